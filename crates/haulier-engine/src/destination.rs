//! The destination's side of the hand-over.
//!
//! ```text
//! Preparing ─begun─▶ Receiving ─restored─▶ Held ─commit─▶ Owner ─thawed─▶ Arriving ─filled─▶ Done
//!     │                  │                  │
//!     └── failed, aborted, disconnected ────┴──▶ Refused                        └── lost ──▶ Lost
//! ```
//! `Owner` and `Refused` are each entered through a record on disk; there is no way from one to the
//! other. A commit that arrives in `Refused` is answered with "refused", in `Arriving`
//! with "resumed", in `Done` with "complete". In `Arriving` the target runs and its pages are still being placed, from this
//! host's page store or from the source; if that cannot be brought to its end the target is killed,
//! and `Lost` tells the source that its copy is the last.

use crate::journal::DestinationRecord;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The source announced that it begins.
    Begun,
    /// The target is restored, complete, and frozen here.
    Restored,
    /// The source said to run it.
    Commit,
    /// It runs here.
    Thawed,
    /// Every page is in its place.
    Filled,
    /// Some never will be. The target has been killed.
    Lost,
    /// A step of this side failed, or a deadline passed.
    Failed,
    /// The source gave up.
    Aborted,
    /// The command connection broke.
    Disconnected,
}

/// What to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Write a record to the journal, to disk.
    Record(DestinationRecord),
    /// Tell the source that it may begin to send.
    SendPrepared,
    /// Tell the source that the target is held here.
    SendHeld,
    /// Announce its addresses and let the target run.
    Thaw,
    /// Tell the source that it runs here.
    SendResumed,
    /// Tell the source that every page is here.
    SendComplete,
    /// Tell the source that the target is gone.
    SendLost,
    /// Kill what was restored and undo everything else.
    Kill,
    /// Tell the source that it will never run here, and why.
    SendRefused,
}

impl Action {
    /// Every action that a hand-over without trouble performs, in its order.
    pub const STRAIGHT_WAY: [Action; 8] = [
        Action::Record(DestinationRecord::Receiving),
        Action::SendPrepared,
        Action::SendHeld,
        Action::Record(DestinationRecord::Committed),
        Action::Thaw,
        Action::SendResumed,
        Action::Record(DestinationRecord::Done),
        Action::SendComplete,
    ];
}

/// Nothing has been taken yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Preparing;

/// Skeleton and pages come in, the restore goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Receiving;

/// The target stands here, complete and frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Held;

/// The target is this host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner;

/// The target runs here while its pages are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Arriving;

/// The target runs here, whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Done;

/// It will never run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Refused;

/// It was to run here and is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lost;

/// A state of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Destination {
    /// See [`Preparing`].
    Preparing(Preparing),
    /// See [`Receiving`].
    Receiving(Receiving),
    /// See [`Held`].
    Held(Held),
    /// See [`Owner`].
    Owner(Owner),
    /// See [`Arriving`].
    Arriving(Arriving),
    /// See [`Done`].
    Done(Done),
    /// See [`Refused`].
    Refused(Refused),
    /// See [`Lost`].
    Lost(Lost),
}

type Step = (Destination, Vec<Action>);

impl Destination {
    /// The state before anything happened.
    pub fn new() -> Destination {
        Destination::Preparing(Preparing)
    }

    /// The next state, and what to do. An event that means nothing in a state changes nothing.
    pub fn on(self, event: Event) -> Step {
        match self {
            Destination::Preparing(state) => state.on(event),
            Destination::Receiving(state) => state.on(event),
            Destination::Held(state) => state.on(event),
            Destination::Owner(state) => state.on(event),
            Destination::Arriving(state) => state.on(event),
            Destination::Done(state) => state.on(event),
            Destination::Refused(state) => state.on(event),
            Destination::Lost(state) => state.on(event),
        }
    }

    /// Whether the target may be running on this host.
    pub fn may_run(self) -> bool {
        matches!(
            self,
            Destination::Owner(_) | Destination::Arriving(_) | Destination::Done(_)
        )
    }

    /// Whether only late commits remain to be answered.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Destination::Done(_) | Destination::Refused(_) | Destination::Lost(_)
        )
    }
}

impl Default for Destination {
    fn default() -> Destination {
        Destination::new()
    }
}

impl Preparing {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Begun => (
                Destination::Receiving(Receiving),
                vec![
                    Action::Record(DestinationRecord::Receiving),
                    Action::SendPrepared,
                ],
            ),
            Event::Failed | Event::Aborted | Event::Disconnected => refuse(),
            // A commit that comes first is of a migration that is not known here (any more): it may
            // have run here. Nothing is known, and nothing is said.
            Event::Commit | Event::Restored | Event::Thawed | Event::Filled | Event::Lost => {
                (Destination::Preparing(self), Vec::new())
            }
        }
    }
}

impl Receiving {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Restored => (Destination::Held(Held), vec![Action::SendHeld]),
            // A commit for what is not held yet is a broken source.
            Event::Failed | Event::Aborted | Event::Disconnected | Event::Commit => refuse(),
            Event::Begun | Event::Thawed | Event::Filled | Event::Lost => {
                (Destination::Receiving(self), Vec::new())
            }
        }
    }
}

impl Held {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Commit => (
                Destination::Owner(Owner),
                vec![Action::Record(DestinationRecord::Committed), Action::Thaw],
            ),
            // The source, if its commit was on the way, asks again and is told.
            Event::Failed | Event::Aborted | Event::Disconnected => refuse(),
            Event::Begun | Event::Restored | Event::Thawed | Event::Filled | Event::Lost => {
                (Destination::Held(self), Vec::new())
            }
        }
    }
}

impl Owner {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Thawed => (Destination::Arriving(Arriving), vec![Action::SendResumed]),
            // There is no way back; a thaw that failed is tried again.
            Event::Failed => (Destination::Owner(self), vec![Action::Thaw]),
            Event::Begun
            | Event::Restored
            | Event::Commit
            | Event::Filled
            | Event::Lost
            | Event::Aborted
            | Event::Disconnected => (Destination::Owner(self), Vec::new()),
        }
    }
}

impl Arriving {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Filled => (
                Destination::Done(Done),
                vec![
                    Action::Record(DestinationRecord::Done),
                    Action::SendComplete,
                ],
            ),
            Event::Lost => (
                Destination::Lost(Lost),
                vec![Action::Record(DestinationRecord::Lost), Action::SendLost],
            ),
            Event::Commit => (Destination::Arriving(self), vec![Action::SendResumed]),
            Event::Begun
            | Event::Restored
            | Event::Thawed
            | Event::Failed
            | Event::Aborted
            | Event::Disconnected => (Destination::Arriving(self), Vec::new()),
        }
    }
}

impl Done {
    fn on(self, event: Event) -> Step {
        let actions = if event == Event::Commit {
            vec![Action::SendComplete]
        } else {
            Vec::new()
        };
        (Destination::Done(self), actions)
    }
}

impl Refused {
    fn on(self, event: Event) -> Step {
        let actions = if event == Event::Commit {
            vec![Action::SendRefused]
        } else {
            Vec::new()
        };
        (Destination::Refused(self), actions)
    }
}

impl Lost {
    fn on(self, event: Event) -> Step {
        let actions = if event == Event::Commit {
            vec![Action::SendLost]
        } else {
            Vec::new()
        };
        (Destination::Lost(self), actions)
    }
}

fn refuse() -> Step {
    let actions = vec![
        Action::Record(DestinationRecord::Refused),
        Action::Kill,
        Action::SendRefused,
    ];
    (Destination::Refused(Refused), actions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 9] = [
        Event::Begun,
        Event::Restored,
        Event::Commit,
        Event::Thawed,
        Event::Filled,
        Event::Lost,
        Event::Failed,
        Event::Aborted,
        Event::Disconnected,
    ];

    fn after(events: &[Event]) -> Step {
        events
            .iter()
            .fold((Destination::new(), Vec::new()), |(state, _), event| {
                state.on(*event)
            })
    }

    #[test]
    fn the_straight_way() {
        let (state, actions) = after(&[Event::Begun, Event::Restored, Event::Commit]);
        assert_eq!(
            actions,
            [Action::Record(DestinationRecord::Committed), Action::Thaw]
        );
        let (state, actions) = state.on(Event::Thawed);
        assert_eq!(actions.last(), Some(&Action::SendResumed));
        assert!(!state.is_final() && state.may_run());
        assert_eq!(state.on(Event::Commit).1, [Action::SendResumed]);
        let (state, actions) = state.on(Event::Filled);
        assert_eq!(
            actions,
            [
                Action::Record(DestinationRecord::Done),
                Action::SendComplete
            ]
        );
        assert!(state.is_final() && state.may_run());
        assert_eq!(state.on(Event::Commit).1, [Action::SendComplete]);
    }

    #[test]
    fn the_list_of_the_straight_way_is_whole_and_in_order() {
        let events = [
            Event::Begun,
            Event::Restored,
            Event::Commit,
            Event::Thawed,
            Event::Filled,
        ];
        let mut state = Destination::new();
        let mut performed = Vec::new();
        for event in events {
            let (next, actions) = state.on(event);
            performed.extend(actions);
            state = next;
        }
        assert_eq!(performed, Action::STRAIGHT_WAY);
    }

    #[test]
    fn nothing_thaws_before_the_decision_is_recorded() {
        for first in EVENTS {
            for second in EVENTS {
                for third in EVENTS {
                    let mut state = Destination::new();
                    let mut committed = false;
                    for event in [first, second, third] {
                        let (next, actions) = state.on(event);
                        for action in actions {
                            committed |= action == Action::Record(DestinationRecord::Committed);
                            assert!(action != Action::Thaw || committed);
                            assert!(action != Action::Kill || !committed);
                        }
                        state = next;
                    }
                    assert_eq!(state.may_run(), committed);
                }
            }
        }
    }

    #[test]
    fn a_refusal_is_final_and_repeated() {
        for begun in [&[][..], &[Event::Begun], &[Event::Begun, Event::Restored]] {
            let (state, actions) = after(begun).0.on(Event::Disconnected);
            assert_eq!(actions[0], Action::Record(DestinationRecord::Refused));
            for event in EVENTS {
                let (next, actions) = state.on(event);
                assert_eq!(next, state);
                assert_eq!(
                    actions.contains(&Action::SendRefused),
                    event == Event::Commit
                );
            }
        }
    }

    #[test]
    fn an_owner_never_lets_go() {
        let (owner, _) = after(&[Event::Begun, Event::Restored, Event::Commit]);
        for event in EVENTS {
            let (next, actions) = owner.on(event);
            assert!(next.may_run());
            assert!(!actions.contains(&Action::Kill));
        }
    }
}
