//! Why rounds end.

use std::fmt;

use serde::Serialize;

/// What ended the rounds, or made the target be throttled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The mode has no rounds.
    NoRounds,
    /// What is left fits into the limit of the downtime.
    Converged,
    /// The fixed cost alone is beyond that limit; what is left adds little to it.
    FixedCost,
    /// Rounds stopped shrinking.
    Stalled,
    /// They stopped shrinking although the target has hardly any CPU time left.
    ThrottledToTheEnd,
    /// There have been enough rounds.
    RoundLimit,
    /// The rounds have taken long enough.
    TimeLimit,
    /// p.haul: the last round sent few pages.
    FewPages,
    /// p.haul: the last round sent more than the one before.
    Growth,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::NoRounds => "the mode has no rounds",
            Reason::Converged => "what is left fits into the downtime",
            Reason::FixedCost => {
                "the switchover takes longer than the limit even with nothing left to send"
            }
            Reason::Stalled => "rounds no longer shrink: memory is written as fast as it is sent",
            Reason::ThrottledToTheEnd => {
                "rounds no longer shrink, although the target has hardly any CPU time left"
            }
            Reason::RoundLimit => "the limit of rounds is reached",
            Reason::TimeLimit => "the limit of time is reached",
            Reason::FewPages => "the last round was small",
            Reason::Growth => "rounds grow",
        })
    }
}
