//! Broken variants of the machines and of recovery: the check finds each of them out.

use haulier_engine::destination::{self, Destination};
use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_engine::recovery::{self, Answer, Decision, DestinationRecovery, Fate, SourceRecovery};
use haulier_engine::source::{self, RolledBack, Source};

use crate::explore;
use crate::properties::{ENDS, NEVER_NONE, NEVER_TWICE, NEVER_TWO, STRANDS};
use crate::rules::{RULES, Rules};
use crate::world::Budget;

const FEW: Budget = Budget {
    source_crashes: 1,
    destination_crashes: 1,
    cuts: 1,
    source_failures: 1,
    destination_failures: 1,
    bad_records: 0,
    source_power: 0,
    destination_power: 0,
    weeks: 0,
};

#[track_caller]
fn assert_found(property: &str, rules: Rules, faults: Budget) {
    let (count, broken) = explore(rules, faults);
    let names: Vec<&str> = broken.iter().map(|(name, _)| *name).collect();
    assert!(names.contains(&property), "{count} worlds, {names:?}");
}

#[test]
fn a_source_that_thaws_in_doubt() {
    fn on(state: Source, event: source::Event) -> (Source, Vec<source::Action>) {
        match (state, event) {
            (Source::InDoubt(_), source::Event::Failed) => (
                Source::RolledBack(RolledBack),
                vec![
                    source::Action::Thaw,
                    source::Action::Record(SourceRecord::RolledBack),
                ],
            ),
            _ => state.on(event),
        }
    }
    let rules = Rules {
        source_on: on,
        ..RULES
    };
    assert_found(NEVER_TWO, rules, FEW);
}

#[test]
fn a_source_that_kills_as_soon_as_it_runs_there() {
    fn on(state: Source, event: source::Event) -> (Source, Vec<source::Action>) {
        match (state, event) {
            (Source::InDoubt(_), source::Event::Resumed) => state.on(source::Event::Complete),
            _ => state.on(event),
        }
    }
    let rules = Rules {
        source_on: on,
        ..RULES
    };
    assert_found(NEVER_NONE, rules, FEW);
}

#[test]
fn a_source_that_sends_its_commit_before_its_record() {
    fn on(state: Source, event: source::Event) -> (Source, Vec<source::Action>) {
        let (next, mut actions) = state.on(event);
        if actions.contains(&source::Action::Record(SourceRecord::InDoubt)) {
            actions.reverse();
        }
        (next, actions)
    }
    let rules = Rules {
        source_on: on,
        ..RULES
    };
    assert_found(NEVER_TWO, rules, FEW);
}

#[test]
fn a_source_that_does_not_ask_again() {
    fn on(state: Source, event: source::Event) -> (Source, Vec<source::Action>) {
        match (state, event) {
            (Source::InDoubt(_), source::Event::Disconnected) => (state, Vec::new()),
            _ => state.on(event),
        }
    }
    let rules = Rules {
        source_on: on,
        ..RULES
    };
    assert_found(ENDS, rules, FEW);
}

#[test]
fn a_destination_that_thaws_before_its_record() {
    fn on(
        state: Destination,
        event: destination::Event,
    ) -> (Destination, Vec<destination::Action>) {
        let (next, mut actions) = state.on(event);
        if actions.contains(&destination::Action::Record(DestinationRecord::Committed)) {
            actions.reverse();
        }
        (next, actions)
    }
    let rules = Rules {
        destination_on: on,
        ..RULES
    };
    assert_found(NEVER_TWICE, rules, FEW);
    // Not even where only a disk fails.
    let faults = Budget {
        bad_records: 1,
        ..Budget::default()
    };
    assert_found(NEVER_TWICE, rules, faults);
}

#[test]
fn a_destination_that_says_complete_as_soon_as_it_runs() {
    fn on(
        state: Destination,
        event: destination::Event,
    ) -> (Destination, Vec<destination::Action>) {
        let (next, mut actions) = state.on(event);
        if event == destination::Event::Thawed {
            actions = vec![destination::Action::SendComplete];
        }
        (next, actions)
    }
    let rules = Rules {
        destination_on: on,
        ..RULES
    };
    assert_found(NEVER_NONE, rules, FEW);
}

#[test]
fn a_destination_that_takes_silence_for_consent() {
    fn on(
        state: Destination,
        event: destination::Event,
    ) -> (Destination, Vec<destination::Action>) {
        match (state, event) {
            (Destination::Held(_), destination::Event::Disconnected) => {
                state.on(destination::Event::Commit)
            }
            _ => state.on(event),
        }
    }
    let rules = Rules {
        destination_on: on,
        ..RULES
    };
    assert_found(NEVER_TWO, rules, FEW);
}

#[test]
fn a_destination_that_refuses_what_it_does_not_know() {
    fn on(
        state: Destination,
        event: destination::Event,
    ) -> (Destination, Vec<destination::Action>) {
        match (state, event) {
            (Destination::Preparing(_), destination::Event::Disconnected) => (state, Vec::new()),
            (Destination::Preparing(_), destination::Event::Commit) => {
                state.on(destination::Event::Failed)
            }
            _ => state.on(event),
        }
    }
    let rules = Rules {
        destination_on: on,
        hangs_up: false,
        ..RULES
    };
    let faults = Budget { weeks: 1, ..FEW };
    assert_found(NEVER_TWO, rules, faults);
}

#[test]
fn a_recovery_that_thaws_in_doubt() {
    fn source(records: &[SourceRecord]) -> SourceRecovery {
        match recovery::source(records) {
            SourceRecovery::Ask(_) => recovery::source(&[]),
            other => other,
        }
    }
    let rules = Rules {
        source_recovery: source,
        ..RULES
    };
    assert_found(NEVER_TWO, rules, FEW);
}

#[test]
fn a_recovery_that_asks_nobody() {
    fn source(records: &[SourceRecord]) -> SourceRecovery {
        match recovery::source(records) {
            SourceRecovery::Ask(_) => SourceRecovery::Person,
            other => other,
        }
    }
    let rules = Rules {
        source_recovery: source,
        ..RULES
    };
    assert_found(ENDS, rules, FEW);
}

#[test]
fn a_recovery_that_brings_no_pages() {
    let rules = Rules {
        recovery_reads_pages: false,
        ..RULES
    };
    assert_found(ENDS, rules, FEW);
}

#[test]
fn a_recovery_that_thinks_that_what_was_lost_had_never_run() {
    fn destination(records: &[DestinationRecord], fate: Option<Fate>) -> DestinationRecovery {
        let fate = fate.map(|fate| match fate {
            Fate::Lost => Fate::NeverRan,
            other => other,
        });
        recovery::destination(records, fate)
    }
    let rules = Rules {
        destination_recovery: destination,
        ..RULES
    };
    assert_found(NEVER_TWICE, rules, FEW);
}

#[test]
fn a_recovery_that_thinks_that_what_never_ran_was_lost() {
    fn answer(records: &[DestinationRecord]) -> Answer {
        match recovery::answer(records) {
            Answer::Refused => Answer::Lost,
            other => other,
        }
    }
    let rules = Rules { answer, ..RULES };
    // Without a death of the server: the link breaks, the destination refuses.
    let faults = Budget {
        cuts: 2,
        ..Budget::default()
    };
    assert_found(STRANDS, rules, faults);
}

#[test]
fn a_recovery_that_does_not_look_whether_the_tasks_live() {
    let rules = Rules {
        fate: |seen, _| seen,
        ..RULES
    };
    let faults = Budget {
        destination_power: 1,
        ..Budget::default()
    };
    assert_found(NEVER_NONE, rules, faults);
}

#[test]
fn an_answer_before_the_decision_is_carried_out() {
    fn answer(records: &[DestinationRecord]) -> Answer {
        match recovery::decision(records) {
            Decision::Committed => Answer::Complete,
            _ => recovery::answer(records),
        }
    }
    let rules = Rules { answer, ..RULES };
    assert_found(NEVER_NONE, rules, FEW);
}

#[test]
fn an_answer_before_the_decision_is_made() {
    fn answer(records: &[DestinationRecord]) -> Answer {
        match recovery::decision(records) {
            Decision::Open => Answer::Refused,
            _ => recovery::answer(records),
        }
    }
    let rules = Rules { answer, ..RULES };
    assert_found(NEVER_TWO, rules, FEW);
}

#[test]
fn a_refusal_that_does_not_outweigh_a_record_that_failed() {
    /// A decision that could not be synced counts, whatever came after it.
    fn first_word(records: &[DestinationRecord]) -> Vec<DestinationRecord> {
        let mut records = records.to_vec();
        if records.contains(&DestinationRecord::Committed) {
            records.retain(|record| *record != DestinationRecord::Refused);
        }
        records
    }
    let rules = Rules {
        destination_recovery: |records, fate| recovery::destination(&first_word(records), fate),
        answer: |records| recovery::answer(&first_word(records)),
        fate: |seen, _| seen,
        ..RULES
    };
    let faults = Budget {
        destination_crashes: 1,
        bad_records: 1,
        ..Budget::default()
    };
    assert_found(NEVER_NONE, rules, faults);
}
