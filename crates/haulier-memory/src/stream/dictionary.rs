//! Pages that were sent before, over the same channel.
//!
//! The second time that a page is sent it becomes an entry of the dictionary, on both sides; from
//! the third time on a reference to the entry is sent. The first time only a hash of it is kept. So
//! pages that do not repeat cost a fast hash each, and no memory at either side.
//!
//! Entries are numbered as they are made, and reused in a ring: both sides count alike, and nothing
//! but the pages themselves has to be said. Each channel has a dictionary of its own, since nothing
//! orders the frames of two channels.
//!
//! Where pages do not repeat, only one chunk in eight is looked at, until they do: on a fast link
//! even a fast hash is felt.
//!
//! No hash decides what memory becomes: the sender keeps the contents of its entries and compares.
//! That is faster than a cryptographic hash, and there is nothing to collide.

use std::collections::HashMap;

use haulier_sys::pages::Pages;
use twox_hash::XxHash3_64;

use crate::page::PAGE_BYTES;

/// Entries: 8 MiB of contents at either side.
pub(super) const ENTRIES: usize = 2048;

/// Hashes of pages sent once, the last of each place: those of 256 MiB, in 512 KiB.
const SEEN: usize = 1 << 16;

/// Pages that are looked at before it is decided again whether that is worth it.
const TERM: u32 = 4096;

/// Repetitions in a term from which on every page is looked at.
const WORTH: u32 = TERM / 256;

/// One chunk in so many is looked at otherwise.
const SAMPLE: u32 = 8;

/// What is to be done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Send it.
    New,
    /// Send it, as the next entry.
    Define,
    /// Send the number of the entry.
    Reference(u32),
}

/// The sending side.
#[derive(Debug)]
pub(super) struct Sent {
    seen: Vec<u64>,
    /// Entries by the hash of their contents.
    entries: HashMap<u64, u32>,
    hashes: Vec<u64>,
    contents: Vec<u8>,
    next: usize,
    /// Pages looked at in this term, and repetitions among them.
    looked: u32,
    repeated: u32,
    sampling: bool,
    chunks: u32,
}

impl Default for Sent {
    fn default() -> Self {
        Self {
            seen: vec![0; SEEN],
            entries: HashMap::new(),
            hashes: Vec::new(),
            contents: Vec::new(),
            next: 0,
            looked: 0,
            repeated: 0,
            sampling: false,
            chunks: 0,
        }
    }
}

impl Sent {
    /// Whether the pages of the next chunk are to be judged; otherwise all of them are sent.
    pub(super) fn wants_chunk(&mut self) -> bool {
        self.chunks = self.chunks.wrapping_add(1);
        !self.sampling || self.chunks % SAMPLE == 0
    }

    /// Judges a page that is about to be sent as this says.
    pub(super) fn judge(&mut self, page: &[u8]) -> Verdict {
        let verdict = self.look_up(page);
        self.looked += 1;
        self.repeated += u32::from(verdict != Verdict::New);
        if self.looked == TERM {
            self.sampling = self.repeated < WORTH;
            (self.looked, self.repeated) = (0, 0);
        } else if self.repeated == WORTH {
            self.sampling = false;
        }
        verdict
    }

    fn look_up(&mut self, page: &[u8]) -> Verdict {
        let hash = XxHash3_64::oneshot(page);
        let seen = &mut self.seen[hash as usize % SEEN];
        if *seen != hash {
            *seen = hash;
            return Verdict::New;
        }
        match self.entries.get(&hash) {
            Some(entry) => {
                let at = *entry as usize * PAGE_BYTES;
                if self.contents[at..at + PAGE_BYTES] == *page {
                    Verdict::Reference(*entry)
                } else {
                    Verdict::New
                }
            }
            None => {
                self.define(hash, page);
                Verdict::Define
            }
        }
    }

    fn define(&mut self, hash: u64, page: &[u8]) {
        let entry = self.next;
        self.next = (entry + 1) % ENTRIES;
        let at = entry * PAGE_BYTES;
        if entry == self.hashes.len() {
            self.hashes.push(hash);
            self.contents.extend_from_slice(page);
        } else {
            self.entries.remove(&self.hashes[entry]);
            self.hashes[entry] = hash;
            self.contents[at..at + PAGE_BYTES].copy_from_slice(page);
        }
        self.entries.insert(hash, entry as u32);
    }
}

/// The receiving side. Its pages are the store's own, counted there until they are replaced.
#[derive(Debug, Default)]
pub(super) struct Received {
    entries: Vec<Pages>,
    next: usize,
}

impl Received {
    /// Enters successive pages.
    pub(super) fn define(&mut self, pages: &Pages) {
        for number in 0..pages.count() {
            let page = pages.share(number..number + 1);
            match self.entries.get_mut(self.next) {
                Some(entry) => *entry = page,
                None => self.entries.push(page),
            }
            self.next = (self.next + 1) % ENTRIES;
        }
    }

    /// The page of an entry, if there is one.
    pub(super) fn page(&self, entry: u32) -> Option<Pages> {
        self.entries.get(entry as usize).cloned()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use haulier_sys::pages::{PagePool, PagesMut};
    use proptest::prelude::*;

    use super::*;

    fn page(number: u16) -> Vec<u8> {
        let bytes = number.to_le_bytes();
        bytes.iter().copied().cycle().take(PAGE_BYTES).collect()
    }

    #[test]
    fn a_page_is_sent_twice_and_then_referred_to() {
        let mut sent = Sent::default();
        assert_eq!(sent.judge(&page(1)), Verdict::New);
        assert_eq!(sent.judge(&page(2)), Verdict::New);
        assert_eq!(sent.judge(&page(2)), Verdict::Define);
        assert_eq!(sent.judge(&page(1)), Verdict::Define);
        assert_eq!(sent.judge(&page(2)), Verdict::Reference(0));
        assert_eq!(sent.judge(&page(1)), Verdict::Reference(1));
    }

    #[test]
    fn the_dictionary_stays_bounded() {
        let mut sent = Sent::default();
        for number in 0..10_000 {
            sent.judge(&page(number));
            sent.judge(&page(number));
        }
        assert_eq!(sent.hashes.len(), ENTRIES);
        assert_eq!(sent.entries.len(), ENTRIES);
        assert_eq!(sent.contents.len(), ENTRIES * PAGE_BYTES);
        assert!(matches!(sent.judge(&page(9_999)), Verdict::Reference(_)));
    }

    #[test]
    fn only_samples_are_looked_at_until_pages_repeat() {
        let mut sent = Sent::default();
        let looked_at = |sent: &mut Sent| (0..800).filter(|_| sent.wants_chunk()).count();
        assert_eq!(looked_at(&mut sent), 800);
        for number in 0..TERM {
            sent.judge(&page(number as u16));
        }
        assert_eq!(looked_at(&mut sent), 100);
        for _ in 0..WORTH {
            sent.judge(&page(7));
        }
        assert_eq!(looked_at(&mut sent), 800);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// Whatever is sent, the other side ends up with the same pages.
        #[test]
        fn both_sides_agree(
            numbers in prop::collection::vec(0..3000_u16, 1..400),
            repeat in 1..20_usize,
        ) {
            let used = Arc::default();
            let pool = PagePool::new(used);
            let (mut sent, mut received) = (Sent::default(), Received::default());
            // Enough of them that entries are replaced.
            for turn in 0..repeat {
                for number in &numbers {
                    let number = number.wrapping_add((turn / 3) as u16 * 777);
                    let contents = page(number);
                    let verdict = sent.judge(&contents);
                    if verdict == Verdict::Define {
                        let mut run = pool.take(1).unwrap().remove(0);
                        run.copy_from_slice(&contents);
                        received.define(&PagesMut::freeze(run));
                    }
                    if let Verdict::Reference(entry) = verdict {
                        prop_assert_eq!(&received.page(entry).unwrap()[..], &contents[..]);
                    }
                }
            }
            prop_assert!(received.page(ENTRIES as u32).is_none());
            prop_assert!(received.page(u32::MAX).is_none());
        }
    }
}
