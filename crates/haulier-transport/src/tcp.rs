//! Connections over plain TCP.
//!
//! Nothing is encrypted or authenticated here: whoever can connect can hand the destination a
//! process to run as root. For networks where that is acceptable.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt;

use crate::channel::Channel;
use crate::error::TransportError;
use crate::wait::{Cancel, Wait, WaitError};

/// How long a server waits for its address: one that was killed keeps it until the kernel has taken
/// its memory apart, which at several GiB takes a second or more.
const BIND_TIME: Duration = Duration::from_secs(5);
const BIND_PAUSE: Duration = Duration::from_millis(10);

/// How long a connection may be dead before it counts as broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkTime(Duration);

impl Default for LinkTime {
    /// For a LAN.
    fn default() -> LinkTime {
        LinkTime(Duration::from_secs(20))
    }
}

impl LinkTime {
    /// At least 4 s, since the kernel counts a quarter of it in whole seconds.
    pub fn new(time: Duration) -> LinkTime {
        LinkTime(time.max(Duration::from_secs(4)))
    }

    /// The whole of it.
    pub fn whole(self) -> Duration {
        self.0
    }

    /// How long one attempt to connect again may take, and after what silence the kernel begins to
    /// probe.
    pub fn attempt(self) -> Duration {
        self.0 / 4
    }

    /// Has the kernel end a connection by it. Those made here have the default.
    ///
    /// # Errors
    /// If it is not a TCP connection.
    pub fn apply(self, channel: &Channel) -> io::Result<()> {
        self.apply_to(channel.socket())
    }

    fn apply_to(self, socket: impl AsFd) -> io::Result<()> {
        let socket = socket.as_fd();
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, self.attempt())?;
        sockopt::set_tcp_keepintvl(socket, self.attempt())?;
        sockopt::set_tcp_keepcnt(socket, 3)?;
        let millis = u32::try_from(self.0.as_millis()).unwrap_or(u32::MAX);
        // Unacknowledged data is given up by the same time.
        Ok(sockopt::set_tcp_user_timeout(socket, millis)?)
    }
}

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

fn bind_patiently(address: &str, wait: &Wait) -> io::Result<TcpListener> {
    loop {
        match TcpListener::bind(address) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && !wait.is_cancelled()
                    && !wait.remaining().is_zero() =>
            {
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
        Listener::bind_within(address, &Wait::uncancellable(BIND_TIME))
    }

    /// The same, but waits no longer than for that token.
    ///
    /// # Errors
    /// [`TransportError::Listen`].
    pub fn bind_until(address: &str, stop: &Cancel) -> Result<Listener, TransportError> {
        Listener::bind_within(address, &stop.wait(BIND_TIME))
    }

    fn bind_within(address: &str, wait: &Wait) -> Result<Listener, TransportError> {
        let failed = |source| TransportError::Listen {
            address: address.to_owned(),
            source,
        };
        let socket = bind_patiently(address, wait).map_err(failed)?;
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
    LinkTime::default().apply_to(stream)
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
    fn an_address_in_use_is_not_waited_for_by_one_who_is_told_to_stop() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_address().unwrap().to_string();
        let stop = Cancel::new().unwrap();
        stop.cancel();
        let error = Listener::bind_until(&address, &stop).unwrap_err();
        assert!(matches!(error, TransportError::Listen { .. }), "{error}");
    }

    #[test]
    fn the_kernel_knows_how_long_a_connection_may_be_dead() {
        let wait = Wait::uncancellable(Duration::from_secs(5));
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_address().unwrap().to_string();
        let channel = connect(&address, &wait).unwrap();
        let told = |channel: &Channel| {
            let timeout = sockopt::tcp_user_timeout(channel.socket()).unwrap();
            let idle = sockopt::tcp_keepidle(channel.socket()).unwrap();
            (timeout, idle)
        };
        assert_eq!(told(&channel), (20_000, Duration::from_secs(5)));
        let wan = LinkTime::new(Duration::from_secs(90));
        wan.apply(&channel).unwrap();
        assert_eq!(told(&channel).0, 90_000);
        let least = LinkTime::new(Duration::ZERO);
        least.apply(&channel).unwrap();
        assert_eq!(told(&channel), (4_000, Duration::from_secs(1)));
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
