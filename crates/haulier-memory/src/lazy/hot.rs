//! What is placed ahead of everything else: pages that are written all the time.
//!
//! A task meets such pages with nearly everything it does, and after the thaw each of them costs it a fault: of
//! the five pages that a Redis touches for a SET, four are of the tenth of its memory that has no values
//! in it. That a page came in round after round says so; what is only read is not known.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::page::{PAGE, PageRange};
use crate::store::PageStore;

/// Once comes all of memory, and once more what was written meanwhile; in a third round comes what is written
/// again and again.
const OFTEN: u8 = 3;

/// At most this part of the pages: one by one they take longer to place than in their order.
const SHARE: u64 = 16;

/// Pages of tasks, in the addresses of the image.
#[derive(Debug, Default)]
pub(super) struct Hot {
    left: OnceLock<Mutex<VecDeque<(u32, PageRange)>>>,
}

impl Hot {
    /// Finds them among what the store has of these tasks, which takes milliseconds for each GiB and keeps
    /// others from the store: for a moment at which at most the last pages still come. A second call does
    /// nothing.
    pub(super) fn find(&self, store: &PageStore, tasks: impl Iterator<Item = u32>) {
        self.left.get_or_init(|| Mutex::new(find(store, tasks)));
    }

    /// The next ones, of one task and at most so many; those that came most often first.
    pub(super) fn next(&self, most: u64) -> Option<(u32, PageRange)> {
        let mut left = self
            .left
            .get()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (task, range) = left.pop_front()?;
        if range.pages <= most {
            return Some((task, range));
        }
        let (first, rest) = range.split(most);
        left.push_front((task, rest));
        Some((task, first))
    }
}

fn find(store: &PageStore, tasks: impl Iterator<Item = u32>) -> VecDeque<(u32, PageRange)> {
    let mut found: Vec<_> = tasks
        .flat_map(|task| {
            let of_task = store.renewed(task, OFTEN).into_iter();
            of_task.map(move |(times, range)| (times, task, range))
        })
        .collect();
    // Stable: those that came equally often stay in the order of their addresses.
    found.sort_by_key(|(times, _, _)| Reverse(*times));
    let mut left = store.used() / PAGE / SHARE;
    let fits = |(_, task, range): (u8, u32, PageRange)| {
        left = left.checked_sub(range.pages)?;
        Some((task, range))
    };
    found.into_iter().map_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageRun;

    fn run(page: u64, pages: u64) -> PageRun {
        let start = page * PAGE;
        PageRun {
            range: PageRange { start, pages },
            zero: false,
        }
    }

    fn insert(store: &PageStore, task: u32, round: u32, run: PageRun) {
        let bytes = (run.range.pages * PAGE) as usize;
        let mut buffer = store.buffer(bytes).unwrap();
        buffer.fill(round as u8 + 1);
        store.insert(task, round, &[run], buffer).unwrap();
    }

    #[test]
    fn what_came_most_often_is_first_and_all_of_it_is_not_much() {
        let store = PageStore::new(1 << 30);
        for task in [1, 2] {
            insert(&store, task, 0, run(0, 1000));
        }
        // Twice is not often, and what is zero costs nothing.
        insert(&store, 1, 1, run(500, 10));
        for round in 1..5 {
            insert(&store, 1, round, run(100, 20));
            store.insert_zero(1, round, run(300, 5).range).unwrap();
        }
        for round in 1..6 {
            insert(&store, 2, round, run(40, 3));
        }
        for round in 1..3 {
            insert(&store, 2, round, run(600, 1000));
        }
        let hot = Hot::default();
        assert_eq!(hot.next(16), None, "nothing was found yet");
        hot.find(&store, [1, 2].into_iter());
        let pieces: Vec<_> = std::iter::from_fn(|| hot.next(16)).collect();
        assert!(pieces.iter().all(|(_, range)| range.pages <= 16));
        let page_of = |(task, range): (u32, PageRange)| {
            let first = range.start / PAGE;
            (first..first + range.pages).map(move |page| (task, page))
        };
        let pages: Vec<_> = pieces.into_iter().flat_map(page_of).collect();
        let expected: Vec<_> = (40..43)
            .map(|page| (2, page))
            .chain((100..120).map(|page| (1, page)))
            .collect();
        assert_eq!(pages[..23], expected);
        assert!(
            pages[23..]
                .iter()
                .all(|(task, page)| *task == 2 && *page >= 600)
        );
        assert!(pages.len() as u64 <= store.used() / PAGE / SHARE);
    }
}
