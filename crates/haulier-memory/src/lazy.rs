//! The destination's lazy-pages daemon: serves the restored tasks' faults and fills their memory.
//!
//! One thread polls CRIU's connection and the tasks' userfaultfds, from the moment it has each: the
//! restorer itself touches lazy pages before `post-restore`, and waits for ever if nobody answers.
//! After [`LazyPagesHandle::fill`] further threads place everything in bulk.
//!
//! A fault on a page of the map is answered from the store, or when the page arrives; on any other
//! page it is answered with zeros. When every page of a task is placed its userfaultfd is closed,
//! which unregisters its memory. **Closing one earlier makes the missing pages zero**: on failure
//! kill the tasks first, then [`LazyPagesHandle::stop`].

mod content;
mod desk;
mod fill;
mod gate;
pub mod guard;
mod hot;
mod recycling;
mod serve;
mod shared;
mod sink;
mod space;
mod stats;
mod todo;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use haulier_criu::lazy_socket::{LazyListener, LazySocketError};
use haulier_criu::skeleton::Skeleton;

use crate::page::PageRange;
use crate::ranges::RangeSet;
use crate::store::PageStore;
use desk::Desk;
use guard::Guard;
use shared::Shared;
pub use sink::FaultSink;
pub use stats::{FillStats, Latency};
use todo::Todo;

/// Which pages the restored tasks lack: the skeleton's word on what exists.
#[derive(Debug, Clone, Default)]
pub struct LazyMap {
    /// The tasks, in any order. A task that is missing here has no pages to be placed.
    pub tasks: Vec<LazyTask>,
}

impl LazyMap {
    /// What the images of a dump say of it.
    pub fn of(skeleton: &Skeleton) -> LazyMap {
        let tasks = skeleton.tasks.iter().map(|task| LazyTask {
            vpid: task.pid,
            ranges: task
                .lazy
                .iter()
                .map(|range| PageRange {
                    start: range.start,
                    pages: range.pages,
                })
                .collect(),
            vmas: task.mappings.clone(),
        });
        LazyMap {
            tasks: tasks.collect(),
        }
    }
}

/// The lazy pages of one task.
#[derive(Debug, Clone, Default)]
pub struct LazyTask {
    /// Its pid in its own PID namespace, as in the image names.
    pub vpid: u32,
    /// Runs of pages that exist and are not in the images (`PE_LAZY`), ascending and disjoint.
    pub ranges: Vec<PageRange>,
    /// Its mappings, ascending: first address, and first beyond. A COPY must stay inside of one.
    pub vmas: Vec<(u64, u64)>,
}

/// What went wrong between the page store and the restored tasks.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// CRIU's connection failed, or the restore did.
    #[error(transparent)]
    Socket(#[from] LazySocketError),
    /// The map names a page outside of every mapping, or is not in order.
    #[error(
        "the skeleton lists pages of task {task} at {range}, which lie in none of its mappings"
    )]
    Map {
        /// The task.
        task: u32,
        /// The range.
        range: PageRange,
    },
    /// The map names a task twice, or CRIU sent it twice.
    #[error("task {task} comes twice")]
    Twice {
        /// The task.
        task: u32,
    },
    /// CRIU restored everything without handing out a task that lacks pages.
    #[error("CRIU gave no userfaultfd for task {task}, which lacks {pages} pages")]
    NoDescriptor {
        /// The task.
        task: u32,
        /// Pages in the map.
        pages: u64,
    },
    /// A page could not be placed.
    #[error("cannot place the page at {address:#x} of task {task}")]
    Place {
        /// The task.
        task: u32,
        /// Its address in the task.
        address: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// CRIU did not register the mapping of a page, and no unmapping explains it.
    #[error("the page at {address:#x} of task {task} lies in memory that CRIU has not registered")]
    Unregistered {
        /// The task.
        task: u32,
        /// Its address in the task.
        address: u64,
    },
    /// A userfaultfd does not work.
    #[error("cannot {doing} the userfaultfd of task {task}")]
    Descriptor {
        /// The task.
        task: u32,
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A thread, a descriptor or a wait could not be had.
    #[error("cannot {doing} for the lazy-pages daemon")]
    System {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The deadline passed before everything was placed.
    #[error("{missing} pages are still missing at the deadline, the first of task {task}")]
    Deadline {
        /// Pages not placed.
        missing: u64,
        /// A task that lacks pages.
        task: u32,
    },
    /// A thread of the daemon panicked, or its error was reported before.
    #[error("the lazy-pages daemon has failed")]
    Failed,
}

/// A daemon that listens and does not serve yet.
pub struct LazyPages {
    listener: LazyListener,
    options: Options,
    sink: Option<Arc<dyn FaultSink>>,
    guard: Option<Guard>,
}

impl fmt::Debug for LazyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyPages").finish_non_exhaustive()
    }
}

/// Processors from which on a thread that answers faults alone is not in the way of those that fill.
const MANY: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Options {
    /// Threads that only fill; with none the one that answers faults fills between them.
    fill_threads: usize,
    /// Pages that a thread of the bulk fill claims at once.
    chunk_pages: u64,
    /// Pages placed around a fault, from the faulting one on.
    fault_pages: u64,
}

impl Options {
    /// 64 KiB around a fault cost 20 us instead of 4.
    const APART: Options = Options {
        fill_threads: 2,
        chunk_pages: 64,
        fault_pages: 16,
    };
    /// Whatever is placed at once keeps the next fault waiting. With 8 pages around each half of the faults
    /// were answered within 32 us, with 16 within 64.
    const ALONE: Options = Options {
        fill_threads: 0,
        chunk_pages: 16,
        fault_pages: 8,
    };
}

impl LazyPages {
    /// Listens in CRIU's work directory. Has to happen before the restore is asked for.
    ///
    /// # Errors
    /// [`LazyError::Socket`].
    pub fn listen(work_dir: &Path) -> Result<Self, LazyError> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let options = match processors < MANY {
            true => Options::ALONE,
            false => Options::APART,
        };
        Ok(Self {
            listener: LazyListener::bind(work_dir)?,
            options,
            sink: None,
            guard: None,
        })
    }

    /// Sets the number of threads that fill in bulk beside the one that answers faults; with none of them
    /// that does both. Unless set there are 2, and none on a machine with fewer than 4 processors.
    #[must_use]
    pub fn fill_threads(mut self, threads: usize) -> Self {
        self.options = match threads {
            0 => Options::ALONE,
            fill_threads => Options {
                fill_threads,
                ..Options::APART
            },
        };
        self
    }

    /// Has `sink` asked for pages that tasks wait for and that have not arrived.
    #[must_use]
    pub fn faults_to(mut self, sink: Arc<dyn FaultSink>) -> Self {
        self.sink = Some(sink);
        self
    }

    /// Has `guard` hold every task's userfaultfd too, until everything is placed: if this process
    /// dies before, the guard kills the tasks instead of letting them see zeros.
    #[must_use]
    pub fn guarded_by(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }

    /// Starts serving. What the store has beyond the map is dropped.
    ///
    /// # Errors
    /// [`LazyError::Map`], [`LazyError::Twice`], [`LazyError::System`].
    pub fn start(self, map: LazyMap, store: Arc<PageStore>) -> Result<LazyPagesHandle, LazyError> {
        let mut expected = HashMap::new();
        for task in &map.tasks {
            let todo = Todo::new(&task.ranges, &task.vmas).map_err(|range| LazyError::Map {
                task: task.vpid,
                range,
            })?;
            if expected.insert(task.vpid, todo).is_some() {
                return Err(LazyError::Twice { task: task.vpid });
            }
        }
        store.retain_tasks(|task| expected.contains_key(&task));
        for task in &map.tasks {
            store.retain(task.vpid, &task.ranges);
        }
        let desk = Desk {
            sink: self.sink,
            guard: self.guard,
            shares_gate: self.options.fill_threads > 0,
            ..Desk::new(store)
        };
        let shared = Shared::new(desk, expected, self.options)?;
        let mut handle = LazyPagesHandle {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        let listener = self.listener;
        handle.spawn("lazy-serve", move || serve::run(&shared, listener))?;
        Ok(handle)
    }
}

/// A daemon at work. Dropping it stops it, with the consequences described at [`Self::stop`].
#[derive(Debug)]
pub struct LazyPagesHandle {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl LazyPagesHandle {
    /// Starts the bulk fill. To be called at CRIU's `post-restore`: before it the memory is not
    /// registered and refuses pages. A second call does nothing.
    ///
    /// # Errors
    /// [`LazyError::System`].
    pub fn fill(&mut self) -> Result<(), LazyError> {
        if !self.shared.begin_filling() {
            return Ok(());
        }
        for index in 0..self.shared.options.fill_threads {
            let shared = self.shared.clone();
            self.spawn("lazy-fill", move || fill::run(&shared, index))?;
        }
        Ok(())
    }

    /// Waits until every page of every task is placed and the userfaultfds are closed. CRIU's last
    /// word is still awaited behind that; [`Self::stop`] only once CRIU has answered the restore, or
    /// it fails for want of a listener.
    ///
    /// # Errors
    /// [`LazyError::Deadline`], after which the daemon goes on; or what made it fail.
    pub fn wait_filled(&self, deadline: Instant) -> Result<FillStats, LazyError> {
        self.shared.wait_filled(deadline)
    }

    /// Whether CRIU has said that every task is restored.
    pub fn restore_finished(&self) -> bool {
        self.shared.restore_finished()
    }

    /// Whether CRIU's restore has connected, which it does before it makes any task.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::SeqCst)
    }

    /// What the tasks still lack and the store does not have either, by task, in the addresses of
    /// the image: what is to be sent again after the link broke. Pages that are being received must
    /// not be under way: end the receiving threads first.
    pub fn missing(&self) -> Vec<(u32, RangeSet)> {
        self.shared.missing()
    }

    /// What was placed so far.
    pub fn stats(&self) -> FillStats {
        self.shared.stats()
    }

    /// Ends all threads and closes everything. Where pages are still missing, kill the tasks first:
    /// what is missing reads as zero from now on. A guard kills them first.
    pub fn stop(self) {}

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), LazyError> {
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .map_err(|source| LazyError::System {
                doing: "start a thread",
                source,
            })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for LazyPagesHandle {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // A panic was recorded as the daemon's failure.
            let _ = thread.join();
        }
        if let Some(guard) = self.shared.desk.guard.as_ref() {
            if !self.shared.is_complete() {
                guard.abandon();
            }
        }
        self.shared.close_all();
    }
}

#[cfg(test)]
mod tests;
