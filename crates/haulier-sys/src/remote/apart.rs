//! Taking done by a process of its own, which goes on to the end when its client is killed.
//!
//! The client asks over a socket; the helper ([`serve`]) stops the thread, takes the userfaultfd, looks
//! at the process ([`super::Look`]), lets that go on as it was, and only then answers: it waits for
//! nobody while the thread stands. Only the death of the helper itself on the way does harm; so it does
//! nothing else, hears no signal but SIGKILL, and is a process that nobody has a reason to kill.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::leftover::Leftover;
use super::{Look, RemoteError, Taken};
use crate::seclusion::seclude;

mod serve;
#[cfg(test)]
mod tests;
mod wire;

pub use serve::serve;
use wire::{Answer, Request, Work};

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
        })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// As [`super::TakeUserfaultfd::take`], by the helper.
    ///
    /// # Errors
    /// [`ApartError::Lost`], after which the helper is of no further use; [`ApartError::Remote`].
    pub fn take(&mut self, pid: i32, timeout: Duration) -> Result<Taken<Look>, ApartError> {
        match self.ask(pid, timeout, Work::Take)? {
            Answer::Taken(taken) => Ok(taken),
            Answer::Failed(error) => Err(error.into()),
            Answer::Closed => Err(self.lost(io::ErrorKind::InvalidData.into())),
        }
    }

    /// As [`super::leftover::close`], by the helper.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn close(&mut self, pid: i32, timeout: Duration, what: Leftover) -> Result<(), ApartError> {
        match self.ask(pid, timeout, Work::Close(what))? {
            Answer::Closed => Ok(()),
            Answer::Failed(error) => Err(error.into()),
            Answer::Taken(_) => Err(self.lost(io::ErrorKind::InvalidData.into())),
        }
    }

    fn ask(&mut self, pid: i32, timeout: Duration, work: Work) -> Result<Answer, ApartError> {
        let Some(socket) = &self.socket else {
            return Err(ApartError::Lost(io::ErrorKind::BrokenPipe.into()));
        };
        let request = Request { pid, timeout, work };
        let deadline = Instant::now() + timeout + MARGIN;
        let answer = wire::send(socket.as_fd(), &request.encode(), &[])
            .and_then(|()| wire::receive(socket.as_fd(), Some(deadline)))
            .and_then(|(bytes, fds)| {
                Ok(Answer::decode(&bytes, fds).ok_or(io::ErrorKind::InvalidData)?)
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
