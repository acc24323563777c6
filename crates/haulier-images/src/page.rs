//! Pages by their contents.

use std::sync::LazyLock;

mod many;

pub use many::hash_many;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// BLAKE3 of a page. It decides what memory becomes, so it is a cryptographic hash.
pub type PageHash = [u8; 32];

/// The hash of a page of zeros.
pub static ZERO_HASH: LazyLock<PageHash> = LazyLock::new(|| hash(&[0; PAGE]));

/// The hash of a page.
pub fn hash(page: &[u8]) -> PageHash {
    *blake3::hash(page).as_bytes()
}

/// The hash of a page, or `None` if it is all zero.
pub fn hash_unless_zero(page: &[u8]) -> Option<PageHash> {
    if is_zero(page) {
        None
    } else {
        Some(hash(page))
    }
}

/// The hashes of pages that are one behind the other. Faster than one by one.
pub fn hash_all(pages: &[u8]) -> Vec<PageHash> {
    let pages: Vec<_> = each(pages).collect();
    let mut hashes = Vec::with_capacity(pages.len());
    hash_many(&pages, &mut hashes);
    hashes
}

/// Pages one by one; what is not a whole page at the end is left out.
pub fn each(pages: &[u8]) -> impl Iterator<Item = &[u8; PAGE]> {
    let pages = pages.chunks_exact(PAGE);
    pages.filter_map(|page| page.first_chunk())
}

/// The hashes of pages, one behind the other, or `None` for those that are all zero. Faster than one
/// by one.
pub fn hash_all_unless_zero(pages: &[u8]) -> Vec<Option<PageHash>> {
    let mut all = Vec::with_capacity(pages.len() / PAGE);
    let mut wanted = Vec::with_capacity(pages.len() / PAGE);
    for page in each(pages) {
        let zero = is_zero(page);
        all.push((!zero).then_some([0; 32]));
        if !zero {
            wanted.push(page);
        }
    }
    let mut hashes = Vec::with_capacity(wanted.len());
    hash_many(&wanted, &mut hashes);
    for (place, hash) in all.iter_mut().flatten().zip(hashes) {
        *place = hash;
    }
    all
}

fn is_zero(page: &[u8]) -> bool {
    // In steps large enough for vector instructions, small enough to leave most pages at once.
    page.chunks(64)
        .all(|step| step.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The hash of an image made of pages, from theirs: neither side then hashes any page twice.
#[derive(Debug)]
pub struct PagesHasher(blake3::Hasher);

impl Default for PagesHasher {
    fn default() -> PagesHasher {
        PagesHasher::new()
    }
}

impl PagesHasher {
    /// The hash of no pages yet.
    pub fn new() -> PagesHasher {
        // A context of its own: no hash of page hashes is the hash of any plain image.
        PagesHasher(blake3::Hasher::new_derive_key(
            "haulier 2026 image of pages, hashes of its pages",
        ))
    }

    /// Adds the next page's hash.
    pub fn update(&mut self, page: &PageHash) {
        self.0.update(page);
    }

    /// The hash of all pages so far.
    pub fn finalize(&self) -> PageHash {
        *self.0.finalize().as_bytes()
    }
}

/// Which of many numbers were seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    words: Vec<u64>,
    count: u64,
}

impl Seen {
    pub(crate) fn mark(&mut self, number: u32) {
        let (word, bit) = (number as usize / 64, 1_u64 << (number % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        if self.words[word] & bit == 0 {
            self.words[word] |= bit;
            self.count += 1;
        }
    }

    /// How many different numbers were marked.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_makes_a_page_not_zero() {
        assert_eq!(hash_unless_zero(&[0; PAGE]), None);
        for place in [0, 63, 64, 2048, PAGE - 1] {
            let mut page = [0; PAGE];
            page[place] = 1;
            assert_eq!(hash_unless_zero(&page), Some(hash(&page)));
        }
    }

    #[test]
    fn many_pages_have_the_hashes_that_each_has() {
        for count in [0, 1, 3, 8, 15, 16, 17, 50] {
            let mut pages = vec![0; count * PAGE];
            for (place, byte) in pages.iter_mut().enumerate() {
                *byte = (place * 7 + place / 251 + place / PAGE) as u8;
            }
            let single: Vec<PageHash> = pages.chunks_exact(PAGE).map(hash).collect();
            assert_eq!(hash_all(&pages), single);
        }
    }

    #[test]
    fn zero_pages_among_others_have_no_hash() {
        let mut pages = vec![0; 40 * PAGE];
        for number in (0..40).filter(|number| number % 3 != 0) {
            pages[number * PAGE + number] = 1;
        }
        let single: Vec<_> = pages.chunks_exact(PAGE).map(hash_unless_zero).collect();
        assert_eq!(hash_all_unless_zero(&pages), single);
    }

    #[test]
    fn numbers_are_counted_once() {
        let mut seen = Seen::default();
        for number in [0, 63, 64, 64, 1000, 0] {
            seen.mark(number);
        }
        assert_eq!(seen.count(), 4);
    }
}
