//! The bulk fill: threads that place whatever has arrived.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use haulier_sys::priority;

use super::LazyError;
use super::shared::{PanicGuard, Shared};
use super::space::{Space, Step};
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
        match space.place(&shared.desk, from, false, pages)? {
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
