//! A histogram of durations in powers of two of a microsecond.

use std::time::Duration;

use serde::ser::{Serialize, SerializeSeq, Serializer};

/// Buckets: below 1 µs, then [2^(n-1), 2^n) µs; the last, from some 36 minutes on, has no end.
const BUCKETS: usize = 33;

/// How many durations fell into each power of two of a microsecond. Of a fixed size, and cheap
/// enough to record every fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    longest: Duration,
}

/// A bucket that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Bucket {
    /// First microsecond of it.
    pub from_us: u64,
    /// First microsecond beyond it; `None` for the last one, which has no end.
    pub below_us: Option<u64>,
    /// How many durations fell into it.
    pub count: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            counts: [0; BUCKETS],
            longest: Duration::ZERO,
        }
    }
}

impl Histogram {
    /// Counts a duration.
    pub fn record(&mut self, time: Duration) {
        self.counts[index_of(time)] += 1;
        self.longest = self.longest.max(time);
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The longest one, exactly; zero if none was counted.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// A duration that `percent` per cent of those counted do not exceed: the end of the bucket
    /// in which that share is reached, or the longest, if that is shorter. So at most twice the
    /// true one. `None` if nothing was counted.
    pub fn percentile(&self, percent: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = (count as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil();
        let wanted = (wanted as u64).clamp(1, count);
        let mut seen = 0;
        let index = self.counts.iter().position(|more| {
            seen += more;
            seen >= wanted
        });
        let end = index.and_then(end_of).map(Duration::from_micros);
        Some(end.map_or(self.longest, |end| end.min(self.longest)))
    }

    /// The buckets that are not empty, the shortest durations first.
    pub fn iter(&self) -> impl Iterator<Item = Bucket> + '_ {
        let filled = self
            .counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        filled.map(|(index, count)| Bucket {
            from_us: index.checked_sub(1).map_or(0, |power| 1 << power),
            below_us: end_of(index),
            count: *count,
        })
    }
}

/// As the list of its buckets that are not empty.
impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        for bucket in self.iter() {
            list.serialize_element(&bucket)?;
        }
        list.end()
    }
}

fn index_of(time: Duration) -> usize {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let bits = u64::BITS - micros.leading_zeros();
    (bits as usize).min(BUCKETS - 1)
}

fn end_of(index: usize) -> Option<u64> {
    (index < BUCKETS - 1).then(|| 1 << index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(micros: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for time in micros {
            histogram.record(Duration::from_micros(*time));
        }
        histogram
    }

    #[test]
    fn buckets_are_powers_of_two_of_a_microsecond() {
        let mut histogram = of(&[1, 2, 3, 4, 127, 128]);
        histogram.record(Duration::from_nanos(900));
        histogram.record(Duration::from_secs(1 << 40));
        let buckets: Vec<_> = histogram
            .iter()
            .map(|b| (b.from_us, b.below_us, b.count))
            .collect();
        assert_eq!(
            buckets,
            [
                (0, Some(1), 1),
                (1, Some(2), 1),
                (2, Some(4), 2),
                (4, Some(8), 1),
                (64, Some(128), 1),
                (128, Some(256), 1),
                (1 << 31, None, 1),
            ]
        );
    }

    #[test]
    fn an_empty_one_has_no_percentiles() {
        assert_eq!(Histogram::default().percentile(50.0), None);
        assert_eq!(Histogram::default().count(), 0);
        assert_eq!(Histogram::default().iter().count(), 0);
    }

    #[test]
    fn a_percentile_is_not_beyond_the_longest() {
        assert_eq!(of(&[70]).percentile(50.0), Some(Duration::from_micros(70)));
        let many = of(&[&[10; 99][..], &[5000]].concat());
        assert_eq!(many.percentile(50.0), Some(Duration::from_micros(16)));
        assert_eq!(many.percentile(99.0), Some(Duration::from_micros(16)));
        assert_eq!(many.percentile(99.5), Some(Duration::from_micros(5000)));
    }

    proptest! {
        #[test]
        fn a_percentile_is_at_least_the_true_one_and_at_most_twice_it(
            mut times in prop::collection::vec(1_u64..10_000_000, 1..200),
            percent in 0.0..100.0_f64,
        ) {
            let said = of(&times).percentile(percent).unwrap().as_micros() as u64;
            times.sort_unstable();
            let rank = ((times.len() as f64 * percent / 100.0).ceil() as usize).max(1);
            let real = times[rank - 1];
            prop_assert!(real <= said && said <= real * 2);
        }

        #[test]
        fn merging_is_recording_all(
            left in prop::collection::vec(0_u64..10_000_000, 0..50),
            right in prop::collection::vec(0_u64..10_000_000, 0..50),
        ) {
            let mut merged = of(&left);
            merged.merge(&of(&right));
            prop_assert_eq!(merged, of(&[left, right].concat()));
        }
    }
}
