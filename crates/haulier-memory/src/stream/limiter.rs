//! The limit on bytes per second.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use haulier_transport::error::TransportError;

use crate::page::PAGE;
use crate::reader::CHUNK_PAGES;
use crate::wait::Wait;

/// Length of the longest burst, as time: what was not used for longer is lost.
const BURST: Duration = Duration::from_millis(20);

/// The longest sleep in one piece, so that a cancellation is noticed.
const NAP: Duration = Duration::from_millis(20);

/// A limit that several channels share.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    bucket: Mutex<Option<Bucket>>,
}

impl Limiter {
    /// A limit in bytes per second.
    pub(super) fn new(bandwidth: Option<u64>) -> Self {
        let limiter = Self::default();
        limiter.set(bandwidth);
        limiter
    }

    /// Changes the limit.
    pub(super) fn set(&self, bandwidth: Option<u64>) {
        let bucket = bandwidth.map(|rate| Bucket::new(rate, Instant::now()));
        *self.bucket.lock().unwrap_or_else(PoisonError::into_inner) = bucket;
    }

    /// Waits until so many bytes may be sent. Returns how long that took.
    pub(super) fn admit(
        &self,
        bytes: u64,
        peer: &str,
        wait: &Wait,
    ) -> Result<Duration, TransportError> {
        const DOING: &str = "keeping to the limit of its bandwidth";
        let start = Instant::now();
        let delay = {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            match bucket.as_mut() {
                Some(bucket) => bucket.take(bytes, start),
                None => return Ok(Duration::ZERO),
            }
        };
        let until = start + delay;
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(start.elapsed());
            }
            if wait.is_cancelled() {
                return Err(TransportError::Cancelled { doing: DOING });
            }
            let allowed = wait.remaining();
            if allowed.is_zero() {
                let peer = peer.to_owned();
                return Err(TransportError::Deadline { peer, doing: DOING });
            }
            thread::sleep(rest.min(NAP).min(allowed));
        }
    }
}

/// Pages of a chunk at most, so that a frame is no burst.
pub(super) fn chunk_pages(bandwidth: Option<u64>) -> u64 {
    bandwidth.map_or(CHUNK_PAGES, |rate| {
        let burst = u128::from(rate) * BURST.as_nanos() / 1_000_000_000;
        (burst as u64 / PAGE).clamp(1, CHUNK_PAGES)
    })
}

/// A token bucket that may be overdrawn by one frame: who overdraws it waits until it is even.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    /// When all that was taken has been earned.
    even: Instant,
}

impl Bucket {
    fn new(rate: u64, now: Instant) -> Self {
        // Slower than this is not meant, and would overflow below.
        let rate = rate.max(1024);
        Self { rate, even: now }
    }

    /// Takes bytes; returns how long to wait before they are sent.
    fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.even = self.even.max(earliest);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
        self.even += Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.even.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// In no stretch of time is more sent than the rate allows, a burst and a frame aside; and
        /// a sender that always has something gets all of it.
        #[test]
        fn what_is_sent_keeps_to_the_rate(
            rate in 1024..10_000_000_000_u64,
            frames in prop::collection::vec((1..300_000_u64, 0..50_u64), 1..100),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(rate, start);
            let mut now = start;
            let (mut sent, mut idle) = (Vec::new(), Duration::ZERO);
            for (bytes, pause) in frames {
                // The fake clock.
                let pause = Duration::from_millis(pause);
                now += pause;
                idle += pause;
                now += bucket.take(bytes, now);
                sent.push((now, bytes));
            }
            let total: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
            let needed = Duration::from_secs_f64(total as f64 / rate as f64);
            prop_assert!(now - start <= needed + idle + Duration::from_millis(1));
            for from in 0..sent.len() {
                let mut bytes = 0;
                for (at, more) in &sent[from..] {
                    bytes += more;
                    let time = *at - sent[from].0 + BURST + Duration::from_millis(1);
                    let allowed = time.as_secs_f64() * rate as f64 + sent[from].1 as f64;
                    prop_assert!(bytes as f64 <= allowed, "{} of {}", bytes, allowed);
                }
            }
        }
    }

    #[test]
    fn chunks_shrink_with_the_limit() {
        assert_eq!(chunk_pages(None), CHUNK_PAGES);
        assert_eq!(chunk_pages(Some(u64::MAX)), CHUNK_PAGES);
        assert_eq!(chunk_pages(Some(1 << 20)), 5);
        assert_eq!(chunk_pages(Some(0)), 1);
    }

    #[test]
    fn a_sleeping_sender_is_woken_by_the_deadline() {
        let limiter = Limiter::new(Some(1024));
        let wait = Wait::uncancellable(Duration::from_millis(1));
        let error = limiter.admit(1 << 30, "peer", &wait).unwrap_err();
        assert!(matches!(error, TransportError::Deadline { .. }), "{error}");
        limiter.set(None);
        assert!(limiter.admit(1 << 30, "peer", &wait).is_ok());
    }
}
