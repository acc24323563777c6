//! The source: what `haulier migrate` and its recovery do around their machine.

use std::collections::VecDeque;

use haulier_engine::journal::SourceRecord;
use haulier_engine::recovery::{SourceRecovery, Verdict};
use haulier_engine::source::{Action, Event, Source};

use crate::rules::Rules;
use crate::world::{Back, Connection, End, Session, SourceAgent, Tasks, There, World, write};

/// Something that happens on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceStep {
    /// The next action of the list is performed.
    Perform,
    /// The next action is a record, which fails; it is on the disk nonetheless, or not.
    FailRecord { on_disk: bool },
    /// Something that the machine is told.
    Happens(Event),
    /// The next message is heard.
    Hear,
    /// The dump is complete and the cgroup holds the tasks.
    Confine,
    /// The agent has come to its end.
    End,
    /// Somebody finds the journal of one that was killed.
    Recover,
    /// A person lets the last copy run.
    LetRun,
}

/// What can happen, the likely first.
pub(crate) fn steps(world: &World, rules: &Rules, steps: &mut Vec<SourceStep>) {
    let host = &world.source;
    let Some(agent) = &host.agent else {
        if let Some(journal) = &host.journal {
            match (rules.source_recovery)(journal) {
                SourceRecovery::Finish(_) | SourceRecovery::Ask(_) => {
                    steps.push(SourceStep::Recover);
                }
                SourceRecovery::Person if journal.contains(&SourceRecord::Stranded) => {
                    steps.push(SourceStep::LetRun);
                }
                SourceRecovery::Person => {}
            }
        }
        return;
    };
    if let Some(action) = agent.todo.front() {
        steps.push(SourceStep::Perform);
        if matches!(action, Action::Record(_)) && world.faults.bad_records > 0 {
            steps.push(SourceStep::FailRecord { on_disk: true });
            steps.push(SourceStep::FailRecord { on_disk: false });
        }
        return;
    }
    let Some(machine) = agent.machine else {
        return steps.push(SourceStep::End);
    };
    if machine.is_final() {
        return steps.push(SourceStep::End);
    }
    let link = world.connections.iter().find(|link| link.source);
    match machine {
        Source::Running(_) if agent.prepared => steps.push(SourceStep::Happens(Event::Begin)),
        Source::Frozen(_) if !host.confined => steps.push(SourceStep::Confine),
        Source::Frozen(_) => steps.push(SourceStep::Happens(Event::AllSent)),
        _ => {}
    }
    if link.is_some_and(|link| !link.back.is_empty()) {
        steps.push(SourceStep::Hear);
    }
    match link {
        // An attempt that cannot succeed changes nothing.
        None if !world.destination.up => {}
        None => steps.push(SourceStep::Happens(Event::Disconnected)),
        Some(link) if link.is_broken() => steps.push(SourceStep::Happens(Event::Disconnected)),
        // The serving of pages has broken with an earlier connection: it takes a new one.
        Some(link)
            if matches!(machine, Source::Serving(_)) && world.leaves_pages && !link.serves =>
        {
            steps.push(SourceStep::Happens(Event::Disconnected));
        }
        Some(_) => {}
    }
    if world.faults.source_failures > 0 {
        steps.push(SourceStep::Happens(Event::Failed));
    }
}

pub(crate) fn take(world: &mut World, rules: &Rules, step: SourceStep) {
    match step {
        SourceStep::Perform => perform(world, rules),
        SourceStep::FailRecord { on_disk } => fail_record(world, rules, on_disk),
        SourceStep::Happens(event) => {
            if event == Event::Failed {
                world.faults.source_failures -= 1;
            }
            if event == Event::Disconnected {
                world.close_source_end();
            }
            if event == Event::AllSent && world.leaves_pages {
                world.send_pages();
            }
            feed(world, rules, event);
        }
        SourceStep::Hear => hear(world, rules),
        SourceStep::Confine => world.source.confined = true,
        SourceStep::End => {
            let stranded = world
                .source
                .agent
                .as_ref()
                .is_some_and(|agent| matches!(agent.machine, Some(Source::Stranded(_))));
            if !stranded {
                world.source.journal = None;
            }
            world.source.agent = None;
            world.close_source_end();
        }
        SourceStep::Recover => recover(world, rules),
        SourceStep::LetRun => {
            let records = world.source.journal.clone().unwrap_or_default();
            let actions = haulier_engine::recovery::resolve(&records, Verdict::RunHere);
            world.past.person = true;
            world.source.agent = actions.map(|actions| finishing(actions.into()));
        }
    }
}

/// The agent is killed, or gives up asking.
pub(crate) fn crash(world: &mut World) {
    if world.source.agent.take().is_none() {
        return;
    }
    world.close_source_end();
    if !world.source.confined && world.source.tasks == Tasks::Frozen {
        world.source.tasks = Tasks::Running;
    }
}

fn finishing(todo: VecDeque<Action>) -> SourceAgent {
    SourceAgent {
        machine: None,
        before: None,
        todo,
        recovers: true,
        prepared: false,
        rejoins: true,
        reads_pages: false,
    }
}

fn recover(world: &mut World, rules: &Rules) {
    let records = world.source.journal.clone().unwrap_or_default();
    world.source.agent = match (rules.source_recovery)(&records) {
        SourceRecovery::Finish(actions) => Some(finishing(actions.into())),
        SourceRecovery::Ask(machine) => Some(SourceAgent {
            machine: Some(machine),
            reads_pages: rules.recovery_reads_pages,
            ..finishing(VecDeque::new())
        }),
        SourceRecovery::Person => None,
    };
}

fn feed(world: &mut World, rules: &Rules, event: Event) {
    let Some(agent) = &mut world.source.agent else {
        return;
    };
    let Some(machine) = agent.machine else { return };
    let (next, actions) = (rules.source_on)(machine, event);
    agent.before = Some(machine);
    agent.machine = Some(next);
    agent.todo = actions.into();
    if agent.todo.is_empty() {
        agent.before = None;
    }
}

fn hear(world: &mut World, rules: &Rules) {
    let heard = world.source_link().and_then(|link| link.back.pop_front());
    let Some(message) = heard else { return };
    let Some(agent) = &mut world.source.agent else {
        return;
    };
    let reads = agent.reads_pages;
    let event = match message {
        Back::Prepared => {
            agent.prepared = true;
            return;
        }
        // What it says that it lacks is sent, if there is somebody who can read it.
        Back::Missing if reads => return world.send_pages(),
        Back::Missing => return,
        Back::Held => Event::Held,
        Back::Resumed => Event::Resumed,
        Back::Complete => Event::Complete,
        Back::Lost => Event::Lost,
        Back::Refused => Event::Refused,
    };
    feed(world, rules, event);
}

fn perform(world: &mut World, rules: &Rules) {
    let Some(agent) = &mut world.source.agent else {
        return;
    };
    let Some(action) = agent.todo.pop_front() else {
        return;
    };
    let again = agent.rejoins;
    match action {
        Action::Record(record) => write(&mut world.source.journal, record),
        Action::Freeze => world.source.tasks = Tasks::Frozen,
        Action::SendOffer => world.say_there(There::Offer),
        Action::SendCommit => world.say_there(There::Commit),
        Action::SendAbort => world.say_there(There::Abort),
        Action::Thaw => world.source.tasks.thaw(),
        Action::Kill => world.source.tasks.kill(),
        // The addresses go; the tasks stay as they are.
        Action::Depart => {}
        Action::Serve if again => {
            world.say_there(There::Rejoin);
            if let Some(link) = world.source_link() {
                link.serves = true;
            }
        }
        Action::Serve => agent.rejoins = true,
        Action::Reconnect => return reconnect(world, rules),
    }
    if let Some(agent) = &mut world.source.agent {
        if agent.todo.is_empty() {
            agent.before = None;
        }
    }
}

fn reconnect(world: &mut World, rules: &Rules) {
    let there = &mut world.destination;
    if !there.up {
        return;
    }
    let destination = match there.knows || there.journal.is_some() {
        true => End::Answerer,
        false => {
            there.knows = true;
            there.session = Some(Session::new(!world.leaves_pages));
            End::Session
        }
    };
    world.connections.push(Connection {
        source: true,
        destination,
        cut: false,
        there: VecDeque::new(),
        pages: false,
        serves: false,
        back: VecDeque::new(),
    });
    feed(world, rules, Event::Reconnected);
}

/// What is not on disk has not happened, and nothing that follows it either.
fn fail_record(world: &mut World, rules: &Rules, on_disk: bool) {
    world.faults.bad_records -= 1;
    let Some(agent) = &mut world.source.agent else {
        return;
    };
    if let Some(Action::Record(record)) = agent.todo.pop_front() {
        if on_disk {
            write(&mut world.source.journal, record);
        }
    }
    // It is tried again by the next.
    if agent.recovers {
        world.source.agent = None;
        return world.close_source_end();
    }
    if agent.machine.is_some_and(Source::is_final) {
        return;
    }
    agent.todo.clear();
    agent.machine = agent.before.take();
    let undo = matches!(
        agent.machine,
        Some(Source::Running(_) | Source::Frozen(_) | Source::Offered(_))
    );
    match undo {
        true => feed(world, rules, Event::Failed),
        // It asks again, over a new connection.
        false => world.close_source_end(),
    }
}
