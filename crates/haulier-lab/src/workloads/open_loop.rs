//! Clients that send at fixed times, whether answers come or not, and time every answer from when
//! its request was due.
//!
//! A client that waits for each answer sends nothing while a server stands still, and so loses
//! nothing then; these show what many independent users would see. TCP and UDP clients all live on
//! one thread, which wakes every millisecond or less.

mod clock;
mod report;
mod tcp;
mod udp;

use super::echo::widen;
use crate::{Error, Result};
use clock::Clock;
use report::Seen;
pub use report::{ClientReport, Kind, OpenLoopReport, Summary};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long to wait for a connection at the start.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the last answers have to come, after the last request.
const GRACE: Duration = Duration::from_secs(2);

/// What a server understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// It sends back every byte: the `echo` workload.
    #[default]
    Echo,
    /// It answers Redis's `ECHO`. Not over UDP.
    Redis,
}

/// What the clients do.
#[derive(Debug, Clone, Copy)]
pub struct OpenLoop {
    /// Where the server is.
    pub server: SocketAddr,
    /// How many TCP connections.
    pub tcp: usize,
    /// How many UDP sockets.
    pub udp: usize,
    /// Each client's time from one request to the next. The clients are spread over it evenly, a
    /// millisecond apart at least.
    pub interval: Duration,
    /// What is sent over TCP.
    pub protocol: Protocol,
}

/// Running clients.
#[derive(Debug)]
pub struct OpenLoopClient {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

impl Shared {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenLoopClient {
    /// Connects all and starts. The sockets belong to the network namespace of the caller's thread.
    ///
    /// # Errors
    /// If a socket cannot be opened or a connection not be made within 10 seconds.
    pub fn start(config: OpenLoop) -> Result<OpenLoopClient> {
        let mut sockets = Vec::new();
        for _ in 0..config.tcp {
            sockets.push(Socket::Tcp(connect(config.server)?));
        }
        for _ in 0..config.udp {
            sockets.push(Socket::Udp(bind(config.server)?));
        }
        let clock = Clock::new(Instant::now(), config.interval, sockets.len());
        let kinds = sockets.iter().map(Socket::kind);
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            seen: Mutex::new(Seen::new(clock, kinds)),
        });
        let mut worker = Worker::new(sockets, clock, config.protocol, Arc::clone(&shared))?;
        let worker = thread::Builder::new()
            .name("open-loop".into())
            .spawn(move || worker.run())
            .map_err(Error::system("start a thread"))?;
        Ok(OpenLoopClient {
            shared,
            worker: Some(worker),
        })
    }

    /// What they have seen so far. Requests without an answer yet count as lost.
    pub fn snapshot(&self) -> OpenLoopReport {
        self.shared.seen().report(Instant::now())
    }

    /// Stops sending, waits up to two seconds for the last answers, and returns what they saw.
    pub fn stop(mut self) -> OpenLoopReport {
        self.end();
        // What is not there by now is lost, and was waited for until now.
        self.snapshot()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            // It does not panic; and if it did, the missing answers would tell.
            let _ = worker.join();
        }
    }
}

impl Drop for OpenLoopClient {
    fn drop(&mut self) {
        self.end();
    }
}

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Socket {
    fn kind(&self) -> Kind {
        match self {
            Socket::Tcp(_) => Kind::Tcp,
            Socket::Udp(_) => Kind::Udp,
        }
    }
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&server, PATIENCE)
        .and_then(|stream| {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        })
        .map_err(|error| Error::Answer {
            server,
            problem: format!("connect: {error}"),
        })
}

fn bind(server: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if server.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any)
        .and_then(|socket| {
            socket.connect(server)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
        .map_err(Error::system("open a UDP socket"))?;
    widen(&socket)?;
    Ok(socket)
}

/// A client, on its socket.
enum Client {
    Tcp(tcp::Client),
    Udp(udp::Client),
}

struct Worker {
    clients: Vec<Client>,
    clock: Clock,
    poll: OwnedFd,
    shared: Arc<Shared>,
}

impl Worker {
    fn new(
        sockets: Vec<Socket>,
        clock: Clock,
        protocol: Protocol,
        shared: Arc<Shared>,
    ) -> Result<Worker> {
        let poll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::system("create an epoll"))?;
        let mut clients = Vec::new();
        for (index, socket) in sockets.into_iter().enumerate() {
            let data = epoll::EventData::new_u64(index as u64);
            let added = match &socket {
                Socket::Tcp(stream) => epoll::add(&poll, stream, data, epoll::EventFlags::IN),
                Socket::Udp(socket) => epoll::add(&poll, socket, data, epoll::EventFlags::IN),
            };
            added.map_err(Error::system("watch a socket"))?;
            clients.push(match socket {
                Socket::Tcp(stream) => Client::Tcp(tcp::Client::new(index, stream, protocol)),
                Socket::Udp(socket) => Client::Udp(udp::Client::new(index, socket)),
            });
        }
        Ok(Worker {
            clients,
            clock,
            poll,
            shared,
        })
    }

    fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.send_due(now);
            self.receive(self.clock.next_tick(now));
        }
        let until = Instant::now() + GRACE;
        while Instant::now() < until && !self.shared.seen().is_complete() {
            self.receive((Instant::now() + Duration::from_millis(20)).min(until));
        }
        self.shared.seen().end(Instant::now());
    }

    /// Sends what is due by `now`, however late it is.
    fn send_due(&mut self, now: Instant) {
        let mut seen = self.shared.seen();
        for (index, client) in self.clients.iter_mut().enumerate() {
            let due = self.clock.due_by(index, now);
            let Some(its) = seen.client(index) else {
                continue;
            };
            match client {
                Client::Tcp(client) => client.send(due, its),
                Client::Udp(client) => client.send(due, its),
            }
        }
    }

    /// Takes answers until `until`.
    fn receive(&mut self, until: Instant) {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(1),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut events = Vec::with_capacity(256);
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.poll, room, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                // Nothing is heard any more, and everything counts as lost.
                Err(_) => return thread::sleep(left),
            }
            let now = Instant::now();
            if !events.is_empty() {
                self.take(&events, now);
            }
            if now >= until {
                return;
            }
        }
    }

    fn take(&mut self, events: &[epoll::Event], now: Instant) {
        let mut seen = self.shared.seen();
        for event in events {
            let index = event.data.u64() as usize;
            let (Some(client), Some(its)) = (self.clients.get_mut(index), seen.client(index))
            else {
                continue;
            };
            let timer = |number: u64| now.saturating_duration_since(self.clock.due(index, number));
            let goes_on = match client {
                Client::Tcp(client) => client.receive(its, timer),
                Client::Udp(client) => client.receive(its, timer),
            };
            if let (false, Client::Tcp(client)) = (goes_on, client) {
                // Else its end would be reported without end.
                let _ = epoll::delete(&self.poll, client.stream());
            }
        }
    }
}

#[cfg(test)]
mod tests;
