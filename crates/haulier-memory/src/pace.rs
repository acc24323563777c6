//! Memory goes no faster than leaves room beside it.
//!
//! TCP fills a line until there is a queue in front of it, and whoever shares the line waits in that
//! queue: the target's clients, and the answers to its faults. So a line that is seen to be full is
//! not filled any more. Seen on a line of 1 Gbit/s with a queue of 20 ms: a client that writes
//! without pause keeps 8 % of its rate beside the rounds, and 85 % when they take nine tenths.

mod rule;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use haulier_sys::tcp;
use haulier_transport::channel::Channel;

use self::rule::{Look, Rule};
use crate::stream::StreamOptions;

/// How often the way to the peer is looked at.
const EACH: Duration = Duration::from_millis(20);

/// How long the line may be taken in one piece when it is full: who comes between two pieces waits
/// half as long. Without it the kernel makes packets of 64 KiB for a near peer, however slow. The
/// target's clients ask and answer all the time (27 us are two packets of a line of 1 Gbit/s); a task
/// whose fault is answered has waited longer for other things, and short pieces cost processor time.
pub(crate) const BESIDE_CLIENTS: Duration = Duration::from_micros(27);
pub(crate) const BESIDE_ANSWERS: Duration = Duration::from_micros(65);

/// From this percentage on a line is used as a whole.
const WHOLE: u8 = 98;

/// No piece is shorter: one packet, more or less.
const LEAST_PIECE: u64 = 1400;

/// From here on the kernel's own pieces are no longer.
const MOST_PIECE: u64 = 64 << 10;

/// Paces connections that carry memory, all of them over the same line. It is looked after by the
/// threads that send, before each thing they send.
#[derive(Debug)]
pub(crate) struct Pacer {
    inner: Mutex<Inner>,
    piece_time: Duration,
    /// Largest piece in bytes; 0 for any.
    piece: AtomicU64,
    /// Bytes per second of one connection; 0 if it is not paced.
    each: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    /// `None`: nothing is paced, and nothing will be.
    rule: Option<Rule>,
    /// Duplicates of the connections.
    channels: Vec<Channel>,
    /// When it was looked last, and what all had delivered by then.
    seen: Option<(Instant, u64)>,
    paced: Option<u64>,
    /// What the line carried when it was found full last.
    line: Option<u64>,
}

impl Pacer {
    /// For these connections.
    pub(crate) fn new<'a>(
        channels: impl IntoIterator<Item = &'a Channel>,
        options: &StreamOptions,
        piece_time: Duration,
    ) -> Pacer {
        let channels = channels.into_iter().map(Channel::try_clone);
        let channels: Vec<Channel> = channels.collect::<Result<_, _>>().unwrap_or_default();
        // Of what is no TCP connection nothing is known.
        let known = !channels.is_empty() && channels.iter().all(|c| tcp::path(c.socket()).is_ok());
        let share = f64::from(options.line_share) / 100.0;
        let rule = (known && share < 1.0).then(|| Rule::new(share, options.line));
        // Who leaves next to nothing leaves it to nobody in particular.
        let piece_time = match options.line_share {
            ..WHOLE => piece_time,
            _ => Duration::MAX,
        };
        let pacer = Pacer {
            inner: Mutex::new(Inner {
                rule,
                channels,
                seen: None,
                paced: None,
                line: options.line,
            }),
            piece_time,
            piece: AtomicU64::new(0),
            each: AtomicU64::new(0),
        };
        pacer.apply(&mut pacer.lock());
        pacer
    }

    /// Looks after the line if it is time to, and after the channel that the caller sends on.
    pub(crate) fn tend(&self, channel: &mut Channel) {
        // Who finds it taken need not wait: somebody is at it.
        if let Ok(mut inner) = self.inner.try_lock() {
            if inner.look() {
                self.apply(&mut inner);
            }
        }
        let piece = self.piece.load(Ordering::Relaxed);
        channel.send_in_pieces((piece > 0).then_some(piece as usize));
    }

    /// Bytes per second that one connection makes at most, if they are paced.
    pub(crate) fn each(&self) -> Option<u64> {
        Some(self.each.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
    }

    /// Time has passed in which nothing was sent.
    pub(crate) fn pause(&self) {
        let mut inner = self.lock();
        inner.seen = None;
        if let Some(rule) = &mut inner.rule {
            rule.pause();
        }
    }

    /// From now on everything goes as fast as it can.
    pub(crate) fn release(&self) {
        let mut inner = self.lock();
        inner.rule = None;
        self.apply(&mut inner);
    }

    /// The line's rate in bytes per second, if it was found full.
    pub(crate) fn line(&self) -> Option<u64> {
        self.lock().line
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, inner: &mut Inner) {
        let rate = inner.rule.as_ref().and_then(Rule::rate);
        if rate == inner.paced {
            return;
        }
        let each = rate.map(|rate| (rate / inner.channels.len() as u64).max(1024));
        for channel in &inner.channels {
            if let Err(error) = tcp::pace(channel.socket(), each) {
                tracing::debug!(%error, "memory is not paced");
            }
        }
        inner.paced = rate;
        let piece = rate
            .and_then(|rate| piece(rate, self.piece_time))
            .unwrap_or(0);
        self.each.store(each.unwrap_or(0), Ordering::Relaxed);
        self.piece.store(piece, Ordering::Relaxed);
        tracing::debug!(?rate, "memory is paced");
    }
}

impl Inner {
    /// True if the rule has seen something.
    fn look(&mut self) -> bool {
        let Some(rule) = &mut self.rule else {
            return false;
        };
        let now = Instant::now();
        if self.seen.is_some_and(|(then, _)| now - then < EACH) {
            return false;
        }
        let mut delivered = 0;
        let mut least: Option<(Duration, Duration)> = None;
        for channel in &self.channels {
            let Ok(path) = tcp::path(channel.socket()) else {
                return false;
            };
            delivered += path.acknowledged;
            let queued = path.smoothed.saturating_sub(path.round_trip);
            // All go the same way: who waits least knows best.
            if least.is_none_or(|(way, now)| queued < now.saturating_sub(way)) {
                least = Some((path.round_trip, path.smoothed));
            }
        }
        let before = self.seen.replace((now, delivered));
        let (Some((then, before)), Some((way, smoothed))) = (before, least) else {
            return false;
        };
        let look = Look {
            length: now - then,
            delivered: delivered.saturating_sub(before),
            way,
            now: smoothed,
        };
        tracing::trace!(
            ?look,
            rate = look.delivered as f64 / look.length.as_secs_f64(),
            "look"
        );
        rule.take(&look);
        self.line = rule.line().or(self.line);
        true
    }
}

/// The largest piece that goes at once, if it is to be limited.
fn piece(rate: u64, time: Duration) -> Option<u64> {
    let bytes = u128::from(rate).saturating_mul(time.as_micros()) / 1_000_000;
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).max(LEAST_PIECE);
    (bytes < MOST_PIECE).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_a_matter_of_time() {
        let gigabit = 125_000_000;
        assert_eq!(piece(gigabit, BESIDE_CLIENTS), Some(3375));
        assert_eq!(piece(gigabit, BESIDE_ANSWERS), Some(8125));
        assert_eq!(piece(gigabit / 100, BESIDE_ANSWERS), Some(LEAST_PIECE));
        assert_eq!(piece(10 * gigabit, BESIDE_ANSWERS), None);
        assert_eq!(piece(u64::MAX, BESIDE_CLIENTS), None);
    }
}
