//! The serving thread: CRIU's connection, events and faults; and, if no other thread does, the fill.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use haulier_criu::lazy_socket::{LazyConnection, LazyListener, LazySocketError, Message};
use haulier_sys::priority;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::LazyError;
use super::fill::{Stride, Walk};
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

/// How long to wait before faults that could not be answered are tried again.
const AGAIN: Duration = Duration::from_micros(250);
/// A look at everything from time to time, although every change wakes.
const IDLE: Duration = Duration::from_secs(1);
/// Strides of filling that are long: some 3 ms.
const LONG: u32 = 64;

/// Body of the serving thread. Ends when told to, or when all is placed and CRIU has finished.
pub(super) fn run(shared: &Shared, listener: LazyListener) {
    let _guard = PanicGuard(shared);
    // While CRIU restores what comes before memory.
    let tasks: Vec<u32> = shared.state().expected.keys().copied().collect();
    shared.hot.find(&shared.desk.store, tasks.into_iter());
    let mut turn = None;
    let mut criu = Criu::Awaited(listener);
    let mut walk = Walk::default();
    // Since it had nothing to place.
    let mut strides = 0;
    // Faults before the filling began: those of CRIU's own code in the tasks.
    let mut held = 0;
    let mut again = false;
    while !shared.is_stopping() {
        // Before it is looked what there is to do, so that nothing that arrives is left lying.
        shared.idle.store(true, Ordering::SeqCst);
        let stride = walk.step(shared);
        let limit = match stride {
            Stride::Placed => Duration::ZERO,
            Stride::Again => AGAIN,
            Stride::Nothing if again => AGAIN,
            Stride::Nothing => IDLE,
        };
        strides = match stride {
            Stride::Placed => LONG.min(strides + 1),
            Stride::Again | Stride::Nothing => 0,
        };
        let faults = shared.desk.counters.faults();
        if !shared.is_filling() {
            held = faults;
        }
        take(Turn::after(strides, faults > held), &mut turn);
        let spaces = shared.served_spaces();
        if spaces.is_empty() && shared.release() && matches!(criu, Criu::Over) {
            return;
        }
        let ready = match wait(shared, &criu, &spaces, limit) {
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

/// How the thread takes its turns on the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// A task stands still while it waits for its turn.
    Urgent,
    /// It computes for long: others are to have a part of this processor.
    Filling,
    /// It places what it can while the tasks are held: who is to let them go comes first.
    Ahead,
}

impl Turn {
    /// After so many strides without a pause. Pages that are pushed arrive a few at a time, and meanwhile
    /// tasks wait for others, which have to be asked for.
    fn after(strides: u32, tasks_run: bool) -> Turn {
        match strides {
            0 => Turn::Urgent,
            _ if !tasks_run => Turn::Ahead,
            1..LONG => Turn::Urgent,
            _ => Turn::Filling,
        }
    }
}

fn take(turn: Turn, last: &mut Option<Turn>) {
    if last.replace(turn) == Some(turn) {
        return;
    }
    let done = match turn {
        Turn::Urgent => priority::urgent(),
        Turn::Filling => priority::usual().and_then(|()| priority::brisk()),
        Turn::Ahead => priority::bulk(),
    };
    if let Err(error) = done {
        tracing::debug!(%error, "faults are answered at the usual priority");
    }
}

fn is_end(error: &LazyError) -> bool {
    matches!(error, LazyError::Socket(LazySocketError::RestoreFailed))
}

struct Ready {
    criu: bool,
    spaces: Vec<bool>,
}

/// Waits for CRIU, for an event, or for a wake-up, at most so long.
fn wait(
    shared: &Shared,
    criu: &Criu,
    spaces: &[Arc<Space>],
    limit: Duration,
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
    let limit = Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
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
