//! The page server that `criu dump --lazy-pages` becomes: asked for pages of the frozen tasks, told
//! how its work ended.
//!
//! It answers one connection, one request after the other, and nothing is consumed by being read. A
//! request for a page that is not in the dump's lazy runs ends the dump (or hangs it), so only those
//! may be asked for. **The end of the connection is success to it**: the tasks are killed. Whoever
//! wants them to live says something that it does not understand.

use std::io;
use std::mem::size_of;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};

use haulier_sys::wait::{Wait, WaitError};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use thiserror::Error;

use crate::skeleton::PAGE;

/// Commands, as numbered in CRIU's page-xfer.c.
const ADD_F: u32 = 6;
const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
/// The half of a command that is not flags.
const COMMAND: u32 = 0xffff;
/// What no version takes for a command.
const NONSENSE: [u8; 64] = [0xff; 64];

/// The dump does not give what it should.
#[derive(Debug, Error)]
pub enum PageServerError {
    /// The connection broke, or could not be set up: the dump has ended.
    #[error("the connection to CRIU's page server broke; its log says why")]
    Broken(#[source] io::Error),
    /// It did not answer in time.
    #[error("CRIU's page server does not answer")]
    Silent,
    /// The wait was given up.
    #[error("the wait for CRIU's page server was given up")]
    Cancelled,
    /// The answer is to another question.
    #[error("CRIU's page server gave another answer than was due: {0}")]
    Answer(String),
    /// It says that it failed.
    #[error("CRIU's page server ended with status {0}")]
    Status(i32),
}

impl From<WaitError> for PageServerError {
    fn from(error: WaitError) -> PageServerError {
        match error {
            WaitError::Deadline => PageServerError::Silent,
            WaitError::Cancelled => PageServerError::Cancelled,
            WaitError::Io(error) => PageServerError::Broken(error),
        }
    }
}

/// A connection to a dump's page server.
#[derive(Debug)]
pub struct PageServer {
    socket: OwnedFd,
    wide: bool,
}

impl PageServer {
    /// Speaks over this connected socket. `wide`: the dump's CRIU counts pages in 64 bits, see
    /// [`crate::skeleton::LeftBehind`].
    ///
    /// # Errors
    /// [`PageServerError::Broken`].
    pub fn new(socket: OwnedFd, wide: bool) -> Result<PageServer, PageServerError> {
        rustix::io::ioctl_fionbio(&socket, true)
            .map_err(|errno| PageServerError::Broken(errno.into()))?;
        // Each request waits for its answer. A local socket has nothing of the kind.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        Ok(PageServer { socket, wide })
    }

    /// The socket.
    pub fn socket(&self) -> impl AsFd + '_ {
        &self.socket
    }

    /// Fetches pages of a task (by its pid in the images) from an address on, into `pages`, which has
    /// room for so many as are wanted. How many came: one at least, fewer if the run of the dump ends.
    ///
    /// # Errors
    /// See [`PageServerError`].
    pub fn get(
        &mut self,
        task: u32,
        address: u64,
        pages: &mut [u8],
        wait: &Wait,
    ) -> Result<usize, PageServerError> {
        let wanted = pages.len() as u64 / PAGE;
        self.say(GET, wanted, address, task.into(), wait)?;
        let mut header = [0; 32];
        let header = &mut header[..self.header_bytes()];
        self.fill(header, wait)?;
        let [command, count, at, of] = self.decode(header);
        let known = command as u32 & COMMAND == ADD_F;
        if !known || at != address || of != u64::from(task) || count == 0 || count > wanted {
            let what = format!(
                "command {command:#x}, {count} pages at {at:#x} of {of}, to {wanted} pages at \
                 {address:#x} of {task}"
            );
            return Err(PageServerError::Answer(what));
        }
        self.fill(&mut pages[..(count * PAGE) as usize], wait)?;
        Ok(count as usize)
    }

    /// Says that everything was fetched: the dump ends with success, and its tasks are killed.
    ///
    /// # Errors
    /// See [`PageServerError`]; then it is not known whether they were.
    pub fn finish(mut self, wait: &Wait) -> Result<(), PageServerError> {
        self.say(CLOSE, 0, 0, 0, wait)?;
        let mut status = [0; size_of::<i32>()];
        self.fill(&mut status, wait)?;
        match i32::from_ne_bytes(status) {
            0 => Ok(()),
            status => Err(PageServerError::Status(status)),
        }
    }

    /// Has the dump fail: its tasks run on.
    pub fn refuse(self) {
        refuse(&self.socket);
    }

    fn header_bytes(&self) -> usize {
        if self.wide { 32 } else { 24 }
    }

    fn say(
        &mut self,
        command: u32,
        pages: u64,
        address: u64,
        task: u64,
        wait: &Wait,
    ) -> Result<(), PageServerError> {
        let mut header = Vec::with_capacity(32);
        header.extend(command.to_ne_bytes());
        if self.wide {
            header.extend([0; 4]);
            header.extend(pages.to_ne_bytes());
        } else {
            header.extend((pages as u32).to_ne_bytes());
        }
        header.extend(address.to_ne_bytes());
        header.extend(task.to_ne_bytes());
        let mut rest = &header[..];
        while !rest.is_empty() {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::AGAIN) => wait.writable(&self.socket)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(PageServerError::Broken(errno.into())),
            }
        }
        Ok(())
    }

    /// Command, pages, address, task.
    fn decode(&self, header: &[u8]) -> [u64; 4] {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        let first = word(0);
        let low = first & u64::from(u32::MAX);
        if self.wide {
            [low, word(8), word(16), word(24)]
        } else {
            [low, first >> 32, word(8), word(16)]
        }
    }

    fn fill(&mut self, mut rest: &mut [u8], wait: &Wait) -> Result<(), PageServerError> {
        while !rest.is_empty() {
            match rustix::net::recv(&self.socket, &mut *rest, RecvFlags::empty()) {
                Ok((_, 0)) => {
                    return Err(PageServerError::Broken(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok((_, count)) => rest = &mut rest[count..],
                Err(Errno::AGAIN) => wait.readable(&self.socket)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(PageServerError::Broken(errno.into())),
            }
        }
        Ok(())
    }
}

/// Has the dump behind this socket fail: its tasks run on.
pub fn refuse(socket: impl AsFd) {
    // It may have ended.
    let _ = rustix::net::send(&socket, &NONSENSE, SendFlags::NOSIGNAL);
    let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Write);
}

/// Has the dump behind this socket end with success, whatever was fetched: its tasks are killed.
pub fn end(socket: impl AsFd) {
    // Not closed: what has not been read would make it an error there.
    let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Write);
}

/// Waits until the page server that was told how to end has closed its side; what it still sends is thrown
/// away.
///
/// # Errors
/// [`PageServerError::Silent`] and [`PageServerError::Cancelled`].
pub fn await_end(socket: impl AsFd, wait: &Wait) -> Result<(), PageServerError> {
    // Not so that it fails: if it blocks after all, then until the same end.
    let _ = rustix::io::ioctl_fionbio(&socket, true);
    let mut buffer = [0; 4096];
    loop {
        match rustix::net::recv(&socket, &mut buffer, RecvFlags::empty()) {
            Ok((_, 0)) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait.readable(&socket)?,
            // Reset.
            Err(_) => return Ok(()),
        }
    }
}

/// Connects to a page server that listens at `host:port`; nothing if none does yet.
///
/// # Errors
/// What connecting says otherwise.
pub fn connect(address: &str) -> io::Result<Option<OwnedFd>> {
    match TcpStream::connect(address) {
        Ok(stream) => Ok(Some(stream.into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn pair(wide: bool) -> (PageServer, UnixStream) {
        let (ours, criu) = UnixStream::pair().unwrap();
        (PageServer::new(ours.into(), wide).unwrap(), criu)
    }

    fn soon() -> Wait {
        Wait::uncancellable(Duration::from_secs(10))
    }

    #[test]
    fn pages_are_fetched_in_either_layout() {
        for (wide, header) in [(true, 32), (false, 24)] {
            let (mut ours, mut criu) = pair(wide);
            let server = thread::spawn(move || {
                let mut request = vec![0; header];
                criu.read_exact(&mut request).unwrap();
                assert_eq!(request[0], 7);
                assert_eq!(request[header - 24 + if wide { 0 } else { 4 }], 2);
                // One page of the two: the run ends there.
                let mut answer = request;
                answer[..4].copy_from_slice(&(4 << 16 | 6_u32).to_ne_bytes());
                answer[if wide { 8 } else { 4 }] = 1;
                answer.extend([5; 4096]);
                criu.write_all(&answer).unwrap();
                let mut close = vec![0; header];
                criu.read_exact(&mut close).unwrap();
                assert_eq!(close[..2], [0x23, 0x10]);
                criu.write_all(&0_i32.to_ne_bytes()).unwrap();
            });
            let mut pages = [0; 8192];
            let got = ours.get(7, 0x40_0000, &mut pages, &soon()).unwrap();
            assert_eq!((got, pages[4095], pages[4096]), (1, 5, 0));
            ours.finish(&soon()).unwrap();
            server.join().unwrap();
        }
    }

    #[test]
    fn an_answer_to_another_question_is_refused() {
        let (mut ours, mut criu) = pair(true);
        criu.write_all(&[0; 32]).unwrap();
        let error = ours.get(7, 0x1000, &mut [0; 4096], &soon()).unwrap_err();
        assert!(matches!(error, PageServerError::Answer(_)), "{error}");
    }

    #[test]
    fn a_dump_that_is_ended_may_finish_what_it_says() {
        let (ours, mut criu) = UnixStream::pair().unwrap();
        criu.write_all(&[7; 10_000]).unwrap();
        end(&ours);
        assert_eq!(criu.read(&mut [0]).unwrap(), 0, "not an error");
        let brief = Wait::uncancellable(Duration::from_millis(20));
        let error = await_end(&ours, &brief).unwrap_err();
        assert!(matches!(error, PageServerError::Silent), "{error}");
        drop(criu);
        await_end(&ours, &soon()).unwrap();
    }

    #[test]
    fn a_dump_that_is_refused_hears_no_command() {
        let (ours, mut criu) = pair(true);
        ours.refuse();
        let mut heard = Vec::new();
        criu.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, NONSENSE);
    }
}
