//! What haulier's own report says.

use serde_json::Value;

/// A report of `haulier migrate --json`. Anything an older haulier does not tell is `None`.
pub(crate) struct Told<'a>(pub(crate) &'a Value);

impl Told<'_> {
    /// From the freeze to the source's knowing that the target runs.
    pub(crate) fn downtime_ms(&self) -> Option<f64> {
        self.0.get("downtime_ms")?.as_f64()
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

    /// Rounds before the freeze.
    pub(crate) fn rounds(&self) -> Option<f64> {
        Some(self.0.get("rounds")?.as_array()?.len() as f64)
    }
    pub(crate) fn faults(&self) -> Option<f64> {
        None
    }
    pub(crate) fn fault_us(&self, _share: f64) -> Option<f64> {
        None
    }
    pub(crate) fn rewritten_bytes(&self) -> Option<f64> {
        None
    }
    pub(crate) fn rounds_begin_ms(&self) -> Option<f64> {
        None
    }
}
