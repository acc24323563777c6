//! What client and helper say: one datagram each, little-endian. Both are of one program.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::super::leftover::Leftover;
use super::super::{Look, RemoteError, Taken};

/// Longest datagram: a process's `stat`, or an error with its words.
const LONGEST: usize = 4096;
/// Descriptors that come with one: the userfaultfd, the pagemap, the mappings.
const FDS: usize = 3;

/// What the client says: what is to be done in process `pid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) pid: i32,
    pub(super) timeout: Duration,
    pub(super) work: Work,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Take,
    Close(Leftover),
}

/// What the helper says. The process goes on already.
#[derive(Debug)]
pub(super) enum Answer {
    Taken(Taken<Look>),
    Closed,
    Failed(RemoteError),
}

const TAKE: u8 = 1;
const CLOSE: u8 = 2;
const TAKEN: u8 = 3;
const CLOSED: u8 = 4;
const FAILED: u8 = 5;

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![match self.work {
            Work::Take => TAKE,
            Work::Close(_) => CLOSE,
        }];
        bytes.extend(self.pid.to_le_bytes());
        bytes.extend(nanos(self.timeout).to_le_bytes());
        if let Work::Close(what) = self.work {
            bytes.extend(what.fd.to_le_bytes());
            bytes.extend(what.inode.to_le_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Request> {
        let mut rest = Rest(bytes);
        let [kind] = rest.take()?;
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
        Some(Request { pid, timeout, work })
    }
}

impl Answer {
    /// The bytes, and what goes with them.
    pub(super) fn encode(&self) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
        match self {
            Answer::Taken(taken) => {
                let mut bytes = vec![TAKEN];
                bytes.extend(nanos(taken.stopped).to_le_bytes());
                bytes.extend(taken.beside.stat.bytes());
                bytes.truncate(LONGEST);
                let Look { pagemap, maps, .. } = &taken.beside;
                let fds = [&taken.userfaultfd, pagemap, maps].map(|fd| fd.as_fd());
                (bytes, fds.to_vec())
            }
            Answer::Closed => (vec![CLOSED], Vec::new()),
            Answer::Failed(error) => {
                let mut bytes = vec![FAILED];
                encode_error(error, &mut bytes);
                (bytes, Vec::new())
            }
        }
    }

    pub(super) fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Answer> {
        let mut rest = Rest(bytes);
        let [kind] = rest.take()?;
        Some(match kind {
            TAKEN => {
                let stopped = Duration::from_nanos(u64::from_le_bytes(rest.take()?));
                let [userfaultfd, pagemap, maps] = fds.try_into().ok()?;
                let stat = String::from_utf8_lossy(rest.0).into_owned();
                Answer::Taken(Taken {
                    userfaultfd,
                    beside: Look {
                        stat,
                        pagemap,
                        maps,
                    },
                    stopped,
                })
            }
            CLOSED => Answer::Closed,
            FAILED => Answer::Failed(decode_error(rest)?),
            _ => return None,
        })
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

/// Sends a datagram with descriptors. Never waits: no more than one is ever under way.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        // There is room for exactly these.
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

/// The next datagram, with what came with it; without a deadline it may never come.
///
/// # Errors
/// `TimedOut`, `UnexpectedEof` if the peer is gone, or what the socket says.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    deadline: Option<Instant>,
) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    loop {
        match receive_now(socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
        let remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if remaining.is_some_and(|remaining| remaining.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = remaining.map(|time| Timespec {
            tv_sec: time.as_secs().min(i64::MAX as u64) as i64,
            tv_nsec: time.subsec_nanos().into(),
        });
        let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn receive_now(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let slices = &mut [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(socket, slices, &mut control, flags)?;
    let rights = |message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    };
    let fds = control.drain().filter_map(rights).flatten().collect();
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(received.bytes);
    Ok((bytes, fds))
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
            let request = Request {
                pid: 4711,
                timeout: Duration::from_micros(1_500_001),
                work,
            };
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
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
            let answer = Answer::Failed(error);
            let (bytes, fds) = answer.encode();
            assert!(fds.is_empty());
            let answer = Answer::decode(&bytes, Vec::new());
            let Some(Answer::Failed(error)) = answer else {
                panic!("{before} became {answer:?}");
            };
            assert_eq!(text(&error), before);
        }
        assert!(Answer::decode(&[FAILED, 77, 0, 0, 0, 0], Vec::new()).is_none());
        // Without its descriptors.
        assert!(Answer::decode(&[TAKEN; 40], Vec::new()).is_none());
    }
}
