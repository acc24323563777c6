//! What the times of a client's answers say about a migration.
//!
//! All times are nanoseconds on one clock, ascending.

use std::ops::Range;

/// Width of the bins in which throughput is looked at.
pub(crate) const BIN: u64 = 50_000_000;

/// Service is back when it has been normal for that many bins: one bin alone is luck.
const BACK: usize = 10;

/// Share of the normal throughput that counts as normal.
const NORMAL: f64 = 0.95;

/// What happened to a client that sends its next request when it has the answer to the last.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Service {
    /// Answers per second before.
    pub(crate) normal: f64,
    /// Longest time between two answers before: what the machine does on its own.
    pub(crate) usual_gap: u64,
    /// What was lost in a second before, by the same measure: no client makes the same number of turns in each
    /// bin.
    pub(crate) usual_loss: f64,
    /// Longest time between two answers from the start of the migration on.
    pub(crate) gap: Range<u64>,
    /// When throughput was back at 95 % after that gap; `None` if it was not by the last answer.
    pub(crate) back: Option<u64>,
    /// Seconds of normal throughput lost from the start until then.
    pub(crate) lost: f64,
    /// The part of it that was lost after the gap began.
    pub(crate) lost_since_gap: f64,
}

/// Looks at a client's answers, of which those in `before` were undisturbed; the migration starts
/// at its end. `None` without answers on both sides of the start.
pub(crate) fn service(answers: &[u64], before: Range<u64>) -> Option<Service> {
    let normal = rate(answers, before.clone());
    let usual_gap = longest_gap(answers, before.clone())?;
    let usual_gap = usual_gap.end - usual_gap.start;
    let gap = longest_gap(answers, before.end..u64::MAX)?;
    let last = answers.last().copied()?;
    if normal <= 0.0 {
        return None;
    }
    let back = (gap.end..last.saturating_sub(BACK as u64 * BIN))
        .step_by(BIN as usize)
        .find(|from| rate(answers, *from..from + BACK as u64 * BIN) >= NORMAL * normal);
    let end = back.unwrap_or(last);
    Some(Service {
        normal,
        usual_gap,
        usual_loss: lost(answers, before.clone(), normal) * 1e9
            / before.end.saturating_sub(before.start).max(1) as f64,
        lost: lost(answers, before.end..end, normal),
        lost_since_gap: lost(answers, gap.start..end, normal),
        gap,
        back,
    })
}

/// Answers per second within a time.
pub(crate) fn rate(answers: &[u64], time: Range<u64>) -> f64 {
    let count = within(answers, &time).len() as f64;
    count * 1e9 / time.end.saturating_sub(time.start).max(1) as f64
}

/// The longest time between two answers that reaches into `time`.
pub(crate) fn longest_gap(answers: &[u64], time: Range<u64>) -> Option<Range<u64>> {
    let inside = within(answers, &time);
    let first = answers.partition_point(|at| *at < time.start);
    // The answer before the first inside, and the one after the last.
    let from = first.saturating_sub(1);
    let to = (first + inside.len() + 1).min(answers.len());
    answers
        .get(from..to)?
        .windows(2)
        .filter_map(|pair| match pair {
            [a, b] => Some(*a..*b),
            _ => None,
        })
        // Of equal ones the first.
        .rev()
        .max_by_key(|gap| gap.end - gap.start)
}

/// Seconds of normal throughput lost within a time. A bin that did better than normal does not make
/// up for another: what was not served then was not served.
fn lost(answers: &[u64], time: Range<u64>, normal: f64) -> f64 {
    (time.start..time.end)
        .step_by(BIN as usize)
        .map(|start| start..(start + BIN).min(time.end))
        .map(|bin| {
            let seconds = (bin.end - bin.start) as f64 / 1e9;
            (1.0 - rate(answers, bin) / normal).max(0.0) * seconds
        })
        .sum()
}

fn within<'a>(answers: &'a [u64], time: &Range<u64>) -> &'a [u64] {
    let from = answers.partition_point(|at| *at < time.start);
    let to = answers.partition_point(|at| *at < time.end);
    answers.get(from..to).unwrap_or_default()
}

/// Smallest, median and largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// `None` for no values; the median of an even number is the mean of the middle two.
pub(crate) fn spread(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = |index: usize| values.get(index).copied();
    let (min, max) = (*values.first()?, *values.last()?);
    let upper = middle(values.len() / 2)?;
    let lower = middle((values.len() - 1) / 2)?;
    let median = f64::midpoint(lower, upper);
    Some(Spread { min, median, max })
}

#[cfg(test)]
mod tests;
