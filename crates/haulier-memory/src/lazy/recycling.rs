//! Whether the memory of pages that were placed should go back to the kernel page by page.
//!
//! The store's memory is in huge pages, which the kernel has back when all of one was placed. That is
//! cheapest where any free memory is as good as another. A virtual machine may have given its free memory
//! back to its host, which has to find it anew, ten times as slow as the placing itself: there it pays to
//! split the huge pages, so that the kernel gives each next page that is placed the memory of the last.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// A page that takes longer was not at hand. Usually it is some 2 us.
const SLOW: Duration = Duration::from_micros(6);
/// Pages placed at once that tell anything.
const TELLING: u64 = 4;
/// Of the last 32 times, those that have to be slow: a thread may also have lost its processor.
const MANY: u32 = 16;

/// What the last times took.
#[derive(Debug, Default)]
pub(super) struct Recycling {
    /// A bit for each of the last times, set if it was slow.
    last: AtomicU32,
    due: AtomicBool,
}

impl Recycling {
    /// So many pages were placed in this time.
    pub(super) fn note(&self, pages: u64, time: Duration) {
        if pages < TELLING || self.is_due() {
            return;
        }
        let slow = u128::from(pages) * SLOW.as_nanos() < time.as_nanos();
        // Two threads at once may lose a bit.
        let last = self.last.load(Ordering::Relaxed) << 1 | u32::from(slow);
        self.last.store(last, Ordering::Relaxed);
        if last.count_ones() >= MANY {
            // For good: once it is, placing is fast.
            self.due.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it should.
    pub(super) fn is_due(&self) -> bool {
        self.due.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_slow_to_be_had_is_recycled() {
        let recycling = Recycling::default();
        let (fast, slow) = (Duration::from_micros(40), Duration::from_micros(160));
        for turn in 0..1000 {
            recycling.note(16, if turn % 3 == 0 { slow } else { fast });
            recycling.note(1, slow);
        }
        assert!(!recycling.is_due(), "something else was slow now and then");
        (0..MANY).for_each(|_| recycling.note(16, slow));
        assert!(recycling.is_due());
        (0..100).for_each(|_| recycling.note(16, fast));
        assert!(recycling.is_due());
    }
}
