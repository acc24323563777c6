//! What a journal means to whoever finds it: to the haulier that starts after one that was killed,
//! and to a destination that is asked about a migration that nobody works on any more.
//!
//! Recovery may itself be killed anywhere and begin again: a record comes before what cannot be
//! taken back, and everything else can be done twice.

use crate::destination::Action as DestinationAction;
use crate::journal::{DestinationRecord, SourceRecord};
use crate::source::{Action as SourceAction, InDoubt, Serving, Source};

/// What is to be done on a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceRecovery {
    /// Do this, in this order; then nothing is left of the migration here.
    Finish(Vec<SourceAction>),
    /// Only the destination knows: go on from this state over a new connection.
    Ask(Source),
    /// The frozen tasks are the last copy, and may be older than what their clients were told: a
    /// person decides.
    Person,
}

/// A person's word on a target that stands frozen on its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It runs nowhere else and never will: it runs on here.
    RunHere,
    /// It runs at the destination, or is given up: what stands here is removed.
    Discard,
}

/// What became of the tasks of a committed target whose server was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Every page is in its place, and the tasks live.
    Complete,
    /// The tasks were killed, and had never run here.
    NeverRan,
    /// The tasks were killed with pages missing, or have died with their host or by themselves, and
    /// may have run; or what is left of them must not be trusted.
    Lost,
}

/// What is to be done on a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationRecovery {
    /// Nothing. The journal is kept for a source that asks late.
    Settled,
    /// First find out what became of the tasks.
    AskGuard,
    /// Do this, in this order.
    Finish(Vec<DestinationAction>),
}

/// What a destination's journal says about the right to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The target is to run on this host.
    Committed,
    /// It does, with all of its memory.
    Done,
    /// It was to, and was lost.
    Lost,
    /// It is not, or was killed before it did.
    Refused,
    /// Nothing was decided yet.
    Open,
}

/// What a journal alone tells a source that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The target runs here, and has all of its memory.
    Complete,
    /// It was lost.
    Lost,
    /// It will never run here.
    Refused,
    /// Not settled: no answer is the only one that is surely right.
    Silence,
}

impl Fate {
    /// What the guard saw, in the light of whether any of the tasks live. It may have seen them
    /// complete, and they have died since, with their host or by themselves: perhaps before they ran.
    pub fn of_tasks(self, live: bool) -> Fate {
        match self {
            Fate::Complete if !live => Fate::Lost,
            seen => seen,
        }
    }
}

/// What a source does with what its journal says.
pub fn source(records: &[SourceRecord]) -> SourceRecovery {
    let has = |record| records.contains(&record);
    if has(SourceRecord::RolledBack) {
        SourceRecovery::Finish(Vec::new())
    } else if has(SourceRecord::Released) {
        SourceRecovery::Finish(vec![SourceAction::Kill])
    } else if has(SourceRecord::Returning) {
        SourceRecovery::Finish(run_on())
    } else if has(SourceRecord::Stranded) {
        SourceRecovery::Person
    } else if has(SourceRecord::Serving) {
        SourceRecovery::Ask(Source::Serving(Serving))
    } else if has(SourceRecord::InDoubt) {
        SourceRecovery::Ask(Source::InDoubt(InDoubt))
    } else {
        SourceRecovery::Finish(run_on())
    }
}

/// What a person's word means on a source; `None` where the journal alone decides.
pub fn resolve(records: &[SourceRecord], verdict: Verdict) -> Option<Vec<SourceAction>> {
    if matches!(source(records), SourceRecovery::Finish(_)) {
        return None;
    }
    Some(match verdict {
        // The word first: it holds when this is killed and done again.
        Verdict::RunHere => {
            let mut actions = vec![SourceAction::Record(SourceRecord::Returning)];
            actions.extend(run_on());
            actions
        }
        Verdict::Discard => vec![
            SourceAction::Record(SourceRecord::Released),
            SourceAction::Kill,
        ],
    })
}

/// What a destination does with what its journal says, and with what the guard saw, if it was
/// asked.
pub fn destination(records: &[DestinationRecord], fate: Option<Fate>) -> DestinationRecovery {
    // What was removed may have come back since, with another migration.
    let removed = records.contains(&DestinationRecord::Removed);
    let remove = |record| remove(record, removed);
    let actions = match decision(records) {
        Decision::Done => Vec::new(),
        Decision::Committed => match fate {
            None => return DestinationRecovery::AskGuard,
            Some(Fate::Complete) => vec![
                DestinationAction::Thaw,
                DestinationAction::Record(DestinationRecord::Done),
            ],
            Some(Fate::NeverRan) => remove(Some(DestinationRecord::Withdrawn)),
            Some(Fate::Lost) => remove(Some(DestinationRecord::Lost)),
        },
        Decision::Open => remove(Some(DestinationRecord::Refused)),
        // Recorded, but perhaps not carried out to its end.
        Decision::Refused | Decision::Lost => remove(None),
    };
    match actions.is_empty() {
        true => DestinationRecovery::Settled,
        false => DestinationRecovery::Finish(actions),
    }
}

/// What the destination decided.
pub fn decision(records: &[DestinationRecord]) -> Decision {
    let has = |record| records.contains(&record);
    // The latest word first: after the decision to run it come its end, or its loss. A refusal comes
    // after "committed" only if that could not be synced, and so has not taken effect.
    if has(DestinationRecord::Lost) {
        Decision::Lost
    } else if has(DestinationRecord::Withdrawn) || has(DestinationRecord::Refused) {
        Decision::Refused
    } else if has(DestinationRecord::Done) {
        Decision::Done
    } else if has(DestinationRecord::Committed) {
        Decision::Committed
    } else {
        Decision::Open
    }
}

/// What a destination tells a source about a migration that nobody works on.
pub fn answer(records: &[DestinationRecord]) -> Answer {
    match decision(records) {
        Decision::Done => Answer::Complete,
        Decision::Lost => Answer::Lost,
        Decision::Refused => Answer::Refused,
        // Whoever works on it after all may decide otherwise in this moment.
        Decision::Committed | Decision::Open => Answer::Silence,
    }
}

fn run_on() -> Vec<SourceAction> {
    vec![
        SourceAction::Thaw,
        SourceAction::Record(SourceRecord::RolledBack),
    ]
}

/// The record first: whenever this is killed, the tasks never run again.
fn remove(record: Option<DestinationRecord>, removed: bool) -> Vec<DestinationAction> {
    let mut actions: Vec<DestinationAction> =
        record.map(DestinationAction::Record).into_iter().collect();
    if !removed {
        actions.extend([
            DestinationAction::Kill,
            DestinationAction::Record(DestinationRecord::Removed),
        ]);
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::*;
    use DestinationRecord as D;
    use SourceRecord as S;

    #[test]
    fn only_the_destinations_word_or_a_persons_leads_out_of_doubt() {
        let doubt = [S::Freezing, S::InDoubt];
        assert_eq!(
            source(&doubt),
            SourceRecovery::Ask(Source::InDoubt(InDoubt))
        );
        let serving = [S::Freezing, S::InDoubt, S::Serving];
        assert_eq!(
            source(&serving),
            SourceRecovery::Ask(Source::Serving(Serving))
        );
        for records in [&doubt[..], &serving[..]] {
            let here = resolve(records, Verdict::RunHere).unwrap();
            assert_eq!(here[0], SourceAction::Record(S::Returning));
            let discard = resolve(records, Verdict::Discard).unwrap();
            assert_eq!(
                discard,
                [SourceAction::Record(S::Released), SourceAction::Kill]
            );
        }
    }

    #[test]
    fn where_the_journal_decides_a_person_does_not() {
        for records in [
            &[][..],
            &[S::Freezing][..],
            &[S::Freezing, S::InDoubt, S::Returning][..],
            &[S::Freezing, S::InDoubt, S::Serving, S::Released][..],
            &[S::Freezing, S::RolledBack][..],
        ] {
            assert!(matches!(source(records), SourceRecovery::Finish(_)));
            for verdict in [Verdict::RunHere, Verdict::Discard] {
                assert_eq!(resolve(records, verdict), None, "{records:?}");
            }
        }
    }

    #[test]
    fn the_last_copy_waits_for_a_person() {
        let records = [S::Freezing, S::InDoubt, S::Serving, S::Stranded];
        assert_eq!(source(&records), SourceRecovery::Person);
        let mut resolved = records.to_vec();
        resolved.push(S::Returning);
        assert_eq!(source(&resolved), SourceRecovery::Finish(run_on()));
    }

    #[test]
    fn a_destination_decides_by_its_latest_word() {
        for (records, expected) in [
            (&[][..], Decision::Open),
            (&[D::Receiving][..], Decision::Open),
            (&[D::Receiving, D::Committed][..], Decision::Committed),
            (&[D::Receiving, D::Refused][..], Decision::Refused),
            (&[D::Receiving, D::Committed, D::Done][..], Decision::Done),
            (&[D::Receiving, D::Committed, D::Lost][..], Decision::Lost),
            (&[D::Committed, D::Withdrawn][..], Decision::Refused),
            (&[D::Committed, D::Refused][..], Decision::Refused),
        ] {
            assert_eq!(decision(records), expected, "{records:?}");
        }
    }

    #[test]
    fn what_is_not_settled_is_not_answered() {
        assert_eq!(answer(&[]), Answer::Silence);
        assert_eq!(answer(&[D::Receiving]), Answer::Silence);
        assert_eq!(answer(&[D::Receiving, D::Committed]), Answer::Silence);
        assert_eq!(answer(&[D::Receiving, D::Refused]), Answer::Refused);
    }

    #[test]
    fn a_committed_target_is_settled_by_its_fate() {
        let committed = [D::Receiving, D::Committed];
        assert_eq!(destination(&committed, None), DestinationRecovery::AskGuard);
        for (fate, first) in [
            (Fate::Complete, DestinationAction::Thaw),
            (Fate::NeverRan, DestinationAction::Record(D::Withdrawn)),
            (Fate::Lost, DestinationAction::Record(D::Lost)),
        ] {
            let DestinationRecovery::Finish(actions) = destination(&committed, Some(fate)) else {
                panic!("{fate:?}")
            };
            assert_eq!(actions[0], first);
        }
        assert_eq!(
            destination(&[D::Receiving, D::Refused, D::Removed], None),
            DestinationRecovery::Settled
        );
    }

    #[test]
    fn what_was_removed_without_a_word_gets_one() {
        let lost = destination(&[D::Receiving, D::Committed, D::Removed], Some(Fate::Lost));
        assert_eq!(
            lost,
            DestinationRecovery::Finish(vec![DestinationAction::Record(D::Lost)])
        );
        let refused = destination(&[D::Receiving, D::Removed], None);
        assert_eq!(
            refused,
            DestinationRecovery::Finish(vec![DestinationAction::Record(D::Refused)])
        );
    }

    #[test]
    fn tasks_that_have_died_since_they_were_complete_are_lost() {
        assert_eq!(Fate::Complete.of_tasks(true), Fate::Complete);
        assert_eq!(Fate::Complete.of_tasks(false), Fate::Lost);
        assert_eq!(Fate::NeverRan.of_tasks(false), Fate::NeverRan);
    }
}
