//! Options of sockets that are a number.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// What `getsockopt(2)` says.
pub(crate) fn get(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call; value and length are live, and length
    // says how large value is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What options are set to: every value of it is plain bytes.
pub(crate) trait Number: Copy {}

impl Number for libc::c_int {}
impl Number for u64 {}

/// Does what `setsockopt(2)` does.
pub(crate) fn set<N: Number>(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: N,
) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call; the value is a live number of the length
    // given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<N>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
