//! Threads that are lent priority while a task waits for what they have in hand.
//!
//! A page that is asked for when it is on its way is not sent again: it comes when the thread that sends
//! it, or the one that receives it, has had its turn on the processor. Where processors are short that
//! takes a tick of the scheduler or more (seen: 2 to 7 ms, where the way itself took 0.1 ms).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use haulier_sys::priority::{self, Thread};

/// The threads.
#[derive(Debug, Default)]
pub(super) struct Helpers(Mutex<Vec<Arc<Helper>>>);

#[derive(Debug)]
struct Helper {
    thread: Thread,
    lent: AtomicBool,
}

impl Helpers {
    /// The calling thread is one of them, until this is dropped by it.
    pub(super) fn join(&self) -> Helping<'_> {
        let helper = Thread::this().map(|thread| {
            let lent = AtomicBool::new(false);
            Arc::new(Helper { thread, lent })
        });
        self.all().extend(helper.clone());
        Helping {
            helpers: self,
            helper,
        }
    }

    /// Has all of them run ahead of others, each until it hands back.
    pub(super) fn lend(&self) {
        for helper in self.all().iter() {
            if !helper.lent.load(Ordering::SeqCst) {
                // Without the right to it the page comes when it comes.
                let _ = helper.thread.lend();
                // Behind it, or it could be handed back before it was lent.
                helper.lent.store(true, Ordering::SeqCst);
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<Helper>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The calling thread's part in [`Helpers`].
#[derive(Debug)]
pub(super) struct Helping<'a> {
    helpers: &'a Helpers,
    helper: Option<Arc<Helper>>,
}

impl Helping<'_> {
    /// Gives back what was lent, if anything was.
    pub(super) fn hand_back(&self) {
        // Not under the lock: from here on others may run first, and who lends would wait for them.
        if let Some(helper) = &self.helper {
            if helper.lent.swap(false, Ordering::SeqCst) {
                let _ = priority::hand_back();
            }
        }
    }
}

impl Drop for Helping<'_> {
    fn drop(&mut self) {
        if let Some(helper) = &self.helper {
            // Its number may be another thread's soon.
            let others = |other: &Arc<Helper>| !Arc::ptr_eq(other, helper);
            self.helpers.all().retain(others);
            self.hand_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// Real-time priority of the calling thread: 0 if it has none.
    fn priority() -> i32 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let behind_name = stat.rsplit(") ").next().unwrap();
        let fields: Vec<&str> = behind_name.split(' ').collect();
        // The 40th of proc_pid_stat(5); the state is the third.
        fields[40 - 3].parse().unwrap()
    }

    #[test]
    fn a_thread_has_it_from_lending_to_handing_back_and_never_after_it_left() {
        let helpers = &Helpers::default();
        let (ready, is_ready) = mpsc::channel();
        let (go, goes) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let helper = scope.spawn(move || {
                let helping = helpers.join();
                helping.hand_back();
                ready.send(()).unwrap();
                goes.recv().unwrap();
                let lent = priority();
                helping.hand_back();
                let handed_back = priority();
                ready.send(()).unwrap();
                goes.recv().unwrap();
                let again = priority();
                drop(helping);
                ready.send(()).unwrap();
                goes.recv().unwrap();
                (lent, handed_back, again, priority())
            });
            for _ in 0..3 {
                is_ready.recv().unwrap();
                helpers.lend();
                go.send(()).unwrap();
            }
            let seen = helper.join().unwrap();
            // Not where the machine refuses it.
            let lent = i32::from(seen.0 > 0);
            assert_eq!(seen, (lent, 0, lent, 0));
            assert!(helpers.all().is_empty());
        });
    }
}
