//! The destination: what `haulier serve` and its recovery do around their machine.

use std::collections::VecDeque;

use haulier_engine::destination::{Action, Destination, Event};
use haulier_engine::recovery::{Answer, DestinationRecovery, Fate};

use crate::rules::Rules;
use crate::world::{Back, End, Guard, Session, Tasks, There, World, write};

/// Something that happens on the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DestinationStep {
    /// The session performs the next action of its list.
    Perform,
    /// The next action is a record, which fails; it is on the disk nonetheless, or not.
    FailRecord { on_disk: bool },
    /// The session hears the next message.
    Hear,
    /// The session takes in the pages that were left behind.
    TakePages,
    /// Something that the session's machine is told.
    Happens(Event),
    /// Memory cannot be completed: the tasks are killed.
    FailFill,
    /// Every page is in its place, and the guard goes.
    Fill,
    /// The session has come to its end.
    End,
    /// A connection that asks again is taken over by the session.
    Join(usize),
    /// It is answered by what the journal says.
    Answer(usize),
    /// It is found to be broken.
    Drop(usize),
    /// The server is started again.
    Start,
    /// Somebody finds the journal of one that was killed.
    Recover,
    /// The recovery performs its next action.
    Undo,
    /// A record of the recovery fails.
    FailUndo { on_disk: bool },
    /// The guard has noticed that its server is gone.
    Kill,
}

/// What can happen, the likely first.
pub(crate) fn steps(world: &World, rules: &Rules, steps: &mut Vec<DestinationStep>) {
    let host = &world.destination;
    if host.guard == Guard::Watching && host.session.is_none() {
        steps.push(DestinationStep::Kill);
    }
    if !host.up {
        return steps.push(DestinationStep::Start);
    }
    let fails = world.faults.bad_records > 0;
    if let Some(recovery) = &host.recovery {
        steps.push(DestinationStep::Undo);
        if fails && matches!(recovery.front(), Some(Action::Record(_))) {
            steps.push(DestinationStep::FailUndo { on_disk: true });
            steps.push(DestinationStep::FailUndo { on_disk: false });
        }
    }
    match &host.session {
        Some(session) => of_session(world, session, steps),
        None => {
            if host.recovery.is_none() && is_unsettled(world, rules) {
                steps.push(DestinationStep::Recover);
            }
        }
    }
    let asking = world.connections.iter().enumerate();
    for (number, link) in asking.filter(|(_, link)| link.destination == End::Answerer) {
        // Settled means to this server: the target is its, and pages are still coming.
        let joins = host.session.as_ref().is_some_and(|session| {
            session.todo.is_empty() && matches!(session.machine, Destination::Arriving(_))
        });
        if joins {
            steps.push(DestinationStep::Join(number));
        }
        // Also while somebody else works on it.
        if !link.there.is_empty() {
            steps.push(DestinationStep::Answer(number));
        }
        if link.is_broken() {
            steps.push(DestinationStep::Drop(number));
        }
    }
}

fn of_session(world: &World, session: &Session, steps: &mut Vec<DestinationStep>) {
    let fillable = session.has_pages && world.destination.tasks.live();
    if world.destination.guard == Guard::Watching && fillable {
        steps.push(DestinationStep::Fill);
    }
    let link = world
        .connections
        .iter()
        .find(|link| link.destination == End::Session);
    if link.is_some_and(|link| link.pages) {
        steps.push(DestinationStep::TakePages);
    }
    if let Some(action) = session.todo.front() {
        steps.push(DestinationStep::Perform);
        if matches!(action, Action::Record(_)) && world.faults.bad_records > 0 {
            steps.push(DestinationStep::FailRecord { on_disk: true });
            steps.push(DestinationStep::FailRecord { on_disk: false });
        }
        return;
    }
    let mut happens = |event| steps.push(DestinationStep::Happens(event));
    let undone = match session.machine {
        Destination::Preparing(_) => true,
        Destination::Receiving(_) => {
            if session.offered {
                happens(Event::Restored);
            }
            true
        }
        Destination::Held(_) => true,
        Destination::Owner(_) => {
            happens(Event::Thawed);
            false
        }
        Destination::Arriving(_) => {
            match (world.destination.guard, world.destination.tasks) {
                (Guard::Complete, _) => happens(Event::Filled),
                (_, Tasks::Dead) => happens(Event::Lost),
                _ => {}
            }
            false
        }
        Destination::Done(_) | Destination::Refused(_) | Destination::Lost(_) => {
            steps.push(DestinationStep::End);
            false
        }
    };
    if world.faults.destination_failures > 0 {
        if undone {
            steps.push(DestinationStep::Happens(Event::Failed));
        } else if matches!(session.machine, Destination::Arriving(_)) && fillable_later(world) {
            steps.push(DestinationStep::FailFill);
        }
    }
    let Some(link) = link else { return };
    if !link.there.is_empty() {
        steps.push(DestinationStep::Hear);
    }
    if link.is_broken() {
        steps.push(DestinationStep::Happens(Event::Disconnected));
    }
}

fn fillable_later(world: &World) -> bool {
    world.destination.guard == Guard::Watching && world.destination.tasks.live()
}

fn fate(world: &World, rules: &Rules) -> Option<Fate> {
    let seen = match world.destination.guard {
        Guard::Watching => return None,
        Guard::Complete => Fate::Complete,
        Guard::KilledFrozen => Fate::NeverRan,
        Guard::None | Guard::KilledRunning | Guard::Dumb => Fate::Lost,
    };
    Some((rules.fate)(seen, world.destination.tasks.live()))
}

fn next_recovery(world: &World, rules: &Rules) -> DestinationRecovery {
    match &world.destination.journal {
        None => DestinationRecovery::Settled,
        Some(records) => match (rules.destination_recovery)(records, None) {
            DestinationRecovery::AskGuard => {
                (rules.destination_recovery)(records, fate(world, rules))
            }
            other => other,
        },
    }
}

/// Whether a recovery would do anything at this moment.
fn is_unsettled(world: &World, rules: &Rules) -> bool {
    matches!(next_recovery(world, rules), DestinationRecovery::Finish(_))
}

pub(crate) fn take(world: &mut World, rules: &Rules, step: DestinationStep) {
    match step {
        DestinationStep::Perform => perform(world),
        DestinationStep::FailRecord { on_disk } => fail_record(world, rules, on_disk),
        DestinationStep::Hear => hear(world, rules),
        DestinationStep::TakePages => {
            if let Some(link) = world.session_link() {
                link.pages = false;
            }
            if let Some(session) = &mut world.destination.session {
                session.has_pages = true;
            }
        }
        DestinationStep::Happens(event) => happens(world, rules, event),
        DestinationStep::FailFill => {
            world.faults.destination_failures -= 1;
            world.past.server_failed = true;
            world.destination.tasks.kill();
            world.destination.guard = Guard::KilledRunning;
        }
        DestinationStep::Fill => {
            world.destination.guard = Guard::Complete;
            note_run(world);
        }
        DestinationStep::End => end(world),
        DestinationStep::Join(number) => {
            world.connections[number].destination = End::Answerer;
            if let Some(old) = world.session_link() {
                old.close_destination();
            }
            world.connections[number].destination = End::Session;
            world.forget_closed();
        }
        DestinationStep::Answer(number) => answer(world, rules, number),
        DestinationStep::Drop(number) => {
            world.connections[number].close_destination();
            world.forget_closed();
        }
        DestinationStep::Start => {
            world.destination.up = true;
            world.destination.knows = false;
        }
        DestinationStep::Recover => {
            if let DestinationRecovery::Finish(actions) = next_recovery(world, rules) {
                world.destination.recovery = Some(actions.into());
            }
        }
        DestinationStep::Undo => undo(world),
        DestinationStep::FailUndo { on_disk } => {
            world.faults.bad_records -= 1;
            let next = world.destination.recovery.take();
            let next = next.and_then(|mut actions| actions.pop_front());
            if let Some(Action::Record(record)) = next.filter(|_| on_disk) {
                write(&mut world.destination.journal, record);
            }
        }
        DestinationStep::Kill => {
            let host = &mut world.destination;
            host.guard = match host.tasks {
                Tasks::Running => Guard::KilledRunning,
                Tasks::None | Tasks::Frozen | Tasks::Dead => Guard::KilledFrozen,
            };
            host.tasks.kill();
        }
    }
}

/// The server is killed, and whatever recovers beside it.
pub(crate) fn crash(world: &mut World) {
    let host = &mut world.destination;
    host.up = false;
    host.session = None;
    host.recovery = None;
    world.past.server_failed = true;
    world.close_destination_ends();
}

/// The host loses its power.
pub(crate) fn lose_power(world: &mut World) {
    crash(world);
    let host = &mut world.destination;
    host.tasks.kill();
    if host.guard == Guard::Watching {
        host.guard = Guard::Dumb;
    }
}

fn note_run(world: &mut World) {
    if world.destination.tasks == Tasks::Running {
        world.past.ran_there = true;
        world.past.whole_there |= world.destination.guard == Guard::Complete;
    }
}

fn feed(world: &mut World, rules: &Rules, event: Event) {
    let Some(session) = &mut world.destination.session else {
        return;
    };
    let (next, actions) = (rules.destination_on)(session.machine, event);
    session.was_held |= matches!(session.machine, Destination::Held(_));
    session.before = session.machine;
    session.machine = next;
    session.todo = actions.into();
    if session.todo.is_empty() {
        session.before = next;
    }
}

fn happens(world: &mut World, rules: &Rules, event: Event) {
    let Some(session) = &world.destination.session else {
        return;
    };
    let machine = session.machine;
    match event {
        Event::Failed => world.faults.destination_failures -= 1,
        Event::Restored => world.destination.tasks = Tasks::Frozen,
        Event::Disconnected => {
            world.close_session_end();
            // It has gone before it began: nothing was made.
            if matches!(machine, Destination::Preparing(_)) {
                world.destination.session = None;
                return;
            }
        }
        _ => {}
    }
    feed(world, rules, event);
}

fn hear(world: &mut World, rules: &Rules) {
    let heard = world.session_link().and_then(|link| link.there.pop_front());
    let Some(message) = heard else { return };
    let Some(session) = &mut world.destination.session else {
        return;
    };
    let machine = session.machine;
    let arriving = matches!(machine, Destination::Arriving(_));
    let event = match message {
        There::Begin => {
            world.destination.journal = Some(Vec::new());
            world.destination.guard = Guard::Watching;
            Event::Begun
        }
        There::Offer => {
            session.offered = true;
            return;
        }
        // Of something that is not known here: it hangs up.
        There::Commit | There::Rejoin
            if rules.hangs_up && matches!(machine, Destination::Preparing(_)) =>
        {
            world.close_session_end();
            world.destination.session = None;
            return;
        }
        There::Commit => Event::Commit,
        There::Rejoin if arriving => return world.say_back(Back::Missing),
        There::Rejoin => return,
        There::Abort => Event::Aborted,
    };
    feed(world, rules, event);
}

fn perform(world: &mut World) {
    let Some(session) = &mut world.destination.session else {
        return;
    };
    let Some(action) = session.todo.pop_front() else {
        return;
    };
    let (machine, was_held) = (session.machine, session.was_held);
    if session.todo.is_empty() {
        session.before = machine;
    }
    match action {
        Action::Record(record) => write(&mut world.destination.journal, record),
        Action::SendPrepared => world.say_back(Back::Prepared),
        Action::SendHeld => world.say_back(Back::Held),
        Action::Thaw => {
            world.destination.tasks.thaw();
            note_run(world);
        }
        Action::SendResumed => world.say_back(Back::Resumed),
        Action::SendComplete => world.say_back(Back::Complete),
        Action::SendLost => {
            let removed = haulier_engine::journal::DestinationRecord::Removed;
            write(&mut world.destination.journal, removed);
            world.say_back(Back::Lost);
        }
        // Nothing was made for what never began.
        Action::Kill if world.destination.journal.is_none() => {}
        Action::Kill => {
            world.destination.tasks.kill();
            if world.destination.guard == Guard::Watching {
                world.destination.guard = Guard::KilledFrozen;
            }
            let removed = haulier_engine::journal::DestinationRecord::Removed;
            write(&mut world.destination.journal, removed);
        }
        Action::SendRefused => {
            world.say_back(Back::Refused);
            // Only of what it has said to hold can the source ask again what became of it.
            if !was_held {
                world.destination.journal = None;
            }
        }
    }
}

fn end(world: &mut World) {
    world.close_session_end();
    world.destination.session = None;
}

fn fail_record(world: &mut World, rules: &Rules, on_disk: bool) {
    world.faults.bad_records -= 1;
    let Some(session) = &mut world.destination.session else {
        return;
    };
    if let Some(Action::Record(record)) = session.todo.pop_front() {
        if on_disk {
            world.past.false_record = true;
            write(&mut world.destination.journal, record);
        }
    }
    if session.machine.is_final() {
        return;
    }
    session.todo = VecDeque::new();
    session.machine = session.before;
    feed(world, rules, Event::Failed);
}

fn answer(world: &mut World, rules: &Rules, number: usize) {
    let answer = match &world.destination.journal {
        None => Answer::Silence,
        Some(records) => (rules.answer)(records),
    };
    let link = &mut world.connections[number];
    let message = match answer {
        Answer::Complete => Some(Back::Complete),
        Answer::Lost => Some(Back::Lost),
        Answer::Refused => Some(Back::Refused),
        Answer::Silence => None,
    };
    if let Some(message) = message.filter(|_| !link.is_broken()) {
        link.back.push_back(message);
    }
    link.close_destination();
    world.forget_closed();
}

fn undo(world: &mut World) {
    let Some(recovery) = &mut world.destination.recovery else {
        return;
    };
    match recovery.pop_front() {
        None => world.destination.recovery = None,
        Some(Action::Record(record)) => write(&mut world.destination.journal, record),
        Some(Action::Kill) => world.destination.tasks.kill(),
        Some(Action::Thaw) => {
            world.destination.tasks.thaw();
            note_run(world);
        }
        Some(_) => {}
    }
}
