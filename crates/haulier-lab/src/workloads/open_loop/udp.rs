//! One UDP socket. Answers carry the number of their request, and may come in any order.

use super::report::SeenByOne;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::Duration;

pub(super) struct Client {
    index: usize,
    socket: UdpSocket,
}

impl Client {
    pub(super) fn new(index: usize, socket: UdpSocket) -> Client {
        Client { index, socket }
    }

    /// Sends until `due` requests are sent. One that the kernel does not take is sent at the next
    /// turn: this is about what gets lost behind the client.
    pub(super) fn send(&mut self, due: u64, seen: &mut SeenByOne) {
        while seen.sent < due {
            let text = format!("{:015x} {:015x}\n", self.index, seen.sent);
            match self.socket.send(text.as_bytes()) {
                Ok(_) => seen.sent += 1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // For example the refusal of an earlier one, which the kernel reports here.
                Err(error) => return seen.error(format!("send: {error}")),
            }
        }
    }

    /// Takes what has come; `wait` tells how long ago a request was due. True: there is no end.
    pub(super) fn receive(&mut self, seen: &mut SeenByOne, wait: impl Fn(u64) -> Duration) -> bool {
        let mut buffer = [0; 64];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(count) => match self.number(buffer.get(..count).unwrap_or_default()) {
                    Some(number) => seen.answer(number, wait(number)),
                    None => seen.error("an answer to nothing that was asked".into()),
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => seen.error(format!("receive: {error}")),
            }
        }
    }

    fn number(&self, answer: &[u8]) -> Option<u64> {
        let text = std::str::from_utf8(answer).ok()?.strip_suffix('\n')?;
        let (index, number) = text.split_once(' ')?;
        let index = usize::from_str_radix(index, 16).ok()?;
        let number = u64::from_str_radix(number, 16).ok()?;
        (index == self.index).then_some(number)
    }
}
