//! What is recorded of a hand-over, and when.
//!
//! A record is written, and is on the disk, before the actions that follow it are performed.

/// A record of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceRecord {
    /// The target is about to be frozen; if nothing follows, it is to be thawed.
    Freezing,
    /// The commit is about to be sent; if nothing follows, only the destination knows.
    InDoubt,
    /// The target runs on the destination, which does not have all of it safe yet: the tasks here
    /// are neither to be thawed nor to be killed.
    Serving,
    /// The destination has lost the target: the tasks here are the last copy, and a person decides
    /// whether they run.
    Stranded,
    /// The target runs on the destination: what is left here is to be removed.
    Released,
    /// The target runs here: what was prepared there is void.
    RolledBack,
}

/// A record of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationRecord {
    /// Resources are about to be taken; if nothing follows, they are to be given back.
    Receiving,
    /// The decision: the target is to run here.
    Committed,
    /// The decision: it is not. A commit that comes later is answered with "refused".
    Refused,
    /// The target runs here and nothing is left to be done.
    Done,
    /// What was made here for a target that will not run here is gone.
    Removed,
    /// The target was to run here, and was killed before it had: it will not run here, and may on
    /// its source.
    Withdrawn,
    /// The target was to run here, and was lost before all of it was safe. It will not run here.
    Lost,
}
