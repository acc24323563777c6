//! Socket calls rustix lacks: passing descriptors, TCP repair mode.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// Leave repair mode and probe the peer's window (`TCP_REPAIR_OFF`, include/uapi/linux/tcp.h).
const TCP_REPAIR_OFF: libc::c_int = 0;
const TCP_REPAIR_ON: libc::c_int = 1;

/// Whether a TCP socket is in repair mode: it then sends nothing and closes without a word.
///
/// # Errors
/// What `getsockopt(2)` says: `PermissionDenied` without `CAP_NET_ADMIN` is not among them
/// (reading needs no right), `ENOPROTOOPT` or `EOPNOTSUPP` is, for another kind of socket.
pub fn tcp_repair(socket: impl AsFd) -> io::Result<bool> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call; value and length are live, and length
    // says how large value is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(value != 0)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes a TCP socket out of repair mode; the kernel probes the peer's window at once.
///
/// The kernel clears `SO_REUSEADDR` on the way (it forces it on in repair mode and does not
/// remember what it was): who needs it sets it again. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn end_tcp_repair(socket: impl AsFd) -> io::Result<()> {
    set_tcp_repair(socket, TCP_REPAIR_OFF)
}

/// Puts a TCP socket into repair mode. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// What `setsockopt(2)` says: `PermissionDenied` also for a socket that listens.
pub fn begin_tcp_repair(socket: impl AsFd) -> io::Result<()> {
    set_tcp_repair(socket, TCP_REPAIR_ON)
}

fn set_tcp_repair(socket: impl AsFd, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call; the option value is a live c_int of
    // the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
