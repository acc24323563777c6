//! Sets of pages of one task.

use std::collections::BTreeMap;
use std::fmt;

use crate::page::{PAGE, PageRange};

/// A set of pages, kept as the fewest ranges that describe it. Empty ranges are never part of it.
///
/// Inserting and removing cost the logarithm of the number of ranges and the ranges they swallow;
/// the operations on two sets are linear in the smaller one, or in both where a new set comes out.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// End of each range by its start. Ranges neither overlap nor touch.
    ends: BTreeMap<u64, u64>,
    pages: u64,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of the pages.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE
    }

    /// Number of ranges that [`Self::iter`] gives.
    pub fn ranges(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The ranges, ascending, with a gap between any two.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> {
        self.ends
            .iter()
            .map(|(&start, &end)| PageRange::between(start, end))
    }

    /// Puts all pages of the range in.
    pub fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = (range.start, range.end());
        if start >= end {
            return;
        }
        if let Some((&before, &before_end)) = self.ends.range(..=start).next_back() {
            if before_end >= end {
                return;
            }
            if before_end >= start {
                start = before;
            }
        }
        while let Some((&at, &at_end)) = self.ends.range(start..=end).next() {
            end = end.max(at_end);
            self.ends.remove(&at);
            self.pages -= (at_end - at) / PAGE;
        }
        self.ends.insert(start, end);
        self.pages += (end - start) / PAGE;
    }

    /// Takes all pages of the range out.
    pub fn remove(&mut self, range: PageRange) {
        let (start, end) = (range.start, range.end());
        if start >= end {
            return;
        }
        if let Some((&before, before_end)) = self.ends.range_mut(..start).next_back() {
            let old = *before_end;
            if old > start {
                *before_end = start;
                self.pages -= (old - start) / PAGE;
                if old > end {
                    self.ends.insert(end, old);
                    self.pages += (old - end) / PAGE;
                    return;
                }
                debug_assert!(before < start);
            }
        }
        while let Some((&at, &at_end)) = self.ends.range(start..end).next() {
            self.ends.remove(&at);
            self.pages -= (at_end - at) / PAGE;
            if at_end > end {
                self.ends.insert(end, at_end);
                self.pages += (at_end - end) / PAGE;
            }
        }
    }

    /// Puts all pages of the other set in.
    pub fn union(&mut self, other: &RangeSet) {
        if self.is_empty() {
            self.clone_from(other);
            return;
        }
        for range in other.iter() {
            self.insert(range);
        }
    }

    /// Takes all pages of the other set out.
    pub fn subtract(&mut self, other: &RangeSet) {
        if other.ends.len() <= self.ends.len() {
            for range in other.iter() {
                self.remove(range);
            }
            return;
        }
        let mut kept = Vec::new();
        for (&start, &end) in &self.ends {
            let mut from = start;
            for piece in other.within(start, end) {
                if from < piece.start {
                    kept.push(PageRange::between(from, piece.start));
                }
                from = piece.end();
            }
            if from < end {
                kept.push(PageRange::between(from, end));
            }
        }
        *self = kept.into_iter().collect();
    }

    /// The pages that are in both sets.
    pub fn intersect(&self, other: &RangeSet) -> RangeSet {
        let (few, many) = if self.ends.len() <= other.ends.len() {
            (self, other)
        } else {
            (other, self)
        };
        few.ends
            .iter()
            .flat_map(|(&start, &end)| many.within(start, end))
            .collect()
    }

    /// The pages of the set from address `start` to the byte before `end`, ascending.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = PageRange> {
        // A range that begins before `start` may reach into it.
        let first = self
            .ends
            .range(..start)
            .next_back()
            .filter(|&(_, &before_end)| before_end > start)
            .map_or(start, |(&before, _)| before);
        self.ends
            .range(first..end.max(first))
            .map(move |(&at, &at_end)| PageRange::between(at.max(start), at_end.min(end)))
            .filter(|range| range.pages > 0)
    }

    /// Whether the page that has this address is in the set.
    pub fn contains(&self, address: u64) -> bool {
        self.ends
            .range(..=address)
            .next_back()
            .is_some_and(|(_, &end)| address < end)
    }

    /// Whether all pages of the range are in the set.
    pub fn covers(&self, range: PageRange) -> bool {
        self.ends
            .range(..=range.start)
            .next_back()
            .is_some_and(|(_, &end)| range.end() <= end)
            || range.pages == 0
    }

    /// Whether any page of the range is in the set.
    pub fn overlaps(&self, range: PageRange) -> bool {
        self.within(range.start, range.end()).next().is_some()
    }
}

impl fmt::Debug for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.iter().map(|range| range.to_string()))
            .finish()
    }
}

/// Ascending ranges are taken in bulk; any order is right.
impl FromIterator<PageRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut joined: Vec<(u64, u64)> = Vec::new();
        let mut late = Vec::new();
        for range in ranges.into_iter().filter(|range| range.pages > 0) {
            match joined.last_mut() {
                Some((start, _)) if range.start < *start => late.push(range),
                Some((_, end)) if range.start <= *end => *end = range.end().max(*end),
                _ => joined.push((range.start, range.end())),
            }
        }
        let pages = joined.iter().map(|(start, end)| (end - start) / PAGE).sum();
        let mut set = Self {
            ends: joined.into_iter().collect(),
            pages,
        };
        set.extend(late);
        set
    }
}

impl Extend<PageRange> for RangeSet {
    fn extend<I: IntoIterator<Item = PageRange>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

#[cfg(test)]
mod tests;
