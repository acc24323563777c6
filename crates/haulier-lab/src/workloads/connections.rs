//! The `connections` workload: a server with many TCP connections on one thread, each with state in
//! memory, and the client that checks them.
//!
//! A client's line `text` is answered `CONNECTION SEQUENCE text`: the server's number for the
//! connection and how many lines it has had, both from 1.

use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Longest line, and most that may wait to be sent on one connection.
const MAX_PENDING: usize = 64 * 1024;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves for ever, up to `limit` connections at a time.
///
/// # Errors
/// If it cannot listen.
pub fn serve(address: SocketAddr, limit: usize) -> Result<()> {
    let listener = TcpListener::bind(address).map_err(Error::system("listen"))?;
    listener
        .set_nonblocking(true)
        .map_err(Error::system("set a socket non-blocking"))?;
    let mut connections: Vec<Connection> = Vec::new();
    let mut accepted = 0;
    loop {
        let mut watched: Vec<PollFd<'_>> = connections.iter().map(Connection::watch).collect();
        if connections.len() < limit {
            watched.push(PollFd::new(&listener, PollFlags::IN));
        }
        // Nothing depends on waking up, but a workload that also has a timer is a better test.
        let timeout = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        match poll(&mut watched, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(other) => return Err(Error::system("poll")(other)),
        }
        let ready: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(watched);
        let mut turn = ready.into_iter();
        connections.retain_mut(|connection| {
            if turn.next() == Some(true) {
                connection.proceed().is_ok()
            } else {
                true
            }
        });
        if turn.next() == Some(true) {
            while let Ok((stream, _)) = listener.accept() {
                accepted += 1;
                if stream
                    .set_nonblocking(true)
                    .and_then(|()| stream.set_nodelay(true))
                    .is_ok()
                {
                    connections.push(Connection::new(accepted, stream));
                }
            }
        }
    }
}

/// A connection as the server keeps it.
struct Connection {
    number: u64,
    sequence: u64,
    stream: TcpStream,
    /// The beginning of a line whose end has not come.
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Connection {
    fn new(number: u64, stream: TcpStream) -> Connection {
        Connection {
            number,
            sequence: 0,
            stream,
            incoming: Vec::new(),
            outgoing: Vec::new(),
        }
    }

    fn watch(&self) -> PollFd<'_> {
        // One who does not read the answers is not read either.
        let flags = if self.outgoing.len() > MAX_PENDING {
            PollFlags::OUT
        } else if self.outgoing.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::IN | PollFlags::OUT
        };
        PollFd::new(&self.stream, flags)
    }

    /// Reads, answers, sends. An error is the end of the connection.
    fn proceed(&mut self) -> std::io::Result<()> {
        let mut buffer = [0; 4096];
        while self.outgoing.len() <= MAX_PENDING {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.incoming.extend(buffer.iter().take(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.answer()?;
        }
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> std::io::Result<()> {
        while let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.incoming.drain(..=end).collect();
            self.sequence += 1;
            self.outgoing
                .extend(format!("{} {} ", self.number, self.sequence).bytes());
            self.outgoing.extend(line);
        }
        if self.incoming.len() > MAX_PENDING {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}

/// Many connections to the server, with what each must answer next.
#[derive(Debug)]
pub struct Client {
    server: SocketAddr,
    connections: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    stream: BufReader<TcpStream>,
    /// The server's number for it, once known.
    number: Option<u64>,
    sequence: u64,
    /// The beginning of a line, sent already.
    begun: Option<String>,
}

impl Client {
    /// Opens `count` connections.
    ///
    /// # Errors
    /// If one cannot be opened within 30 seconds.
    pub fn open(server: SocketAddr, count: usize) -> Result<Client> {
        let open = |_| {
            let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            let stream = BufReader::new(stream);
            Ok(Open {
                stream,
                number: None,
                sequence: 0,
                begun: None,
            })
        };
        let connections = (0..count).map(open).collect::<std::io::Result<_>>();
        let connections = connections.map_err(|error: std::io::Error| Error::Answer {
            server,
            problem: format!("connect: {error}"),
        })?;
        Ok(Client {
            server,
            connections,
        })
    }

    /// How many connections there are.
    pub fn count(&self) -> usize {
        self.connections.len()
    }

    /// Sends a line on every connection and checks every answer.
    ///
    /// # Errors
    /// The first connection that is lost, or answers something else than it should.
    pub fn round(&mut self) -> Result<()> {
        self.begin()?;
        self.finish()
    }

    /// Sends the first half of a line on every connection. Until [`Client::finish`] the server
    /// holds it in memory, or the kernel in a queue: what a migration in between must carry along.
    ///
    /// # Errors
    /// The first connection that is lost.
    pub fn begin(&mut self) -> Result<()> {
        for (index, open) in self.connections.iter_mut().enumerate() {
            if open.begun.is_some() {
                continue;
            }
            let half = format!("line {} of connection {index}, ", open.sequence + 1);
            open.stream
                .get_mut()
                .write_all(half.as_bytes())
                .map_err(|error| Error::Answer {
                    server: self.server,
                    problem: format!("connection {index}: send: {error}"),
                })?;
            open.begun = Some(half);
        }
        Ok(())
    }

    /// Sends the other half of what was begun, and checks every answer.
    ///
    /// # Errors
    /// As [`Client::round`].
    pub fn finish(&mut self) -> Result<()> {
        for (index, open) in self.connections.iter_mut().enumerate() {
            if open.begun.is_some() {
                open.stream
                    .get_mut()
                    .write_all(b"its end\n")
                    .map_err(|error| Error::Answer {
                        server: self.server,
                        problem: format!("connection {index}: send: {error}"),
                    })?;
            }
        }
        for (index, open) in self.connections.iter_mut().enumerate() {
            if let Some(half) = open.begun.take() {
                open.expect(&format!("{half}its end"))
                    .map_err(|problem| Error::Answer {
                        server: self.server,
                        problem: format!("connection {index}: {problem}"),
                    })?;
            }
        }
        Ok(())
    }
}

impl Open {
    fn expect(&mut self, text: &str) -> std::result::Result<(), String> {
        let mut line = String::new();
        let received = (&mut self.stream)
            .take(MAX_PENDING as u64)
            .read_line(&mut line);
        match received {
            Ok(0) => return Err("closed by the server".into()),
            Ok(_) => {}
            Err(error) => return Err(format!("receive: {error}")),
        }
        self.sequence += 1;
        let number = line
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        let number = *self.number.get_or_insert(number);
        let expected = format!("{number} {} {text}\n", self.sequence);
        if line == expected {
            return Ok(());
        }
        Err(format!(
            "expected `{}`, got `{}`",
            expected.trim_end(),
            line.trim_end()
        ))
    }
}
