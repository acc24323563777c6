use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::page::PAGE_BYTES;

const TASK: u32 = 7;

fn run(page: u64, pages: u64, zero: bool) -> PageRun {
    PageRun {
        range: PageRange {
            start: page * PAGE,
            pages,
        },
        zero,
    }
}

fn filled(store: &PageStore, values: &[u8]) -> BatchBuffer {
    let mut buffer = store.buffer(values.len() * PAGE_BYTES).unwrap();
    for (page, value) in buffer.chunks_exact_mut(PAGE_BYTES).zip(values) {
        page.fill(*value);
    }
    buffer
}

#[test]
fn the_limit_holds_for_contents_and_for_bookkeeping() {
    let store = PageStore::new(10 * PAGE);
    let batch = store.buffer(8 * PAGE_BYTES).unwrap();
    assert!(matches!(
        store.buffer(3 * PAGE_BYTES),
        Err(StoreError::Full { .. })
    ));
    store.insert(TASK, 0, &[run(0, 8, false)], batch).unwrap();
    let error = (0..u64::from(u32::MAX))
        .find_map(|page| {
            store
                .insert_zero(TASK, 0, run(100 + 2 * page, 1, true).range)
                .err()
        })
        .unwrap();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert!(store.used() <= 10 * PAGE);
    store.retain(TASK, &[]);
    assert_eq!(store.used(), 0, "all is given back");
}

#[test]
fn each_page_is_given_back_when_its_last_reader_is_gone() {
    let store = PageStore::new(1 << 20);
    let batch = filled(&store, &[1, 2, 3]);
    store.insert(TASK, 0, &[run(10, 3, false)], batch).unwrap();
    store.discard(TASK, run(10, 2, false).range);
    assert_eq!(store.used(), PAGE + EXTENT_BYTES);
    let Lookup::Data(last) = store.take_run(TASK, 12 * PAGE, 9) else {
        panic!("page 12 lost")
    };
    assert_eq!(store.used(), PAGE, "the reader still holds it");
    assert!(last.iter().all(|byte| *byte == 3));
    drop(last);
    assert_eq!(store.used(), 0);
}

#[test]
fn pages_that_are_written_again_and_again_take_no_more_room() {
    // Twelve pages, of which one or the other comes anew in each round: a limit of a few more
    // is enough for ever.
    let store = PageStore::new(24 * PAGE);
    let batch = filled(&store, &[1; 12]);
    store.insert(TASK, 0, &[run(0, 12, false)], batch).unwrap();
    let mut last = 0;
    for round in 1..200 {
        let page = u64::from(round) * 7 % 12;
        last = page;
        let batch = filled(&store, &[round as u8]);
        store
            .insert(TASK, round, &[run(page, 1, false)], batch)
            .unwrap();
    }
    let Lookup::Data(data) = store.lookup(TASK, last * PAGE, 1) else {
        panic!("lost")
    };
    assert_eq!(data[0], 199);
}

#[test]
fn bad_input_is_refused_whole() {
    let store = PageStore::new(1 << 20);
    let refused = |runs: &[PageRun], pages: usize| {
        store
            .insert(TASK, 0, runs, store.buffer(pages * PAGE_BYTES).unwrap())
            .unwrap_err()
    };
    assert!(matches!(
        refused(&[run(1, 2, false)], 1),
        StoreError::Length { .. }
    ));
    let end = PageRange {
        start: crate::page::ADDRESS_END - PAGE,
        pages: 2,
    };
    let beyond = PageRun {
        range: end,
        zero: true,
    };
    assert!(matches!(
        refused(&[run(1, 1, false), beyond], 1),
        StoreError::Range { .. }
    ));
    store.seal();
    assert_eq!(
        refused(&[run(1, 1, false)], 1),
        StoreError::Sealed { task: TASK }
    );
    let found = store.lookup(TASK, PAGE, 1);
    assert!(
        matches!(
            found,
            Lookup::Absent {
                next: None,
                sealed: true
            }
        ),
        "{found:?}"
    );
    assert_eq!(store.used(), 0);
}

#[test]
fn a_waiter_is_woken_by_an_arrival_and_by_the_seal() {
    let store = Arc::new(PageStore::new(1 << 20));
    let deadline = Instant::now() + Duration::from_secs(20);
    for seal in [false, true] {
        let seen = store.version();
        let waiter = {
            let store = store.clone();
            std::thread::spawn(move || store.wait_change(seen, deadline))
        };
        if seal {
            store.seal();
        } else {
            store.insert_zero(TASK, 0, run(1, 1, true).range).unwrap();
        }
        assert_eq!(waiter.join().unwrap(), seen + 1);
    }
    let now = store.version();
    assert_eq!(
        store.wait_change(now, Instant::now()),
        now,
        "a passed deadline ends the wait"
    );
}

#[derive(Debug, Clone)]
enum Action {
    Insert {
        round: u32,
        runs: Vec<(u64, u64, bool)>,
    },
    Take {
        page: u64,
        max: u64,
    },
    Discard {
        page: u64,
        pages: u64,
    },
    DiscardBefore {
        round: u32,
        page: u64,
        pages: u64,
    },
    Retain(Vec<(u64, u64)>),
}

const PAGES: u64 = 40;

fn action() -> impl Strategy<Value = Action> {
    let runs = prop::collection::vec((0..PAGES, 1..12_u64, any::<bool>()), 1..4);
    prop_oneof![
        4 => (0..4_u32, runs).prop_map(|(round, runs)| Action::Insert { round, runs }),
        3 => (0..PAGES, 1..12_u64).prop_map(|(page, max)| Action::Take { page, max }),
        1 => (0..PAGES, 1..12_u64).prop_map(|(page, pages)| Action::Discard { page, pages }),
        2 => (0..5_u32, 0..PAGES, 1..12_u64)
            .prop_map(|(round, page, pages)| Action::DiscardBefore { round, page, pages }),
        1 => prop::collection::vec((0..6_u64, 1..8_u64), 0..4).prop_map(Action::Retain),
    ]
}

proptest! {
    /// Against a map of single pages to (round, value); value 0 is a zero page.
    #[test]
    fn it_behaves_like_a_map_of_pages(actions in prop::collection::vec(action(), 1..40)) {
        let store = PageStore::new(1 << 30);
        let mut model: HashMap<u64, (u32, u8)> = HashMap::new();
        let mut value = 0_u8;
        for action in actions {
            match action {
                Action::Insert { round, runs } => {
                    let (mut list, mut values) = (Vec::new(), Vec::new());
                    for (page, pages, zero) in runs {
                        list.push(run(page, pages, zero));
                        for page in page..page + pages {
                            value = value % 250 + 1;
                            let new = if zero { 0 } else { value };
                            values.extend((!zero).then_some(value));
                            let old = model.entry(page).or_insert((round, new));
                            if old.0 <= round {
                                *old = (round, new);
                            }
                        }
                    }
                    store.insert(TASK, round, &list, filled(&store, &values)).unwrap();
                }
                Action::Take { page, max } => {
                    let found = store.take_run(TASK, page * PAGE, max);
                    prop_assert!(found.pages() <= max);
                    for n in 0..found.pages() {
                        let got = match &found {
                            Lookup::Data(data) => data[n as usize * PAGE_BYTES + 17],
                            _ => 0,
                        };
                        prop_assert_eq!(model.remove(&(page + n)).map(|old| old.1), Some(got));
                    }
                    if let Lookup::Absent { next, .. } = found {
                        let expected = model.keys().filter(|other| **other >= page).min();
                        prop_assert_eq!(next, expected.map(|page| page * PAGE));
                        prop_assert!(!model.contains_key(&page));
                    }
                }
                Action::Discard { page, pages } => {
                    store.discard(TASK, run(page, pages, false).range);
                    model.retain(|at, _| !(page..page + pages).contains(at));
                }
                Action::DiscardBefore { round, page, pages } => {
                    store.discard_before(TASK, round, run(page, pages, false).range).unwrap();
                    model.retain(|at, old| {
                        !(page..page + pages).contains(at) || old.0 >= round
                    });
                }
                Action::Retain(gaps) => {
                    let (mut from, mut ranges) = (0, Vec::new());
                    for (gap, pages) in gaps {
                        ranges.push(run(from + gap, pages, false).range);
                        from += gap + pages;
                    }
                    store.retain(TASK, &ranges);
                    model.retain(|at, _| ranges.iter()
                        .any(|range| (range.start..range.end()).contains(&(at * PAGE))));
                }
            }
            for page in 0..PAGES + 12 {
                let expected = model.get(&page).map(|old| old.1);
                let got = match store.lookup(TASK, page * PAGE, 1) {
                    Lookup::Data(data) => Some(data[4095]),
                    Lookup::Zero(_) => Some(0),
                    Lookup::Absent { .. } => None,
                };
                prop_assert_eq!(got, expected, "page {}", page);
                let absent = store.absent(TASK, run(page, 1, false).range);
                prop_assert_eq!(absent.is_empty(), expected.is_some());
            }
            let all = store.absent(TASK, run(0, PAGES + 12, false).range);
            let absent: u64 = all.iter().map(|range| range.pages).sum();
            prop_assert_eq!(absent, PAGES + 12 - model.len() as u64);
        }
        store.retain(TASK, &[]);
        prop_assert_eq!(store.used(), 0);
    }
}
