//! Moves between cgroups that must not wait.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use haulier_targets::cgroup::CgroupFs;

/// A move within some 8 ms of another finds the kernel prepared.
const PAUSE: Duration = Duration::from_millis(2);

/// Keeps the kernel prepared for a process to be moved between cgroups.
///
/// The first move in a while waits until every processor has noticed that one is coming (an RCU
/// grace period: 5 to 45 ms were seen), those that follow at once do not. So this process is put,
/// again and again, where it is.
#[derive(Debug)]
pub(crate) struct FastMoves {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FastMoves {
    /// Until this is dropped. `None` if it cannot be done; moves then take their time.
    pub(crate) fn keep(cgroups: &CgroupFs) -> Option<FastMoves> {
        let this = std::process::id() as i32;
        let group = cgroups.of(this).ok()?;
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            loop {
                // A refusal comes late enough to serve as well.
                let _ = group.add(this);
                if stopped.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        });
        Some(FastMoves {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for FastMoves {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic has nothing to tell that matters here.
            let _ = thread.join();
        }
    }
}
