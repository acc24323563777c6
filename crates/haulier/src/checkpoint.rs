//! Points at which a test can hold an agent, to kill it or another process, or to cut the link, there.
//!
//! A point is a phase of the source that is about to begin, or an action of a side's hand-over that is
//! about to be performed: the lists are those of `haulier_engine`. An agent whose environment has
//! [`HOLD_AT`] says on standard error that it has come there, and goes on when the file named by
//! [`HOLD_UNTIL`] exists. Nobody else pays more than a comparison for it.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// Environment variable: the point, as `source phase dump` or `destination Record(Committed)`.
pub const HOLD_AT: &str = "HAULIER_TEST_HOLD_AT";
/// Environment variable: the file that ends the hold.
pub const HOLD_UNTIL: &str = "HAULIER_TEST_HOLD_UNTIL";

/// A hold that nobody ends, ends.
const LONGEST: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug)]
struct Hold {
    at: String,
    until: PathBuf,
}

/// The calling agent has come to a point of its `side`.
pub(crate) fn reach(side: &str, point: impl Display) {
    static HOLD: OnceLock<Option<Hold>> = OnceLock::new();
    let Some(hold) = HOLD.get_or_init(Hold::of_environment) else {
        return;
    };
    if hold.at != name(side, point) {
        return;
    }
    eprintln!("held at {}", hold.at);
    let deadline = Instant::now() + LONGEST;
    while !hold.until.exists() && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
}

/// The name of a point.
pub fn name(side: &str, point: impl Display) -> String {
    format!("{side} {point}")
}

impl Hold {
    fn of_environment() -> Option<Hold> {
        Some(Hold {
            at: std::env::var(HOLD_AT).ok()?,
            until: std::env::var_os(HOLD_UNTIL)?.into(),
        })
    }
}
