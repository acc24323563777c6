//! One connection. Answers come in the order of the requests.

use super::Protocol;
use super::report::SeenByOne;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

pub(super) struct Client {
    index: usize,
    stream: TcpStream,
    protocol: Protocol,
    /// What the kernel would not take yet.
    outgoing: Vec<u8>,
    /// The beginning of an answer.
    incoming: Vec<u8>,
}

impl Client {
    pub(super) fn new(index: usize, stream: TcpStream, protocol: Protocol) -> Client {
        Client {
            index,
            stream,
            protocol,
            outgoing: Vec::new(),
            incoming: Vec::new(),
        }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends until `due` requests are sent.
    pub(super) fn send(&mut self, due: u64, seen: &mut SeenByOne) {
        if seen.is_broken() {
            return;
        }
        while seen.sent < due {
            let request = self.request(seen.sent);
            self.outgoing.extend(request);
            seen.sent += 1;
        }
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return seen.broken(format!("send: {error}")),
            }
        }
    }

    /// Takes what has come; `wait` tells how long ago a request was due. False if nothing more
    /// will come.
    pub(super) fn receive(&mut self, seen: &mut SeenByOne, wait: impl Fn(u64) -> Duration) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => seen.broken("closed by the server".into()),
                Ok(count) => self.incoming.extend(buffer.iter().take(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => seen.broken(format!("receive: {error}")),
            }
            self.compare(seen, &wait);
            if seen.is_broken() {
                return false;
            }
        }
    }

    fn compare(&mut self, seen: &mut SeenByOne, wait: &impl Fn(u64) -> Duration) {
        let mut used = 0;
        loop {
            let number = seen.next_unanswered();
            let expected = self.answer(number);
            let rest = self.incoming.get(used..).unwrap_or_default();
            let Some(answer) = rest.get(..expected.len()) else {
                break;
            };
            if answer != expected {
                let answer = String::from_utf8_lossy(answer).into_owned();
                seen.broken(format!("answer {number} is {answer:?}"));
                break;
            }
            seen.answer(number, wait(number));
            used += expected.len();
            if seen.is_broken() {
                break;
            }
        }
        self.incoming.drain(..used);
    }

    fn text(&self, number: u64) -> String {
        format!("{:015x} {number:015x}\n", self.index)
    }

    fn request(&self, number: u64) -> Vec<u8> {
        let text = self.text(number);
        match self.protocol {
            Protocol::Echo => text.into_bytes(),
            Protocol::Redis => {
                format!("*2\r\n$4\r\nECHO\r\n${}\r\n{text}\r\n", text.len()).into_bytes()
            }
        }
    }

    fn answer(&self, number: u64) -> Vec<u8> {
        let text = self.text(number);
        match self.protocol {
            Protocol::Echo => text.into_bytes(),
            Protocol::Redis => format!("${}\r\n{text}\r\n", text.len()).into_bytes(),
        }
    }
}
