//! Lists of pages, completed with those that CRIU was not shown ([`crate::veil`]).

use std::fs;
use std::path::Path;

use prost::Message;

use crate::image::{Image, ImageError, ImageKind, Mapping, MmEntry, PagemapEntry, PagemapHead};
use crate::skeleton::{LazyRange, PAGE};

/// Enters pages into the list of a dumped task that are left to the lazy-pages daemon. `pages` are
/// ascending and disjoint; what the list has already stays as it is there.
///
/// # Errors
/// See [`ImageError`]; also if a page lies where a restore would not leave it to the daemon, because
/// its mapping was locked or replaced since it was found. The images are of no use then.
pub fn add_lazy(directory: &Path, pid: u32, pages: &[LazyRange]) -> Result<(), ImageError> {
    let mm_path = directory.join(format!("mm-{pid}.img"));
    let mut mm_image = Image::open(&mm_path, ImageKind::Mm)?;
    let mut mappings = mm_image.expect::<MmEntry>()?.mappings;
    mappings.retain(|mapping| !mapping.is_guard());
    mappings.sort_by_key(|mapping| mapping.start);
    let lazy = within(&mappings, pages).map_err(|address| {
        mm_image.invalid(format!(
            "the page at {address:#x} cannot be left behind: its mapping has changed"
        ))
    })?;

    let path = directory.join(format!("pagemap-{pid}.img"));
    let mut image = Image::open(&path, ImageKind::Pagemap)?;
    let head: PagemapHead = image.expect()?;
    let mut listed: Vec<PagemapEntry> = Vec::new();
    while let Some(entry) = image.next()? {
        listed.push(entry);
    }
    let mut bytes = ImageKind::Pagemap.header();
    append(&mut bytes, &head);
    for entry in merge(listed, lazy) {
        append(&mut bytes, &entry);
    }
    fs::write(&path, bytes).map_err(|source| ImageError::Write { path, source })
}

fn append(bytes: &mut Vec<u8>, entry: &impl Message) {
    bytes.extend((entry.encoded_len() as u32).to_le_bytes());
    bytes.extend(entry.encode_to_vec());
}

/// What of the pages is dumped at all; the address of one that has to be dumped otherwise, if there
/// is one.
fn within(mappings: &[Mapping], pages: &[LazyRange]) -> Result<Vec<(u64, u64)>, u64> {
    let mut parts = Vec::new();
    for range in pages {
        let (mut from, end) = (range.start, range.start + range.pages * PAGE);
        let first = mappings.partition_point(|mapping| mapping.end <= from);
        for mapping in &mappings[first..] {
            if from >= end || mapping.start > from {
                break;
            }
            let part = (from, end.min(mapping.end));
            if mapping.is_droppable() {
                // Its contents may go at any time, and CRIU lets them.
            } else if mapping.can_be_lazy() {
                parts.push(part);
            } else {
                return Err(from);
            }
            from = part.1;
        }
        if from < end {
            return Err(from);
        }
    }
    Ok(parts)
}

/// The list, with what of `lazy` it does not have put between.
fn merge(listed: Vec<PagemapEntry>, lazy: Vec<(u64, u64)>) -> Vec<PagemapEntry> {
    let end_of = |entry: &PagemapEntry| entry.address + entry.page_count() * PAGE;
    let mut merged = Vec::with_capacity(listed.len() + lazy.len());
    let mut push = |start: u64, end: u64| {
        if start < end {
            merged.push(PagemapEntry::lazy(start, (end - start) / PAGE));
        }
    };
    let mut at = 0;
    for (mut start, end) in lazy {
        while at < listed.len() && end_of(&listed[at]) <= start {
            at += 1;
        }
        let mut other = at;
        while let Some(entry) = listed.get(other).filter(|entry| entry.address < end) {
            push(start, entry.address);
            start = end_of(entry).max(start);
            other += 1;
        }
        push(start, end);
    }
    merged.extend(listed);
    merged.sort_by_key(|entry| entry.address);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAZY: u32 = 0x22;

    fn mapping(start: u64, end: u64, flags: u32) -> Mapping {
        Mapping {
            start: start * PAGE,
            end: end * PAGE,
            flags,
            status: 1 | 1 << 9,
        }
    }

    fn pages(start: u64, pages: u64) -> LazyRange {
        LazyRange {
            start: start * PAGE,
            pages,
        }
    }

    fn eager(start: u64, pages: u64) -> PagemapEntry {
        PagemapEntry {
            address: start * PAGE,
            compat_pages: 0,
            in_parent: None,
            flags: Some(4),
            pages: Some(pages),
        }
    }

    fn lazy(start: u64, pages: u64) -> PagemapEntry {
        PagemapEntry::lazy(start * PAGE, pages)
    }

    #[test]
    fn pages_are_entered_in_order_and_once() {
        let listed = vec![eager(2, 2), lazy(10, 2), eager(20, 1)];
        let found = [(0, 8), (9, 13), (21, 22)].map(|(start, end)| (start * PAGE, end * PAGE));
        let expected = [
            lazy(0, 2),
            eager(2, 2),
            lazy(4, 4),
            lazy(9, 1),
            lazy(10, 2),
            lazy(12, 1),
            eager(20, 1),
            lazy(21, 1),
        ];
        assert_eq!(merge(listed, found.to_vec()), expected);
        assert_eq!(merge(vec![eager(1, 1)], Vec::new()), [eager(1, 1)]);
    }

    #[test]
    fn pages_may_cross_mappings_and_must_be_lazy() {
        let droppable = mapping(8, 10, LAZY | 0x8);
        let mappings = [mapping(0, 4, LAZY), mapping(4, 8, LAZY), droppable];
        let parts = [(1, 4), (4, 6), (7, 8)].map(|(start, end)| (start * PAGE, end * PAGE));
        let found = within(&mappings, &[pages(1, 5), pages(7, 2)]);
        assert_eq!(found, Ok(parts.to_vec()));

        let locked = [mapping(0, 4, LAZY), mapping(4, 8, LAZY | 0x2000)];
        assert_eq!(within(&locked, &[pages(2, 4)]), Err(4 * PAGE));
        assert_eq!(within(&mappings, &[pages(9, 4)]), Err(10 * PAGE));
        assert_eq!(within(&[], &[pages(9, 4)]), Err(9 * PAGE));
    }
}
