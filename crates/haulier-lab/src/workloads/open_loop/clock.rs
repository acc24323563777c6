//! When each request is due.

use std::time::{Duration, Instant};

/// Clients closer together than this share a time: the thread wakes once for them.
const SPACING: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    pub(super) began: Instant,
    interval: Duration,
    /// At how many different times within an interval clients send.
    slots: u32,
}

impl Clock {
    pub(super) fn new(began: Instant, interval: Duration, clients: usize) -> Clock {
        let interval = interval.max(SPACING);
        let most = u32::try_from(interval.as_millis() / SPACING.as_millis()).unwrap_or(u32::MAX);
        let clients = u32::try_from(clients).unwrap_or(u32::MAX);
        Clock {
            began,
            interval,
            slots: clients.clamp(1, most.max(1)),
        }
    }

    fn offset(&self, client: usize) -> Duration {
        let slot = client as u64 % u64::from(self.slots);
        self.interval * u32::try_from(slot).unwrap_or(0) / self.slots
    }

    /// When request `number` of a client is due; both count from 0.
    pub(super) fn due(&self, client: usize, number: u64) -> Instant {
        let whole = self.interval.as_nanos() as u64;
        self.began + self.offset(client) + Duration::from_nanos(whole.saturating_mul(number))
    }

    /// How many requests of a client are due by `now`.
    pub(super) fn due_by(&self, client: usize, now: Instant) -> u64 {
        let first = self.began + self.offset(client);
        match now.checked_duration_since(first) {
            None => 0,
            Some(since) => (since.as_nanos() / self.interval.as_nanos()) as u64 + 1,
        }
    }

    /// The next time after `now` at which some client sends.
    pub(super) fn next_tick(&self, now: Instant) -> Instant {
        let step = (self.interval / self.slots).as_nanos().max(1);
        let passed = now.saturating_duration_since(self.began).as_nanos() / step + 1;
        self.began + Duration::from_nanos((passed * step) as u64)
    }
}
