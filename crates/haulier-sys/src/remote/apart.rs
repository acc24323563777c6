//! Taking done by a process of its own, which goes on to the end when its client is killed.
//!
//! The client asks over a socket; the helper ([`serve`]) stops the thread, sends the descriptor, waits
//! until the client has done what has to be done beside, or is gone, or has had [`HOLD`], and lets the
//! process go on as it was. Only the death of the helper itself on the way does harm; so it does
//! nothing else, hears no signals but SIGKILL, and is a process that nobody has a reason to kill.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::leftover::Leftover;
use super::{Beside, RemoteError, Taken};
use crate::seclusion::seclude;

mod serve;
#[cfg(test)]
mod tests;
mod wire;

pub use serve::serve;
use wire::{Answer, Request, Work};

/// How long a thread is held for its client at most.
pub const HOLD: Duration = Duration::from_millis(500);
/// How long an answer may take beyond the time that the work may: the thread is put back in any case.
const MARGIN: Duration = Duration::from_secs(15);
/// How long a helper may take to end when it is not needed any more.
const END: Duration = Duration::from_secs(1);

/// Why a helper did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ApartError {
    /// It could not be started; nothing was touched.
    #[error("cannot start the process that takes userfaultfds")]
    Start(#[source] io::Error),
    /// It ended, or is silent. It lets go of the target if it lives.
    #[error("the process that takes userfaultfds does not answer")]
    Lost(#[source] io::Error),
    /// The work could not be done.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// A helper at work. Dropped, it ends.
#[derive(Debug)]
pub struct Apart {
    socket: Option<OwnedFd>,
    process: Child,
    last: u32,
}

impl Apart {
    /// Starts a helper: `command` is a program that calls [`serve`]. Its standard streams are set here.
    ///
    /// # Errors
    /// [`ApartError::Start`].
    pub fn start(mut command: Command) -> Result<Apart, ApartError> {
        let failed = |errno: rustix::io::Errno| ApartError::Start(errno.into());
        let flags = SocketFlags::CLOEXEC;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.map_err(failed)?;
        command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = seclude(&mut command).spawn().map_err(ApartError::Start)?;
        // The command holds the other end.
        drop(command);
        Ok(Apart {
            socket: Some(ours),
            process,
            last: 0,
        })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// As [`super::take_userfaultfd`], by the helper. `beside` runs in this process.
    ///
    /// # Errors
    /// [`ApartError::Lost`], after which the helper is of no further use; [`ApartError::Remote`].
    pub fn take(
        &mut self,
        pid: i32,
        timeout: Duration,
        beside: &mut Beside<'_>,
    ) -> Result<Taken<()>, ApartError> {
        let deadline = Instant::now() + timeout + MARGIN;
        self.ask(pid, timeout, Work::Take)?;
        let userfaultfd = match self.answer(deadline)? {
            (Answer::Held, Some(userfaultfd)) => userfaultfd,
            (Answer::Failed(error), _) => return Err(error.into()),
            _ => return Err(self.lost(io::ErrorKind::InvalidData.into())),
        };
        let seen = beside();
        self.say(&Request::GoOn { id: self.last })?;
        let (stopped, in_time) = match self.answer(deadline)? {
            (Answer::Done { stopped, in_time }, _) => (stopped, in_time),
            (Answer::Failed(error), _) => return Err(error.into()),
            _ => return Err(self.lost(io::ErrorKind::InvalidData.into())),
        };
        seen.map_err(RemoteError::io("look at the process"))?;
        if !in_time {
            // It ran on before we had looked: it may have become another.
            let late = io::ErrorKind::TimedOut.into();
            return Err(RemoteError::io("look at the process")(late).into());
        }
        Ok(Taken {
            userfaultfd,
            beside: (),
            stopped,
        })
    }

    /// As [`super::leftover::close`], by the helper.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn close(&mut self, pid: i32, timeout: Duration, what: Leftover) -> Result<(), ApartError> {
        let deadline = Instant::now() + timeout + MARGIN;
        self.ask(pid, timeout, Work::Close(what))?;
        match self.answer(deadline)? {
            (Answer::Done { .. }, _) => Ok(()),
            (Answer::Failed(error), _) => Err(error.into()),
            (Answer::Held, _) => Err(self.lost(io::ErrorKind::InvalidData.into())),
        }
    }

    fn ask(&mut self, pid: i32, timeout: Duration, work: Work) -> Result<(), ApartError> {
        self.last = self.last.wrapping_add(1);
        let request = Request::Do {
            id: self.last,
            pid,
            timeout,
            work,
        };
        self.say(&request)
    }

    fn say(&mut self, request: &Request) -> Result<(), ApartError> {
        let Some(socket) = &self.socket else {
            return Err(ApartError::Lost(io::ErrorKind::BrokenPipe.into()));
        };
        let sent = wire::send(socket.as_fd(), &request.encode(), None);
        sent.map_err(|error| self.lost(error))
    }

    fn answer(&mut self, deadline: Instant) -> Result<(Answer, Option<OwnedFd>), ApartError> {
        let Some(socket) = &self.socket else {
            return Err(ApartError::Lost(io::ErrorKind::BrokenPipe.into()));
        };
        let received = wire::receive(socket.as_fd(), deadline);
        let answer = received.and_then(|(bytes, fd)| {
            let (id, answer) = Answer::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
            match id == self.last {
                true => Ok((answer, fd)),
                false => Err(io::ErrorKind::InvalidData.into()),
            }
        });
        answer.map_err(|error| self.lost(error))
    }

    /// With the end of the connection it brings what it does to the end, and ends.
    fn lost(&mut self, error: io::Error) -> ApartError {
        self.socket = None;
        ApartError::Lost(error)
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.socket = None;
        let deadline = Instant::now() + END;
        while let Ok(None) = self.process.try_wait() {
            if Instant::now() >= deadline {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}
