//! The pages of one task that the store holds, as disjoint extents by address.

use std::collections::BTreeMap;

use haulier_sys::pages::Pages;

use super::batch::PageData;
use crate::page::{PAGE, PageRange};

/// What an extent's pages are.
#[derive(Debug)]
pub(crate) enum Content {
    Zero,
    /// As many pages as the extent has.
    Data(Pages),
}

impl Content {
    /// Part of it, from one page up to another.
    fn part(&self, from: u64, to: u64) -> Content {
        match self {
            Content::Zero => Content::Zero,
            Content::Data(pages) => Content::Data(pages.share(from as usize..to as usize)),
        }
    }
}

#[derive(Debug)]
struct Extent {
    pages: u64,
    round: u32,
    /// How often contents came: pages that are written all the time come in many rounds.
    times: u8,
    content: Content,
}

/// What is known of the page at an address.
#[derive(Debug, Clone)]
pub(super) enum Found {
    Data(PageData),
    Zero(u64),
    /// Nothing; the next page that is known.
    Absent(Option<u64>),
}

#[derive(Debug, Default)]
pub(super) struct Extents {
    by_start: BTreeMap<u64, Extent>,
}

impl Extents {
    pub(super) fn len(&self) -> usize {
        self.by_start.len()
    }

    /// Puts pages in. They replace those of the same or an earlier round; those of a later round
    /// stay, since streams do not keep step with one another.
    pub(super) fn insert(&mut self, range: PageRange, round: u32, content: Content) {
        let (start, end) = (range.start, range.end());
        self.split_at(start);
        self.split_at(end);
        let kept: Vec<(u64, u64)> = self
            .by_start
            .range(start..end)
            .filter(|(_, extent)| extent.round > round)
            .map(|(at, extent)| (*at, at + extent.pages * PAGE))
            .collect();
        if kept.is_empty() {
            self.replace(start, end, round, content);
            return;
        }
        let mut from = start;
        for (kept_start, kept_end) in kept.into_iter().chain([(end, end)]) {
            if from < kept_start {
                let part = content.part((from - start) / PAGE, (kept_start - start) / PAGE);
                self.replace(from, kept_start, round, part);
            }
            from = kept_end;
        }
    }

    /// Puts pages in the place of all that is in `[start, end)`, whose ends are borders.
    ///
    /// Contents that were there before are overwritten, if nobody else has them: so pages stay in memory
    /// in the order of their addresses, however often they come. When they are placed in that order,
    /// whole arenas become free at once, and it is their memory that the kernel gives to the tasks. Of a
    /// virtual machine any other may be such that its host has to find it first.
    fn replace(&mut self, start: u64, end: u64, round: u32, content: Content) {
        let Content::Data(new) = &content else {
            self.renew(start, end, round, content);
            return;
        };
        let mut overwritten = Vec::new();
        for (at, extent) in self.by_start.range_mut(start..end) {
            let Content::Data(old) = &mut extent.content else {
                continue;
            };
            if let Some(old) = old.unshared() {
                let from = (at - start) as usize;
                old.copy_from_slice(&new[from..from + old.len()]);
                extent.round = round;
                extent.times = extent.times.saturating_add(1);
                overwritten.push((*at, at + extent.pages * PAGE));
            }
        }
        if overwritten.is_empty() {
            self.renew(start, end, round, content);
            return;
        }
        let mut from = start;
        for (at, behind) in overwritten.into_iter().chain([(end, end)]) {
            if from < at {
                let part = content.part((from - start) / PAGE, (at - start) / PAGE);
                self.renew(from, at, round, part);
            }
            from = behind;
        }
    }

    /// Puts one extent in the place of all that is in `[start, end)`, whose ends are borders.
    fn renew(&mut self, start: u64, end: u64, round: u32, content: Content) {
        let inside = self.by_start.range(start..end);
        let before = inside.map(|(_, extent)| extent.times).max();
        self.remove_whole(start, end);
        let times = before.unwrap_or(0).saturating_add(1);
        self.put(start, end, round, times, content);
    }

    /// The pages whose contents came so many times or more, with that number. Zero pages are not among
    /// them.
    pub(super) fn renewed(&self, least: u8) -> impl Iterator<Item = (u8, PageRange)> {
        let often = move |extent: &Extent| {
            extent.times >= least && matches!(extent.content, Content::Data(_))
        };
        let extents = self.by_start.iter();
        extents
            .filter(move |(_, extent)| often(extent))
            .map(|(start, extent)| {
                let (start, pages) = (*start, extent.pages);
                (extent.times, PageRange { start, pages })
            })
    }

    /// Drops the pages of a range.
    pub(super) fn remove(&mut self, range: PageRange) {
        self.split_at(range.start);
        self.split_at(range.end());
        self.remove_whole(range.start, range.end());
    }

    /// Drops the pages of a range that came before a round.
    pub(super) fn remove_before(&mut self, range: PageRange, round: u32) {
        self.split_at(range.start);
        self.split_at(range.end());
        let inside = self.by_start.range(range.start..range.end());
        let old: Vec<u64> = inside
            .filter(|(_, extent)| extent.round < round)
            .map(|(start, _)| *start)
            .collect();
        for start in old {
            self.by_start.remove(&start);
        }
    }

    /// Drops every page outside of the ranges, which are ascending and disjoint.
    pub(super) fn retain(&mut self, ranges: &[PageRange]) {
        let mut from = 0;
        for range in ranges {
            self.remove(PageRange::between(from, range.start));
            from = range.end();
        }
        self.split_at(from);
        self.by_start.split_off(&from);
    }

    /// What is at an address, for at most `max_pages` from there on.
    pub(super) fn find(&self, address: u64, max_pages: u64) -> Found {
        if let Some((start, extent)) = self.by_start.range(..=address).next_back() {
            let skip = (address - start) / PAGE;
            if skip < extent.pages {
                let pages = (extent.pages - skip).min(max_pages);
                return match &extent.content {
                    Content::Zero => Found::Zero(pages),
                    Content::Data(data) => {
                        let (from, to) = (skip as usize, (skip + pages) as usize);
                        Found::Data(PageData(data.share(from..to)))
                    }
                };
            }
        }
        Found::Absent(
            self.by_start
                .range(address..)
                .next()
                .map(|(start, _)| *start),
        )
    }

    /// The contents of the page at an address, if they came in this round.
    pub(super) fn of_round(&self, address: u64, round: u32) -> Option<PageData> {
        let (start, extent) = self.by_start.range(..=address).next_back()?;
        let skip = (address - start) / PAGE;
        match &extent.content {
            Content::Data(data) if extent.round == round && skip < extent.pages => {
                let from = skip as usize;
                Some(PageData(data.share(from..from + 1)))
            }
            _ => None,
        }
    }

    /// The parts of a range that no extent covers.
    pub(super) fn gaps(&self, range: PageRange) -> Vec<PageRange> {
        let mut gaps = Vec::new();
        let before = self.by_start.range(..range.start).next_back();
        let end = |start: &u64, extent: &Extent| start + extent.pages * PAGE;
        let mut at = before.map_or(range.start, |(start, extent)| {
            end(start, extent).max(range.start)
        });
        for (start, extent) in self.by_start.range(range.start..range.end()) {
            if *start > at {
                gaps.push(PageRange::between(at, *start));
            }
            at = at.max(end(start, extent));
        }
        if at < range.end() {
            gaps.push(PageRange::between(at, range.end()));
        }
        gaps
    }

    /// Adds `[start, end)`, where nothing is.
    fn put(&mut self, start: u64, end: u64, round: u32, times: u8, content: Content) {
        let pages = (end - start) / PAGE;
        // Zero pages come in many small runs that lie side by side.
        if let (Content::Zero, Some((before, extent))) =
            (&content, self.by_start.range_mut(..start).next_back())
        {
            let touches = before + extent.pages * PAGE == start;
            if touches && extent.round == round && matches!(extent.content, Content::Zero) {
                extent.pages += pages;
                return;
            }
        }
        self.by_start.insert(
            start,
            Extent {
                pages,
                round,
                times,
                content,
            },
        );
    }

    /// Makes `address` the border of extents, if it lies inside of one.
    fn split_at(&mut self, address: u64) {
        let Some((start, extent)) = self.by_start.range_mut(..address).next_back() else {
            return;
        };
        let head = (address - start) / PAGE;
        if head >= extent.pages {
            return;
        }
        let content = match &mut extent.content {
            Content::Zero => Content::Zero,
            Content::Data(pages) => Content::Data(pages.split_off(head as usize)),
        };
        let tail = Extent {
            pages: extent.pages - head,
            round: extent.round,
            times: extent.times,
            content,
        };
        extent.pages = head;
        self.by_start.insert(address, tail);
    }

    /// Removes the extents of a range whose ends are borders.
    fn remove_whole(&mut self, start: u64, end: u64) {
        while let Some((&at, _)) = self.by_start.range(start..end).next() {
            self.by_start.remove(&at);
        }
    }
}
