//! The source's side of the hand-over.
//!
//! ```text
//! Running ─begin─▶ Frozen ─sent─▶ Offered ─held─▶ InDoubt ─resumed─▶ Serving ─complete─▶ Released
//!    ▲               │               │               │ └───────── lost ─┴──▶ Stranded
//!    └── failed, cancelled, refused ─┴── refused ────┘
//!         (RolledBack: thawed, final)
//! ```
//! `Serving` holds the frozen tasks until the destination has placed every page, over however many
//! connections: post-copy and hybrid have left pages here, and in the other modes a destination
//! whose server dies before it has placed what it received loses the target. `Stranded` is what
//! remains then: the tasks as they were frozen, the last copy. It may be older than what its
//! clients were told since, so a person decides whether it runs.
//!
//! From `InDoubt` only the destination's answer leads on. If the connection breaks there, a new one
//! is made and the commit sent again; the destination answers it the same way every time.

use crate::journal::SourceRecord;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Everything that can be checked and prepared without touching the target is done.
    Begin,
    /// Skeleton and pages have been sent, but for pages that are left here on purpose.
    AllSent,
    /// The destination says that it holds the restored target.
    Held,
    /// The destination says that the target runs there.
    Resumed,
    /// The destination says that it has every page.
    Complete,
    /// The destination says that it will never run it.
    Refused,
    /// The destination says that it may have run it, has lost it, and will not run it again.
    Lost,
    /// A step of this side failed, a deadline passed, or the user cancelled.
    Failed,
    /// The command connection broke.
    Disconnected,
    /// A new command connection has been made.
    Reconnected,
}

/// What to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Write a record to the journal, to disk.
    Record(SourceRecord),
    /// Freeze the target and lock its network.
    Freeze,
    /// Tell the destination that everything has been sent.
    SendOffer,
    /// Tell the destination to run the target.
    SendCommit,
    /// Tell the destination that nothing will come of it. It may not hear it.
    SendAbort,
    /// Let the target run here again and undo everything else.
    Thaw,
    /// Kill the frozen tasks and undo everything else.
    Kill,
    /// Give the target's addresses away; its frozen tasks stay.
    Depart,
    /// See to it that the destination gets what it lacks, anew after a break.
    Serve,
    /// Make a new command connection.
    Reconnect,
}

impl Action {
    /// Every action that a hand-over without trouble performs, in its order.
    pub const STRAIGHT_WAY: [Action; 10] = [
        Action::Record(SourceRecord::Freezing),
        Action::Freeze,
        Action::SendOffer,
        Action::Record(SourceRecord::InDoubt),
        Action::SendCommit,
        Action::Record(SourceRecord::Serving),
        Action::Depart,
        Action::Serve,
        Action::Record(SourceRecord::Released),
        Action::Kill,
    ];
}

/// Before the target is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Running;

/// The target is frozen (or about to be).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Frozen;

/// Everything has been sent; the destination restores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Offered;

/// The commit may have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InDoubt;

/// The target runs on the destination, which does not have all of it safe yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Serving;

/// The target runs on the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Released;

/// The destination lost the target: the frozen tasks here are the last copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stranded;

/// The target runs here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RolledBack;

/// A state of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// See [`Running`].
    Running(Running),
    /// See [`Frozen`].
    Frozen(Frozen),
    /// See [`Offered`].
    Offered(Offered),
    /// See [`InDoubt`].
    InDoubt(InDoubt),
    /// See [`Serving`].
    Serving(Serving),
    /// See [`Released`].
    Released(Released),
    /// See [`Stranded`].
    Stranded(Stranded),
    /// See [`RolledBack`].
    RolledBack(RolledBack),
}

type Step = (Source, Vec<Action>);

impl Source {
    /// The state before anything happened.
    pub fn new() -> Source {
        Source::Running(Running)
    }

    /// The next state, and what to do. An event that means nothing in a state changes nothing.
    pub fn on(self, event: Event) -> Step {
        match self {
            Source::Running(state) => state.on(event),
            Source::Frozen(state) => state.on(event),
            Source::Offered(state) => state.on(event),
            Source::InDoubt(state) => state.on(event),
            Source::Serving(state) => state.on(event),
            Source::Released(_) | Source::Stranded(_) | Source::RolledBack(_) => (self, Vec::new()),
        }
    }

    /// Whether the target may be running on this host.
    pub fn may_run(self) -> bool {
        matches!(self, Source::Running(_) | Source::RolledBack(_))
    }

    /// Whether nothing more will happen by itself.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Source::Released(_) | Source::Stranded(_) | Source::RolledBack(_)
        )
    }
}

impl Default for Source {
    fn default() -> Source {
        Source::new()
    }
}

impl Running {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Begin => (
                Source::Frozen(Frozen),
                vec![Action::Record(SourceRecord::Freezing), Action::Freeze],
            ),
            Event::Failed | Event::Disconnected | Event::Refused => {
                (Source::RolledBack(RolledBack), vec![Action::SendAbort])
            }
            Event::AllSent
            | Event::Held
            | Event::Resumed
            | Event::Complete
            | Event::Lost
            | Event::Reconnected => (Source::Running(self), Vec::new()),
        }
    }
}

impl Frozen {
    fn on(self, event: Event) -> Step {
        match event {
            Event::AllSent => (Source::Offered(Offered), vec![Action::SendOffer]),
            Event::Failed | Event::Disconnected | Event::Refused => roll_back(),
            Event::Begin
            | Event::Held
            | Event::Resumed
            | Event::Complete
            | Event::Lost
            | Event::Reconnected => (Source::Frozen(self), Vec::new()),
        }
    }
}

impl Offered {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Held => (
                Source::InDoubt(InDoubt),
                vec![Action::Record(SourceRecord::InDoubt), Action::SendCommit],
            ),
            Event::Failed | Event::Disconnected | Event::Refused => roll_back(),
            Event::Begin
            | Event::AllSent
            | Event::Resumed
            | Event::Complete
            | Event::Lost
            | Event::Reconnected => (Source::Offered(self), Vec::new()),
        }
    }
}

impl InDoubt {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Resumed => (
                Source::Serving(Serving),
                vec![
                    Action::Record(SourceRecord::Serving),
                    Action::Depart,
                    Action::Serve,
                ],
            ),
            // A destination that has every page has resumed as well.
            Event::Complete => release(),
            Event::Lost => strand(),
            // The destination has recorded its refusal: this is the only way back from here. It is
            // recorded here as well, so that nobody has to ask again, or takes what runs for frozen.
            Event::Refused => {
                let (state, mut actions) = roll_back();
                actions.insert(0, Action::Record(SourceRecord::Returning));
                (state, actions)
            }
            Event::Disconnected => (Source::InDoubt(self), vec![Action::Reconnect]),
            Event::Reconnected => (Source::InDoubt(self), vec![Action::SendCommit]),
            // A deadline or Ctrl-C is no reason to thaw: the destination may be running it.
            Event::Failed | Event::Begin | Event::AllSent | Event::Held => {
                (Source::InDoubt(self), Vec::new())
            }
        }
    }
}

impl Serving {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Complete => release(),
            Event::Lost => strand(),
            Event::Disconnected => (Source::Serving(self), vec![Action::Reconnect]),
            Event::Reconnected => (Source::Serving(self), vec![Action::Serve]),
            // The target has run elsewhere: what stands here is never thawed by itself, and never
            // given up before the other side has all of it.
            Event::Begin
            | Event::AllSent
            | Event::Held
            | Event::Resumed
            | Event::Refused
            | Event::Failed => (Source::Serving(self), Vec::new()),
        }
    }
}

fn release() -> Step {
    let actions = vec![Action::Record(SourceRecord::Released), Action::Kill];
    (Source::Released(Released), actions)
}

fn strand() -> Step {
    let actions = vec![Action::Record(SourceRecord::Stranded)];
    (Source::Stranded(Stranded), actions)
}

fn roll_back() -> Step {
    let actions = vec![
        Action::SendAbort,
        Action::Thaw,
        Action::Record(SourceRecord::RolledBack),
    ];
    (Source::RolledBack(RolledBack), actions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 10] = [
        Event::Begin,
        Event::AllSent,
        Event::Held,
        Event::Resumed,
        Event::Complete,
        Event::Refused,
        Event::Lost,
        Event::Failed,
        Event::Disconnected,
        Event::Reconnected,
    ];

    fn after(events: &[Event]) -> Step {
        events
            .iter()
            .fold((Source::new(), Vec::new()), |(state, _), event| {
                state.on(*event)
            })
    }

    #[test]
    fn the_straight_way() {
        let (state, actions) = after(&[Event::Begin, Event::AllSent, Event::Held]);
        assert_eq!(
            actions,
            [Action::Record(SourceRecord::InDoubt), Action::SendCommit]
        );
        let (state, actions) = state.on(Event::Resumed);
        assert_eq!(
            actions,
            [
                Action::Record(SourceRecord::Serving),
                Action::Depart,
                Action::Serve
            ]
        );
        assert!(!state.is_final() && !state.may_run());
        let (state, actions) = state.on(Event::Complete);
        assert_eq!(
            actions,
            [Action::Record(SourceRecord::Released), Action::Kill]
        );
        assert!(state.is_final() && !state.may_run());
    }

    #[test]
    fn the_list_of_the_straight_way_is_whole_and_in_order() {
        let events = [
            Event::Begin,
            Event::AllSent,
            Event::Held,
            Event::Resumed,
            Event::Complete,
        ];
        let mut state = Source::new();
        let mut performed = Vec::new();
        for event in events {
            let (next, actions) = state.on(event);
            performed.extend(actions);
            state = next;
        }
        assert_eq!(performed, Action::STRAIGHT_WAY);
    }

    #[test]
    fn before_the_commit_every_failure_thaws() {
        for begun in [&[Event::Begin][..], &[Event::Begin, Event::AllSent]] {
            for event in [Event::Failed, Event::Disconnected, Event::Refused] {
                let (state, actions) = after(begun).0.on(event);
                assert!(actions.contains(&Action::Thaw), "{begun:?} {event:?}");
                assert_eq!(state, Source::RolledBack(RolledBack));
            }
        }
    }

    #[test]
    fn from_the_commit_on_only_a_refusal_thaws_and_only_completeness_kills() {
        let (in_doubt, _) = after(&[Event::Begin, Event::AllSent, Event::Held]);
        let (serving, _) = in_doubt.on(Event::Resumed);
        for event in EVENTS {
            for state in [in_doubt, serving] {
                let (_, actions) = state.on(event);
                let refused = event == Event::Refused && state == in_doubt;
                assert_eq!(actions.contains(&Action::Thaw), refused, "{event:?}");
                let complete = event == Event::Complete;
                assert_eq!(actions.contains(&Action::Kill), complete, "{event:?}");
            }
        }
        assert_eq!(in_doubt.on(Event::Disconnected).1, [Action::Reconnect]);
        assert_eq!(in_doubt.on(Event::Reconnected).1, [Action::SendCommit]);
        assert_eq!(serving.on(Event::Disconnected).1, [Action::Reconnect]);
        assert_eq!(serving.on(Event::Reconnected).1, [Action::Serve]);
    }

    #[test]
    fn a_target_that_was_lost_leaves_the_tasks_here_for_a_person() {
        let (in_doubt, _) = after(&[Event::Begin, Event::AllSent, Event::Held]);
        for state in [in_doubt, in_doubt.on(Event::Resumed).0] {
            let (state, actions) = state.on(Event::Lost);
            assert_eq!(actions, [Action::Record(SourceRecord::Stranded)]);
            assert!(state.is_final() && !state.may_run());
        }
        // Before the commit there is nothing that could have been lost.
        let (offered, _) = after(&[Event::Begin, Event::AllSent]);
        assert_eq!(offered.on(Event::Lost), (offered, Vec::new()));
    }

    #[test]
    fn nothing_follows_a_final_state() {
        for state in [
            Source::Released(Released),
            Source::Stranded(Stranded),
            Source::RolledBack(RolledBack),
        ] {
            for event in EVENTS {
                assert_eq!(state.on(event), (state, Vec::new()));
            }
        }
    }

    #[test]
    fn a_target_that_was_not_touched_is_not_thawed() {
        let (state, actions) = Source::new().on(Event::Failed);
        assert_eq!(actions, [Action::SendAbort]);
        assert!(state.may_run());
    }
}
