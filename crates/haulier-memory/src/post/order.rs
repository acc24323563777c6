//! What is still to be sent, and what of it next. No IO.

use std::collections::VecDeque;

use crate::page::{PAGE, PageRange};
use crate::ranges::RangeSet;

/// Pages behind a fault that are pushed ahead of the rest: who touches a page mostly goes on with
/// those behind it.
const AHEAD_PAGES: u64 = 256;

/// Places of faults that are remembered for it.
const PLACES: usize = 64;

/// Every page that is to be sent, by task in the order given, each once.
#[derive(Debug, Default)]
pub(super) struct Order {
    tasks: Vec<Task>,
    /// Where faults happened, the latest last: task and what follows the page.
    places: VecDeque<(usize, PageRange)>,
    /// How far the given order has been followed: task, and number of the range in its list.
    at: (usize, usize),
}

#[derive(Debug)]
struct Task {
    task: u32,
    list: Vec<PageRange>,
    remaining: RangeSet,
    sent: RangeSet,
}

/// What to do about a page that somebody waits for. Tasks by their index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// It is taken herewith, and to be sent.
    Send(usize),
    /// It was taken before.
    UnderWay,
    /// It was never to be sent. Taken herewith as well.
    Unlisted(usize),
    /// There is no such task.
    NoTask,
}

impl Order {
    /// Tasks with their pages in the order in which to push them.
    pub(super) fn new(tasks: impl IntoIterator<Item = (u32, Vec<PageRange>)>) -> Self {
        let task = |(task, list): (u32, Vec<PageRange>)| Task {
            task,
            remaining: list.iter().copied().collect(),
            sent: RangeSet::new(),
            list,
        };
        Self {
            tasks: tasks.into_iter().map(task).collect(),
            ..Self::default()
        }
    }

    /// Pages to be sent.
    pub(super) fn remaining(&self) -> u64 {
        self.tasks.iter().map(|task| task.remaining.pages()).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.iter().all(|task| task.remaining.is_empty())
    }

    /// Takes the next pages to push, at most so many, all of one task: what follows the latest fault,
    /// or what comes next in the order. The answer is the task's index and its pages.
    pub(super) fn push(&mut self, max_pages: u64, pages: &mut Vec<PageRange>) -> Option<usize> {
        pages.clear();
        while let Some((index, range)) = self.places.back_mut() {
            let index = *index;
            let taken = self.tasks[index].take(*range, max_pages, pages);
            if let Some(end) = taken {
                *range = PageRange::between(end, range.end());
                return Some(index);
            }
            self.places.pop_back();
        }
        while let Some(task) = self.tasks.get_mut(self.at.0) {
            let mut left = max_pages;
            while let Some(range) = task.list.get(self.at.1).filter(|_| left > 0) {
                task.take(*range, left, pages);
                left = max_pages - pages.iter().map(|range| range.pages).sum::<u64>();
                // The range may have more.
                self.at.1 += usize::from(left > 0);
            }
            if !pages.is_empty() {
                return Some(self.at.0);
            }
            self.at = (self.at.0 + 1, 0);
        }
        let everything = PageRange::between(0, u64::MAX - PAGE + 1);
        let mut rest = self.tasks.iter_mut().enumerate();
        rest.find_map(|(index, task)| task.take(everything, max_pages, pages).map(|_| index))
    }

    /// Somebody waits for a page.
    pub(super) fn ask(&mut self, task: u32, page: u64) -> Asked {
        let Some(index) = self.tasks.iter().position(|other| other.task == task) else {
            return Asked::NoTask;
        };
        let state = &mut self.tasks[index];
        let range = PageRange {
            start: page,
            pages: 1,
        };
        if state.sent.contains(page) {
            return Asked::UnderWay;
        }
        let listed = state.remaining.contains(page);
        state.remaining.remove(range);
        state.sent.insert(range);
        let behind = PageRange {
            start: page + PAGE,
            pages: AHEAD_PAGES,
        };
        if self.places.len() == PLACES {
            self.places.pop_front();
        }
        self.places.push_back((index, behind));
        if listed {
            Asked::Send(index)
        } else {
            Asked::Unlisted(index)
        }
    }

    /// Takes up to `pages` neighbours behind a page that was asked for.
    pub(super) fn neighbours(&mut self, index: usize, page: u64, pages: u64) -> Vec<PageRange> {
        let start = page + PAGE;
        let mut taken = Vec::new();
        self.tasks[index].take(PageRange { start, pages }, pages, &mut taken);
        taken
    }

    /// Puts pages back that were taken and not sent.
    pub(super) fn put_back(&mut self, index: usize, pages: &[PageRange]) {
        let task = &mut self.tasks[index];
        for range in pages {
            task.sent.remove(*range);
            task.remaining.insert(*range);
        }
        self.at = (0, 0);
    }

    /// Begins anew with these pages and no others. Returns a task that is not known; nothing has
    /// changed then.
    pub(super) fn reset(&mut self, missing: &[(u32, RangeSet)]) -> Option<u32> {
        let known = |task: u32| self.tasks.iter().any(|other| other.task == task);
        if let Some((task, _)) = missing.iter().find(|(task, _)| !known(*task)) {
            return Some(*task);
        }
        for task in &mut self.tasks {
            let old = std::mem::take(&mut task.remaining);
            task.sent.union(&old);
            for (_, set) in missing.iter().filter(|(other, _)| *other == task.task) {
                task.remaining.union(set);
            }
            task.sent.subtract(&task.remaining);
        }
        self.places.clear();
        self.at = (0, 0);
        None
    }
}

impl Task {
    /// Takes what remains of a range, at most so many pages. Returns where the last of them ends.
    fn take(
        &mut self,
        range: PageRange,
        max_pages: u64,
        pages: &mut Vec<PageRange>,
    ) -> Option<u64> {
        let first = pages.len();
        let mut left = max_pages;
        for mut piece in self.remaining.within(range.start, range.end()) {
            if left == 0 {
                break;
            }
            piece.pages = piece.pages.min(left);
            left -= piece.pages;
            pages.push(piece);
        }
        for piece in &pages[first..] {
            self.remaining.remove(*piece);
            self.sent.insert(*piece);
        }
        pages[first..].last().map(PageRange::end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(page: u64, pages: u64) -> PageRange {
        PageRange {
            start: page * PAGE,
            pages,
        }
    }

    fn next(order: &mut Order, max_pages: u64) -> Option<(usize, Vec<PageRange>)> {
        let mut pages = Vec::new();
        let index = order.push(max_pages, &mut pages)?;
        Some((index, pages))
    }

    #[test]
    fn the_order_is_kept_and_pieces_of_one_task_are_joined_up_to_the_limit() {
        let lists = [
            (7, vec![range(100, 3), range(10, 2), range(50, 1)]),
            (8, vec![range(0, 1)]),
        ];
        let mut order = Order::new(lists);
        assert_eq!(order.remaining(), 7);
        assert_eq!(next(&mut order, 2), Some((0, vec![range(100, 2)])));
        assert_eq!(
            next(&mut order, 2),
            Some((0, vec![range(102, 1), range(10, 1)]))
        );
        assert_eq!(
            next(&mut order, 9),
            Some((0, vec![range(11, 1), range(50, 1)]))
        );
        assert_eq!(next(&mut order, 9), Some((1, vec![range(0, 1)])));
        assert_eq!(next(&mut order, 9), None);
        assert!(order.is_empty());
    }

    #[test]
    fn a_fault_is_taken_once_and_what_follows_it_is_pushed_next() {
        let mut order = Order::new([(7, vec![range(0, 1000)])]);
        assert_eq!(order.ask(7, 500 * PAGE), Asked::Send(0));
        assert_eq!(order.ask(7, 500 * PAGE), Asked::UnderWay);
        assert_eq!(order.ask(9, 0), Asked::NoTask);
        assert_eq!(order.neighbours(0, 500 * PAGE, 15), [range(501, 15)]);
        assert_eq!(order.ask(7, 501 * PAGE), Asked::UnderWay);
        assert_eq!(next(&mut order, 64), Some((0, vec![range(516, 64)])));
        assert_eq!(order.ask(7, 900 * PAGE), Asked::Send(0));
        assert_eq!(
            next(&mut order, 64),
            Some((0, vec![range(901, 64)])),
            "the latest fault first"
        );
        assert_eq!(order.ask(7, 2000 * PAGE), Asked::Unlisted(0));
        assert_eq!(order.ask(7, 2000 * PAGE), Asked::UnderWay);
        let mut pages = 1 + 15 + 64 + 1 + 64;
        while let Some((_, ranges)) = next(&mut order, 100) {
            pages += ranges.iter().map(|range| range.pages).sum::<u64>();
        }
        assert_eq!(pages, 1000);
    }

    #[test]
    fn what_the_destination_misses_becomes_what_is_to_be_sent() {
        let mut order = Order::new([(7, vec![range(0, 10)]), (8, vec![range(0, 10)])]);
        let sent = next(&mut order, 4).unwrap();
        let missing = |task, ranges: &[PageRange]| (task, ranges.iter().copied().collect());
        assert_eq!(order.reset(&[missing(9, &[range(0, 1)])]), Some(9));
        assert_eq!(order.remaining(), 16, "nothing has changed");
        let new = [missing(7, &[range(2, 3), range(20, 1)])];
        assert_eq!(order.reset(&new), None);
        assert_eq!(order.remaining(), 4);
        assert_eq!(order.ask(7, 0), Asked::UnderWay, "it has arrived");
        assert_eq!(order.ask(8, 0), Asked::UnderWay, "it has arrived");
        assert_eq!(next(&mut order, 9), Some((0, vec![range(2, 3)])));
        assert_eq!(next(&mut order, 9), Some((0, vec![range(20, 1)])));
        order.put_back(0, &sent.1);
        assert_eq!(next(&mut order, 9), Some((0, vec![range(0, 4)])));
    }

    proptest! {
        /// Whatever is asked for, pushed and put back: each page is given out once.
        #[test]
        fn every_page_comes_exactly_once(
            starts in prop::collection::vec(0..40_u64, 1..20),
            steps in prop::collection::vec((0..3_u8, 0..200_u64, 1..9_u64), 0..60),
        ) {
            let mut lists = [(1, Vec::new()), (2, Vec::new())];
            let mut expected = std::collections::BTreeSet::new();
            for (n, start) in starts.iter().enumerate() {
                // Disjoint, in no order.
                let page = start * 20 + n as u64 % 20;
                if expected.insert((n % 2, page)) {
                    lists[n % 2].1.push(range(page, 1));
                }
            }
            let mut order = Order::new(lists);
            let mut given = Vec::new();
            let give = |index: usize, ranges: &[PageRange], given: &mut Vec<(usize, u64)>| {
                for range in ranges {
                    given.extend((0..range.pages).map(|n| (index, range.start / PAGE + n)));
                }
            };
            for (what, page, max) in steps {
                match what {
                    0 => {
                        let Some((index, ranges)) = next(&mut order, max) else { continue };
                        give(index, &ranges, &mut given);
                    }
                    1 => {
                        let Some((index, ranges)) = next(&mut order, max) else { continue };
                        order.put_back(index, &ranges);
                    }
                    _ => {
                        let task = page % 2;
                        let page = page * 4;
                        if let Asked::Send(index) = order.ask(task as u32 + 1, page * PAGE) {
                            give(index, &[range(page, 1)], &mut given);
                            let more = order.neighbours(index, page * PAGE, max);
                            give(index, &more, &mut given);
                        }
                    }
                }
            }
            while let Some((index, ranges)) = next(&mut order, 7) {
                give(index, &ranges, &mut given);
            }
            prop_assert!(order.is_empty());
            given.sort_unstable();
            prop_assert_eq!(given, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
