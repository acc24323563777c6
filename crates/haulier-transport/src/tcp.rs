//! Connections over plain TCP.
//!
//! Nothing is encrypted or authenticated here: whoever can connect can hand the destination a
//! process to run as root. For networks where that is acceptable.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::channel::Channel;
use crate::error::TransportError;
use crate::wait::{Wait, WaitError};

/// How long a server waits for its address: one that was killed keeps it until the kernel has taken
/// its memory apart, which at several GiB takes a second or more.
const BIND_TIME: Duration = Duration::from_secs(5);
const BIND_PAUSE: Duration = Duration::from_millis(10);
/// How long unacknowledged data may wait before the kernel gives the connection up.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Connects to `address` (`host:port`), trying each address the name has.
///
/// # Errors
/// [`TransportError::Connect`] with the reason of the last address tried.
pub fn connect(address: &str, wait: &Wait) -> Result<Channel, TransportError> {
    let failed = |source| TransportError::Connect {
        address: address.to_owned(),
        source,
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for candidate in address.to_socket_addrs().map_err(failed)? {
        if wait.is_cancelled() {
            return Err(TransportError::Cancelled {
                doing: "connecting",
            });
        }
        match dial(candidate, wait) {
            Ok(stream) => {
                tune(&stream).map_err(failed)?;
                return Channel::new(stream, address).map_err(failed);
            }
            Err(error) => last = error,
        }
    }
    if wait.is_cancelled() {
        return Err(TransportError::Cancelled {
            doing: "connecting",
        });
    }
    Err(failed(last))
}

/// The local address of a TCP connection, `None` for a socket of another kind.
pub fn local_address(channel: &Channel) -> Option<SocketAddr> {
    let address = rustix::net::getsockname(channel.socket()).ok()?;
    SocketAddr::try_from(address).ok()
}

/// The peer's address of a TCP connection, `None` for a socket of another kind.
pub fn peer_address(channel: &Channel) -> Option<SocketAddr> {
    let address = rustix::net::getpeername(channel.socket()).ok()??;
    SocketAddr::try_from(address).ok()
}

/// A port that accepts connections.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

fn bind_patiently(address: &str) -> io::Result<TcpListener> {
    let deadline = Instant::now() + BIND_TIME;
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                thread::sleep(BIND_PAUSE);
            }
            result => return result,
        }
    }
}

impl Listener {
    /// Listens on `address` (`host:port`; port 0 takes a free one).
    /// Waits some seconds for an address that is in use.
    ///
    /// # Errors
    /// [`TransportError::Listen`].
    pub fn bind(address: &str) -> Result<Listener, TransportError> {
        let failed = |source| TransportError::Listen {
            address: address.to_owned(),
            source,
        };
        let socket = bind_patiently(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Listener { socket })
    }

    /// The address it listens on.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The next connection.
    ///
    /// # Errors
    /// When the wait ends or the listening socket fails; a connection that was gone before it was
    /// accepted is not an error.
    pub fn accept(&self, wait: &Wait) -> Result<Channel, WaitError> {
        loop {
            wait.readable(&self.socket)?;
            match self.socket.accept() {
                Ok((stream, peer)) => {
                    let channel =
                        tune(&stream).and_then(|()| Channel::new(stream, peer.to_string()));
                    if let Ok(channel) = channel {
                        return Ok(channel);
                    }
                }
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(WaitError::Io(error)),
            }
        }
    }
}

/// Errors of `accept(2)` that concern the one connection, not the listening socket.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

/// Connects without blocking, so that the wait's cancellation is honoured while the peer is silent.
fn dial(address: SocketAddr, wait: &Wait) -> io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(rustix::io::Errno::INPROGRESS) => {
            wait.writable(socket.as_fd()).map_err(|error| match error {
                WaitError::Deadline => io::Error::from(io::ErrorKind::TimedOut),
                WaitError::Cancelled => io::Error::from(io::ErrorKind::Interrupted),
                WaitError::Io(error) => error,
            })?;
            sockopt::socket_error(&socket)?.map_err(io::Error::from)?;
        }
        Err(errno) => return Err(errno.into()),
    }
    Ok(TcpStream::from(socket))
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, USER_TIMEOUT.as_millis() as u32)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use haulier_proto::frame::Kind;

    use super::*;

    #[test]
    fn a_closed_port_is_named_with_its_reason() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = connect(&address, &Wait::uncancellable(Duration::from_secs(5))).unwrap_err();
        let TransportError::Connect {
            address: named,
            source,
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(named, address);
        assert_eq!(source.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_frame_crosses_tcp() {
        let wait = Wait::uncancellable(Duration::from_secs(5));
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_address().unwrap().to_string();
        let mut client = connect(&address, &wait).unwrap();
        let mut server = listener.accept(&wait).unwrap();
        client.send(Kind::ImagesDone, &[b"abc"], &wait).unwrap();
        assert_eq!(server.receive(&wait).unwrap().1, b"abc");
        assert_eq!(local_address(&client), peer_address(&server));
    }
}
