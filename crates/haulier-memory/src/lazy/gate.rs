//! Who may change an address space: many who place pages, or one who reads what its task has done.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use haulier_sys::priority::{self, Thread};

/// Lets in those who place pages together, and one who reads events alone. Whoever waits to be alone
/// comes next: a task stands still for him, while those who place come again at once. (The standard
/// library's lock lets them overtake: seen, five times for a fault.) He lends his priority to those who
/// are inside: some are the last to get a processor.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    /// Those who wait to be alone, for a look without the lock.
    wanted: AtomicU32,
    empty: Condvar,
    open: Condvar,
}

#[derive(Debug, Default)]
struct State {
    inside: u32,
    /// Those of them who may be kept from running, and who was lent priority.
    slow: Vec<(Thread, bool)>,
    alone: bool,
    waiting: u32,
}

/// Inside, until dropped.
#[derive(Debug)]
pub(super) struct Inside<'a> {
    gate: &'a Gate,
    alone: bool,
    slow: Option<Thread>,
}

impl Gate {
    /// Goes in with others.
    pub(super) fn together(&self) -> Inside<'_> {
        let slow = Thread::this();
        let closed = |state: &mut State| state.alone || state.waiting > 0;
        let waited = self.open.wait_while(self.lock(), closed);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.inside += 1;
        state.slow.extend(slow.map(|thread| (thread, false)));
        Inside {
            gate: self,
            alone: false,
            slow,
        }
    }

    /// Goes in alone, ahead of all who are not in yet.
    pub(super) fn alone(&self) -> Inside<'_> {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        state.waiting += 1;
        for (thread, lent) in &mut state.slow {
            // Without the right to it the wait is longer.
            *lent = *lent || thread.lend().is_ok();
        }
        let taken = |state: &mut State| state.alone || state.inside > 0;
        let waited = self.empty.wait_while(state, taken);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state.alone = true;
        self.wanted.fetch_sub(1, Ordering::Relaxed);
        Inside {
            gate: self,
            alone: true,
            slow: None,
        }
    }

    /// Whether somebody waits to be alone: who is inside should make haste.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        if self.alone {
            state.alone = false;
        } else {
            state.inside -= 1;
        }
        let own = |(thread, _): &(Thread, bool)| Some(*thread) == self.slow;
        let slow = state.slow.iter().position(own);
        let lent = slow.is_some_and(|index| state.slow.swap_remove(index).1);
        let (inside, waiting) = (state.inside, state.waiting);
        drop(state);
        if waiting == 0 && self.alone {
            self.gate.open.notify_all();
        } else if waiting > 0 && inside == 0 {
            self.gate.empty.notify_one();
        }
        if lent {
            // It succeeded in the other direction.
            let _ = priority::hand_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn who_is_alone_sees_nobody_and_is_let_in_past_those_who_come_again() {
        let gate = Gate::default();
        let (inside, over) = (AtomicU32::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let _in = gate.together();
                        inside.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            let alone = || {
                for _ in 0..1000 {
                    let _in = gate.alone();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
            };
            let both = [scope.spawn(alone), scope.spawn(alone)];
            let ended = both.map(thread::ScopedJoinHandle::join);
            over.store(true, Ordering::Relaxed);
            assert!(ended.iter().all(Result::is_ok));
        });
        assert!(!gate.is_wanted());
    }
}
