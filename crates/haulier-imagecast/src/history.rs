//! The pages that both sides have of a target: what later dumps refer to instead of sending it.
//!
//! Pages are numbered from zero, in the order in which their contents came. At the end of a
//! snapshot those that it did not use are forgotten, and the others are numbered anew in the same
//! order. Both sides do so from the same frames, so nothing of it is ever sent.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hasher, RandomState};

use haulier_images::page::PageHash;

use crate::store::Piece;

/// Which numbers were used, with their rank among those.
#[derive(Debug, Default)]
struct Used {
    words: Vec<u64>,
}

impl Used {
    fn mark(&mut self, number: u32) {
        let (word, bit) = (number as usize / 64, 1_u64 << (number % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= bit;
    }

    fn has(&self, number: u32) -> bool {
        let word = self.words.get(number as usize / 64).copied().unwrap_or(0);
        word & (1 << (number % 64)) != 0
    }

    /// For each word the count of bits in the words before it.
    fn ranks(&self) -> Vec<u32> {
        let mut sum = 0;
        let ranks = self.words.iter().map(|word| {
            let before = sum;
            sum += word.count_ones();
            before
        });
        ranks.collect()
    }

    fn rank(&self, ranks: &[u32], number: u32) -> u32 {
        let (word, bit) = (number as usize / 64, number % 64);
        ranks[word] + (self.words[word] & ((1 << bit) - 1)).count_ones()
    }
}

/// The sender's side: numbers by contents.
#[derive(Debug, Default)]
pub(crate) struct Known {
    numbers: HashMap<PageHash, u32, Keys>,
    used: Used,
}

impl Known {
    /// The number of a page that the receiver has, which is used with this; `None` for one that it
    /// does not have, and that has the next number from now on.
    pub(crate) fn refer_or_add(&mut self, hash: &PageHash) -> Option<u32> {
        let next = self.numbers.len() as u32;
        match self.numbers.entry(*hash) {
            Entry::Occupied(known) => {
                self.used.mark(*known.get());
                Some(*known.get())
            }
            Entry::Vacant(new) => {
                new.insert(next);
                self.used.mark(next);
                None
            }
        }
    }

    /// The snapshot is complete.
    pub(crate) fn finish(&mut self) {
        let used = std::mem::take(&mut self.used);
        let ranks = used.ranks();
        self.numbers.retain(|_, number| {
            let keep = used.has(*number);
            if keep {
                *number = used.rank(&ranks, *number);
            }
            keep
        });
    }
}

/// Makes the hasher of a map whose keys are hashes already. It still has secrets of its own: who chooses
/// page contents must not choose buckets.
#[derive(Debug, Clone)]
struct Keys(u64, u64);

impl Default for Keys {
    fn default() -> Keys {
        // The standard library's secrets are random.
        let random = RandomState::new();
        Keys(random.hash_one(1), random.hash_one(2))
    }
}

impl BuildHasher for Keys {
    type Hasher = Folded;
    fn build_hasher(&self) -> Folded {
        Folded {
            keys: self.clone(),
            sum: 0,
        }
    }
}

/// Half of a hash, folded with the keys.
struct Folded {
    keys: Keys,
    sum: u64,
}

impl Hasher for Folded {
    fn write(&mut self, bytes: &[u8]) {
        // Of a hash 16 bytes do: to find two that have the same of them is out of reach.
        if let Some(half) = bytes.first_chunk::<16>() {
            let half = u128::from_le_bytes(*half);
            let (a, b) = (half as u64 ^ self.keys.0, (half >> 64) as u64 ^ self.keys.1);
            let product = u128::from(a) * u128::from(b);
            self.sum = product as u64 ^ (product >> 64) as u64;
        }
    }

    // The length of the key, which is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.sum
    }
}

/// The receiver's side: contents by number.
#[derive(Debug, Default)]
pub(crate) struct Bank {
    pages: Vec<(PageHash, Piece)>,
    used: Used,
}

/// What a page counts for in a bank, beside its contents.
pub(crate) const BANK_COST: u64 = size_of::<(PageHash, Piece)>() as u64;

impl Bank {
    /// Pages it has.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// A page by its number, which is used with this.
    pub(crate) fn refer(&mut self, number: u32) -> Option<(PageHash, Piece)> {
        let (hash, page) = self.pages.get(number as usize)?;
        self.used.mark(number);
        Some((*hash, page.clone()))
    }

    /// Adds a page whose contents came. The sender counts to [`u32::MAX`] pages at most.
    pub(crate) fn add(&mut self, hash: PageHash, page: Piece) {
        self.used.mark(self.pages.len() as u32);
        self.pages.push((hash, page));
    }

    /// The snapshot is complete. How many pages were forgotten.
    pub(crate) fn finish(&mut self) -> usize {
        let used = std::mem::take(&mut self.used);
        let before = self.pages.len();
        let mut number = 0;
        self.pages.retain(|_| {
            number += 1;
            used.has(number - 1)
        });
        before - self.pages.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::store::Pool;

    fn hash(page: u16) -> PageHash {
        haulier_images::page::hash(&page.to_le_bytes())
    }

    proptest! {
        /// Whatever the dumps contain, a number means the same page on both sides, and a page that
        /// the dump before contained is not sent again.
        #[test]
        fn both_sides_number_alike(dumps in prop::collection::vec(prop::collection::vec(0_u16..300, 0..400), 1..6)) {
            let pool = Arc::new(Pool::new(1 << 20));
            let (mut known, mut bank) = (Known::default(), Bank::default());
            let mut before: Vec<u16> = Vec::new();
            for dump in dumps {
                for (index, page) in dump.iter().enumerate() {
                    let had = before.contains(page) || dump[..index].contains(page);
                    match known.refer_or_add(&hash(*page)) {
                        Some(number) => {
                            prop_assert!(had);
                            let (got, piece) = bank.refer(number).unwrap();
                            prop_assert_eq!(got, hash(*page));
                            let contents = piece.read().unwrap().unwrap();
                            prop_assert_eq!(&*contents, &page.to_le_bytes()[..]);
                        }
                        None => {
                            prop_assert!(!had);
                            let blob = pool.put(&page.to_le_bytes()).unwrap();
                            bank.add(hash(*page), Piece::Data(Arc::new(blob)));
                        }
                    }
                }
                known.finish();
                bank.finish();
                prop_assert_eq!(known.numbers.len(), bank.len());
                before = dump;
            }
            prop_assert!(bank.refer(bank.len() as u32).is_none());
        }
    }
}
