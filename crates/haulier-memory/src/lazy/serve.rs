//! The serving thread: CRIU's connection, events and faults.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use haulier_criu::lazy_socket::{LazyConnection, LazyListener, LazySocketError, Message};
use haulier_sys::priority;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::LazyError;
use super::shared::{PanicGuard, Shared};
use super::space::Space;
use super::todo::Todo;

/// Where CRIU's messages come from.
enum Criu {
    Awaited(LazyListener),
    Connected(LazyConnection),
    /// It has said its last word, or failed.
    Over,
}

/// Body of the serving thread. Ends when told to, or when all is placed and CRIU has finished.
pub(super) fn run(shared: &Shared, listener: LazyListener) {
    let _guard = PanicGuard(shared);
    // A task stands still while this thread waits for its turn.
    if let Err(error) = priority::urgent() {
        tracing::debug!(%error, "faults are answered at the usual priority");
    }
    let mut criu = Criu::Awaited(listener);
    let mut again = false;
    while !shared.is_stopping() {
        let spaces = shared.served_spaces();
        if spaces.is_empty() && shared.release() && matches!(criu, Criu::Over) {
            return;
        }
        let ready = match wait(shared, &criu, &spaces, again) {
            Ok(ready) => ready,
            Err(error) => return shared.fail(error),
        };
        if ready.criu {
            if let Err(error) = shared.take_in(|| hear(shared, &mut criu)) {
                criu = Criu::Over;
                // With everything placed CRIU tells of its failure by its own answer.
                if !(shared.release() && is_end(&error)) {
                    shared.fail(error);
                }
            }
        }
        // Before the answers are looked up, so that no arrival between goes unnoticed.
        shared.parked.store(true, Ordering::SeqCst);
        again = false;
        let mut waiting = false;
        for (space, readable) in spaces.iter().zip(ready.spaces) {
            match serve(shared, space, readable) {
                Ok(more) => again |= more,
                // The others are served on; this one would fail again at once, and for ever.
                Err(error) => {
                    space.set_broken();
                    shared.fail(error);
                }
            }
            waiting |= space.has_waiters();
        }
        if !waiting {
            shared.parked.store(false, Ordering::SeqCst);
        }
    }
}

fn is_end(error: &LazyError) -> bool {
    matches!(error, LazyError::Socket(LazySocketError::RestoreFailed))
}

struct Ready {
    criu: bool,
    spaces: Vec<bool>,
}

/// Waits for CRIU, for an event, for a wake-up, or, if faults are to be tried again, a moment.
fn wait(
    shared: &Shared,
    criu: &Criu,
    spaces: &[Arc<Space>],
    again: bool,
) -> Result<Ready, LazyError> {
    let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
    fds.extend(
        spaces
            .iter()
            .map(|space| PollFd::from_borrowed_fd(space.as_fd(), PollFlags::IN)),
    );
    match criu {
        Criu::Awaited(listener) => fds.push(PollFd::new(listener, PollFlags::IN)),
        Criu::Connected(connection) => fds.push(PollFd::new(connection, PollFlags::IN)),
        Criu::Over => {}
    }
    let limit = if again {
        Timespec {
            tv_sec: 0,
            tv_nsec: 250_000,
        }
    } else {
        Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        }
    };
    match poll(&mut fds, Some(&limit)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => {
            return Err(LazyError::System {
                doing: "poll",
                source: errno.into(),
            });
        }
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    if ready[0] {
        // Empties the counter; that it was empty already is as good.
        let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
    }
    let behind = 1 + spaces.len();
    Ok(Ready {
        criu: ready.get(behind).copied().unwrap_or(false),
        spaces: ready[1..behind].to_vec(),
    })
}

/// Takes what CRIU has sent.
fn hear(shared: &Shared, criu: &mut Criu) -> Result<(), LazyError> {
    if let Criu::Awaited(listener) = criu {
        match listener.accept()? {
            Some(connection) => {
                *criu = Criu::Connected(connection);
                shared.connected.store(true, Ordering::SeqCst);
            }
            None => return Ok(()),
        }
    }
    let Criu::Connected(connection) = criu else {
        return Ok(());
    };
    while let Some(message) = connection.receive()? {
        match message {
            Message::Task { vpid, pid, uffd } => {
                let todo: Todo = shared.meet(vpid)?;
                shared.add(Space::new(vpid, pid, uffd, todo, &shared.desk)?);
            }
            Message::Zombie { vpid } => {
                shared.meet(vpid)?;
            }
            Message::Finished => {
                *criu = Criu::Over;
                return shared.finish_restore();
            }
        }
    }
    Ok(())
}

/// Follows a task's events and answers its faults. True if to be tried again in a moment.
fn serve(shared: &Shared, space: &Space, readable: bool) -> Result<bool, LazyError> {
    if readable {
        // The end of this also wakes a filling thread that waits for the event to be gone.
        shared.take_in(|| -> Result<(), LazyError> {
            let children = space.read_events(&shared.desk)?;
            children.into_iter().for_each(|child| shared.add(child));
            Ok(())
        })?;
    }
    space.answer(&shared.desk, shared.options.fault_pages)
}
