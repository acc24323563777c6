//! The `echo` workload: one thread that sends back what comes, over TCP and UDP on the same port,
//! beside memory that is rewritten and checked all the while.

use super::threads::{self, Ballast};
use crate::{Error, Result};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;

/// Room for datagrams that come while the server does not run. The server is not to lose any itself.
pub(super) const DATAGRAM_ROOM: usize = 8 << 20;

const LISTENER: u64 = 0;
const DATAGRAMS: u64 = 1;

/// What the workload should do.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// The address of both sockets. Not a wildcard if UDP clients use an address that the host has
    /// beside its first: the answers would come from the first one.
    pub listen: SocketAddr,
    /// Memory beside the server, in MiB. None of it is used for the connections.
    pub memory_mib: usize,
    /// How many pages of it are rewritten each second; `None` for as many as a thread can.
    pub pages_per_second: Option<u64>,
}

/// Serves for ever, or until a page of the memory is not as it should be.
///
/// # Errors
/// If it cannot listen, or if the memory was wrong.
pub fn serve(config: &Config) -> Result<()> {
    let mut server = Server::listen(config.listen)?;
    let ballast =
        (config.memory_mib > 0).then(|| Ballast::start(config.memory_mib, config.pages_per_second));
    loop {
        server.turn()?;
        if ballast.as_ref().is_some_and(Ballast::is_wrong) {
            return Err(threads::wrong_page());
        }
    }
}

struct Server {
    poll: std::os::fd::OwnedFd,
    listener: TcpListener,
    datagrams: UdpSocket,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

struct Connection {
    stream: TcpStream,
    /// What the kernel would not take yet.
    outgoing: Vec<u8>,
}

impl Server {
    fn listen(address: SocketAddr) -> Result<Server> {
        let listener = TcpListener::bind(address).map_err(Error::system("listen"))?;
        let datagrams = UdpSocket::bind(address).map_err(Error::system("bind a UDP socket"))?;
        listener
            .set_nonblocking(true)
            .and_then(|()| datagrams.set_nonblocking(true))
            .map_err(Error::system("set a socket non-blocking"))?;
        widen(&datagrams)?;
        let poll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::system("create an epoll"))?;
        let server = Server {
            poll,
            listener,
            datagrams,
            connections: BTreeMap::new(),
            next: DATAGRAMS + 1,
        };
        server.watch(&server.listener, LISTENER, epoll::EventFlags::IN)?;
        server.watch(&server.datagrams, DATAGRAMS, epoll::EventFlags::IN)?;
        Ok(server)
    }

    fn watch(&self, socket: impl AsFd, number: u64, flags: epoll::EventFlags) -> Result<()> {
        let data = epoll::EventData::new_u64(number);
        epoll::add(&self.poll, socket, data, flags).map_err(Error::system("watch a socket"))
    }

    fn turn(&mut self) -> Result<()> {
        let mut events = Vec::with_capacity(256);
        // A second, so that wrong memory is noticed on a quiet server too.
        let second = rustix::event::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        match epoll::wait(
            &self.poll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&second),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(other) => return Err(Error::system("wait for sockets")(other)),
        }
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept()?,
                DATAGRAMS => self.answer_datagrams(),
                number => self.answer(number),
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> Result<()> {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true))
                .is_err()
            {
                continue;
            }
            let number = self.next;
            self.next += 1;
            self.watch(&stream, number, epoll::EventFlags::IN)?;
            let connection = Connection {
                stream,
                outgoing: Vec::new(),
            };
            self.connections.insert(number, connection);
        }
        Ok(())
    }

    fn answer_datagrams(&self) {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = self.datagrams.recv_from(&mut buffer) {
            // One that cannot be sent is lost, which is what the client is there to see.
            let _ = self
                .datagrams
                .send_to(buffer.get(..length).unwrap_or_default(), from);
        }
    }

    fn answer(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        let waited = !connection.outgoing.is_empty();
        if connection.proceed().is_err() {
            // Closed, and thereby no longer watched.
            self.connections.remove(&number);
            return;
        }
        // Who does not read the answers is not read either.
        let waits = !connection.outgoing.is_empty();
        if waits != waited {
            let flags = if waits {
                epoll::EventFlags::OUT
            } else {
                epoll::EventFlags::IN
            };
            let data = epoll::EventData::new_u64(number);
            if epoll::modify(&self.poll, &connection.stream, data, flags).is_err() {
                self.connections.remove(&number);
            }
        }
    }
}

impl Connection {
    /// Sends what waits, then reads and sends back. An error is the end of the connection.
    fn proceed(&mut self) -> std::io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            while !self.outgoing.is_empty() {
                match self.stream.write(&self.outgoing) {
                    Ok(count) => drop(self.outgoing.drain(..count)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.outgoing.extend(buffer.iter().take(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Gives a socket room for a burst, beyond the machine's limit.
pub(super) fn widen(socket: impl AsFd) -> Result<()> {
    set_socket_recv_buffer_size_force(&socket, DATAGRAM_ROOM)
        .and_then(|()| set_socket_send_buffer_size_force(&socket, DATAGRAM_ROOM))
        .map_err(Error::system("enlarge the buffers of a socket"))
}
