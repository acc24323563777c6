//! Socket calls rustix lacks: passing descriptors, TCP repair mode.

use std::io;
use std::os::fd::AsFd;

use crate::option;

/// Leave repair mode and probe the peer's window (`TCP_REPAIR_OFF`, include/uapi/linux/tcp.h).
const TCP_REPAIR_OFF: libc::c_int = 0;
const TCP_REPAIR_ON: libc::c_int = 1;

/// Whether a TCP socket is in repair mode: it then sends nothing and closes without a word.
///
/// # Errors
/// What `getsockopt(2)` says: `PermissionDenied` without `CAP_NET_ADMIN` is not among them
/// (reading needs no right), `ENOPROTOOPT` or `EOPNOTSUPP` is, for another kind of socket.
pub fn tcp_repair(socket: impl AsFd) -> io::Result<bool> {
    Ok(option::get(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR)? != 0)
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
    option::set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, value)
}
