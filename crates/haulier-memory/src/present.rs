//! The pages that exist.

use std::io;

use haulier_sys::pagemap::category::{GUARD, PFNZERO, PRESENT, SWAPPED};
use haulier_sys::pagemap::{Pagemap, Query};

use crate::page::{PAGE, PageRange};
use crate::ranges::RangeSet;

/// Whether the kernel can be asked by [`pages`] (Linux 6.7).
pub fn is_supported() -> bool {
    let query = Query {
        any: PRESENT,
        ..Query::default()
    };
    let own = Pagemap::open(std::process::id() as i32);
    own.is_ok_and(|mut pagemap| pagemap.scan(0..PAGE, query, |_| ()).is_ok())
}

/// The pages of process `pid` within `lazy`, its [lazy mappings](crate::mappings::lazy), that have
/// contents: those that CRIU's dump would list. A page of zeros that the kernel shares has none.
///
/// The ranges are ascending and disjoint if the process stands still.
///
/// # Errors
/// The process is gone, or the kernel cannot be asked.
pub fn pages(pid: i32, lazy: &RangeSet) -> io::Result<Vec<PageRange>> {
    let mut pagemap = Pagemap::open(pid)?;
    let none = match pagemap.knows_guards() {
        true => PFNZERO | GUARD,
        false => PFNZERO,
    };
    let query = Query {
        any: PRESENT | SWAPPED,
        none,
        ..Query::default()
    };
    let mut found: Vec<PageRange> = Vec::new();
    for range in lazy.iter() {
        pagemap.scan(range.start..range.end(), query, |pages| {
            // The kernel tells a range that fills its answer in two parts, and may repeat itself.
            match found.last_mut() {
                Some(last) if pages.start <= last.end() => {
                    *last = PageRange::between(last.start, pages.end.max(last.end()));
                }
                _ => found.push(PageRange::between(pages.start, pages.end)),
            }
        })?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use haulier_sys::userfaultfd::Region;

    use super::*;

    const PAGE: usize = super::PAGE as usize;

    #[test]
    fn pages_with_contents_are_found_and_no_others() {
        let region = Region::map(8 * PAGE).unwrap();
        let page = |at: u64| region.address() + at * PAGE as u64;
        for at in [1, 2, 5] {
            region.write(at * PAGE, 1);
        }
        // Reading maps the kernel's page of zeros.
        assert_eq!(region.read(6 * PAGE), 0);
        region.write(7 * PAGE, 1);
        region.discard(7 * PAGE..8 * PAGE).unwrap();
        let whole = [PageRange::between(page(0), page(8))].into_iter().collect();
        let found = pages(std::process::id() as i32, &whole).unwrap();
        let expected = [(1, 3), (5, 6)];
        let expected = expected.map(|(start, end)| PageRange::between(page(start), page(end)));
        assert_eq!(found, expected);
    }
}
