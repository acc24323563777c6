use std::io;

use haulier_sys::pidfd::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use haulier_sys::socket::{end_tcp_repair, tcp_repair};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_reuseaddr, socket_domain, socket_protocol, socket_type};
use rustix::net::{AddressFamily, SocketType, ipproto};
use rustix::process::Pid;

use super::Error;
use super::connections::descriptors;

/// Takes every TCP socket of a process out of repair mode, in which a CRIU that was killed
/// leaves them: they send nothing, and closing one tells its peer nothing. Returns how many
/// there were.
///
/// `SO_REUSEADDR` is set on them: leaving repair mode clears it, what it was cannot be found
/// out any more, and a server that had it could not start again without it.
///
/// # Errors
/// What opening the process or its descriptors says; the rest of the sockets is done all the
/// same, and the first error returned.
pub fn end_repair_of(pid: i32) -> io::Result<usize> {
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut ended = 0;
    let mut failure = None;
    let sockets = descriptors(pid).map_err(|error| match error {
        Error::Proc { path, source } => {
            io::Error::new(source.kind(), format!("{}: {source}", path.display()))
        }
        error => io::Error::other(error),
    })?;
    for (number, _) in sockets {
        let result = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
            // Closed since.
            Err(Errno::BADF) => Ok(false),
            socket => socket.map_err(io::Error::from).and_then(end_repair),
        };
        match result {
            Ok(true) => ended += 1,
            Ok(false) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(ended),
    }
}

fn end_repair(socket: std::os::fd::OwnedFd) -> io::Result<bool> {
    let internet = matches!(
        socket_domain(&socket)?,
        AddressFamily::INET | AddressFamily::INET6
    );
    let tcp = socket_type(&socket)? == SocketType::STREAM
        && socket_protocol(&socket)? == Some(ipproto::TCP);
    if !(internet && tcp && tcp_repair(&socket)?) {
        return Ok(false);
    }
    end_tcp_repair(&socket)?;
    set_socket_reuseaddr(&socket, true)?;
    Ok(true)
}
