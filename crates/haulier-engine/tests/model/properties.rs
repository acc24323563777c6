//! What must hold in every world that can come about.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_engine::recovery::{self, Decision, DestinationRecovery};
use stateright::Property;

use crate::HandOver;
use crate::world::{Guard, Tasks, World};

pub(crate) const NEVER_TWO: &str = "never two that run";
pub(crate) const NEVER_TWICE: &str = "what has run there does not run here from an older state";
pub(crate) const NEVER_NONE: &str = "never none that runs or can be recovered";
pub(crate) const ENDS: &str = "it ends when both hosts stay up and the link is whole";
pub(crate) const STRANDS: &str = "it strands only where a server failed";

pub(crate) fn all() -> Vec<Property<HandOver>> {
    vec![
        Property::always(NEVER_TWO, |_, world: &World| {
            let running = [world.source.tasks, world.destination.tasks];
            running != [Tasks::Running; 2]
        }),
        Property::always(NEVER_TWICE, |_, world: &World| {
            let again = world.source.tasks == Tasks::Running && world.past.ran_there;
            !again || world.past.person
        }),
        Property::always(NEVER_NONE, |_, world: &World| is_saved(world)),
        Property::always(STRANDS, |_, world: &World| {
            !is_stranded(world) || world.past.server_failed || world.past.false_record
        }),
        Property::always(ENDS, |model, world: &World| {
            needs_a_person(world) || ends(model, world)
        }),
        Property::sometimes("it moves", |_, world: &World| {
            world.source.tasks == Tasks::Dead && is_over(world)
        }),
        Property::sometimes("it comes back", |_, world: &World| {
            world.source.tasks == Tasks::Running && is_over(world)
        }),
        Property::sometimes("a person lets the last copy run", |_, world: &World| {
            world.past.person && is_over(world)
        }),
        Property::sometimes("what was committed is withdrawn", |_, world: &World| {
            let records = world.destination.journal.as_deref().unwrap_or_default();
            records.contains(&DestinationRecord::Withdrawn) && is_over(world)
        }),
    ]
}

/// Nothing is left to be done on the destination.
pub(crate) fn is_settled_there(world: &World) -> bool {
    world
        .destination
        .journal
        .as_ref()
        .is_some_and(|records| recovery::destination(records, None) == DestinationRecovery::Settled)
}

fn is_stranded(world: &World) -> bool {
    let records = world.source.journal.as_deref().unwrap_or_default();
    records.contains(&SourceRecord::Stranded)
}

/// A copy lives that runs, or that somebody will or can let run. Power that goes takes along what
/// lives on its host.
fn is_saved(world: &World) -> bool {
    let there = &world.destination;
    let decision = there.journal.as_deref().map(recovery::decision);
    let owns = there.tasks == Tasks::Running
        || matches!(decision, Some(Decision::Committed | Decision::Done));
    let lives_there = there.tasks.live() && there.guard == Guard::Complete && owns;
    let went_down =
        world.past.source_power || world.past.destination_power && world.past.whole_there;
    world.source.tasks.live() || lives_there || went_down
}

/// Nothing happens by itself any more, and everything is in order.
fn is_over(world: &World) -> bool {
    let (here, there) = (&world.source, &world.destination);
    let settled_here = here.journal.is_none() || is_stranded(world);
    let settled_there = there.journal.is_none() || is_settled_there(world);
    let stands = here.tasks == Tasks::Frozen && !is_stranded(world);
    here.agent.is_none()
        && settled_here
        && there.up
        && there.session.is_none()
        && there.recovery.is_none()
        && settled_there
        && !stands
        && there.tasks != Tasks::Frozen
}

/// What waits for a person, and is announced to one.
fn needs_a_person(world: &World) -> bool {
    // Pages that have gone with their host are waited for.
    let pages = world.leaves_pages && world.past.source_power;
    // A source that asks after more than a week is not answered.
    pages || world.past.forgotten
}

/// Whether a world that is in order can be reached from here without any further fault.
///
/// Every world that is reached on the way is explored as well, and so has a way of its own: nothing
/// that happens by itself leads to where there is none. So unless some step that is possible again
/// and again is never taken, it ends. The checker's own "eventually" would not tell: it does not see
/// cycles, of which there are some (a source that asks again before the destination has settled).
fn ends(model: &HandOver, world: &World) -> bool {
    let mut known = model
        .ending
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut seen = HashSet::new();
    // Depth first, the way in hand: if it leads to the end, all of it does.
    let mut way: Vec<(u64, Vec<World>)> = Vec::new();
    let mut next = Some(calm(world));
    loop {
        if let Some(world) = next.take() {
            let hash = hash(&world);
            if known.contains(&hash) || is_over(&world) {
                known.insert(hash);
                known.extend(way.iter().map(|(hash, _)| *hash));
                return true;
            }
            if seen.insert(hash) {
                let steps = model.natural(&world);
                let worlds = steps.into_iter().rev();
                let worlds = worlds.map(|step| model.after(&world, step));
                way.push((hash, worlds.collect()));
            }
        }
        match way.last_mut() {
            None => return false,
            Some((_, rest)) => match rest.pop() {
                Some(world) => next = Some(world),
                None => drop(way.pop()),
            },
        }
    }
}

/// The same world, in which nothing more goes wrong.
fn calm(world: &World) -> World {
    World {
        faults: crate::world::Budget::default(),
        ..world.clone()
    }
}

fn hash(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}
