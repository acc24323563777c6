use std::io;
use std::os::fd::OwnedFd;

use haulier_sys::pidfd::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use haulier_sys::socket::{begin_tcp_repair, end_tcp_repair, tcp_repair};
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
    each_tcp_socket(pid, |socket| {
        if !tcp_repair(socket)? {
            return Ok(false);
        }
        end_tcp_repair(socket)?;
        set_socket_reuseaddr(socket, true)?;
        Ok(true)
    })
}

/// Puts every connection of a process into repair mode, so that its peers hear nothing of it when
/// the process is killed, and nothing of it stays in the kernel: another copy of the process may go
/// on with them, here or elsewhere. Returns how many there were.
///
/// # Errors
/// As [`end_repair_of`].
pub fn begin_repair_of(pid: i32) -> io::Result<usize> {
    each_tcp_socket(pid, |socket| match begin_tcp_repair(socket) {
        Ok(()) => Ok(true),
        // It listens: nobody is told of its end.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
        Err(error) => Err(error),
    })
}

/// Does something to each TCP socket of a process; returns for how many it was done.
fn each_tcp_socket(pid: i32, act: impl Fn(&OwnedFd) -> io::Result<bool>) -> io::Result<usize> {
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut done = 0;
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
            Err(error) => Err(error.into()),
            Ok(socket) => match is_tcp(&socket) {
                Ok(true) => act(&socket),
                other => other,
            },
        };
        match result {
            Ok(true) => done += 1,
            Ok(false) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(done),
    }
}

fn is_tcp(socket: &OwnedFd) -> io::Result<bool> {
    let internet = matches!(
        socket_domain(socket)?,
        AddressFamily::INET | AddressFamily::INET6
    );
    Ok(internet
        && socket_type(socket)? == SocketType::STREAM
        && socket_protocol(socket)? == Some(ipproto::TCP))
}
