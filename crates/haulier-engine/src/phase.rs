//! The phases of a migration, in order: one list, for messages, statistics and fault injection.

use std::fmt;

/// A phase, as the source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Look at the target and at this host.
    Examine,
    /// Reach the destination.
    Connect,
    /// Ask the destination whether it can take the target.
    Check,
    /// Put the target into a cgroup of its own and arm the network lock.
    Prepare,
    /// Send memory in rounds while the target runs.
    PreCopy,
    /// Stop the target: from here on its users wait.
    Freeze,
    /// Have CRIU write the skeleton.
    Dump,
    /// Send the skeleton and the pages.
    Send,
    /// Wait until the destination has restored it and holds it.
    Restore,
    /// Hand the right to run over: its users no longer wait.
    Commit,
    /// Wait until every page is in its place at the destination, where the target runs; send those
    /// that were left behind.
    Arrive,
    /// Remove what is left on the source.
    Release,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Phase; 12] = [
        Phase::Examine,
        Phase::Connect,
        Phase::Check,
        Phase::Prepare,
        Phase::PreCopy,
        Phase::Freeze,
        Phase::Dump,
        Phase::Send,
        Phase::Restore,
        Phase::Commit,
        Phase::Arrive,
        Phase::Release,
    ];

    /// Whether the target stands still during this phase.
    pub fn is_downtime(self) -> bool {
        matches!(
            self,
            Phase::Freeze | Phase::Dump | Phase::Send | Phase::Restore | Phase::Commit
        )
    }

    /// The name people see.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Examine => "examine",
            Phase::Connect => "connect",
            Phase::Check => "check",
            Phase::Prepare => "prepare",
            Phase::PreCopy => "pre-copy",
            Phase::Freeze => "freeze",
            Phase::Dump => "dump",
            Phase::Send => "send",
            Phase::Restore => "restore",
            Phase::Commit => "commit",
            Phase::Arrive => "arrive",
            Phase::Release => "release",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_whole_and_in_order() {
        assert!(Phase::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(Phase::ALL.len(), Phase::Release as usize + 1);
        let down: Vec<Phase> = Phase::ALL.into_iter().filter(|p| p.is_downtime()).collect();
        assert_eq!(down.first(), Some(&Phase::Freeze));
        assert_eq!(down.last(), Some(&Phase::Commit));
    }
}
