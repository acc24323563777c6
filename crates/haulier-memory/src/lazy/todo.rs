//! The pages of one address space that are still to be placed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::page::{PAGE, PageRange};

/// Pages to place, keyed by where they are now. A piece never crosses the border of a mapping, as a
/// COPY must not.
#[derive(Debug, Default)]
pub(super) struct Todo {
    by_start: BTreeMap<u64, Piece>,
    /// Claimed by a thread that is placing them.
    in_flight: Vec<Part>,
    /// Pages that a thread of the task waits for and that nobody has answered.
    waiting: BTreeMap<u64, Waiter>,
    /// Pages that could not be placed for want of a registered mapping, and since when.
    unregistered: BTreeMap<u64, Instant>,
    /// No piece was moved: addresses in the task and in the image are the same.
    pub(super) in_place: bool,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    pages: u64,
    /// Address at the time of the dump, under which the store has the contents.
    image: u64,
}

/// Somebody waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiter {
    /// When the first fault on it was seen.
    pub(super) since: Instant,
    /// Its address in the image, once it was found not to have arrived.
    pub(super) missing: Option<u64>,
}

/// Pages to place: where, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) at: u64,
    pub(super) image: u64,
    pub(super) pages: u64,
}

impl Part {
    pub(super) fn end(&self) -> u64 {
        self.at + self.pages * PAGE
    }

    /// The part without its first pages.
    pub(super) fn skip(&self, pages: u64) -> Part {
        let bytes = pages * PAGE;
        Part {
            at: self.at + bytes,
            image: self.image + bytes,
            pages: self.pages - pages,
        }
    }

    pub(super) fn image_range(&self) -> PageRange {
        PageRange {
            start: self.image,
            pages: self.pages,
        }
    }
}

impl Todo {
    /// The ranges, cut at the borders of the mappings. The first range that is not wholly inside
    /// mappings, or not in order, is the error.
    pub(super) fn new(ranges: &[PageRange], vmas: &[(u64, u64)]) -> Result<Self, PageRange> {
        let mut todo = Self {
            in_place: true,
            ..Self::default()
        };
        let mut vmas = vmas.iter().peekable();
        let mut end = 0;
        for range in ranges {
            if !range.is_valid() || range.start < end {
                return Err(*range);
            }
            end = range.end();
            let mut at = range.start;
            while at < end {
                while vmas.next_if(|vma| vma.1 <= at).is_some() {}
                let Some(vma) = vmas.peek().filter(|vma| vma.0 <= at) else {
                    return Err(*range);
                };
                let stop = vma.1.min(end);
                todo.by_start.insert(
                    at,
                    Piece {
                        pages: (stop - at) / PAGE,
                        image: at,
                    },
                );
                at = stop;
            }
        }
        Ok(todo)
    }

    /// The same pages for a forked child, whose threads do not wait yet.
    pub(super) fn fork(&self) -> Self {
        Self {
            by_start: self.by_start.clone(),
            in_flight: Vec::new(),
            waiting: BTreeMap::new(),
            unregistered: BTreeMap::new(),
            in_place: self.in_place,
        }
    }

    /// Whether every page is placed.
    pub(super) fn is_done(&self) -> bool {
        self.by_start.is_empty() && self.in_flight.is_empty()
    }

    pub(super) fn pages(&self) -> u64 {
        let flying: u64 = self.in_flight.iter().map(|part| part.pages).sum();
        flying + self.by_start.values().map(|piece| piece.pages).sum::<u64>()
    }

    /// Every part that is to be placed and not claimed.
    pub(super) fn unclaimed(&self) -> impl Iterator<Item = Part> {
        self.by_start.iter().map(|(at, piece)| Part {
            at: *at,
            image: piece.image,
            pages: piece.pages,
        })
    }

    /// The contents that may still be asked of the store, claimed ones included: a claim may come
    /// back.
    pub(super) fn images(&self) -> impl Iterator<Item = PageRange> {
        let claimed = self.in_flight.iter().map(Part::image_range);
        claimed.chain(self.unclaimed().map(|part| part.image_range()))
    }

    pub(super) fn in_flight(&self, page: u64) -> bool {
        self.in_flight
            .iter()
            .any(|part| (part.at..part.end()).contains(&page))
    }

    /// Notes that a thread waits for a page.
    pub(super) fn wait_for(&mut self, page: u64) {
        self.waiting.entry(page).or_insert_with(|| Waiter {
            since: Instant::now(),
            missing: None,
        });
    }

    /// Whether a thread waits for this page.
    pub(super) fn is_awaited(&self, page: u64) -> bool {
        self.waiting.contains_key(&page)
    }

    /// Whether a thread waits for a page that has not arrived.
    pub(super) fn awaits_missing(&self) -> bool {
        self.waiting.values().any(|waiter| waiter.missing.is_some())
    }

    /// Whether a thread waits for any page.
    pub(super) fn has_waiters(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The pages that are waited for, the longest wait first.
    pub(super) fn awaited(&self) -> Vec<u64> {
        let mut pages: Vec<_> = self
            .waiting
            .iter()
            .map(|(page, w)| (w.since, *page))
            .collect();
        pages.sort_unstable();
        pages.into_iter().map(|(_, page)| page).collect()
    }

    /// Notes that a page that is waited for has not arrived. True if that is new.
    pub(super) fn is_missing(&mut self, page: u64, image: u64) -> bool {
        let Some(waiter) = self.waiting.get_mut(&page) else {
            return false;
        };
        waiter.missing.replace(image) != Some(image)
    }

    /// Nobody waits for the page any more.
    pub(super) fn answered(&mut self, page: u64) -> Option<Waiter> {
        self.waiting.remove(&page)
    }

    /// As [`Self::answered`], for all pages.
    pub(super) fn answer_all(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    /// The first part to place at or after an address, up to the end of its piece.
    pub(super) fn next(&self, from: u64) -> Option<Part> {
        if let Some((start, piece)) = self.by_start.range(..from).next_back() {
            let skip = (from - start) / PAGE;
            if skip < piece.pages {
                let part = Part {
                    at: *start,
                    image: piece.image,
                    pages: piece.pages,
                };
                return Some(part.skip(skip));
            }
        }
        let (start, piece) = self.by_start.range(from..).next()?;
        Some(Part {
            at: *start,
            image: piece.image,
            pages: piece.pages,
        })
    }

    /// Takes a part, as [`Self::next`] gave it or a beginning of that, to place it.
    pub(super) fn claim(&mut self, part: Part) {
        self.take(part.at, part.end());
        self.in_flight.push(part);
    }

    /// Ends a claim of which `rest` was not placed. Returns who waited for the others.
    pub(super) fn finish(&mut self, part: Part, rest: Part) -> Vec<Waiter> {
        if let Some(index) = self.in_flight.iter().position(|claim| *claim == part) {
            self.in_flight.swap_remove(index);
        }
        if rest.pages > 0 {
            self.by_start.insert(
                rest.at,
                Piece {
                    pages: rest.pages,
                    image: rest.image,
                },
            );
        }
        self.settle(part.at, rest.at);
        let mut answered = Vec::new();
        while let Some((&page, &waiter)) = self.waiting.range(part.at..rest.at).next() {
            self.waiting.remove(&page);
            answered.push(waiter);
        }
        answered
    }

    /// Notes that a page lies in unregistered memory. Returns for how long it has been so.
    pub(super) fn unregistered(&mut self, page: u64) -> Duration {
        self.unregistered
            .entry(page)
            .or_insert_with(Instant::now)
            .elapsed()
    }

    fn settle(&mut self, start: u64, end: u64) {
        while let Some((&page, _)) = self.unregistered.range(start..end).next() {
            self.unregistered.remove(&page);
        }
    }

    /// Forgets `[start, end)` and returns the image addresses of what was to be placed there.
    /// Nothing may be claimed.
    pub(super) fn cut(&mut self, start: u64, end: u64) -> Vec<PageRange> {
        self.settle(start, end);
        let parts = self.take(start, end);
        parts.iter().map(Part::image_range).collect()
    }

    /// Follows an `mremap`. Nothing may be claimed.
    pub(super) fn remap(&mut self, from: u64, to: u64, len: u64) {
        self.settle(from, from.saturating_add(len));
        let moved = self.take(from, from.saturating_add(len));
        // A fixed target replaces what was there; its unmap event is on its way.
        for part in moved {
            let at = to + (part.at - from);
            self.cut(at, at + part.pages * PAGE);
            self.by_start.insert(
                at,
                Piece {
                    pages: part.pages,
                    image: part.image,
                },
            );
            self.in_place = false;
        }
    }

    fn take(&mut self, start: u64, end: u64) -> Vec<Part> {
        self.split_at(start);
        self.split_at(end);
        let mut parts = Vec::new();
        while let Some((&at, &Piece { pages, image })) = self.by_start.range(start..end).next() {
            self.by_start.remove(&at);
            parts.push(Part { at, image, pages });
        }
        parts
    }

    fn split_at(&mut self, address: u64) {
        let Some((start, piece)) = self.by_start.range_mut(..address).next_back() else {
            return;
        };
        let head = address.saturating_sub(*start) / PAGE;
        if head < piece.pages {
            let tail = Piece {
                pages: piece.pages - head,
                image: piece.image + head * PAGE,
            };
            piece.pages = head;
            self.by_start.insert(address, tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> PageRange {
        PageRange {
            start: page * PAGE,
            pages,
        }
    }

    fn part(at: u64, image: u64, pages: u64) -> Part {
        Part {
            at: at * PAGE,
            image: image * PAGE,
            pages,
        }
    }

    fn parts(todo: &Todo) -> Vec<Part> {
        let mut from = 0;
        std::iter::from_fn(|| {
            let part = todo.next(from)?;
            from = part.end();
            Some(part)
        })
        .collect()
    }

    #[test]
    fn ranges_are_cut_at_mappings_and_must_lie_in_them() {
        let vmas = [
            (10 * PAGE, 14 * PAGE),
            (14 * PAGE, 20 * PAGE),
            (30 * PAGE, 31 * PAGE),
        ];
        let todo = Todo::new(&[range(11, 5), range(17, 2), range(30, 1)], &vmas).unwrap();
        let expected = [
            part(11, 11, 3),
            part(14, 14, 2),
            part(17, 17, 2),
            part(30, 30, 1),
        ];
        assert_eq!(parts(&todo), expected);
        for bad in [
            range(9, 2),
            range(19, 2),
            range(25, 1),
            range(30, 2),
            range(12, 0),
        ] {
            assert_eq!(Todo::new(&[bad], &vmas).unwrap_err(), bad);
        }
        let doubled = [range(11, 2), range(12, 1)];
        assert_eq!(Todo::new(&doubled, &vmas).unwrap_err(), range(12, 1));
    }

    #[test]
    fn a_claim_comes_back_in_part() {
        let mut todo = Todo::new(&[range(10, 10)], &[(0, 100 * PAGE)]).unwrap();
        todo.wait_for(12 * PAGE);
        todo.wait_for(15 * PAGE);
        assert!(todo.is_missing(15 * PAGE, 15 * PAGE));
        assert!(!todo.is_missing(15 * PAGE, 15 * PAGE), "is known");
        let claim = part(11, 11, 6);
        todo.claim(claim);
        assert!(todo.in_flight(16 * PAGE) && !todo.in_flight(17 * PAGE));
        assert_eq!(todo.pages(), 10);
        let images: Vec<_> = todo.images().map(|range| range.pages).collect();
        assert_eq!(images, [6, 1, 3], "the claimed one too");
        let answered = todo.finish(claim, claim.skip(3));
        assert!(matches!(answered[..], [Waiter { missing: None, .. }]));
        assert!(!todo.in_flight(12 * PAGE));
        assert_eq!(todo.awaited(), [15 * PAGE]);
        assert_eq!(
            parts(&todo),
            [part(10, 10, 1), part(14, 14, 3), part(17, 17, 3)]
        );
        assert_eq!(todo.next(15 * PAGE), Some(part(15, 15, 2)));
    }

    #[test]
    fn moves_keep_the_image_address_and_holes_are_forgotten() {
        let mut todo = Todo::new(&[range(10, 10)], &[(0, 100 * PAGE)]).unwrap();
        todo.remap(12 * PAGE, 50 * PAGE, 4 * PAGE);
        assert!(!todo.in_place);
        assert_eq!(
            parts(&todo),
            [part(10, 10, 2), part(16, 16, 4), part(50, 12, 4)]
        );
        let gone = todo.cut(51 * PAGE, 60 * PAGE);
        assert_eq!(gone, [range(13, 3)]);
        todo.remap(50 * PAGE, 17 * PAGE, PAGE);
        assert_eq!(
            parts(&todo),
            [
                part(10, 10, 2),
                part(16, 16, 1),
                part(17, 12, 1),
                part(18, 18, 2)
            ]
        );
    }
}
