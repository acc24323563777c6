//! Until when a call may wait, and what cancels it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// Cancels every [`Wait`] made from it, from any thread, once and for good.
#[derive(Debug, Clone)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    wake: OwnedFd,
}

impl Cancel {
    /// A token that nobody has used yet.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn new() -> io::Result<Cancel> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Cancel(Arc::new(Inner {
            cancelled: AtomicBool::new(false),
            wake,
        })))
    }

    /// Ends every wait, present and future.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        // An eventfd counter of 1 stays readable for ever, since nobody reads it; a failed write
        // means that it already is.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Sleeps for so long. Returns whether it was cancelled, which ends the sleep.
    pub fn sleep(&self, time: Duration) -> bool {
        // It is readable only when it is cancelled; that the kernel refuses to wait is a bug.
        let _ = self.wait(time).readable(&self.0.wake);
        self.is_cancelled()
    }

    /// A wait that ends with this token, or `timeout` from now.
    pub fn wait(&self, timeout: Duration) -> Wait {
        Wait {
            limit: Limit::At(Instant::now() + timeout),
            cancel: Some(self.clone()),
        }
    }

    /// A wait that ends with this token, or when nothing has moved for `timeout`: for transfers
    /// whose length nobody knows.
    pub fn wait_idle(&self, timeout: Duration) -> Wait {
        Wait {
            limit: Limit::Idle(timeout),
            cancel: Some(self.clone()),
        }
    }
}

/// A bound on waiting: a deadline, and mostly also a [`Cancel`].
#[derive(Debug, Clone)]
pub struct Wait {
    limit: Limit,
    cancel: Option<Cancel>,
}

#[derive(Debug, Clone, Copy)]
enum Limit {
    At(Instant),
    /// Counted anew by each call that waits.
    Idle(Duration),
}

/// How a wait ended without what was waited for.
#[derive(Debug)]
pub enum WaitError {
    /// The deadline passed.
    Deadline,
    /// It was cancelled.
    Cancelled,
    /// The kernel refused to wait.
    Io(io::Error),
}

impl Wait {
    /// A wait that nobody can cancel: for the steps that bring the target back.
    pub fn uncancellable(timeout: Duration) -> Wait {
        Wait {
            limit: Limit::At(Instant::now() + timeout),
            cancel: None,
        }
    }

    /// Time until the deadline.
    pub fn remaining(&self) -> Duration {
        match self.limit {
            Limit::At(deadline) => deadline.saturating_duration_since(Instant::now()),
            Limit::Idle(timeout) => timeout,
        }
    }

    /// When the wait ends at the latest.
    pub fn deadline(&self) -> Instant {
        match self.limit {
            Limit::At(deadline) => deadline,
            Limit::Idle(timeout) => Instant::now() + timeout,
        }
    }

    /// The same, but ending `timeout` from now if that is earlier.
    pub fn at_most(&self, timeout: Duration) -> Wait {
        Wait {
            limit: Limit::At(self.deadline().min(Instant::now() + timeout)),
            cancel: self.cancel.clone(),
        }
    }

    /// Whether the wait was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(Cancel::is_cancelled)
    }

    /// Waits until `fd` can be read (data, end of file or an error are all "can").
    ///
    /// # Errors
    /// See [`WaitError`].
    pub fn readable(&self, fd: impl AsFd) -> Result<(), WaitError> {
        self.ready(fd.as_fd(), PollFlags::IN)
    }

    /// Waits until `fd` can be written.
    ///
    /// # Errors
    /// See [`WaitError`].
    pub fn writable(&self, fd: impl AsFd) -> Result<(), WaitError> {
        self.ready(fd.as_fd(), PollFlags::OUT)
    }

    fn ready(&self, fd: BorrowedFd<'_>, interest: PollFlags) -> Result<(), WaitError> {
        loop {
            if self.is_cancelled() {
                return Err(WaitError::Cancelled);
            }
            let remaining = self.remaining();
            let timeout = Timespec {
                tv_sec: remaining.as_secs().min(i64::MAX as u64) as i64,
                tv_nsec: remaining.subsec_nanos().into(),
            };
            let mut fds = Vec::with_capacity(2);
            fds.push(PollFd::from_borrowed_fd(fd, interest));
            if let Some(cancel) = &self.cancel {
                fds.push(PollFd::from_borrowed_fd(
                    cancel.0.wake.as_fd(),
                    PollFlags::IN,
                ));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Err(WaitError::Deadline),
                Ok(_) if !fds[0].revents().is_empty() && !self.is_cancelled() => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(WaitError::Io(errno.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancelled_wait_ends_at_once_and_for_good() {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        let cancel = Cancel::new().unwrap();
        let wait = cancel.wait(Duration::from_secs(3600));
        let other = cancel.clone();
        let thread = std::thread::spawn(move || other.cancel());
        assert!(matches!(wait.readable(&read), Err(WaitError::Cancelled)));
        thread.join().unwrap();
        assert!(matches!(wait.readable(&read), Err(WaitError::Cancelled)));
    }

    #[test]
    fn a_sleep_ends_when_it_is_over_or_cancelled() {
        let cancel = Cancel::new().unwrap();
        assert!(!cancel.sleep(Duration::from_millis(1)));
        let other = cancel.clone();
        let thread = std::thread::spawn(move || other.cancel());
        assert!(cancel.sleep(Duration::from_secs(3600)));
        thread.join().unwrap();
        assert!(cancel.sleep(Duration::from_secs(3600)));
    }

    #[test]
    fn a_deadline_ends_a_wait() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let wait = Wait::uncancellable(Duration::from_millis(1));
        assert!(matches!(wait.readable(&read), Err(WaitError::Deadline)));
        drop(write);
        let wait = Wait::uncancellable(Duration::from_secs(3600));
        assert!(wait.readable(&read).is_ok());
    }
}
