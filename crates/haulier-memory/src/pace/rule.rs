//! When a line is full, and how fast to send then. No IO, no clock.
//!
//! ```text
//!          a queue, and the same rate in LOOKS looks
//!   Open ──────────────────────────────────────────▶ Paced { line } ─┐ queue all the same: what
//!    ▲                     (slower until it is empty)  │    │    ▲   │ came through, or line * CUT
//!    └──── AGAIN has passed: is there more by now? ────┘    │    └───┘
//!    ▲                                                      │
//!    └──── the queue is others': CUTS cuts, still there ────┘  (and stays Open for AGAIN)
//! ```
//!
//! A rate alone says nothing: it is that of the slowest of reader, line and receiver. A queue on the
//! way says that it is the line, if the rate is steady besides; round trips alone grow on a busy
//! machine too.

use std::time::Duration;

/// Looks that have to agree.
const LOOKS: usize = 3;

/// How long a packet has to stand in a queue on the way, at least; or this part of the way, which
/// varies more if it is long.
const QUEUE: Duration = Duration::from_millis(1);
const QUEUE_PART: u32 = 4;

/// Rates agree that differ by this factor at most.
const STEADY: f64 = 1.1;

/// How long a line is believed to be what it was.
const AGAIN: Duration = Duration::from_secs(10);

/// What is left of a line's rate when there is a queue though less than that is sent, and how often
/// in a row that is tried.
const CUT: f64 = 0.9;
const CUTS: u32 = 3;

/// No cut leaves less of it: in one look nothing at all may have come through, which is a stall and no
/// line, and who sent at that rate would hardly come to the next look.
const MOST_CUT: f64 = 0.5;

/// Part of a share that is sent while the queue runs empty which finding the line has made, and how
/// many looks that may take.
const DRAIN: f64 = 0.5;
const DRAINING: usize = 10;

/// What was seen of all connections since the look before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    /// How long ago that was.
    pub(super) length: Duration,
    /// Bytes that the peer has acknowledged meanwhile.
    pub(super) delivered: u64,
    /// The way there and back without queues.
    pub(super) way: Duration,
    /// The same as it is now.
    pub(super) now: Duration,
}

impl Look {
    fn rate(&self) -> f64 {
        self.delivered as f64 / self.length.as_secs_f64().max(1e-6)
    }

    fn has_queue(&self) -> bool {
        let least = QUEUE.max(self.way / QUEUE_PART);
        self.now.saturating_sub(self.way) >= least
    }
}

/// The rule.
#[derive(Debug)]
pub(super) struct Rule {
    /// Part of a full line that is used.
    share: f64,
    state: State,
}

#[derive(Debug)]
enum State {
    Open {
        /// Rates of looks in a row that saw a queue. Of the first, the queue is not all of the time.
        rates: Vec<f64>,
        /// Nothing is concluded for so long.
        hold: Duration,
    },
    Paced {
        line: f64,
        /// Looks that are left to it for the queue to run empty.
        draining: usize,
        /// Since it was measured.
        age: Duration,
        /// Looks in a row that saw a queue.
        queues: usize,
        /// Cuts in a row after which there still was one.
        cuts: u32,
    },
}

impl State {
    fn open(hold: Duration) -> State {
        State::Open {
            rates: Vec::new(),
            hold,
        }
    }

    fn paced(line: f64, draining: usize) -> State {
        State::Paced {
            line,
            draining,
            age: Duration::ZERO,
            queues: 0,
            cuts: 0,
        }
    }
}

impl Rule {
    /// For a line of which nothing is known, or which had this rate (bytes per second) a moment ago.
    pub(super) fn new(share: f64, line: Option<u64>) -> Rule {
        let state = match line {
            Some(line) => State::paced(line as f64, 0),
            None => State::open(Duration::ZERO),
        };
        Rule { share, state }
    }

    /// Bytes per second to send at most; `None`: as fast as it goes.
    pub(super) fn rate(&self) -> Option<u64> {
        let State::Paced { line, draining, .. } = &self.state else {
            return None;
        };
        let share = match draining {
            0 => self.share,
            _ => self.share * DRAIN,
        };
        // Slower than this is no line, and would round to none.
        Some(((line * share) as u64).max(1024))
    }

    /// Bytes per second that the line carries, if it is full.
    pub(super) fn line(&self) -> Option<u64> {
        match &self.state {
            State::Open { .. } => None,
            State::Paced { line, .. } => Some(*line as u64),
        }
    }

    /// Time has passed in which nothing was sent.
    pub(super) fn pause(&mut self) {
        match &mut self.state {
            State::Open { rates, .. } => rates.clear(),
            State::Paced { queues, .. } => *queues = 0,
        }
    }

    /// Takes in what was seen. The rate may have changed.
    pub(super) fn take(&mut self, look: &Look) {
        let next = match &mut self.state {
            State::Open { rates, hold } => {
                *hold = hold.saturating_sub(look.length);
                if !hold.is_zero() || !look.has_queue() {
                    rates.clear();
                    return;
                }
                rates.push(look.rate());
                full_line(rates).map(|line| State::paced(line, DRAINING))
            }
            State::Paced {
                line,
                draining,
                age,
                queues,
                cuts,
            } => {
                *age += look.length;
                if !look.has_queue() {
                    (*draining, *queues, *cuts) = (0, 0, 0);
                } else if *draining > 0 {
                    *draining -= 1;
                } else {
                    *queues += 1;
                }
                if *queues >= LOOKS {
                    *queues = 0;
                    *cuts += 1;
                    // If less comes through than is sent, that is the line by now.
                    let cut = *line * CUT;
                    if look.rate() < cut * self.share {
                        *line = look.rate().max(*line * MOST_CUT);
                        *draining = DRAINING;
                    } else {
                        *line = cut;
                    }
                }
                if *cuts > CUTS {
                    // Who gives way to that would come to nothing.
                    Some(State::open(AGAIN))
                } else {
                    (*age >= AGAIN).then(|| State::open(Duration::ZERO))
                }
            }
        };
        if let Some(next) = next {
            tracing::trace!(?next, "the line");
            self.state = next;
        }
    }
}

/// The line's rate, if these of looks in a row say that it is full.
fn full_line(rates: &mut Vec<f64>) -> Option<f64> {
    let first_and_last = LOOKS + 1;
    if rates.len() > first_and_last {
        rates.remove(0);
    }
    let last = rates.get(1..first_and_last)?;
    let most = last.iter().copied().fold(0.0, f64::max);
    let least = last.iter().copied().fold(f64::MAX, f64::min);
    let steady = least > 0.0 && most <= least * STEADY;
    steady.then(|| last.iter().sum::<f64>() / LOOKS as f64)
}

#[cfg(test)]
mod tests;
