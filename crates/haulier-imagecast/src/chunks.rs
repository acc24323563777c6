//! Bytes of which nobody knows how many there will be, over a socket that goes on to be used: chunks,
//! each led by its length, and an empty one at the end.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use haulier_sys::wait::Wait;
use rustix::net::RecvFlags;

use crate::control;

/// Largest chunk that is sent.
const MOST: usize = 1 << 20;

/// Sends chunks. Without [`ChunkWriter::finish`] the other side knows that there should be more.
#[derive(Debug)]
pub(crate) struct ChunkWriter<'a> {
    socket: &'a OwnedFd,
    wait: &'a Wait,
}

impl<'a> ChunkWriter<'a> {
    pub(crate) fn new(socket: &'a OwnedFd, wait: &'a Wait) -> ChunkWriter<'a> {
        ChunkWriter { socket, wait }
    }

    /// Says that there is no more.
    pub(crate) fn finish(self) -> io::Result<()> {
        control::send_all(self.socket, &0_u32.to_le_bytes(), self.wait)
    }
}

impl Write for ChunkWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(MOST)];
        if !chunk.is_empty() {
            let length = (chunk.len() as u32).to_le_bytes();
            control::send_all(self.socket, &length, self.wait)?;
            control::send_all(self.socket, chunk, self.wait)?;
        }
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Receives them, to the end of the last and no further.
#[derive(Debug)]
pub(crate) struct ChunkReader<'a> {
    socket: &'a OwnedFd,
    wait: &'a Wait,
    /// Of the chunk that is being read.
    left: usize,
    ended: bool,
}

impl<'a> ChunkReader<'a> {
    pub(crate) fn new(socket: &'a OwnedFd, wait: &'a Wait) -> ChunkReader<'a> {
        ChunkReader {
            socket,
            wait,
            left: 0,
            ended: false,
        }
    }

    fn some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match control::receive_some(self.socket, buffer, RecvFlags::empty(), self.wait)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }
}

impl Read for ChunkReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            let mut length = [0; 4];
            let mut filled = 0;
            while filled < length.len() {
                filled += self.some(&mut length[filled..])?;
            }
            self.left = u32::from_le_bytes(length) as usize;
            if self.left == 0 {
                self.ended = true;
                return Ok(0);
            }
        }
        let room = buffer.len().min(self.left);
        let count = self.some(&mut buffer[..room])?;
        self.left -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn pair() -> [OwnedFd; 2] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        [ours, theirs].map(|socket| {
            socket.set_nonblocking(true).unwrap();
            socket.into()
        })
    }

    fn wait() -> Wait {
        Wait::uncancellable(Duration::from_secs(10))
    }

    #[test]
    fn chunks_end_where_they_end() {
        let [ours, theirs] = pair();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
        let bytes = sent.clone();
        let sender = thread::spawn(move || {
            let wait = wait();
            let mut chunks = ChunkWriter::new(&ours, &wait);
            chunks.write_all(&bytes).unwrap();
            chunks.finish().unwrap();
            control::send(&ours, &"and now something else", &wait).unwrap();
            ours
        });
        let wait = wait();
        let mut received = Vec::new();
        let mut chunks = ChunkReader::new(&theirs, &wait);
        chunks.read_to_end(&mut received).unwrap();
        assert!(received == sent);
        let after: String = control::receive(&theirs, &wait).unwrap();
        assert_eq!(after, "and now something else");
        drop(sender.join().unwrap());
    }

    #[test]
    fn chunks_without_an_end_are_an_error() {
        for bytes in [&[][..], &[5, 0], &[5, 0, 0, 0, 1, 2], &[1, 0, 0, 0, 1]] {
            let [ours, theirs] = pair();
            let wait = wait();
            control::send_all(&ours, bytes, &wait).unwrap();
            drop(ours);
            let read = ChunkReader::new(&theirs, &wait).read_to_end(&mut Vec::new());
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
