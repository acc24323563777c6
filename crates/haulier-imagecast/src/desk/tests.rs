//! A cache that means no good, as the desk hears it.

use std::collections::BTreeSet;

use haulier_criu::skeleton::LazyRange;
use proptest::prelude::*;

use super::*;
use crate::left::Errand;
use crate::message::{Go, Held};
use crate::pages::LazyPages;

/// As little as there may be of either half.
const MEMORY: usize = 2 * LEAST;
/// Pages of each of the two tasks: more than there is room for.
const PAGES: u64 = 3000;
const PAGE: u64 = 4096;

/// A desk with a dump that was released and whose pages are there to be fetched. Nothing waits.
fn desk() -> (Desk, u64) {
    let stop = Cancel::new().unwrap();
    let desk = Desk::new(MEMORY, Duration::from_secs(60), stop.clone());
    let dump = desk.register(&ImageName::new("a").unwrap()).unwrap().dump;
    desk.connected(0).unwrap();
    desk.begin(dump).unwrap();
    for task in [7, 8] {
        let pages = skeleton::LeftBehind {
            wide: true,
            ranges: vec![LazyRange {
                start: 16 * PAGE,
                pages: PAGES,
            }],
        };
        assert_eq!(desk.left_behind(dump, task, &pages).unwrap(), task == 7);
    }
    desk.taken(dump, 0, 0).unwrap();
    desk.held(&Held {
        snapshot: dump,
        number: 1,
        images: 0,
        bytes: 0,
    });
    desk.serves(dump);
    stop.cancel();
    (desk, dump)
}

#[derive(Debug, Clone)]
enum Step {
    /// The cache says something.
    Hear(Body),
    /// So many errands are run.
    Errands(usize),
    /// So many frames are sent, and all but so many of those acknowledged.
    Send(usize, usize),
    Reconnect,
    Lost,
}

fn step() -> impl Strategy<Value = Step> {
    let snapshot = prop_oneof![9 => Just(1_u64), 1 => any::<u64>()];
    let page = prop_oneof![
        8 => (0..PAGES + 40).prop_map(|page| page * PAGE),
        1 => any::<u64>(),
    ];
    let task = prop_oneof![9 => 7_u32..9, 1 => any::<u32>()];
    let fault = (snapshot.clone(), task, prop::collection::vec(page, 0..300)).prop_map(
        |(snapshot, task, pages)| {
            Body::Fault(Fault {
                snapshot,
                task,
                pages,
            })
        },
    );
    let body = prop_oneof![
        3 => snapshot.clone().prop_map(|snapshot| Body::Wanted(Wanted { snapshot })),
        9 => fault,
        2 => snapshot.clone().prop_map(|snapshot| Body::Restored(Restored { snapshot })),
        1 => snapshot.clone().prop_map(|snapshot| Body::Placed(Placed { snapshot })),
        1 => (snapshot.clone(), any::<bool>()).prop_map(|(snapshot, ran)| {
            Body::GaveUp(GaveUp { snapshot, reason: "so".to_owned(), ran })
        }),
        1 => snapshot.clone().prop_map(|snapshot| Body::Go(Go { snapshot })),
        1 => snapshot.prop_map(|snapshot| Body::Over(Over { snapshot, reason: String::new() })),
    ];
    prop_oneof![
        8 => body.prop_map(Step::Hear),
        8 => (0_usize..200).prop_map(Step::Errands),
        4 => (0_usize..50, 0_usize..50).prop_map(|(send, keep)| Step::Send(send, keep)),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Lost),
    ]
}

/// What the cache has said, and the desk has had done.
#[derive(Default)]
struct Seen {
    begun: bool,
    placed: bool,
    never_ran: bool,
    fetched: BTreeSet<(u32, u64)>,
}

/// Runs an errand as who fetches does; false if it was the last one.
fn run(desk: &Desk, dump: u64, seen: &mut Seen) -> Result<bool, TestCaseError> {
    match desk.errand(dump) {
        None => return Ok(false),
        Some(Errand::Begin) => {
            prop_assert!(!seen.begun);
            seen.begun = true;
            desk.go(dump);
        }
        Some(Errand::Get(task, range, urgent)) => {
            prop_assert!(seen.begun);
            prop_assert!(range.is_valid() && range.pages <= crate::left::CHUNK);
            for page in 0..range.pages {
                let at = range.start + page * PAGE;
                // What a page server does not have ends its dump.
                prop_assert!(
                    [7, 8].contains(&task) && (16 * PAGE..(16 + PAGES) * PAGE).contains(&at)
                );
                prop_assert!(seen.fetched.insert((task, at)), "once");
            }
            let pages = LazyPages {
                snapshot: dump,
                task,
                range,
                zero: false,
            };
            desk.send_pages(&pages, vec![1; (range.pages * PAGE) as usize], urgent);
        }
        Some(Errand::Finish) => {
            prop_assert!(seen.begun && seen.placed);
            return Ok(false);
        }
        Some(Errand::Refuse(_)) => {
            prop_assert!(!seen.begun || seen.never_ran, "two copies");
            return Ok(false);
        }
        Some(Errand::Hold(_)) => return Ok(false),
    }
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a cache says of memory that was left behind: nothing panics, the proxy keeps within its
    /// memory, asks its dump for nothing that it does not have, and for nothing twice; and the tasks do not
    /// run on at their source once they may run elsewhere, unless the cache says that they never did.
    #[test]
    fn a_hostile_cache_does_no_harm(steps in prop::collection::vec(step(), 0..60)) {
        let (desk, dump) = desk();
        let mut seen = Seen::default();
        for step in steps {
            match step {
                Step::Hear(body) => {
                    match &body {
                        Body::Placed(placed) if placed.snapshot == dump => seen.placed = true,
                        Body::GaveUp(gave_up) if gave_up.snapshot == dump => {
                            seen.never_ran |= !gave_up.ran;
                        }
                        _ => {}
                    }
                    let proxys = matches!(body, Body::Go(_) | Body::Over(_));
                    prop_assert_eq!(desk.hear(body).is_err(), proxys);
                }
                Step::Errands(count) => {
                    for _ in 0..count {
                        if !run(&desk, dump, &mut seen)? {
                            break;
                        }
                    }
                }
                Step::Send(send, keep) => {
                    let mut state = desk.state();
                    let sent = (0..send).take_while(|_| state.outbox.next().is_some()).count();
                    let received = state.outbox.acknowledged() + sent.saturating_sub(keep) as u64;
                    drop(state);
                    desk.acknowledge(received);
                }
                Step::Reconnect => {
                    let received = desk.state().outbox.acknowledged();
                    desk.connected(received);
                }
                Step::Lost => desk.lost("lost"),
            }
            // A frame over, and what is said beside.
            prop_assert!(desk.state().outbox.held() <= MEMORY + (1 << 20));
        }
    }
}

#[test]
fn a_cache_that_wants_everything_and_takes_nothing_gets_what_there_is_room_for() {
    let (desk, dump) = desk();
    let mut seen = Seen::default();
    desk.hear(Body::Wanted(Wanted { snapshot: dump })).unwrap();
    assert!(run(&desk, dump, &mut seen).unwrap());
    for task in [7, 8] {
        let pages = (16..16 + PAGES).map(|page| page * PAGE).collect();
        let fault = Fault {
            snapshot: dump,
            task,
            pages,
        };
        desk.hear(Body::Fault(fault)).unwrap();
    }
    while run(&desk, dump, &mut seen).unwrap() {}
    assert!(desk.state().outbox.held() <= MEMORY);
    assert!(!seen.fetched.is_empty());
    // The rest comes when it takes them.
    let all = 2 * PAGES as usize;
    while seen.fetched.len() < all {
        let mut state = desk.state();
        let sent = std::iter::from_fn(|| state.outbox.next()).count() as u64;
        let received = state.outbox.acknowledged() + sent;
        drop(state);
        assert!(sent > 0 && desk.acknowledge(received));
        while run(&desk, dump, &mut seen).unwrap() {}
    }
}
