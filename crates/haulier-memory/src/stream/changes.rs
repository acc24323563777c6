//! The body of a frame of changes: pages of which the peer has an older version.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | task: its pid in its own PID namespace |
//! | 4..8 | round |
//! | 8..12 | number of pages, 1 to [`MAX_PAGES`] |
//! | 12..16 | how the blocks are encoded, as in a [page frame](super::frame) |
//! | 24 each | pages: address (8), the round of the version that the peer has (4), blocks that changed, a bit for each of its 16 blocks of 256 bytes, the first one in the lowest (4), XXH3-64 of the page (8) |
//! | rest | blocks that changed, in their order, encoded as one piece |
//!
//! Integers are little-endian.

use haulier_proto::frame::Kind;

use super::PageFrameError;
use super::codec::Codec;
use super::versions::{BLOCK_BYTES, BLOCKS, Change};
use crate::page::{PAGE, PAGE_BYTES, PageRange};

/// Bytes before the pages.
const HEAD_BYTES: usize = 16;
/// Bytes of a page.
const ENTRY_BYTES: usize = 24;
/// Pages in a frame at most.
const MAX_PAGES: u32 = 512;

/// The largest frame fits the limit of its kind, and what we make ourselves is accepted.
const _: () = assert!(HEAD_BYTES + MAX_PAGES as usize * (ENTRY_BYTES + PAGE_BYTES) <= 4 << 20);
const _: () = assert!(crate::reader::CHUNK_PAGES <= MAX_PAGES as u64);

/// A frame of this kind.
pub(super) const KIND: Kind = Kind::PageChanges;

/// What changed of the page at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChangedPage {
    pub(super) address: u64,
    pub(super) change: Change,
}

impl ChangedPage {
    /// The numbers of its blocks that changed.
    pub(super) fn blocks(&self) -> impl Iterator<Item = usize> + use<> {
        let blocks = self.change.blocks;
        (0..BLOCKS).filter(move |number| blocks & (1 << number) != 0)
    }

    /// Bytes of them.
    fn bytes(&self) -> usize {
        self.change.blocks.count_ones() as usize * BLOCK_BYTES
    }
}

/// A frame without its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changes<'a> {
    pub(super) task: u32,
    pub(super) round: u32,
    pub(super) codec: Codec,
    pub(super) pages: Vec<ChangedPage>,
    /// Bytes of the blocks, decoded.
    pub(super) bytes: usize,
    /// The blocks, encoded.
    pub(super) blocks: &'a [u8],
}

/// Encodes everything but the blocks into `out`, which is emptied first.
pub(super) fn encode(
    task: u32,
    round: u32,
    codec: Codec,
    pages: &[ChangedPage],
    out: &mut Vec<u8>,
) {
    debug_assert!((1..=MAX_PAGES as usize).contains(&pages.len()));
    out.clear();
    for word in [task, round, pages.len() as u32, codec as u32] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for page in pages {
        out.extend_from_slice(&page.address.to_le_bytes());
        out.extend_from_slice(&page.change.base.to_le_bytes());
        out.extend_from_slice(&u32::from(page.change.blocks).to_le_bytes());
        out.extend_from_slice(&page.change.hash.to_le_bytes());
    }
}

/// Decodes a body, whose length the limit of its kind bounds.
pub(super) fn decode(body: &[u8]) -> Result<Changes<'_>, PageFrameError> {
    let (head, rest) = body
        .split_at_checked(HEAD_BYTES)
        .ok_or(PageFrameError::Short)?;
    let [task, round, count, codec] = [0, 4, 8, 12].map(|at| word(head, at));
    let codec = Codec::from_wire(codec).ok_or(PageFrameError::Encoding(codec))?;
    if count == 0 || count > MAX_PAGES {
        return Err(PageFrameError::Pages(count.into()));
    }
    let (table, blocks) = rest
        .split_at_checked(count as usize * ENTRY_BYTES)
        .ok_or(PageFrameError::Short)?;
    let mut pages = Vec::with_capacity(count as usize);
    for entry in table.chunks_exact(ENTRY_BYTES) {
        pages.push(decode_page(entry, round)?);
    }
    let bytes = pages.iter().map(ChangedPage::bytes).sum();
    let got = blocks.len();
    let fits = match codec {
        Codec::None => got == bytes,
        // What does not get smaller is not compressed.
        Codec::Lz4 | Codec::Zstd => got > 0 && got < bytes,
    };
    if !fits {
        return Err(PageFrameError::Contents {
            expected: bytes as u64,
            got,
        });
    }
    Ok(Changes {
        task,
        round,
        codec,
        pages,
        bytes,
        blocks,
    })
}

fn decode_page(entry: &[u8], round: u32) -> Result<ChangedPage, PageFrameError> {
    let long = |at| u64::from(word(entry, at)) | u64::from(word(entry, at + 4)) << 32;
    let address = long(0);
    let range = PageRange {
        start: address,
        pages: 1,
    };
    if !range.is_valid() {
        return Err(PageFrameError::Range(range));
    }
    let (base, blocks) = (word(entry, 8), word(entry, 12));
    let blocks = u16::try_from(blocks).map_err(|_| PageFrameError::Blocks(blocks))?;
    if base >= round {
        return Err(PageFrameError::Base {
            address,
            round: base,
        });
    }
    let hash = long(16);
    let change = Change { base, blocks, hash };
    Ok(ChangedPage { address, change })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Changes the page that the peer had into the one that was sent: takes its blocks from the front of
/// `blocks`, which has them. False if it has become another.
pub(super) fn apply(page: &mut [u8], changed: &ChangedPage, blocks: &mut &[u8]) -> bool {
    debug_assert_eq!(page.len() as u64, PAGE);
    for number in changed.blocks() {
        let (block, rest) = blocks.split_at(BLOCK_BYTES.min(blocks.len()));
        let at = number * BLOCK_BYTES;
        page[at..at + block.len()].copy_from_slice(block);
        *blocks = rest;
    }
    super::versions::page_hash(page) == changed.change.hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn changed(page: u64, base: u32, blocks: u16) -> ChangedPage {
        ChangedPage {
            address: page * PAGE,
            change: Change {
                base,
                blocks,
                hash: page ^ 0x1234_5678_9abc_def0,
            },
        }
    }

    fn encoded(codec: Codec, pages: &[ChangedPage], blocks: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(9, 4, codec, pages, &mut bytes);
        bytes.resize(bytes.len() + blocks, 0);
        bytes
    }

    #[test]
    fn hostile_frames_are_refused() {
        let good = encoded(Codec::None, &[changed(1, 3, 5)], 512);
        assert!(decode(&good).is_ok());
        assert_eq!(decode(&good[..39]), Err(PageFrameError::Short));
        assert_eq!(decode(&good[..15]), Err(PageFrameError::Short));
        let contents = |got| Err(PageFrameError::Contents { expected: 512, got });
        assert_eq!(decode(&good[..good.len() - 1]), contents(511));
        let bad = |at: usize, value: u32| {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            decode(&bytes).unwrap_err()
        };
        assert_eq!(bad(8, 0), PageFrameError::Pages(0));
        assert_eq!(bad(8, 513), PageFrameError::Pages(513));
        assert_eq!(bad(8, 60), PageFrameError::Short);
        assert_eq!(bad(12, 3), PageFrameError::Encoding(3));
        assert_eq!(
            decode(&encoded(Codec::Lz4, &[changed(1, 3, 5)], 512)),
            contents(512)
        );
        let range = PageRange {
            start: PAGE + 1,
            pages: 1,
        };
        assert_eq!(bad(16, PAGE as u32 + 1), PageFrameError::Range(range));
        let base = PageFrameError::Base {
            address: PAGE,
            round: 4,
        };
        assert_eq!(bad(24, 4), base);
        assert_eq!(bad(28, 1 << 16), PageFrameError::Blocks(1 << 16));
    }

    #[test]
    fn a_page_that_becomes_another_is_told() {
        let old = vec![1; PAGE_BYTES];
        let mut new = old.clone();
        new[300] = 2;
        let mut page = changed(1, 0, 2);
        page.change.hash = super::super::versions::page_hash(&new);
        let blocks = new[256..512].to_vec();
        let mut rest = &blocks[..];
        let mut became = old.clone();
        assert!(apply(&mut became, &page, &mut rest));
        assert!(became == new && rest.is_empty());
        let mut other = old;
        other[4000] = 9;
        assert!(!apply(&mut other, &page, &mut &blocks[..]));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            pages in prop::collection::vec((0..1_u64 << 40, 0..4_u32, any::<u16>()), 1..64),
        ) {
            let pages: Vec<ChangedPage> = pages
                .into_iter()
                .map(|(page, base, blocks)| changed(page, base, blocks))
                .collect();
            let bytes: usize = pages.iter().map(ChangedPage::bytes).sum();
            let body = encoded(Codec::None, &pages, bytes);
            let decoded = decode(&body).unwrap();
            prop_assert_eq!((decoded.task, decoded.round, decoded.codec), (9, 4, Codec::None));
            prop_assert_eq!((decoded.bytes, decoded.blocks.len()), (bytes, bytes));
            prop_assert_eq!(decoded.pages, pages);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), low: bool) {
            if low && bytes.len() >= 16 {
                bytes[8] %= 16;
                bytes[9..16].fill(0);
            }
            let _ = decode(&bytes);
        }
    }
}
