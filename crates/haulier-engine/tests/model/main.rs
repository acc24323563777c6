//! The hand-over, explored: both machines that run, the recovery of both, and a network that breaks,
//! loses and reconnects, in every order in which things can happen.
//!
//! Each side performs its actions one by one, and may be killed before and after each; what is
//! recorded stays, the rest is lost. The properties look at the tasks themselves, as the actions
//! leave them, and not at what a machine believes.

mod destination_host;
mod properties;
mod rules;
mod source_host;
mod teeth;
mod world;

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Instant;

use destination_host::DestinationStep;
use rules::{RULES, Rules};
use source_host::SourceStep;
use stateright::{Checker, Expectation, Model, Property};
use world::{Budget, World};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Source(SourceStep),
    Destination(DestinationStep),
    CrashSource,
    CrashDestination,
    CutPowerOfSource,
    CutPowerOfDestination,
    Cut(usize),
    WeekPasses,
}

/// What is explored.
pub(crate) struct HandOver {
    pub(crate) rules: Rules,
    pub(crate) faults: Budget,
    /// Worlds known to come to an end by themselves, by their hash.
    ending: Mutex<HashSet<u64>>,
}

impl HandOver {
    pub(crate) fn new(rules: Rules, faults: Budget) -> HandOver {
        HandOver {
            rules,
            faults,
            ending: Mutex::new(HashSet::new()),
        }
    }

    /// What happens by itself: nothing breaks, what was killed is started again.
    fn natural(&self, world: &World) -> Vec<Step> {
        let mut source = Vec::new();
        let mut destination = Vec::new();
        let calm = World {
            faults: Budget::default(),
            ..world.clone()
        };
        source_host::steps(&calm, &self.rules, &mut source);
        destination_host::steps(&calm, &self.rules, &mut destination);
        let source = source.into_iter().map(Step::Source);
        source
            .chain(destination.into_iter().map(Step::Destination))
            .collect()
    }

    fn after(&self, world: &World, step: Step) -> World {
        let mut next = world.clone();
        match step {
            Step::Source(step) => source_host::take(&mut next, &self.rules, step),
            Step::Destination(step) => destination_host::take(&mut next, &self.rules, step),
            Step::CrashSource => {
                next.faults.source_crashes -= 1;
                source_host::crash(&mut next);
            }
            Step::CrashDestination => {
                next.faults.destination_crashes -= 1;
                destination_host::crash(&mut next);
            }
            Step::CutPowerOfSource => {
                next.faults.source_power -= 1;
                next.past.source_power |= next.source.tasks.live();
                source_host::crash(&mut next);
                next.source.tasks.kill();
            }
            Step::CutPowerOfDestination => {
                next.faults.destination_power -= 1;
                next.past.destination_power |= next.destination.tasks.live();
                destination_host::lose_power(&mut next);
            }
            Step::Cut(number) => {
                next.faults.cuts -= 1;
                next.connections[number].cut = true;
            }
            Step::WeekPasses => {
                next.faults.weeks -= 1;
                next.past.forgotten = true;
                next.destination.journal = None;
            }
        }
        next
    }
}

impl Model for HandOver {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        [false, true]
            .map(|leaves_pages| World::at_first(leaves_pages, self.faults))
            .to_vec()
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let mut source = Vec::new();
        let mut destination = Vec::new();
        source_host::steps(world, &self.rules, &mut source);
        destination_host::steps(world, &self.rules, &mut destination);
        steps.extend(source.into_iter().map(Step::Source));
        steps.extend(destination.into_iter().map(Step::Destination));
        let faults = &world.faults;
        if faults.source_crashes > 0 && world.source.agent.is_some() {
            steps.push(Step::CrashSource);
        }
        if faults.destination_crashes > 0 && world.destination.up {
            steps.push(Step::CrashDestination);
        }
        if faults.source_power > 0 && world.source.tasks.live() {
            steps.push(Step::CutPowerOfSource);
        }
        if faults.destination_power > 0 && world.destination.up {
            steps.push(Step::CutPowerOfDestination);
        }
        if faults.cuts > 0 {
            let whole = world.connections.iter().enumerate();
            let whole = whole.filter(|(_, link)| !link.is_broken());
            steps.extend(whole.map(|(number, _)| Step::Cut(number)));
        }
        let host = &world.destination;
        let idle = host.session.is_none() && host.recovery.is_none();
        if faults.weeks > 0 && idle && properties::is_settled_there(world) {
            steps.push(Step::WeekPasses);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let next = self.after(world, step);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<HandOver>> {
        properties::all()
    }
}

/// Explores everything. Returns how many worlds there are, and what does not hold in them, with the
/// shortest way there.
fn explore(rules: Rules, faults: Budget) -> (usize, Vec<(&'static str, String)>) {
    let checker = HandOver::new(rules, faults).checker().spawn_bfs().join();
    let mut broken = Vec::new();
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match (property.expectation, found) {
            (Expectation::Always, Some(path)) => {
                let steps = path.into_actions();
                let steps: Vec<String> = steps.iter().map(|step| format!("{step:?}")).collect();
                broken.push((property.name, steps.join("\n  ")));
            }
            (Expectation::Sometimes, None) => broken.push((property.name, "never".to_owned())),
            _ => {}
        }
    }
    (checker.unique_state_count(), broken)
}

#[track_caller]
fn assert_holds(faults: Budget) {
    let start = Instant::now();
    let (count, broken) = explore(RULES, faults);
    for (property, way) in &broken {
        println!("not so: {property}:\n  {way}");
    }
    println!("{count} states in {:?}", start.elapsed());
    assert!(broken.is_empty());
}

#[test]
fn agents_may_be_killed_twice_on_each_side() {
    assert_holds(Budget {
        source_crashes: 2,
        destination_crashes: 2,
        cuts: 1,
        destination_failures: 1,
        ..Budget::default()
    });
}

#[test]
fn the_link_may_break_again_and_again() {
    assert_holds(Budget {
        source_crashes: 1,
        destination_crashes: 1,
        cuts: 3,
        ..Budget::default()
    });
}

#[test]
fn disks_may_fail() {
    assert_holds(Budget {
        source_crashes: 1,
        destination_crashes: 1,
        cuts: 1,
        destination_failures: 1,
        bad_records: 1,
        ..Budget::default()
    });
    assert_holds(Budget {
        source_crashes: 1,
        destination_crashes: 1,
        bad_records: 2,
        ..Budget::default()
    });
}

#[test]
fn hosts_may_lose_their_power() {
    assert_holds(Budget {
        destination_crashes: 1,
        cuts: 1,
        source_power: 1,
        destination_power: 1,
        ..Budget::default()
    });
}

#[test]
fn a_source_may_ask_after_the_destination_has_forgotten() {
    assert_holds(Budget {
        source_crashes: 2,
        destination_crashes: 1,
        cuts: 1,
        weeks: 1,
        ..Budget::default()
    });
}
