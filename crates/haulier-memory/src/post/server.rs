//! The source's side: the frozen tasks' remaining pages, each once.

mod answer;
mod run;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

use super::order::Order;
use super::request::RequestError;
use crate::page::PageRange;
use crate::ranges::RangeSet;
use crate::reader::{ReadError, TaskMemory};
use crate::stream::{StreamError, StreamOptions};
use crate::wait::Wait;
use run::Run;

/// The remaining pages of one task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskOrder {
    /// Its pid in our PID namespace.
    pub pid: i32,
    /// Its pid in its own PID namespace, which names it on the wire and in the store.
    pub task: u32,
    /// Its pages, in the order in which to push them: those first that are likely to be needed
    /// first.
    pub ranges: Vec<PageRange>,
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Number of the round that all pages belong to; the destination has to expect it.
    pub round: u32,
    /// How what is pushed is compressed, and how fast it may be. Answers are sent as they are, and
    /// at once.
    pub stream: StreamOptions,
    /// Pages behind one that was asked for that are sent behind it over the fault channel.
    pub neighbours: u64,
    /// Pages pushed at once.
    pub chunk_pages: u64,
}

impl ServeOptions {
    /// The usual: 15 neighbours (fewer on a slow link), chunks of 128 KiB.
    pub fn new(round: u32) -> Self {
        Self {
            round,
            stream: StreamOptions::default(),
            neighbours: 15,
            chunk_pages: 32,
        }
    }
}

/// What was sent. The pages of all ways of sending add up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServeStats {
    /// Pages sent, the zero ones included.
    pub pages: u64,
    /// Pages of which only the address was sent, since they are zero.
    pub zero_pages: u64,
    /// Bytes sent, headers included.
    pub wire_bytes: u64,
    /// Pages that were pushed.
    pub pushed: u64,
    /// Pages that were sent because a task waits for them.
    pub answered: u64,
    /// Pages that were sent because one in front of them was waited for.
    pub neighbours: u64,
    /// Pages that were asked for when they were on their way.
    pub under_way: u64,
    /// Time from the call to the last byte that the kernel took.
    pub elapsed: Duration,
}

impl ServeStats {
    fn add(&mut self, other: &ServeStats) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.wire_bytes += other.wire_bytes;
        self.pushed += other.pushed;
        self.answered += other.answered;
        self.neighbours += other.neighbours;
        self.under_way += other.under_way;
    }
}

/// How far the server is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServeProgress {
    /// Pages that are still to be sent.
    pub remaining: u64,
    /// Pages sent over all links, those that were lost with a link included.
    pub sent: u64,
}

/// Why not everything was sent.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The link failed. [`PageServer::resume`] and another call go on over a new one.
    #[error("the link broke while memory was being sent")]
    Link(#[from] TransportError),
    /// A page could not be read: the process is gone, and with it everything that was not sent.
    #[error("a page that is still to be sent cannot be read")]
    Read(#[from] ReadError),
    /// The pages could not be sent for another reason.
    #[error("a page could not be sent")]
    Stream(#[source] StreamError),
    /// The destination asks for what cannot be.
    #[error("{peer} sent what is no request for pages")]
    Request {
        /// The peer's address.
        peer: String,
        /// What is wrong with it.
        #[source]
        source: RequestError,
    },
    /// The destination names a task that is not migrated.
    #[error("the destination lacks pages of task {task}, of which there is none")]
    NoTask {
        /// The task.
        task: u32,
    },
    /// A thread or a descriptor could not be had.
    #[error("cannot {doing} to send pages")]
    System {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A sending thread panicked.
    #[error("a sender of pages panicked")]
    Panicked,
}

impl ServeError {
    /// Whether the link failed, so that another one may help.
    pub fn is_broken_link(&self) -> bool {
        let ServeError::Link(error) = self else {
            return false;
        };
        matches!(
            error,
            TransportError::Broken { .. }
                | TransportError::Closed { .. }
                | TransportError::Deadline { .. }
        )
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, ServeError::Link(error) if error.is_cancelled())
    }
}

/// What is left of the frozen tasks at the source. It outlives links: what a call of
/// [`Self::serve`] could not send the next one does.
#[derive(Debug)]
pub struct PageServer {
    memories: Vec<TaskMemory>,
    state: Mutex<State>,
    /// No answer is being made any more.
    calm: Condvar,
}

#[derive(Debug, Default)]
struct State {
    order: Order,
    sent: u64,
    /// Somebody waits for a page: the push pauses.
    urgent: bool,
}

impl PageServer {
    /// A server of these pages of frozen tasks.
    ///
    /// # Errors
    /// [`ReadError::Range`].
    pub fn new(tasks: Vec<TaskOrder>) -> Result<Self, ReadError> {
        for task in &tasks {
            if let Some(range) = task.ranges.iter().find(|range| !range.is_valid()) {
                return Err(ReadError::Range {
                    pid: task.pid,
                    range: *range,
                });
            }
        }
        let memory = |task: &TaskOrder| TaskMemory::new(task.pid, task.task);
        Ok(Self {
            memories: tasks.iter().map(memory).collect(),
            state: Mutex::new(State {
                order: Order::new(tasks.into_iter().map(|task| (task.task, task.ranges))),
                ..State::default()
            }),
            calm: Condvar::new(),
        })
    }

    /// Sends everything that is to be sent: what the destination asks for over `faults`, ahead of all
    /// the rest, which is pushed over the memory channels, or without any over `faults` as well. Ends
    /// with the end of the round on every channel. The destination has everything only when it says
    /// so.
    ///
    /// # Errors
    /// The first [`ServeError`]; all channels are shut down then.
    pub fn serve(
        &self,
        faults: &mut Channel,
        memory: &mut [Channel],
        options: &ServeOptions,
        wait: &Wait,
    ) -> Result<ServeStats, ServeError> {
        let start = Instant::now();
        let mut stats = Run::new(self, options, faults, memory)?.all(faults, memory, wait)?;
        stats.elapsed = start.elapsed();
        Ok(stats)
    }

    /// After a link broke: what the destination misses, and nothing else, is to be sent.
    ///
    /// # Errors
    /// [`ServeError::NoTask`]; nothing has changed then.
    pub fn resume(&self, missing: &[(u32, RangeSet)]) -> Result<(), ServeError> {
        let mut state = self.state();
        match state.order.reset(missing) {
            None => Ok(()),
            Some(task) => Err(ServeError::NoTask { task }),
        }
    }

    /// How far it is; from any thread.
    pub fn progress(&self) -> ServeProgress {
        let state = self.state();
        ServeProgress {
            remaining: state.order.remaining(),
            sent: state.sent,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
