//! The source's side of the hand-over.
//!
//! ```text
//! Running ─begin─▶ Frozen ─sent─▶ Offered ─held─▶ InDoubt ─resumed─▶ Released
//!    ▲               │               │               │ └──resumed, pages are here──▶ Serving ─complete─▶ Released
//!    └── failed, cancelled, refused ─┴── refused ────┘
//!         (RolledBack: thawed, final)
//! ```
//! Post-copy and hybrid leave pages here when they offer: `Serving` holds the frozen tasks until the
//! destination has every page, over however many connections.
//!
//! From `InDoubt` only the destination's answer leads on. If the connection breaks there, a new one
//! is made and the commit sent again; the destination answers it the same way every time.

use crate::journal::SourceRecord;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Everything that can be checked and prepared without touching the target is done.
    Begin,
    /// Skeleton and pages have been sent whole.
    AllSent,
    /// The skeleton has been sent, and pages are left here for after the commit.
    SkeletonSent,
    /// The destination says that it holds the restored target.
    Held,
    /// The destination says that the target runs there.
    Resumed,
    /// The destination says that it has every page.
    Complete,
    /// The destination says that it will never run it.
    Refused,
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
    /// Send the pages that are left here, anew after a break.
    Serve,
    /// Make a new command connection.
    Reconnect,
}

/// Before the target is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Running;

/// The target is frozen (or about to be).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Frozen;

/// Everything has been sent; the destination restores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Offered {
    /// Pages are left here.
    pub behind: bool,
}

/// The commit may have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InDoubt {
    /// Pages are left here.
    pub behind: bool,
}

/// The target runs on the destination and lacks pages, which are here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Serving;

/// The target runs on the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Released;

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
            Source::Released(_) | Source::RolledBack(_) => (self, Vec::new()),
        }
    }

    /// Whether the target may be running on this host.
    pub fn may_run(self) -> bool {
        matches!(self, Source::Running(_) | Source::RolledBack(_))
    }

    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Source::Released(_) | Source::RolledBack(_))
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
            | Event::SkeletonSent
            | Event::Held
            | Event::Resumed
            | Event::Complete
            | Event::Reconnected => (Source::Running(self), Vec::new()),
        }
    }
}

impl Frozen {
    fn on(self, event: Event) -> Step {
        match event {
            Event::AllSent | Event::SkeletonSent => {
                let behind = event == Event::SkeletonSent;
                (Source::Offered(Offered { behind }), vec![Action::SendOffer])
            }
            Event::Failed | Event::Disconnected | Event::Refused => roll_back(),
            Event::Begin | Event::Held | Event::Resumed | Event::Complete | Event::Reconnected => {
                (Source::Frozen(self), Vec::new())
            }
        }
    }
}

impl Offered {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Held => (
                Source::InDoubt(InDoubt {
                    behind: self.behind,
                }),
                vec![Action::Record(SourceRecord::InDoubt), Action::SendCommit],
            ),
            Event::Failed | Event::Disconnected | Event::Refused => roll_back(),
            Event::Begin
            | Event::AllSent
            | Event::SkeletonSent
            | Event::Resumed
            | Event::Complete
            | Event::Reconnected => (Source::Offered(self), Vec::new()),
        }
    }
}

impl InDoubt {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Resumed if self.behind => (
                Source::Serving(Serving),
                vec![
                    Action::Record(SourceRecord::Serving),
                    Action::Depart,
                    Action::Serve,
                ],
            ),
            // A destination that has every page has resumed as well.
            Event::Resumed | Event::Complete => release(),
            // The destination has recorded its refusal: this is the only way back from here.
            Event::Refused => roll_back(),
            Event::Disconnected => (Source::InDoubt(self), vec![Action::Reconnect]),
            Event::Reconnected => (Source::InDoubt(self), vec![Action::SendCommit]),
            // A deadline or Ctrl-C is no reason to thaw: the destination may be running it.
            Event::Failed | Event::Begin | Event::AllSent | Event::SkeletonSent | Event::Held => {
                (Source::InDoubt(self), Vec::new())
            }
        }
    }
}

impl Serving {
    fn on(self, event: Event) -> Step {
        match event {
            Event::Complete => release(),
            Event::Disconnected => (Source::Serving(self), vec![Action::Reconnect]),
            Event::Reconnected => (Source::Serving(self), vec![Action::Serve]),
            // The target has run elsewhere: what stands here is never thawed by itself, and never
            // given up before the other side has all of it.
            Event::Begin
            | Event::AllSent
            | Event::SkeletonSent
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
        Event::SkeletonSent,
        Event::Held,
        Event::Resumed,
        Event::Complete,
        Event::Refused,
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
            [Action::Record(SourceRecord::Released), Action::Kill]
        );
        assert!(state.is_final() && !state.may_run());
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
    fn in_doubt_only_a_refusal_thaws_and_only_a_resumption_kills() {
        let (in_doubt, _) = after(&[Event::Begin, Event::AllSent, Event::Held]);
        for event in EVENTS {
            let (_, actions) = in_doubt.on(event);
            assert_eq!(
                actions.contains(&Action::Thaw),
                event == Event::Refused,
                "{event:?}"
            );
            assert_eq!(
                actions.contains(&Action::Kill),
                matches!(event, Event::Resumed | Event::Complete),
                "{event:?}"
            );
        }
        assert_eq!(in_doubt.on(Event::Disconnected).1, [Action::Reconnect]);
        assert_eq!(in_doubt.on(Event::Reconnected).1, [Action::SendCommit]);
    }

    #[test]
    fn pages_that_are_left_here_keep_the_tasks_until_they_are_complete_there() {
        let (in_doubt, _) = after(&[Event::Begin, Event::SkeletonSent, Event::Held]);
        let (serving, actions) = in_doubt.on(Event::Resumed);
        assert_eq!(
            actions,
            [
                Action::Record(SourceRecord::Serving),
                Action::Depart,
                Action::Serve
            ]
        );
        assert!(!serving.may_run() && !serving.is_final());
        for event in EVENTS {
            let (_, actions) = serving.on(event);
            assert!(!actions.contains(&Action::Thaw), "{event:?}");
            let kills = actions.contains(&Action::Kill);
            assert_eq!(kills, event == Event::Complete, "{event:?}");
        }
        assert_eq!(serving.on(Event::Disconnected).1, [Action::Reconnect]);
        assert_eq!(serving.on(Event::Reconnected).1, [Action::Serve]);
    }

    #[test]
    fn nothing_follows_a_final_state() {
        for state in [Source::Released(Released), Source::RolledBack(RolledBack)] {
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
