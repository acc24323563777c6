//! Keeping the processors from sleeping.
//!
//! On a virtual machine an idle processor takes tens of microseconds to wake up. A closed-loop client
//! of an idle machine is then slower than the same client beside a migration, and "normal" would be
//! less than what is measured during the rounds. Beside threads that take only what nobody else wants,
//! it is the same for all phases and all contenders.

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use haulier_sys::priority;

/// A thread for each processor, until it is dropped.
pub(crate) struct Awake {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    /// Starts them.
    pub(crate) fn keep() -> Result<Awake> {
        let stop = Arc::new(AtomicBool::new(false));
        let processors = thread::available_parallelism().context("how many processors?")?;
        let mut awake = Awake {
            stop: Arc::clone(&stop),
            threads: Vec::new(),
        };
        for _ in 0..processors.get() {
            let (stop, (ready, is_ready)) = (Arc::clone(&stop), std::sync::mpsc::channel());
            awake.threads.push(thread::spawn(move || {
                let idle = priority::leftover();
                let spin = idle.is_ok();
                // Nobody waits for it any more only if the thread that started it has failed.
                let _ = ready.send(idle);
                while spin && !stop.load(Ordering::Relaxed) {
                    for _ in 0..1000 {
                        spin_loop();
                    }
                }
            }));
            is_ready
                .recv()
                .context("a thread that keeps a processor awake has ended")?
                .context("cannot run at the lowest priority")?;
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
