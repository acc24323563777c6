//! What haulier's own report says.

use serde_json::Value;

/// Bytes of a page.
const PAGE: f64 = 4096.0;

/// A report of `haulier migrate --json`. What it does not tell is `None`.
pub(crate) struct Told<'a>(pub(crate) &'a Value);

impl Told<'_> {
    /// The number at a path of names, such as `faults.remote`.
    pub(crate) fn number(&self, path: &str) -> Option<f64> {
        let found = path
            .split('.')
            .try_fold(self.0, |value, name| value.get(name));
        found?.as_f64()
    }

    /// Steps of the source or the destination (`phases`, `destination_steps`), in milliseconds.
    pub(crate) fn steps(&self, list: &str) -> Vec<(String, f64)> {
        let steps = self.0.get(list).and_then(Value::as_array);
        steps
            .into_iter()
            .flatten()
            .filter_map(|step| {
                let name = step.get("name")?.as_str()?;
                Some((name.to_owned(), step.get("milliseconds")?.as_f64()?))
            })
            .collect()
    }

    fn rounds(&self) -> &[Value] {
        let rounds = self.0.get("rounds").and_then(Value::as_array);
        rounds.map_or(&[], Vec::as_slice)
    }

    /// Rounds before the freeze; `None` if there were none.
    pub(crate) fn round_count(&self) -> Option<f64> {
        Some(self.rounds().len() as f64).filter(|count| *count > 0.0)
    }

    /// Milliseconds from haulier's start to the beginning of the rounds, and to the freeze; `None`
    /// without rounds.
    pub(crate) fn rounds_ms(&self) -> Option<(f64, f64)> {
        let mut passed = 0.0;
        for (name, time) in self.steps("phases") {
            if name == "pre-copy" {
                return Some((passed, passed + time));
            }
            passed += time;
        }
        None
    }

    /// Bytes per second of memory, as it is and not as it was compressed, in the first round; in
    /// the frozen phase's, if there were no rounds.
    pub(crate) fn bulk_rate(&self) -> Option<f64> {
        if let Some(first) = self.rounds().first() {
            let first = Told(first);
            return Some(first.number("raw_bytes")? / first.number("send_ms")? * 1000.0);
        }
        let pages = self.number("sent.pages")?;
        let (_, time) = self
            .steps("phases")
            .into_iter()
            .find(|(name, _)| name == "send")?;
        Some(pages * PAGE / time * 1000.0)
    }

    /// Bytes of memory that were written again after they had been sent: what each round found,
    /// which is what the next, the frozen phase or the push had to send. `None` without rounds.
    pub(crate) fn rewritten(&self) -> Option<f64> {
        self.round_count()?;
        let found = self
            .rounds()
            .iter()
            .map(|round| Told(round).number("found"));
        let pages: f64 = found.sum::<Option<f64>>()?;
        Some(pages * PAGE)
    }

    /// Time below which that share of the faults stayed, in microseconds, from the histogram of
    /// that name (`histogram`, `remote_histogram`).
    pub(crate) fn fault_us(&self, histogram: &str, share: f64) -> Option<f64> {
        let counts = self.0.get("faults")?.get(histogram)?.as_array()?;
        let counts: Vec<u64> = counts.iter().filter_map(Value::as_u64).collect();
        quantile(&counts, share)
    }
}

/// A quantile of a histogram whose entry n counts what is below 2 to the n and in no entry before.
/// Within an entry values are taken to be spread evenly.
fn quantile(counts: &[u64], share: f64) -> Option<f64> {
    let total: u64 = counts.iter().sum();
    let due = total as f64 * share;
    let mut seen = 0.0;
    for (power, count) in counts.iter().enumerate() {
        let count = *count as f64;
        if count > 0.0 && seen + count >= due {
            let upper = 2_f64.powi(power as i32);
            let lower = if power == 0 { 0.0 } else { upper / 2.0 };
            return Some(lower + (upper - lower) * (due - seen) / count);
        }
        seen += count;
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantiles_lie_within_their_entry() {
        let counts = [0, 0, 10, 80, 10];
        assert_eq!(quantile(&counts, 0.5), Some(6.0));
        assert_eq!(quantile(&counts, 0.1), Some(4.0));
        assert_eq!(quantile(&counts, 1.0), Some(16.0));
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[0, 0], 0.5), None);
    }

    #[test]
    fn rounds_give_rate_and_rewritten_memory() {
        let report = json!({
            "phases": [
                {"name": "examine", "milliseconds": 2.0},
                {"name": "pre-copy", "milliseconds": 10.0},
                {"name": "freeze", "milliseconds": 1.0},
            ],
            "rounds": [
                {"raw_bytes": 8192, "send_ms": 4.0, "found": 3},
                {"raw_bytes": 4096, "send_ms": 1.0, "found": 1},
            ],
        });
        let told = Told(&report);
        assert_eq!(told.bulk_rate(), Some(2_048_000.0));
        assert_eq!(told.rewritten(), Some(4.0 * 4096.0));
        assert_eq!(told.rounds_ms(), Some((2.0, 12.0)));
        assert_eq!(told.round_count(), Some(2.0));
    }

    #[test]
    fn a_stop_and_copy_has_a_rate_and_no_rounds() {
        let report = json!({
            "phases": [{"name": "send", "milliseconds": 1000.0}],
            "sent": {"pages": 256},
        });
        let told = Told(&report);
        assert_eq!(told.bulk_rate(), Some(1_048_576.0));
        assert_eq!(told.round_count(), None);
        assert_eq!(told.rewritten(), None);
        assert_eq!(told.rounds_ms(), None);
        assert_eq!(told.fault_us("histogram", 0.5), None);
    }
}
