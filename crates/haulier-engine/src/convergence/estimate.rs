//! What the rounds so far say about bandwidth, dirty rate and downtime.

use std::time::Duration;

use super::{Measurements, PAGE, Round};

/// The least that a bandwidth is derived from, in pages, if there is as much: a smaller round
/// takes as long as a round trip does, and says little about more.
const LEAST_PAGES: u64 = 1024;

/// What a switchover takes beside the sending of pages: freeze, skeleton, restore, hand-over. CRIU
/// walks the page tables of the whole target, so it grows with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedCost {
    /// Of a target without memory.
    pub base: Duration,
    /// For each GiB of its memory.
    pub per_gib: Duration,
}

impl Default for FixedCost {
    /// What was seen on a small machine with CRIU 4.2: some 40 ms each for a skeleton's dump and
    /// its restore, and 60 ms of dump per GiB.
    fn default() -> FixedCost {
        FixedCost {
            base: Duration::from_millis(80),
            per_gib: Duration::from_millis(60),
        }
    }
}

impl FixedCost {
    /// If CRIU is not shown the pages of a target: it looks at its page tables once still, for the
    /// properties of its mappings.
    pub const VEILED: FixedCost = FixedCost {
        base: Duration::from_millis(50),
        per_gib: Duration::from_millis(30),
    };

    /// For a target with so many bytes of memory.
    pub fn of(&self, memory: u64) -> Duration {
        let gib = memory as f64 / f64::from(1_u32 << 30);
        self.base
            .saturating_add(seconds(self.per_gib.as_secs_f64() * gib))
    }
}

/// Bytes of memory per second that the rounds so far can send, for something of `pages` pages:
/// the rate of the latest rounds that together sent at least as many, so that an estimate rests
/// on as much as it is asked about. Compressed or not: it is what the target has, not what the
/// wire carries. Zero pages do not count. `None` before anything was sent.
pub fn bandwidth(rounds: &[Round], pages: u64) -> Option<f64> {
    let enough = pages.max(LEAST_PAGES);
    let mut sent = 0_u64;
    let mut time = 0_f64;
    for round in rounds.iter().rev() {
        sent = sent.saturating_add(content(round));
        time += round.send_time.as_secs_f64();
        if sent >= enough {
            break;
        }
    }
    // A clock too coarse for what it measured counts as a microsecond.
    (sent > 0).then(|| sent as f64 * PAGE as f64 / time.max(1e-6))
}

/// Pages per second that the target wrote during the last round; `None` before the first. Pages
/// written more than once count once, so a longer round sees less.
pub fn dirty_rate(rounds: &[Round]) -> Option<f64> {
    let last = rounds.last()?;
    Some(last.found as f64 / last.length.as_secs_f64().max(1e-6))
}

/// How long the target would stand if it were frozen now and all that is left were sent: the
/// remaining pages ÷ the bandwidth + the fixed cost. `None` before the first round, and without a
/// bandwidth if there is something to send.
pub fn predict_downtime(measured: &Measurements) -> Option<Duration> {
    let left = measured.rounds.last()?.found;
    time_to_send(&measured.rounds, left).map(|time| time.saturating_add(measured.fixed))
}

/// How long so many pages take at the measured bandwidth.
pub(super) fn time_to_send(rounds: &[Round], pages: u64) -> Option<Duration> {
    if pages == 0 {
        return Some(Duration::ZERO);
    }
    let bytes = pages as f64 * PAGE as f64;
    bandwidth(rounds, pages).map(|rate| seconds(bytes / rate))
}

/// Whether pages were written at least as fast as they were sent.
pub(super) fn is_outrun(round: &Round) -> bool {
    let sent = content(round) as f64 * round.length.as_secs_f64();
    let written = round.found as f64 * round.send_time.as_secs_f64();
    round.found > 0 && sent > 0.0 && written >= sent
}

fn content(round: &Round) -> u64 {
    round.pages.saturating_sub(round.zero)
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)
}
