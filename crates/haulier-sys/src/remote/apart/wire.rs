//! What client and helper say: one datagram each, little-endian. Both are of one program.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::super::RemoteError;
use super::super::leftover::Leftover;

/// Longest datagram: an error with its words.
const LONGEST: usize = 512;
/// How long an answer is looked for without sleeping: the target stands, and waking up takes longer
/// than what is awaited.
const BRISK: Duration = Duration::from_micros(500);

/// What the client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Do something in process `pid`.
    Do {
        id: u32,
        pid: i32,
        timeout: Duration,
        work: Work,
    },
    /// The thread held for this request may go on.
    GoOn { id: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Take,
    Close(Leftover),
}

/// What the helper says.
#[derive(Debug)]
pub(super) enum Answer {
    /// Comes with the descriptor; the thread stands.
    Held,
    /// The process goes on.
    Done {
        stopped: Duration,
        /// The client was heard while the thread stood.
        in_time: bool,
    },
    /// The process goes on, and this went wrong.
    Failed(RemoteError),
}

const TAKE: u8 = 1;
const CLOSE: u8 = 2;
const GO_ON: u8 = 3;
const HELD: u8 = 4;
const DONE: u8 = 5;
const FAILED: u8 = 6;

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match *self {
            Request::GoOn { id } => {
                bytes.push(GO_ON);
                bytes.extend(id.to_le_bytes());
            }
            Request::Do {
                id,
                pid,
                timeout,
                work,
            } => {
                bytes.push(match work {
                    Work::Take => TAKE,
                    Work::Close(_) => CLOSE,
                });
                bytes.extend(id.to_le_bytes());
                bytes.extend(pid.to_le_bytes());
                bytes.extend(nanos(timeout).to_le_bytes());
                if let Work::Close(what) = work {
                    bytes.extend(what.fd.to_le_bytes());
                    bytes.extend(what.inode.to_le_bytes());
                }
            }
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Request> {
        let mut rest = Rest(bytes);
        let [kind] = rest.take()?;
        let id = u32::from_le_bytes(rest.take()?);
        if kind == GO_ON {
            return Some(Request::GoOn { id });
        }
        let pid = i32::from_le_bytes(rest.take()?);
        let timeout = Duration::from_nanos(u64::from_le_bytes(rest.take()?));
        let work = match kind {
            TAKE => Work::Take,
            CLOSE => Work::Close(Leftover {
                fd: i32::from_le_bytes(rest.take()?),
                inode: u64::from_le_bytes(rest.take()?),
            }),
            _ => return None,
        };
        Some(Request::Do {
            id,
            pid,
            timeout,
            work,
        })
    }
}

impl Answer {
    pub(super) fn encode(&self, id: u32) -> Vec<u8> {
        let kind = match self {
            Answer::Held => HELD,
            Answer::Done { .. } => DONE,
            Answer::Failed(_) => FAILED,
        };
        let mut bytes = vec![kind];
        bytes.extend(id.to_le_bytes());
        match self {
            Answer::Held => {}
            Answer::Done { stopped, in_time } => {
                bytes.extend(nanos(*stopped).to_le_bytes());
                bytes.push((*in_time).into());
            }
            Answer::Failed(error) => encode_error(error, &mut bytes),
        }
        bytes
    }

    /// An answer, and the request it is to.
    pub(super) fn decode(bytes: &[u8]) -> Option<(u32, Answer)> {
        let mut rest = Rest(bytes);
        let [kind] = rest.take()?;
        let id = u32::from_le_bytes(rest.take()?);
        let answer = match kind {
            HELD => Answer::Held,
            DONE => {
                let stopped = Duration::from_nanos(u64::from_le_bytes(rest.take()?));
                let [in_time] = rest.take()?;
                Answer::Done {
                    stopped,
                    in_time: in_time != 0,
                }
            }
            FAILED => Answer::Failed(decode_error(rest)?),
            _ => return None,
        };
        Some((id, answer))
    }
}

/// Kind, the kernel's number of the cause (0: there is none), and the words: what failed, and after a
/// zero the cause if it has no number.
fn encode_error(error: &RemoteError, bytes: &mut Vec<u8>) {
    let (kind, source, what) = match error {
        RemoteError::Gone => (0_u8, None, ""),
        RemoteError::Traced(source) => (1, Some(source), ""),
        RemoteError::Compat => (2, None, ""),
        RemoteError::Seccomp(source) => (3, Some(source), ""),
        RemoteError::Dispatch => (4, None, ""),
        RemoteError::Busy => (5, None, ""),
        RemoteError::NoInstruction => (6, None, ""),
        RemoteError::Refused { call, source } => (7, Some(source), &**call),
        RemoteError::Io { action, source } => (8, Some(source), &**action),
    };
    let number = source.and_then(io::Error::raw_os_error).unwrap_or(0);
    bytes.push(kind);
    bytes.extend(number.to_le_bytes());
    bytes.extend(what.bytes());
    bytes.push(0);
    if let (0, Some(source)) = (number, source) {
        bytes.extend(source.to_string().bytes());
    }
    bytes.truncate(LONGEST);
}

fn decode_error(mut rest: Rest<'_>) -> Option<RemoteError> {
    let [kind] = rest.take()?;
    let number = i32::from_le_bytes(rest.take()?);
    let text = String::from_utf8_lossy(rest.0);
    let (what, cause) = text.split_once('\0').unwrap_or((&text, ""));
    let what = what.to_owned().into();
    let source = match number {
        0 => io::Error::other(cause.to_owned()),
        number => io::Error::from_raw_os_error(number),
    };
    Some(match kind {
        0 => RemoteError::Gone,
        1 => RemoteError::Traced(source),
        2 => RemoteError::Compat,
        3 => RemoteError::Seccomp(source),
        4 => RemoteError::Dispatch,
        5 => RemoteError::Busy,
        6 => RemoteError::NoInstruction,
        7 => RemoteError::Refused { call: what, source },
        8 => RemoteError::Io {
            action: what,
            source,
        },
        _ => return None,
    })
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// What is left to be read.
#[derive(Clone, Copy)]
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }
}

/// Sends a datagram, with a descriptor if there is one. Never waits: no more than one or two are ever
/// under way.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        // There is room for exactly this.
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

/// The next datagram, which is due.
///
/// # Errors
/// `TimedOut`, `UnexpectedEof` if the peer is gone, or what the socket says.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    deadline: Instant,
) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let brisk = deadline.min(Instant::now() + BRISK);
    loop {
        match receive_now(socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if now < brisk {
            thread::yield_now();
        } else {
            wait(socket, Some(deadline - now))?;
        }
    }
}

/// The next datagram, for which there is no hurry.
///
/// # Errors
/// As [`receive`], but never `TimedOut`.
pub(super) fn receive_some_time(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    loop {
        wait(socket, None)?;
        match receive_now(socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

fn wait(socket: BorrowedFd<'_>, at_most: Option<Duration>) -> io::Result<()> {
    let timeout = at_most.map(|time| Timespec {
        tv_sec: time.as_secs().min(i64::MAX as u64) as i64,
        tv_nsec: time.subsec_nanos().into(),
    });
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn receive_now(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let slices = &mut [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(socket, slices, &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(received.bytes);
    Ok((bytes, fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        let what = Leftover {
            fd: 9,
            inode: u64::MAX - 3,
        };
        for work in [Work::Take, Work::Close(what)] {
            let request = Request::Do {
                id: 7,
                pid: 4711,
                timeout: Duration::from_micros(1_500_001),
                work,
            };
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        let request = Request::GoOn { id: u32::MAX };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        assert_eq!(Request::decode(&[]), None);
        assert_eq!(Request::decode(&[TAKE, 1, 0, 0, 0, 1]), None);
        assert_eq!(Request::decode(&[99; 40]), None);
    }

    #[test]
    fn errors_survive_the_wire_with_their_words_and_causes() {
        let io = || io::Error::from_raw_os_error(libc::EPERM);
        let errors = [
            RemoteError::Gone,
            RemoteError::Traced(io()),
            RemoteError::Compat,
            RemoteError::Seccomp(io()),
            RemoteError::Dispatch,
            RemoteError::Busy,
            RemoteError::NoInstruction,
            RemoteError::refused("userfaultfd")(io()),
            RemoteError::io("start a thread")(io()),
            RemoteError::io("start a thread")(io::ErrorKind::InvalidInput.into()),
        ];
        for error in errors {
            let text = |error: &RemoteError| {
                let source = std::error::Error::source(error).map(ToString::to_string);
                format!("{error}: {source:?}")
            };
            let before = text(&error);
            let (id, answer) = Answer::decode(&Answer::Failed(error).encode(3)).unwrap();
            let Answer::Failed(error) = answer else {
                panic!("{before} became {answer:?}");
            };
            assert_eq!((id, text(&error)), (3, before));
        }
        assert!(Answer::decode(&[FAILED, 0, 0, 0, 0, 77, 0, 0, 0, 0]).is_none());
    }
}
