//! What every placing thread needs: contents, counters, whom to ask, whom to tell.

use std::sync::Arc;
use std::time::Duration;

use super::guard::Guard;
use super::recycling::Recycling;
use super::sink::FaultSink;
use super::stats::Counters;
use super::todo::Waiter;
use crate::store::PageStore;

pub(super) struct Desk {
    pub(super) store: Arc<PageStore>,
    pub(super) counters: Counters,
    pub(super) recycling: Recycling,
    /// Several threads place pages.
    pub(super) shares_gate: bool,
    pub(super) sink: Option<Arc<dyn FaultSink>>,
    pub(super) guard: Option<Guard>,
}

impl Desk {
    pub(super) fn new(store: Arc<PageStore>) -> Self {
        Self {
            store,
            counters: Counters::default(),
            recycling: Recycling::default(),
            shares_gate: true,
            sink: None,
            guard: None,
        }
    }

    /// A page that a thread of the task waited for has been placed.
    pub(super) fn answered(&self, task: u32, waiter: Waiter) {
        let waited = waiter.since.elapsed();
        self.counters.answered(waited, waiter.missing.is_some());
        self.settled(task, waiter);
    }

    /// A page that is not to be placed was waited for, and is zero.
    pub(super) fn answered_with_zero(&self, task: u32, waited: Duration, waiter: Waiter) {
        self.counters.zero_fault(waited);
        self.settled(task, waiter);
    }

    /// Nobody waits for the page any more.
    pub(super) fn settled(&self, task: u32, waiter: Waiter) {
        if let (Some(sink), Some(page)) = (&self.sink, waiter.missing) {
            sink.settled(task, page);
        }
    }

    /// Tasks wait for pages that have not arrived.
    pub(super) fn ask(&self, task: u32, pages: &[u64]) {
        if let Some(sink) = self.sink.as_ref().filter(|_| !pages.is_empty()) {
            sink.missing(task, pages);
        }
    }
}
