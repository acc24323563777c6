//! How much of the push may lie in front of an answer.
//!
//! The answer to a fault has a connection of its own, but shares the link's queue with the push, and
//! a page that is asked for when it is on its way comes behind what was pushed before. So what the
//! kernel takes of the push at once is what the way to the peer holds, and half a millisecond more.

use std::time::{Duration, Instant};

use haulier_sys::tcp;
use haulier_transport::channel::Channel;
use rustix::net::sockopt;

/// How long the queue of a push may be, beside what is on the way.
const QUEUE: Duration = Duration::from_micros(500);

/// Below this nothing is fast.
const LEAST: u64 = 96 << 10;

/// The same on a line that is full, and kept from being fuller: what waits, waits here.
const LEAST_PACED: u64 = 32 << 10;

/// Beyond this nothing gets faster.
const MOST: u64 = 32 << 20;

/// How often the link is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Rates that are remembered: a single one says little.
const RATES: usize = 8;

/// Keeps the send buffer of a channel as short as its way to the peer allows. Of what is no TCP
/// connection it keeps off.
#[derive(Debug)]
pub(super) struct Window {
    bytes: u64,
    rates: [u64; RATES],
    looks: usize,
    next: Option<Instant>,
    /// When it was looked at last, and what had been sent by then.
    seen: Option<(Instant, u64)>,
}

impl Window {
    pub(super) fn new(channel: &Channel) -> Self {
        let mut window = Self {
            bytes: 0,
            rates: [0; RATES],
            looks: 0,
            next: None,
            seen: None,
        };
        if tcp::path(channel.socket()).is_ok() && window.set(channel, 2 * LEAST) {
            window.next = Some(Instant::now());
        }
        window
    }

    /// Looks at the link, if it is time to. `sent`: bytes that it was given so far; `paced`: no more is
    /// sent than leaves room on the line.
    pub(super) fn adjust(&mut self, channel: &Channel, sent: u64, paced: bool) {
        let now = Instant::now();
        if self.next.is_none_or(|next| now < next) {
            return;
        }
        let Ok(path) = tcp::path(channel.socket()) else {
            self.next = None;
            return;
        };
        // What TCP says of a near peer is the speed of bursts, several times what goes through.
        let rate = match self.seen.replace((now, sent)) {
            Some((then, before)) => path.rate.min(grown(sent - before, now - then)),
            None => path.rate,
        };
        self.rates[self.looks % RATES] = rate;
        self.looks += 1;
        let rate = self.rates.into_iter().max().unwrap_or(0);
        let least = if paced { LEAST_PACED } else { LEAST };
        let wanted = wanted(rate, path.round_trip, least);
        let change = wanted.abs_diff(self.bytes);
        if change > self.bytes / 8 && !self.set(channel, wanted) {
            self.next = None;
            return;
        }
        self.next = Some(now + LOOK);
    }

    fn set(&mut self, channel: &Channel, bytes: u64) -> bool {
        // By force: the limit for everybody is far below what a long way needs. Without the right
        // to it the kernel's own choice is better than that limit.
        let size = bytes as usize;
        self.bytes = bytes;
        sockopt::set_socket_send_buffer_size_force(channel.socket(), size).is_ok()
    }
}

/// Bytes per second, with room to grow.
fn grown(bytes: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(bytes) * 2 * 1_000_000 / micros).unwrap_or(u64::MAX)
}

/// The way is counted one and a half times, or else a window that is too small would make the rate
/// that keeps it small.
fn wanted(rate: u64, round_trip: Duration, least: u64) -> u64 {
    let time = round_trip * 3 / 2 + QUEUE;
    let bytes = u128::from(rate) * time.as_micros() / 1_000_000;
    u64::try_from(bytes).unwrap_or(MOST).clamp(least, MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_rate_and_round_trip() {
        let gigabit = 125_000_000;
        let near = Duration::from_micros(100);
        assert_eq!(wanted(0, near, LEAST), LEAST);
        assert_eq!(
            wanted(gigabit, near, LEAST),
            LEAST,
            "0.65 ms of it are less"
        );
        assert_eq!(wanted(10 * gigabit, near, LEAST), 812_500);
        assert_eq!(wanted(gigabit, Duration::from_millis(50), LEAST), 9_437_500);
        assert_eq!(wanted(gigabit / 2, near, LEAST_PACED), 40_625);
        assert_eq!(wanted(u64::MAX, Duration::from_secs(9), LEAST), MOST);
    }

    #[test]
    fn what_goes_through_has_room_to_grow() {
        assert_eq!(grown(1_000_000, Duration::from_millis(10)), 200_000_000);
        assert_eq!(grown(1, Duration::ZERO), 2_000_000);
        assert_eq!(grown(u64::MAX, Duration::from_nanos(1)), u64::MAX);
    }

    #[test]
    fn it_grows_until_the_link_is_full() {
        // A window on a way of 50 ms that carries a gigabit, from the smallest on.
        let (way, gigabit) = (Duration::from_millis(50), 125_000_000);
        let mut window = LEAST;
        for _ in 0..20 {
            window = wanted((window * 20).min(gigabit), way, LEAST);
        }
        assert_eq!(window, wanted(gigabit, way, LEAST));
    }
}
