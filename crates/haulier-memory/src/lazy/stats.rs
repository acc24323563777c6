//! What the lazy-pages daemon counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// What was placed, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FillStats {
    /// Pages placed with contents.
    pub copied: u64,
    /// Pages of the map placed as zero.
    pub zeroed: u64,
    /// Pages of the map that were present already.
    pub present: u64,
    /// Faults reported.
    pub faults: u64,
    /// Faults on pages that are not in the map, answered with a zero page.
    pub zero_faults: u64,
    /// Attempts to answer a fault before its page had arrived.
    pub parked: u64,
    /// Tasks that vanished before they were complete.
    pub gone: Vec<u32>,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    copied: AtomicU64,
    zeroed: AtomicU64,
    present: AtomicU64,
    faults: AtomicU64,
    zero_faults: AtomicU64,
    parked: AtomicU64,
}

impl Counters {
    pub(super) fn copied(&self, pages: u64) {
        self.copied.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn zeroed(&self, pages: u64) {
        self.zeroed.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn present(&self, pages: u64) {
        self.present.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn zero_fault(&self) {
        self.zero_faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn parked(&self) {
        self.parked.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, gone: &[u32]) -> FillStats {
        FillStats {
            copied: self.copied.load(Ordering::Relaxed),
            zeroed: self.zeroed.load(Ordering::Relaxed),
            present: self.present.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            zero_faults: self.zero_faults.load(Ordering::Relaxed),
            parked: self.parked.load(Ordering::Relaxed),
            gone: gone.to_vec(),
        }
    }
}
