//! Pages that were sent ahead, by number: what both sides know of them.
//!
//! A frame of them is the first page's number and the count (little-endian `u32`), then the
//! contents. Numbers count up from zero. The sender finds a page by its hash, the receiver by its
//! number; the receiver hashes what it got itself, while the target still runs.

use std::collections::HashMap;

use crate::account::Account;
use crate::error::ImagesError;
use crate::page::{self, PAGE, PageHash, Seen};

/// Most pages in a frame.
pub(crate) const FRAME_PAGES: usize = 1024;
/// Bytes in front of the contents.
pub(crate) const HEAD: usize = 8;

/// Pages of a block of the receiver's memory.
const BLOCK_PAGES: usize = 1024;
/// What a block counts for: contents, hashes, marks.
const BLOCK_COST: u64 = (BLOCK_PAGES * (PAGE + size_of::<PageHash>()) + BLOCK_PAGES / 8) as u64;

/// The sender's side: numbers by hash.
#[derive(Debug, Default)]
pub(crate) struct KnownPages {
    // The standard hasher, although the keys are hashes: who chooses page contents must not choose
    // buckets.
    numbers: HashMap<PageHash, u32>,
    seen: Seen,
}

impl KnownPages {
    pub(crate) fn len(&self) -> u64 {
        self.numbers.len() as u64
    }

    pub(crate) fn contains(&self, hash: &PageHash) -> bool {
        self.numbers.contains_key(hash)
    }

    /// Adds a page that is not known yet and returns its number; `None` if there are no more.
    pub(crate) fn add(&mut self, hash: PageHash) -> Option<u32> {
        let number = u32::try_from(self.numbers.len()).ok()?;
        self.numbers.insert(hash, number);
        Some(number)
    }

    /// The number of a page that an image has, which is marked as used.
    pub(crate) fn refer(&mut self, hash: &PageHash) -> Option<u32> {
        let number = *self.numbers.get(hash)?;
        self.seen.mark(number);
        Some(number)
    }

    /// Pages that no image referred to.
    pub(crate) fn unused(&self) -> u64 {
        self.len() - self.seen.count()
    }
}

/// The receiver's side: contents and hashes by number, charged to an account until dropped.
#[derive(Debug)]
pub(crate) struct Bank<'a> {
    account: &'a Account,
    blocks: Vec<Box<[u8]>>,
    hashes: Vec<PageHash>,
    seen: Seen,
}

impl<'a> Bank<'a> {
    pub(crate) fn new(account: &'a Account) -> Bank<'a> {
        Bank {
            account,
            blocks: Vec::new(),
            hashes: Vec::new(),
            seen: Seen::default(),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.hashes.len() as u64
    }

    /// Pages that no image referred to.
    pub(crate) fn unused(&self) -> u64 {
        self.len() - self.seen.count()
    }

    /// Where the next `pages` (at most [`FRAME_PAGES`]) pages belong: two pieces, the second of
    /// which may be empty. They are part of the bank with [`Bank::added`].
    ///
    /// # Errors
    /// [`ImagesError::TooLarge`].
    pub(crate) fn room(&mut self, pages: usize) -> Result<(&mut [u8], &mut [u8]), ImagesError> {
        let (block, from) = place(self.hashes.len());
        while self.blocks.len() * BLOCK_PAGES < self.hashes.len() + pages {
            self.account.charge(BLOCK_COST)?;
            self.blocks
                .push(vec![0; BLOCK_PAGES * PAGE].into_boxed_slice());
        }
        let first = pages.min(BLOCK_PAGES - from / PAGE) * PAGE;
        let rest = pages * PAGE - first;
        Ok(match &mut self.blocks[block..] {
            [one] => (&mut one[from..from + first], &mut []),
            [one, two, ..] => (&mut one[from..from + first], &mut two[..rest]),
            [] => (&mut [], &mut []),
        })
    }

    /// The pages that [`Bank::room`] made room for have come.
    pub(crate) fn added(&mut self, pages: usize) {
        for _ in 0..pages {
            let (block, from) = place(self.hashes.len());
            self.hashes
                .push(page::hash(&self.blocks[block][from..from + PAGE]));
        }
    }

    /// Hashes and contents (in pieces) of `pages` pages from `first` on, which are marked as used.
    /// `None` if the bank does not have all of them.
    pub(crate) fn refer(
        &mut self,
        first: u32,
        pages: u32,
    ) -> Option<(&[PageHash], impl Iterator<Item = &[u8]>)> {
        let (from, end) = (first as usize, first as usize + pages as usize);
        let hashes = self.hashes.get(from..end)?;
        for number in from..end {
            self.seen.mark(number as u32);
        }
        let blocks = &self.blocks;
        let mut next = from;
        let pieces = std::iter::from_fn(move || {
            let (block, offset) = place(next);
            let count = (end - next).min(BLOCK_PAGES - offset / PAGE);
            next += count;
            (count > 0).then(|| &blocks[block][offset..offset + count * PAGE])
        });
        Some((hashes, pieces))
    }
}

impl Drop for Bank<'_> {
    fn drop(&mut self) {
        self.account.release(self.blocks.len() as u64 * BLOCK_COST);
    }
}

/// Block and offset in it of a page.
fn place(number: usize) -> (usize, usize) {
    (number / BLOCK_PAGES, number % BLOCK_PAGES * PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(bank: &mut Bank<'_>, from: u32, pages: usize) {
        let (one, two) = bank.room(pages).unwrap();
        assert_eq!(one.len() + two.len(), pages * PAGE);
        let room = one.chunks_mut(PAGE).chain(two.chunks_mut(PAGE));
        for (number, page) in (from..).zip(room) {
            page[..4].copy_from_slice(&number.to_le_bytes());
        }
        bank.added(pages);
    }

    #[test]
    fn pages_come_back_by_number_across_blocks() {
        let account = Account::new(u64::MAX);
        let mut bank = Bank::new(&account);
        fill(&mut bank, 0, 700);
        fill(&mut bank, 700, 700);
        fill(&mut bank, 1400, 648);
        assert_eq!(account.used(), 2 * BLOCK_COST);
        let (hashes, pieces) = bank.refer(1000, 100).unwrap();
        let hashes = hashes.to_vec();
        let contents: Vec<u8> = pieces.flatten().copied().collect();
        assert_eq!(contents.len(), 100 * PAGE);
        for (index, page) in contents.chunks(PAGE).enumerate() {
            assert_eq!(page[..4], (1000 + index as u32).to_le_bytes());
            assert_eq!(hashes[index], page::hash(page));
        }
        assert_eq!(bank.unused(), 1948);
        assert!(bank.refer(2047, 1).is_some());
        assert!(bank.refer(2047, 2).is_none());
        assert!(bank.refer(u32::MAX, u32::MAX).is_none());
        drop(bank);
        assert_eq!(account.used(), 0);
    }

    #[test]
    fn a_bank_never_passes_the_limit() {
        let account = Account::new(BLOCK_COST);
        let mut bank = Bank::new(&account);
        fill(&mut bank, 0, BLOCK_PAGES);
        assert!(matches!(bank.room(1), Err(ImagesError::TooLarge { .. })));
    }
}
