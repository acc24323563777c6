//! The bulk fill: threads that place whatever has arrived, or the serving thread between faults.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use haulier_sys::priority;

use super::LazyError;
use super::shared::{PanicGuard, Shared};
use super::space::{Aim, Space, Step};
use crate::page::PAGE;

/// How long to wait before trying again where the kernel said "mappings are changing": the task
/// goes on microseconds after its event was read, and says so to nobody.
const AGAIN: Duration = Duration::from_millis(1);

/// How often the store is searched for what nobody needs: it matters only when it runs full.
const PRUNE: Duration = Duration::from_millis(100);

/// How often, and for how long, to stand back for a page that a task waits for and that is on its way:
/// whoever brings it should find a processor, and no lock in the hands of a thread that has none.
const PAUSES: usize = 5;
const PAUSE: Duration = Duration::from_micros(100);

/// A look at everything from time to time, although every change wakes.
const IDLE: Duration = Duration::from_secs(1);

/// Body of the filling thread number `index`.
pub(super) fn run(shared: &Shared, index: usize) {
    let _guard = PanicGuard(shared);
    // The restore, the target itself and its faults go first.
    let _ = priority::background();
    let mut pruned = Instant::now();
    while let Some((version, spaces)) = shared.work() {
        let mut pass = Pass::default();
        // Each thread starts elsewhere, so that they meet in one address space only in the end.
        let skip = index * spaces.len() / shared.options.fill_threads;
        if let Err(error) = fill_hot(shared, &spaces, &mut pass) {
            shared.fail(error);
            return;
        }
        for space in spaces.iter().cycle().skip(skip).take(spaces.len()) {
            if let Err(error) = fill(shared, space, &mut pass) {
                shared.fail(error);
                return;
            }
        }
        drop(spaces);
        shared.worked(pass.placed);
        if pass.placed {
            continue;
        }
        if index == 0 && pruned.elapsed() >= PRUNE && shared.desk.store.used() > 0 {
            shared.prune();
            pruned = Instant::now();
        }
        if pass.again {
            shared.wait(version, AGAIN);
        } else {
            shared.wait(version, IDLE);
        }
    }
}

/// How far the serving thread has come, where it fills too.
///
/// With few processors a thread that only waits for faults has to take one from a filling thread for each
/// of them, has to wait until the other is out of the address space, and gives it back: five switches for
/// a page that is at hand. A thread that fills and looks for faults in between is never far from either,
/// and the task that waits leaves it a processor.
#[derive(Debug, Default)]
pub(super) struct Walk {
    space: usize,
    from: u64,
    over: bool,
    pruned: Option<Instant>,
}

/// What came of a step of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stride {
    /// Something was placed.
    Placed,
    /// There is nothing to be placed before something changes.
    Nothing,
    /// To be tried again in a moment.
    Again,
}

impl Walk {
    /// Places a few pages, if any are to be had.
    pub(super) fn step(&mut self, shared: &Shared) -> Stride {
        if self.over || shared.options.fill_threads > 0 || !shared.is_filling() {
            return Stride::Nothing;
        }
        let Some((_, spaces)) = shared.work() else {
            self.over = true;
            return Stride::Nothing;
        };
        let stride = match place_hot(shared, &spaces) {
            Ok(true) => Ok(Stride::Placed),
            Ok(false) => self.place(shared, &spaces),
            Err(error) => Err(error),
        };
        drop(spaces);
        shared.worked(matches!(stride, Ok(Stride::Placed)));
        let stride = stride.unwrap_or_else(|error| {
            shared.fail(error);
            self.over = true;
            Stride::Nothing
        });
        let due = |pruned: Instant| pruned.elapsed() >= PRUNE;
        let idle = stride != Stride::Placed && shared.desk.store.used() > 0;
        if idle && self.pruned.is_none_or(due) {
            shared.prune();
            self.pruned = Some(Instant::now());
        }
        stride
    }

    fn place(&mut self, shared: &Shared, spaces: &[Arc<Space>]) -> Result<Stride, LazyError> {
        let pages = shared.options.chunk_pages;
        let mut otherwise = Stride::Nothing;
        // Each once, and the first one to its end.
        for _ in 0..=spaces.len() {
            if self.space >= spaces.len() {
                (self.space, self.from) = (0, 0);
            }
            let Some(space) = spaces.get(self.space) else {
                break;
            };
            loop {
                match space.place(&shared.desk, Aim::From(self.from), pages)? {
                    Step::Next(next) => {
                        self.from = next;
                        return Ok(Stride::Placed);
                    }
                    Step::Gone => return Ok(Stride::Placed),
                    Step::NotHere(Some(next)) => self.from = next,
                    Step::Unregistered(at) => {
                        otherwise = Stride::Again;
                        self.from = at + pages * PAGE;
                    }
                    Step::Changing => {
                        otherwise = Stride::Again;
                        break;
                    }
                    Step::NotHere(None) | Step::Missing(_) | Step::Nothing => break,
                }
            }
            (self.space, self.from) = (self.space + 1, 0);
        }
        Ok(otherwise)
    }
}

/// Places a few of the pages that are written all the time. False if there are none left.
fn place_hot(shared: &Shared, spaces: &[Arc<Space>]) -> Result<bool, LazyError> {
    let most = shared.options.chunk_pages;
    let mut done = 0;
    // Most lie apart from one another, and one by one they take some three times as long.
    while done == 0 || done < most / 3 {
        let Some((task, range)) = shared.hot.next(most) else {
            return Ok(done > 0);
        };
        // What cannot be placed now, or was moved since, comes in its turn. A forked child has the pages of
        // its parent.
        for space in spaces.iter().filter(|space| space.vpid == task) {
            space.place(&shared.desk, Aim::Within(range), range.pages)?;
        }
        done += range.pages;
    }
    Ok(true)
}

/// Places all of them.
fn fill_hot(shared: &Shared, spaces: &[Arc<Space>], pass: &mut Pass) -> Result<(), LazyError> {
    while !shared.is_stopping() && place_hot(shared, spaces)? {
        pass.placed = true;
    }
    Ok(())
}

#[derive(Default)]
struct Pass {
    placed: bool,
    again: bool,
}

/// One walk through an address space.
fn fill(shared: &Shared, space: &Arc<Space>, pass: &mut Pass) -> Result<(), LazyError> {
    let mut from = 0;
    while !shared.is_stopping() {
        let pages = shared.options.chunk_pages;
        for _ in 0..PAUSES {
            if !space.awaits_missing() {
                break;
            }
            thread::sleep(PAUSE);
        }
        match space.place(&shared.desk, Aim::From(from), pages)? {
            Step::Next(next) => {
                pass.placed = true;
                from = next;
            }
            Step::NotHere(Some(next)) => from = next,
            Step::NotHere(None) | Step::Missing(_) | Step::Nothing => break,
            Step::Changing => {
                pass.again = true;
                break;
            }
            Step::Unregistered(at) => {
                pass.again = true;
                // What lies behind may be registered.
                from = at + pages * PAGE;
            }
            Step::Gone => {
                pass.placed = true;
                break;
            }
        }
    }
    Ok(())
}
