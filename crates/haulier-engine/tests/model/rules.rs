//! What decides: the code that runs, or, to see that the check has teeth, a broken variant of it.

use haulier_engine::destination::{self, Destination};
use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_engine::recovery::{self, Answer, DestinationRecovery, Fate, SourceRecovery};
use haulier_engine::source::{self, Source};

/// The machines, and what recovery makes of their records.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) source_on: fn(Source, source::Event) -> (Source, Vec<source::Action>),
    pub(crate) destination_on:
        fn(Destination, destination::Event) -> (Destination, Vec<destination::Action>),
    pub(crate) source_recovery: fn(&[SourceRecord]) -> SourceRecovery,
    pub(crate) destination_recovery: fn(&[DestinationRecord], Option<Fate>) -> DestinationRecovery,
    pub(crate) fate: fn(Fate, bool) -> Fate,
    pub(crate) answer: fn(&[DestinationRecord]) -> Answer,
    /// A destination hangs up on who asks about what it does not know.
    pub(crate) hangs_up: bool,
    /// Whoever recovers a source can read the pages that were left behind.
    pub(crate) recovery_reads_pages: bool,
}

/// The ones that run.
pub(crate) const RULES: Rules = Rules {
    source_on: Source::on,
    destination_on: Destination::on,
    source_recovery: recovery::source,
    destination_recovery: recovery::destination,
    fate: Fate::of_tasks,
    answer: recovery::answer,
    hangs_up: true,
    recovery_reads_pages: true,
};
