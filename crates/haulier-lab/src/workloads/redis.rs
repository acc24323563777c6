//! One connection to a Redis server: the part of its protocol (RESP2) that the checks need.

use crate::host::wait_until;
use crate::{Error, Host, Process, Result};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Longest value accepted from a server.
const MAX_VALUE: usize = 64 * 1024 * 1024;

/// How often a silent connection is looked at.
const GLANCE: Duration = Duration::from_millis(50);

/// Starts `redis-server` on a host so that it can be migrated (session and cgroup `redis` of its
/// own, null streams, nothing on disk) and waits until it answers. It listens on all addresses of
/// the host, those added later included.
///
/// # Errors
/// If it cannot be started or does not answer within 20 seconds.
pub fn start_redis(host: &Host, port: u16) -> Result<Process> {
    let port_text = port.to_string();
    let process = host
        .command("redis-server")
        .args([
            "--port",
            &port_text,
            "--bind",
            "0.0.0.0",
            "::",
            "--protected-mode",
            "no",
        ])
        .args([
            "--save",
            "",
            "--appendonly",
            "no",
            "--logfile",
            "",
            "--dir",
            "/",
        ])
        .setsid()
        .cgroup("redis")
        .spawn()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let answers = || {
        let mut connection = Connection::open(address, Duration::from_secs(1))?;
        connection.ask(&[b"PING"])
    };
    wait_until(
        Duration::from_secs(20),
        || format!("answer of redis-server on {}", host.name()),
        || host.in_network(answers).is_ok_and(|answer| answer.is_ok()),
    )?;
    Ok(process)
}

/// What a server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Simple(String),
    Integer(i64),
    /// `None` for a key that is not there.
    Bulk(Option<Vec<u8>>),
}

pub(crate) struct Connection {
    server: SocketAddr,
    stream: TcpStream,
    /// Received and not used yet, from `used` on.
    received: Vec<u8>,
    used: usize,
    /// How long an answer may take.
    patience: Duration,
}

impl Connection {
    pub(crate) fn open(server: SocketAddr, patience: Duration) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&server, patience)
            .and_then(|stream| {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(GLANCE))?;
                stream.set_write_timeout(Some(patience))?;
                Ok(stream)
            })
            .map_err(|error| failed(server, "connect", &error))?;
        Ok(Connection {
            server,
            stream,
            received: Vec::new(),
            used: 0,
            patience,
        })
    }

    /// Sends one command and waits for its answer.
    pub(crate) fn ask(&mut self, command: &[&[u8]]) -> Result<Answer> {
        let mut bytes = Vec::new();
        encode(command, &mut bytes);
        self.send(&bytes)?;
        self.answer()
    }

    /// Sends commands already encoded; as many answers follow.
    pub(crate) fn send(&mut self, commands: &[u8]) -> Result<()> {
        self.stream
            .write_all(commands)
            .map_err(|error| failed(self.server, "send", &error))
    }

    /// The next answer; one that says error is an error.
    pub(crate) fn answer(&mut self) -> Result<Answer> {
        let until = Instant::now() + self.patience;
        let line = self.line(until)?;
        let (kind, text) = line.split_at_checked(1).unwrap_or_default();
        match kind {
            "+" => Ok(Answer::Simple(text.to_owned())),
            "-" => Err(self.wrong(format!("answered {text}"))),
            ":" => match text.parse() {
                Ok(number) => Ok(Answer::Integer(number)),
                Err(_) => Err(self.wrong(format!("answered `{line}`, which is no number"))),
            },
            "$" if text == "-1" => Ok(Answer::Bulk(None)),
            "$" => match text.parse::<usize>() {
                Ok(length) if length <= MAX_VALUE => {
                    let mut value = self.bytes(length + 2, until)?;
                    value.truncate(length);
                    Ok(Answer::Bulk(Some(value)))
                }
                _ => Err(self.wrong(format!("answered `{line}`, which is no length"))),
            },
            _ => Err(self.wrong(format!("answered `{line}`, which is not RESP2"))),
        }
    }

    pub(crate) fn wrong(&self, problem: String) -> Error {
        Error::Answer {
            server: self.server,
            problem,
        }
    }

    fn line(&mut self, until: Instant) -> Result<String> {
        let mut searched = self.used;
        loop {
            let unread = self.received.get(searched..).unwrap_or_default();
            if let Some(end) = unread.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.bytes(searched + end + 2 - self.used, until)?;
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            if unread.len() > 64 * 1024 {
                return Err(self.wrong("answered an endless line".into()));
            }
            searched = self.received.len().saturating_sub(1).max(self.used);
            let consumed = self.used;
            self.receive(until)?;
            searched -= consumed - self.used;
        }
    }

    fn bytes(&mut self, count: usize, until: Instant) -> Result<Vec<u8>> {
        loop {
            if let Some(bytes) = self.received.get(self.used..self.used + count) {
                let bytes = bytes.to_vec();
                self.used += count;
                return Ok(bytes);
            }
            self.receive(until)?;
        }
    }

    /// Receives something, forgetting what has been used.
    fn receive(&mut self, until: Instant) -> Result<()> {
        self.received.drain(..self.used);
        self.used = 0;
        let mut buffer = [0; 64 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(self.wrong("closed the connection".into())),
                Ok(count) => {
                    self.received.extend(buffer.iter().take(count));
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if Instant::now() >= until {
                        let patience = self.patience;
                        return Err(self.wrong(format!("did not answer within {patience:?}")));
                    }
                }
                Err(error) => return Err(failed(self.server, "receive", &error)),
            }
        }
    }
}

/// Appends a command in RESP2.
pub(crate) fn encode(command: &[&[u8]], bytes: &mut Vec<u8>) {
    bytes.extend(format!("*{}\r\n", command.len()).bytes());
    for word in command {
        bytes.extend(format!("${}\r\n", word.len()).bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
}

fn failed(server: SocketAddr, verb: &str, error: &std::io::Error) -> Error {
    Error::Answer {
        server,
        problem: format!("{verb}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    /// A server that sends `pieces` one by one, whatever it is asked.
    fn scripted(pieces: &'static [&'static [u8]]) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            for piece in pieces {
                stream.write_all(piece).unwrap();
                thread::sleep(Duration::from_millis(2));
            }
        });
        Connection::open(server, Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn answers_may_come_in_any_pieces() {
        let mut connection = scripted(&[
            b"+O",
            b"K\r",
            b"\n:4",
            b"2\r\n$5\r\nhe",
            b"l\r\n\r",
            b"\n$-1\r\n+x\r\n",
        ]);
        assert_eq!(connection.answer().unwrap(), Answer::Simple("OK".into()));
        assert_eq!(connection.answer().unwrap(), Answer::Integer(42));
        assert_eq!(
            connection.answer().unwrap(),
            Answer::Bulk(Some(b"hel\r\n".to_vec()))
        );
        assert_eq!(connection.answer().unwrap(), Answer::Bulk(None));
        assert_eq!(connection.answer().unwrap(), Answer::Simple("x".into()));
        let closed = connection.answer().unwrap_err().to_string();
        assert!(closed.ends_with("closed the connection"), "{closed}");
    }

    #[test]
    fn refuses_lengths_without_measure() {
        let mut connection = scripted(&[b"$99999999999\r\n"]);
        let error = connection.answer().unwrap_err().to_string();
        assert!(error.contains("is no length"), "{error}");
    }
}
