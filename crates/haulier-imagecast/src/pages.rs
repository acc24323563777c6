//! Frames of pages that a dump left behind. No IO.

use std::borrow::Cow;

use haulier_images::page::PAGE;
use haulier_memory::page::PageRange;

use crate::compress::{self, Compression};

/// Bytes in front of the contents.
const HEAD: usize = 24;
/// Most pages of a frame.
pub(crate) const MOST: u64 = 256;
/// They are all zero, and no contents follow.
const ZERO: u32 = 1 << 31;
/// The contents are compressed.
const COMPRESSED: u32 = 1 << 30;

/// Which pages are in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LazyPages {
    pub(crate) snapshot: u64,
    /// Whose they are, by the pid in the images.
    pub(crate) task: u32,
    pub(crate) range: PageRange,
    pub(crate) zero: bool,
}

impl LazyPages {
    pub(crate) fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let count = self.range.pages as u32 | if self.zero { ZERO } else { 0 };
        head[..8].copy_from_slice(&self.snapshot.to_le_bytes());
        head[8..12].copy_from_slice(&self.task.to_le_bytes());
        head[12..16].copy_from_slice(&count.to_le_bytes());
        head[16..].copy_from_slice(&self.range.start.to_le_bytes());
        head
    }

    /// The body of a frame, given as its head and the contents, in fewer bytes; `None` if it goes as it is.
    pub(crate) fn compressed(how: Compression, head: &[u8], contents: &[u8]) -> Option<Vec<u8>> {
        let small = compress::compress(how, contents)?;
        let (head, _) = head.split_first_chunk::<HEAD>()?;
        let mut body = head.to_vec();
        // The count is little-endian: this is in its last byte.
        body[15] |= (COMPRESSED >> 24) as u8;
        body.extend_from_slice(&small);
        Some(body)
    }

    /// Which pages a body has, and their contents.
    pub(crate) fn decode(body: &[u8]) -> Result<(LazyPages, Cow<'_, [u8]>), String> {
        let (pages, compressed, contents) = LazyPages::head_of(body)?;
        let contents = match compressed {
            true => Cow::Owned(compress::decompress(contents)?),
            false => Cow::Borrowed(contents),
        };
        let length = if pages.zero { 0 } else { pages.range.pages };
        if contents.len() as u64 != length * PAGE as u64 {
            return Err(format!("{} bytes for {length} pages", contents.len()));
        }
        Ok((pages, contents))
    }

    /// Which pages a body has, whether they are compressed, and what follows the head.
    pub(crate) fn head_of(body: &[u8]) -> Result<(LazyPages, bool, &[u8]), String> {
        let (head, contents) = body
            .split_first_chunk::<HEAD>()
            .ok_or("pages without a head")?;
        let long = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&head[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let second = long(8);
        let count = (second >> 32) as u32;
        let pages = LazyPages {
            snapshot: long(0),
            task: second as u32,
            range: PageRange {
                start: long(16),
                pages: u64::from(count & !(ZERO | COMPRESSED)),
            },
            zero: count & ZERO != 0,
        };
        if !pages.range.is_valid() || pages.range.pages > MOST {
            return Err(format!("no frame of pages: {}", pages.range));
        }
        Ok((pages, count & COMPRESSED != 0, contents))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever comes, it is nothing or whole pages at an address that exists.
        #[test]
        fn a_hostile_body_is_refused_or_whole(
            long in (any::<u64>(), any::<u32>(), any::<u64>(), 0_u32..3),
            start in prop_oneof![any::<u64>(), (0_u64..1 << 52).prop_map(|page| page << 12)],
            length in 0_usize..3 * PAGE,
        ) {
            let (snapshot, task, noise, few) = long;
            let count = if noise % 2 == 0 { few | (noise as u32 & ZERO) } else { noise as u32 };
            let mut body = snapshot.to_le_bytes().to_vec();
            body.extend(task.to_le_bytes());
            body.extend(count.to_le_bytes());
            body.extend(start.to_le_bytes());
            let whole = noise % 3 == 0;
            body.resize(HEAD + if whole { length / PAGE * PAGE } else { length }, 1);
            body.truncate(HEAD + length - if noise % 5 == 0 { length.min(HEAD) } else { 0 });
            if let Ok((pages, contents)) = LazyPages::decode(&body) {
                prop_assert!(pages.range.is_valid() && pages.range.pages <= MOST);
                let literal = if pages.zero { 0 } else { pages.range.pages };
                prop_assert_eq!(contents.len() as u64, literal * PAGE as u64);
                let mut head = pages.head();
                head[15] |= body[15] & 0x40;
                prop_assert_eq!(&body[..HEAD], &head[..]);
            }
        }
    }

    #[test]
    fn compressed_pages_come_back_and_damage_is_refused() {
        let pages = LazyPages {
            snapshot: 1,
            task: 77,
            range: PageRange {
                start: 0x1000,
                pages: 3,
            },
            zero: false,
        };
        let contents: Vec<u8> = (0..3 * PAGE).map(|at| (at / 100) as u8).collect();
        for how in [Compression::Lz4, Compression::Zstd] {
            let body = LazyPages::compressed(how, &pages.head(), &contents).unwrap();
            assert!(body.len() < PAGE);
            let (got, back) = LazyPages::decode(&body).unwrap();
            assert_eq!((got, &back[..]), (pages, &contents[..]));
            for other in [2, 4] {
                let mut wrong = body.clone();
                wrong[12] = other;
                assert!(LazyPages::decode(&wrong).is_err(), "{other} pages");
            }
            assert!(LazyPages::decode(&body[..body.len() - 1]).is_err(), "cut");
        }
        assert!(LazyPages::compressed(Compression::None, &pages.head(), &contents).is_none());
    }

    #[test]
    fn a_head_comes_back_and_nonsense_is_refused() {
        for zero in [false, true] {
            let pages = LazyPages {
                snapshot: 3 << 40,
                task: 77,
                range: PageRange {
                    start: 0x7f00_1234_5000,
                    pages: 2,
                },
                zero,
            };
            let mut body = pages.head().to_vec();
            body.resize(HEAD + if zero { 0 } else { 2 * PAGE }, 9);
            let (got, contents) = LazyPages::decode(&body).unwrap();
            assert_eq!((got, contents.len()), (pages, body.len() - HEAD));
            body.push(0);
            assert!(LazyPages::decode(&body).is_err(), "a byte too many");
        }
        let of = |pages, start| LazyPages {
            snapshot: 1,
            task: 1,
            range: PageRange { start, pages },
            zero: true,
        };
        for bad in [of(0, 0x1000), of(MOST + 1, 0x1000), of(1, 0x1001)] {
            assert!(LazyPages::decode(&bad.head()).is_err(), "{bad:?}");
        }
        assert!(LazyPages::decode(&[0; HEAD - 1]).is_err());
    }
}
