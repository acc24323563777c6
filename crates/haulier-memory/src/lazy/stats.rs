//! What the lazy-pages daemon counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
    /// Pages that tasks waited for and that were here already.
    pub local_faults: u64,
    /// Pages that tasks waited for before they had arrived, and that have been placed since.
    pub remote_faults: u64,
    /// Faults met before their page had arrived, those that still wait included.
    pub parked: u64,
    /// How long tasks waited for pages that had to be waited for.
    pub remote_latency: Latency,
    /// How long tasks waited for all other pages.
    pub local_latency: Latency,
    /// Tasks that vanished before they were complete.
    pub gone: Vec<u32>,
}

/// Buckets of a [`Latency`]: the last one begins at half an hour.
const BUCKETS: usize = 32;

/// How long tasks stood still for pages, from the moment a fault was seen until the page was placed,
/// as a histogram over powers of two. Two faults on one page count once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// Number of waits by duration: the first below 1 microsecond, number `n` from 2^(n-1)
    /// microseconds to below 2^n, the last all longer ones.
    pub buckets: [u64; BUCKETS],
    /// The longest, in microseconds.
    pub longest_us: u64,
    /// Sum of all, in microseconds.
    pub sum_us: u64,
}

impl Latency {
    /// Number of waits.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// A duration that this part of the waits did not exceed: 0.5 for the median. It is the upper
    /// end of a bucket, or the longest wait if that is less. `None` without waits.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let count = self.count();
        let rank = ((count as f64 * part).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|waits| {
            seen += waits;
            *waits > 0 && seen >= rank
        })?;
        let end = if bucket + 1 == BUCKETS {
            self.longest_us
        } else {
            1 << bucket
        };
        Some(Duration::from_micros(end.min(self.longest_us.max(1))))
    }

    /// The waits of both.
    #[must_use]
    pub fn merged(mut self, other: &Latency) -> Latency {
        for (sum, more) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += more;
        }
        self.longest_us = self.longest_us.max(other.longest_us);
        self.sum_us += other.sum_us;
        self
    }
}

#[derive(Debug, Default)]
struct Waits {
    buckets: [AtomicU64; BUCKETS],
    longest_us: AtomicU64,
    sum_us: AtomicU64,
}

impl Waits {
    fn add(&self, wait: Duration) {
        let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        self.longest_us.fetch_max(micros, Ordering::Relaxed);
        self.sum_us.fetch_add(micros, Ordering::Relaxed);
    }

    fn snapshot(&self) -> Latency {
        let mut latency = Latency {
            longest_us: self.longest_us.load(Ordering::Relaxed),
            sum_us: self.sum_us.load(Ordering::Relaxed),
            ..Latency::default()
        };
        for (to, from) in latency.buckets.iter_mut().zip(&self.buckets) {
            *to = from.load(Ordering::Relaxed);
        }
        latency
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    copied: AtomicU64,
    zeroed: AtomicU64,
    present: AtomicU64,
    faults: AtomicU64,
    zero_faults: AtomicU64,
    parked: AtomicU64,
    remote: Waits,
    local: Waits,
    local_faults: AtomicU64,
    remote_faults: AtomicU64,
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

    /// Faults so far.
    pub(super) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    pub(super) fn zero_fault(&self, waited: Duration) {
        self.zero_faults.fetch_add(1, Ordering::Relaxed);
        self.local.add(waited);
    }

    pub(super) fn parked(&self) {
        self.parked.fetch_add(1, Ordering::Relaxed);
    }

    /// A page that a task waited for was placed. `remote`: it had not arrived at the fault.
    pub(super) fn answered(&self, waited: Duration, remote: bool) {
        let (faults, waits) = if remote {
            (&self.remote_faults, &self.remote)
        } else {
            (&self.local_faults, &self.local)
        };
        faults.fetch_add(1, Ordering::Relaxed);
        waits.add(waited);
    }

    pub(super) fn snapshot(&self, gone: &[u32]) -> FillStats {
        FillStats {
            copied: self.copied.load(Ordering::Relaxed),
            zeroed: self.zeroed.load(Ordering::Relaxed),
            present: self.present.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            zero_faults: self.zero_faults.load(Ordering::Relaxed),
            local_faults: self.local_faults.load(Ordering::Relaxed),
            remote_faults: self.remote_faults.load(Ordering::Relaxed),
            parked: self.parked.load(Ordering::Relaxed),
            remote_latency: self.remote.snapshot(),
            local_latency: self.local.snapshot(),
            gone: gone.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_sorted_by_powers_of_two() {
        let waits = Waits::default();
        for micros in [0, 1, 2, 3, 4, 100, 1000, u64::MAX] {
            waits.add(Duration::from_micros(micros));
        }
        let latency = waits.snapshot();
        let filled: Vec<_> = (0..BUCKETS).filter(|n| latency.buckets[*n] > 0).collect();
        assert_eq!(filled, [0, 1, 2, 3, 7, 10, 31]);
        assert_eq!(latency.buckets[2], 2, "2 and 3 microseconds");
        assert_eq!(latency.count(), 8);
    }

    #[test]
    fn quantiles_are_upper_bounds() {
        assert_eq!(Latency::default().quantile(0.5), None);
        let waits = Waits::default();
        for micros in 1..=100 {
            waits.add(Duration::from_micros(micros));
        }
        let latency = waits.snapshot();
        assert_eq!(latency.quantile(0.5), Some(Duration::from_micros(64)));
        assert_eq!(latency.quantile(0.0), Some(Duration::from_micros(2)));
        assert_eq!(latency.quantile(1.0), Some(Duration::from_micros(100)));
        let both = latency.merged(&latency);
        assert_eq!(
            (both.count(), both.longest_us, both.sum_us),
            (200, 100, 10100)
        );
    }
}
