//! A process of its own that keeps missing pages from becoming zeros when this one dies.
//!
//! When the last descriptor of a userfaultfd is closed, pages that are still missing read as zero,
//! and the task runs on with them. So a guard holds a duplicate of each. While it does, a task that
//! touches a missing page stands still; and when the daemon's end of the socket closes without the
//! word that all is placed, the guard kills the tasks' cgroup before it lets go.
//!
//! Where the tasks are in no cgroup of their own ([`run_for_tasks`]) it kills each task that has sent
//! a descriptor, and all that descends from it. A child that has left its family is found by its memory,
//! and stands where it needs a page until then: the guard holds its descriptor for as long as it lives.
//!
//! A forked child's descriptor reaches the guard some microseconds after the child can run: to die
//! in between is the one case that is not covered for that child, until the guard kills it.

mod keeper;
mod strays;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use haulier_sys::pidfd::{PidfdFlags, pidfd_open};
use haulier_sys::seclusion::seclude;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketFlags, SocketType, sockopt,
};
use rustix::process::Pid;

use crate::wait::{Wait, WaitError};
pub use keeper::{Outcome, run, run_for_tasks};

/// How long the guard may take for a word of ours. It only has to wake up.
const SEND_TIME: Duration = Duration::from_secs(5);

/// How long to wait for the guard to end after its work.
const END_TIME: Duration = Duration::from_secs(5);

/// Why there is no guard, or why it could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The process could not be started.
    #[error("cannot start the guard of missing pages")]
    Start(#[source] io::Error),
    /// The process ended, or did not say that it is ready.
    #[error("the guard of missing pages is not ready")]
    NotReady(#[source] io::Error),
    /// The wait ended first.
    #[error("the guard of missing pages did not get ready in time")]
    Wait,
    /// The tasks' cgroup cannot be killed.
    #[error("cannot open {path}")]
    Cgroup {
        /// The file in the cgroup's directory.
        path: PathBuf,
        /// The kernel's answer; before Linux 5.14 there is no such file.
        #[source]
        source: io::Error,
    },
    /// Standard input is no socket of a daemon.
    #[error("the guard cannot hear the process that started it")]
    Socket(#[source] io::Error),
}

/// A guard at work, as the daemon sees it. Dropping it without [`Self::complete`] makes the guard
/// kill the cgroup.
#[derive(Debug)]
pub struct Guard {
    link: Arc<Link>,
    process: Mutex<Option<Child>>,
}

#[derive(Debug)]
struct Link {
    socket: OwnedFd,
    next: AtomicU64,
    /// It is no more; said once.
    lost: AtomicBool,
    complete: AtomicBool,
}

/// The guard's duplicate of a descriptor, which it closes when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    link: Arc<Link>,
    id: u64,
}

/// What the daemon says: one byte, and the number of the descriptor meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    /// Comes with a descriptor.
    Hold = 1,
    Release = 2,
    Complete = 3,
}

const WORD_BYTES: usize = 9;

/// What the guard says when it is ready; followed by an error number it is not.
const READY: u8 = 0;

impl Guard {
    /// Starts a guard: `command` is a program that calls [`run`] with the cgroup of the tasks. Its
    /// standard streams are set here.
    ///
    /// # Errors
    /// [`GuardError::Start`], [`GuardError::NotReady`], [`GuardError::Wait`].
    pub fn spawn(mut command: Command, wait: &Wait) -> Result<Self, GuardError> {
        let flags = SocketFlags::CLOEXEC;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.map_err(|errno| GuardError::Start(errno.into()))?;
        sockopt::set_socket_timeout(&ours, sockopt::Timeout::Send, Some(SEND_TIME))
            .map_err(|errno| GuardError::Start(errno.into()))?;
        command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = seclude(&mut command).spawn().map_err(GuardError::Start)?;
        // The command holds the other end.
        drop(command);
        let guard = Self {
            link: Arc::new(Link {
                socket: ours,
                next: AtomicU64::new(1),
                lost: AtomicBool::new(false),
                complete: AtomicBool::new(false),
            }),
            process: Mutex::new(Some(process)),
        };
        guard.await_ready(wait)?;
        Ok(guard)
    }

    fn await_ready(&self, wait: &Wait) -> Result<(), GuardError> {
        wait.readable(&self.link.socket)
            .map_err(|error| match error {
                WaitError::Io(error) => GuardError::NotReady(error),
                WaitError::Deadline | WaitError::Cancelled => GuardError::Wait,
            })?;
        let mut answer = [READY; 5];
        let (_, len) = rustix::net::recv(&self.link.socket, &mut answer, RecvFlags::empty())
            .map_err(|errno| GuardError::NotReady(errno.into()))?;
        let [kind, number @ ..] = answer;
        match len {
            1 if kind == READY => Ok(()),
            5 => {
                let number = i32::from_le_bytes(number);
                Err(GuardError::NotReady(io::Error::from_raw_os_error(number)))
            }
            _ => Err(GuardError::NotReady(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Says that everything is placed: the guard ends, and kills nothing.
    pub fn complete(&self) {
        if !self.link.complete.swap(true, Ordering::Relaxed) {
            self.link.say(Word::Complete, 0, &[]);
        }
    }

    /// Has the guard kill the tasks and end, and waits for it. After [`Self::complete`] it only
    /// waits for its end.
    pub fn abandon(&self) {
        let _ = rustix::net::shutdown(&self.link.socket, Shutdown::Both);
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut process) = process.take() else {
            return;
        };
        let deadline = Instant::now() + END_TIME;
        while let Ok(None) = process.try_wait() {
            if Instant::now() >= deadline {
                tracing::warn!(
                    pid = process.id(),
                    "the guard of missing pages does not end"
                );
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Has the guard hold a duplicate, of the task with that pid if it is known.
    pub(super) fn hold(&self, fd: BorrowedFd<'_>, pid: Option<i32>) -> Held {
        let id = self.link.next.fetch_add(1, Ordering::Relaxed);
        let task = pid
            .and_then(Pid::from_raw)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        match &task {
            Some(task) => self.link.say(Word::Hold, id, &[fd, task.as_fd()]),
            None => self.link.say(Word::Hold, id, &[fd]),
        }
        Held {
            link: self.link.clone(),
            id,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.link.say(Word::Release, self.id, &[]);
    }
}

impl Link {
    fn say(&self, word: Word, id: u64, fds: &[BorrowedFd<'_>]) {
        let mut bytes = [word as u8; WORD_BYTES];
        bytes[1..].copy_from_slice(&id.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            // There is room for exactly this.
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let slices = [IoSlice::new(&bytes)];
        let sent = rustix::net::sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL);
        // After its last word it is gone, as it should be.
        let expected = self.complete.load(Ordering::Relaxed);
        if let Err(error) = sent {
            if !expected && !self.lost.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    %error,
                    "the guard is gone: if haulier is killed before all memory has arrived, the \
                     target runs on with zeros"
                );
            }
        }
    }
}

/// The file of a cgroup that kills it.
fn kill_file(cgroup: &Path) -> PathBuf {
    cgroup.join("cgroup.kill")
}
