//! What the user chooses: a mode, a policy, and what to do when rounds stop shrinking.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

/// When the pages are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All while the target stands.
    StopAndCopy,
    /// In rounds while it runs at the source, the rest while it stands.
    #[default]
    PreCopy,
    /// All while it runs at the destination.
    PostCopy,
    /// In rounds while it runs at the source, the rest while it runs at the destination.
    Hybrid,
}

/// What ends the rounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyKind {
    /// The predicted downtime is within [`Policy::max_downtime`].
    #[default]
    Downtime,
    /// p.haul's constants: 8 rounds, a round of fewer than 64 pages, or one that is more than 10 %
    /// larger than the one before. Then it freezes, whatever that takes: neither
    /// [`Policy::max_downtime`] nor [`Policy::on_stall`] counts.
    Phaul,
}

/// What to do when rounds stop shrinking, or when there have been enough of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStall {
    /// Freeze, and send what is left while the target runs at the destination.
    PostCopy,
    /// Take CPU time from the target: 20 %, then 10 % more at each round that does not shrink, 99 %
    /// at most. When that is not enough, or when the limit of rounds or time is reached: as
    /// [`OnStall::Force`].
    Throttle,
    /// Freeze, however long the rest takes.
    #[default]
    Force,
    /// Give up; the target runs on at the source.
    Abort,
}

/// When the rounds end, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What ends them.
    pub kind: PolicyKind,
    /// Longest time the target may stand. 300 ms unless told.
    pub max_downtime: Duration,
    /// Most rounds, the first included. 30 unless told.
    pub max_rounds: u32,
    /// Longest time for the rounds: none is begun after it. No limit unless told.
    pub max_time: Option<Duration>,
    /// What to do when they stop shrinking.
    pub on_stall: OnStall,
    /// Whether the host can take CPU time from the target. Without, [`OnStall::Throttle`] does
    /// what [`OnStall::Force`] does.
    pub may_throttle: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            kind: PolicyKind::default(),
            max_downtime: Duration::from_millis(300),
            max_rounds: 30,
            max_time: None,
            on_stall: OnStall::default(),
            may_throttle: true,
        }
    }
}

/// A word on the command line is not one of those expected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{word:?} is none of {}", expected.join(", "))]
pub struct UnknownWord {
    /// What was given.
    pub word: String,
    /// What could have been.
    pub expected: Vec<&'static str>,
}

/// Display and `FromStr` by one table of names, in the order in which they are offered.
macro_rules! words {
    ($kind:ident: $($variant:ident = $word:literal),+) => {
        impl $kind {
            /// Every value, in the order in which help texts name them.
            pub const ALL: &'static [$kind] = &[$($kind::$variant),+];

            /// The word on the command line and in reports.
            pub fn name(self) -> &'static str {
                match self {
                    $($kind::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $kind {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<$kind, UnknownWord> {
                let found = $kind::ALL.iter().find(|value| value.name() == word);
                found.copied().ok_or_else(|| UnknownWord {
                    word: word.to_owned(),
                    expected: $kind::ALL.iter().map(|value| value.name()).collect(),
                })
            }
        }
    };
}

words!(Mode: StopAndCopy = "stop-and-copy", PreCopy = "pre-copy", PostCopy = "post-copy", Hybrid = "hybrid");
words!(PolicyKind: Downtime = "downtime", Phaul = "phaul");
words!(OnStall: PostCopy = "post-copy", Throttle = "throttle", Force = "force", Abort = "abort");
