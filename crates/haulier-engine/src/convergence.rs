//! The stop rule: when to end the rounds of pre-copy, and how.
//!
//! A pure function of what was measured: no clock, no IO. After each round the shell adds a
//! [`Round`] to its [`Measurements`] and asks [`decide`]. The first question may come before the
//! first round: stop-and-copy and post-copy have none.
//!
//! With [`PolicyKind::Downtime`] the rounds end
//!
//! * when what is left fits: remaining pages ÷ measured bandwidth + fixed cost is within the
//!   limit. One more round is made of something that fits only if the last one took at least a
//!   quarter off what is left and the next can be expected to save a sixteenth of the fixed cost: a
//!   round costs the target little, while the downtime is what its users see;
//! * when the fixed cost alone is beyond the limit, and a round can save no more than a tenth of
//!   it. No round makes that cost smaller. With [`OnStall::Abort`] it is given up at once;
//! * when rounds no longer shrink although all of the line is theirs ([`OnStall`] says how it goes
//!   on), or when the limit of rounds or of time is reached. As long as others are left a part of the
//!   line, that part is taken first, as soon as a round leaves more than three quarters of what
//!   it sent: they lose service for the few rounds that are left, but would lose it all the same, a little
//!   in each of many rounds, or at one stroke in a longer freeze.
//!
//! It always ends: there are never more than [`Policy::max_rounds`] rounds, throttled or not.

use std::time::Duration;

pub use estimate::{FixedCost, bandwidth, dirty_rate, predict_downtime};
pub use policy::{Mode, OnStall, Policy, PolicyKind, UnknownWord};
pub use reason::Reason;

mod estimate;
mod policy;
mod reason;

/// Bytes of a page; the engine counts in pages.
pub const PAGE: u64 = 4096;

/// A round that leaves more than this part of the smallest remainder so far has not shrunk it.
const SHRUNK_PERCENT: u64 = 90;
/// So many rounds in a row without progress are a stall.
const STALL_ROUNDS: usize = 2;
/// Once the CPU is throttled, one such round at each step is enough: the first step was decided
/// with patience, and each further one is small.
const STALL_ROUNDS_THROTTLED: usize = 1;
/// The first step of throttling, the others, and the last, in per cent of the CPU.
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const THROTTLE_MOST: u8 = 99;
/// p.haul's constants: rounds, pages, per cent.
const PHAUL_ROUNDS: usize = 8;
const PHAUL_PAGES: u64 = 64;
const PHAUL_GROWTH_PERCENT: u64 = 10;

/// What one round did, and what it left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Round {
    /// Pages it sent: those written since the round before, or, in round 0, all.
    pub pages: u64,
    /// Of these, pages that were all zero and cost next to nothing. They say nothing about the
    /// bandwidth.
    pub zero: u64,
    /// From the first page's reading until the destination had the last one.
    pub send_time: Duration,
    /// From the scan that began it to the scan after it: how long pages were being written.
    pub length: Duration,
    /// Pages that the scan after it found written: what is left now.
    pub found: u64,
    /// Per cent of the CPU that were taken from the target during it.
    pub throttle: u8,
    /// It left others their part of a line that it could have filled.
    pub shared: bool,
}

/// What is known when a decision is due.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measurements {
    /// The rounds so far, the oldest first.
    pub rounds: Vec<Round>,
    /// What the switchover takes beside sending pages: [`FixedCost::of`] the target's memory.
    pub fixed: Duration,
    /// Since the rounds began.
    pub elapsed: Duration,
}

/// How it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum Decision {
    /// Make another round.
    Another,
    /// Leave nothing of the line to others any more, then make another round.
    TakeLine,
    /// Take so much of the CPU from the target (more than now), then make another round.
    Throttle {
        /// Per cent of the CPU time that it uses when it is left alone.
        percent: u8,
        /// What made it necessary.
        why: Reason,
    },
    /// End the rounds and freeze the target.
    Freeze {
        /// Send what is left only after it runs at the destination (post-copy).
        left_behind: bool,
        /// What ended the rounds.
        why: Reason,
        /// How long the target is expected to stand. `None` without a measured bandwidth, if
        /// there is something to send.
        predicted: Option<Duration>,
    },
    /// Give the migration up; the target runs on here.
    GiveUp {
        /// What made it necessary.
        why: Reason,
    },
}

/// Decides how it goes on after the rounds in `measured`.
///
/// A throttled target is still throttled when the answer is to freeze or to give up: the shell
/// undoes that in either case.
pub fn decide(policy: &Policy, mode: Mode, measured: &Measurements) -> Decision {
    match mode {
        Mode::StopAndCopy | Mode::PostCopy => freeze(mode, policy, measured, Reason::NoRounds),
        Mode::PreCopy | Mode::Hybrid => match policy.kind {
            PolicyKind::Downtime => aim_at_downtime(policy, mode, measured),
            PolicyKind::Phaul => as_phaul_does(policy, mode, measured),
        },
    }
}

fn aim_at_downtime(policy: &Policy, mode: Mode, measured: &Measurements) -> Decision {
    let gives_up = mode == Mode::PreCopy && policy.on_stall == OnStall::Abort;
    let is_beyond_reach = measured.fixed > policy.max_downtime;
    if is_beyond_reach && gives_up {
        return Decision::GiveUp {
            why: Reason::FixedCost,
        };
    }
    let limit = reached_limit(policy, measured);
    let goal = policy
        .max_downtime
        .max(measured.fixed.saturating_add(measured.fixed / 10));
    let predicted = predict_downtime(measured);
    if predicted.is_some_and(|predicted| predicted <= goal) {
        let may_go_on = limit.is_none() && !is_stalled(&measured.rounds);
        if may_go_on && another_round_pays(measured) {
            return Decision::Another;
        }
        let why = if predicted > Some(policy.max_downtime) {
            Reason::FixedCost
        } else {
            Reason::Converged
        };
        return freeze(mode, policy, measured, why);
    }
    let last_shrank_little = measured.rounds.last().is_some_and(shrinks_little);
    let stalled = is_stalled(&measured.rounds);
    if limit.is_none() && (stalled || last_shrank_little) && may_take_line(measured) {
        return Decision::TakeLine;
    }
    match limit.or_else(|| stalled.then_some(Reason::Stalled)) {
        None => Decision::Another,
        Some(why) => on_stall(policy, mode, measured, why),
    }
}

/// Whether there is more of the line to be had.
fn may_take_line(measured: &Measurements) -> bool {
    measured.rounds.last().is_some_and(|round| round.shared)
}

/// At this pace the rounds to come would take longer in sum than three more like this one.
fn shrinks_little(round: &Round) -> bool {
    round.found > round.pages / 4 * 3
}

fn on_stall(policy: &Policy, mode: Mode, measured: &Measurements, why: Reason) -> Decision {
    // Leaving behind what does not converge is what a hybrid is for.
    if mode == Mode::Hybrid {
        return freeze(mode, policy, measured, why);
    }
    match policy.on_stall {
        OnStall::PostCopy | OnStall::Force => freeze(mode, policy, measured, why),
        OnStall::Abort => Decision::GiveUp { why },
        // At the limit of rounds or time there is no round left that could profit. At the last
        // step hardly anything of the target runs: standing still is no worse.
        OnStall::Throttle => match next_throttle(&measured.rounds) {
            Some(percent) if policy.may_throttle && why == Reason::Stalled => {
                Decision::Throttle { percent, why }
            }
            Some(_) => freeze(mode, policy, measured, why),
            None => freeze(mode, policy, measured, Reason::ThrottledToTheEnd),
        },
    }
}

fn freeze(mode: Mode, policy: &Policy, measured: &Measurements, why: Reason) -> Decision {
    let did_not_fit = matches!(
        why,
        Reason::Stalled | Reason::RoundLimit | Reason::TimeLimit
    );
    let left_behind = match mode {
        Mode::StopAndCopy => false,
        Mode::PostCopy => true,
        // Nothing left: nothing to risk the target for.
        Mode::Hybrid => measured.rounds.last().is_none_or(|round| round.found > 0),
        Mode::PreCopy => {
            did_not_fit
                && policy.kind == PolicyKind::Downtime
                && policy.on_stall == OnStall::PostCopy
        }
    };
    let predicted = if left_behind {
        Some(measured.fixed)
    } else {
        predict_downtime(measured)
    };
    Decision::Freeze {
        left_behind,
        why,
        predicted,
    }
}

fn reached_limit(policy: &Policy, measured: &Measurements) -> Option<Reason> {
    if measured.rounds.len() >= policy.max_rounds as usize {
        Some(Reason::RoundLimit)
    } else if policy.max_time.is_some_and(|most| measured.elapsed >= most) {
        Some(Reason::TimeLimit)
    } else {
        None
    }
}

/// Whether what is left fits, but a further round would make it a good deal less.
fn another_round_pays(measured: &Measurements) -> bool {
    let Some(last) = measured.rounds.last() else {
        return false;
    };
    let shrinks = !shrinks_little(last);
    let (Some(now), Some(rate)) = (
        estimate::time_to_send(&measured.rounds, last.found),
        dirty_rate(&measured.rounds),
    ) else {
        return false;
    };
    let left_then = (rate * now.as_secs_f64()) as u64;
    let saved = estimate::time_to_send(&measured.rounds, left_then)
        .map_or(Duration::ZERO, |then| now.saturating_sub(then));
    shrinks && saved > measured.fixed / 16
}

/// Whether the last rounds with the present throttle and part of the line made no progress: none left
/// less than the smallest remainder before it, or in each of them pages were written faster than sent.
fn is_stalled(rounds: &[Round]) -> bool {
    let Some(last) = rounds.last() else {
        return false;
    };
    let patience = if last.throttle == 0 {
        STALL_ROUNDS
    } else {
        STALL_ROUNDS_THROTTLED
    };
    let same = rounds
        .iter()
        .rev()
        .take_while(|round| (round.throttle, round.shared) == (last.throttle, last.shared))
        .count();
    if same < patience {
        return false;
    }
    let first = rounds.len() - patience;
    let is_outrun = rounds[first..].iter().all(estimate::is_outrun);
    is_outrun || (first..rounds.len()).all(|index| has_not_shrunk(rounds, index))
}

fn has_not_shrunk(rounds: &[Round], index: usize) -> bool {
    let smallest = rounds[..index].iter().map(|round| round.found).min();
    smallest.is_some_and(|smallest| {
        u128::from(rounds[index].found) * 100 > u128::from(smallest) * u128::from(SHRUNK_PERCENT)
    })
}

/// The next step of throttling; `None` after the last.
fn next_throttle(rounds: &[Round]) -> Option<u8> {
    match rounds.last().map_or(0, |round| round.throttle) {
        0 => Some(THROTTLE_FIRST),
        now if now >= THROTTLE_MOST => None,
        now => Some(now.saturating_add(THROTTLE_STEP).min(THROTTLE_MOST)),
    }
}

/// p.haul looks at the pages a round sent, not at what it left, and always freezes in the end.
fn as_phaul_does(policy: &Policy, mode: Mode, measured: &Measurements) -> Decision {
    let why = match measured.rounds[..] {
        [.., last] if last.pages < PHAUL_PAGES => Some(Reason::FewPages),
        // The first growth that can be told is that of the second round over the first delta:
        // round 0 sends everything.
        [_, .., before, last]
            if u128::from(last.pages) * 100
                > u128::from(before.pages) * u128::from(100 + PHAUL_GROWTH_PERCENT) =>
        {
            Some(Reason::Growth)
        }
        _ if measured.rounds.len() >= PHAUL_ROUNDS.min(policy.max_rounds as usize) => {
            Some(Reason::RoundLimit)
        }
        _ => None,
    };
    match why.or_else(|| reached_limit(policy, measured)) {
        None => Decision::Another,
        Some(why) => freeze(mode, policy, measured, why),
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
