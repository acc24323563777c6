//! Sockets in a directory, for programs of the same host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

/// How long to wait when the system is out of descriptors or memory.
const RETRY: Duration = Duration::from_millis(50);
/// Longest path that fits an address of a socket.
const LONGEST: usize = 107;

/// A socket in a directory cannot be had.
#[derive(Debug, Error)]
#[error("cannot {doing} {path}")]
pub struct LocalError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A listening socket in a directory. The file goes with it.
#[derive(Debug)]
pub(crate) struct LocalListener {
    socket: OwnedFd,
    directory: OwnedFd,
    name: String,
}

impl AsFd for LocalListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl LocalListener {
    /// Listens. A socket that a dead program left there is replaced, one of a living one is not.
    pub(crate) fn bind(directory: &Path, name: &str) -> Result<LocalListener, LocalError> {
        let path = directory.join(name);
        let failed = |doing, source: io::Error| LocalError {
            doing,
            path: path.clone(),
            source,
        };
        if path.as_os_str().len() > LONGEST {
            // Ours could be reached another way, but CRIU cuts the path without a word.
            let why = format!("the path is longer than the {LONGEST} bytes that CRIU can use");
            let why = io::Error::new(io::ErrorKind::InvalidInput, why);
            return Err(failed("listen on", why));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(directory, flags, Mode::empty())
            .map_err(|e| failed("open the directory of", e.into()))?;
        let bind = |socket: &OwnedFd| {
            let address = address(&folder, name)?;
            rustix::net::bind(socket, &address)
        };
        let socket = socket().map_err(|e| failed("make a socket for", e.into()))?;
        if let Err(errno) = bind(&socket) {
            if errno != Errno::ADDRINUSE {
                return Err(failed("bind", errno.into()));
            }
            if connect(directory, name).is_ok() {
                let why = io::Error::new(io::ErrorKind::AddrInUse, "another program listens there");
                return Err(failed("listen on", why));
            }
            rustix::fs::unlinkat(&folder, name, AtFlags::empty())
                .map_err(|e| failed("replace", e.into()))?;
            bind(&socket).map_err(|e| failed("bind", e.into()))?;
        }
        let this = LocalListener {
            socket,
            directory: folder,
            name: name.to_owned(),
        };
        rustix::net::listen(&this.socket, 64).map_err(|e| failed("listen on", e.into()))?;
        Ok(this)
    }

    /// The next connection, or `None` if there is none. Never blocks.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.socket, flags) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) if passes(&errno.into()) => {
                // It stays readable: not to be asked again at once.
                thread::sleep(RETRY);
                Ok(None)
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Whether the system was out of something that others may give back.
pub(crate) fn passes(error: &io::Error) -> bool {
    let passing = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    error
        .raw_os_error()
        .is_some_and(|code| passing.iter().any(|errno| errno.raw_os_error() == code))
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        // Gone already if the directory was removed first.
        let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
    }
}

/// Connects to a socket in a directory; the connection does not block.
pub(crate) fn connect(directory: &Path, name: &str) -> Result<OwnedFd, LocalError> {
    let attempt = || -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(directory, flags, Mode::empty())?;
        let socket = socket()?;
        rustix::net::connect(&socket, &address(&folder, name)?)?;
        Ok(socket)
    };
    attempt().map_err(|errno| LocalError {
        doing: "connect to",
        path: directory.join(name),
        source: errno.into(),
    })
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// By way of the open directory, whatever its path is by now.
fn address(directory: &OwnedFd, name: &str) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_left_over_socket_is_replaced_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let left = std::os::unix::net::UnixListener::bind(directory.path().join("s")).unwrap();
        drop(left);
        let listener = LocalListener::bind(directory.path(), "s").unwrap();
        assert!(listener.accept().unwrap().is_none());
        let error = LocalListener::bind(directory.path(), "s").unwrap_err();
        assert!(error.to_string().starts_with("cannot listen on"), "{error}");
        connect(directory.path(), "s").unwrap();
        drop(listener);
        assert!(connect(directory.path(), "s").is_err());
        assert!(!directory.path().join("s").exists());
    }

    #[test]
    fn a_path_that_criu_would_cut_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(100));
        std::fs::create_dir(&deep).unwrap();
        assert!(LocalListener::bind(&deep, "s").is_err());
    }
}
