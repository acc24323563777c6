//! What the store has of the pages that are placed together.

use crate::store::{Lookup, PageData};

/// Contents of successive pages.
#[derive(Debug)]
pub(super) enum Content {
    Data(PageData),
    Zero,
}

/// What was found, in as few pieces as it lies in memory, each with its number of pages: it is placed with one
/// call, whatever the rounds in which its pages came.
pub(super) fn pieces(found: Vec<Lookup>) -> Vec<(u64, Content)> {
    let mut pieces: Vec<(u64, Content)> = Vec::with_capacity(found.len());
    for found in found {
        let pages = found.pages();
        let mut content = Content::of(found);
        if let Some((before, last)) = pieces.last_mut() {
            match last.join(content) {
                None => {
                    *before += pages;
                    continue;
                }
                Some(apart) => content = apart,
            }
        }
        pieces.push((pages, content));
    }
    pieces
}

/// Gives the memory of contents back to the kernel, which has it for the next pages to be placed.
pub(super) fn give_back(contents: Vec<(u64, Content)>) {
    for (_, content) in contents {
        if let Content::Data(PageData(pages)) = content {
            pages.give_back();
        }
    }
}

impl Content {
    fn of(found: Lookup) -> Content {
        match found {
            Lookup::Data(data) => Content::Data(data),
            Lookup::Zero(_) | Lookup::Absent { .. } => Content::Zero,
        }
    }

    /// Takes `next` in if it goes on where this ends, else gives it back.
    fn join(&mut self, next: Content) -> Option<Content> {
        match (self, next) {
            (Content::Zero, Content::Zero) => None,
            (Content::Data(PageData(pages)), Content::Data(PageData(next))) => {
                pages.join(next).map(PageData).map(Content::Data)
            }
            (_, next) => Some(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PAGE, PageRange, PageRun};
    use crate::store::PageStore;

    #[test]
    fn pages_of_several_rounds_are_one_piece() {
        let store = PageStore::new(1 << 30);
        let range = |page: u64, pages: u64| PageRange {
            start: page * PAGE,
            pages,
        };
        let insert = |round: u32, range: PageRange| {
            let mut buffer = store.buffer((range.pages * PAGE) as usize).unwrap();
            buffer.fill(round as u8 + 1);
            let runs = [PageRun { range, zero: false }];
            store.insert(7, round, &runs, buffer).unwrap();
        };
        insert(0, range(0, 100));
        for round in 1..20 {
            insert(round, range(u64::from(round) * 5, 2));
        }
        store.insert_zero(7, 1, range(100, 3)).unwrap();
        store.insert_zero(7, 2, range(103, 3)).unwrap();
        let found = store.lookup_all(7, 0, 200);
        assert!(found.len() > 30, "{} extents", found.len());
        let pieces = pieces(found);
        assert!(pieces.len() <= 3, "{} pieces", pieces.len());
        let mut at = 0;
        for (pages, content) in &pieces {
            for page in at..at + pages {
                let round = if page >= 5 && page % 5 < 2 {
                    page / 5
                } else {
                    0
                };
                match content {
                    Content::Data(data) => {
                        let start = ((page - at) * PAGE) as usize;
                        let page = &data[start..start + PAGE as usize];
                        assert!(page.iter().all(|byte| *byte == round as u8 + 1));
                    }
                    Content::Zero => assert!(page >= 100),
                }
            }
            at += pages;
        }
        assert_eq!(at, 106);
    }
}
