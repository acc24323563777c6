//! The body of a page frame.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | task: its pid in its own PID namespace |
//! | 4..8 | round, from zero |
//! | 8..12 | number of runs, 1 to [`MAX_RUNS`] |
//! | 12..16 | how the contents are encoded: 0 as they are, 1 LZ4 block, 2 Zstandard frame |
//! | 16 each | runs: address (8), pages (4), kind (4) |
//! | 4 each | an entry of the dictionary for each page of the runs of kind 3, in their order |
//! | rest | contents of the runs of kind 0 and 2, in their order, encoded as one piece |
//!
//! Kinds of runs: 0 contents follow; 1 all pages are zero; 2 as 0, and each page becomes the next
//! entry of the dictionary; 3 pages that are entries of the dictionary. The
//! [dictionary](super::dictionary) belongs to the channel; runs are gone through in their order.
//!
//! Integers are little-endian. The frame's checksum covers all of it.

use haulier_proto::frame::Kind;

use super::codec::Codec;
use crate::page::{PAGE_BYTES, PageRange};

/// Bytes before the runs.
pub(super) const HEAD_BYTES: usize = 16;

/// Bytes of one run.
pub(super) const RUN_BYTES: usize = 16;

/// Bytes of a reference to the dictionary.
pub(super) const REFERENCE_BYTES: usize = 4;

/// Runs in a frame at most.
pub(super) const MAX_RUNS: usize = 1024;

/// Pages in a frame at most, those aside that are zero: few enough that one call receives them even
/// into single pages.
const MAX_PAGES: u64 = 512;

/// What is wrong with a page frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageFrameError {
    /// It is too short for its head, its runs or its references.
    #[error("it ends inside its head")]
    Short,
    /// It has no run, or too many.
    #[error("it has {0} runs")]
    Runs(u32),
    /// It has too many pages.
    #[error("it has {0} pages")]
    Pages(u64),
    /// A run is of a kind that this version does not know.
    #[error("it has a run of unknown kind {0:#x}")]
    RunKind(u32),
    /// The contents are encoded in a way that this version does not know.
    #[error("its contents are of unknown encoding {0:#x}")]
    Encoding(u32),
    /// A run is empty, not aligned, or beyond the address space.
    #[error("it has an invalid range of pages: {0}")]
    Range(PageRange),
    /// The contents are not as long as the runs say.
    #[error("it has {got} bytes of contents where its runs have {expected}")]
    Contents {
        /// Bytes by its runs.
        expected: u64,
        /// Bytes by its length.
        got: usize,
    },
    /// The contents cannot be decompressed to what the runs say.
    #[error("its contents do not decompress to the {expected} bytes of its runs")]
    Compressed {
        /// Bytes by its runs.
        expected: usize,
    },
    /// More blocks of a page changed than it has.
    #[error("it changes blocks {0:#x} of a page")]
    Blocks(u32),
    /// It changes a version of a page that never came, or was dropped.
    #[error("it changes the page at {address:#x} of round {round}, which is not here")]
    Base {
        /// The page.
        address: u64,
        /// The round of the version.
        round: u32,
    },
    /// A page is not what its hash says once it was changed.
    #[error("the page at {address:#x} does not become the one that was sent")]
    Changed {
        /// The page.
        address: u64,
    },
    /// A page is said to be one that was never sent.
    #[error("it refers to page {0} of the dictionary, which there is not")]
    Reference(u32),
}

/// What a run's pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunKind {
    /// In the contents.
    Data,
    /// All zero.
    Zero,
    /// In the contents, and from now on in the dictionary.
    Define,
    /// In the dictionary.
    Reference,
}

impl RunKind {
    fn from_wire(value: u32) -> Option<Self> {
        [Self::Data, Self::Zero, Self::Define, Self::Reference]
            .into_iter()
            .find(|kind| *kind as u32 == value)
    }

    /// Whether the contents of the frame have its pages.
    pub(super) fn has_contents(self) -> bool {
        matches!(self, RunKind::Data | RunKind::Define)
    }
}

/// Successive pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) range: PageRange,
    pub(super) kind: RunKind,
}

/// The head of a page frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) task: u32,
    pub(super) round: u32,
    pub(super) runs: usize,
    pub(super) codec: Codec,
}

/// Pages of a frame by where they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// All.
    pub(super) pages: u64,
    /// In the contents.
    pub(super) contents: usize,
    /// In the dictionary.
    pub(super) references: usize,
}

/// Encodes head, runs and references into `out`, which is emptied first.
pub(super) fn encode(
    task: u32,
    round: u32,
    codec: Codec,
    runs: &[Run],
    references: &[u32],
    out: &mut Vec<u8>,
) {
    debug_assert!((1..=MAX_RUNS).contains(&runs.len()), "{} runs", runs.len());
    out.clear();
    for word in [task, round, runs.len() as u32, codec as u32] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for run in runs {
        debug_assert!(run.range.pages <= u64::from(u32::MAX), "{}", run.range);
        out.extend_from_slice(&run.range.start.to_le_bytes());
        out.extend_from_slice(&(run.range.pages as u32).to_le_bytes());
        out.extend_from_slice(&(run.kind as u32).to_le_bytes());
    }
    for reference in references {
        out.extend_from_slice(&reference.to_le_bytes());
    }
}

/// Decodes the head of a frame of `length` bytes.
pub(super) fn decode_head(bytes: &[u8; HEAD_BYTES], length: usize) -> Result<Head, PageFrameError> {
    let runs = word(bytes, 8);
    let codec = Codec::from_wire(word(bytes, 12));
    let codec = codec.ok_or(PageFrameError::Encoding(word(bytes, 12)))?;
    if runs == 0 || runs as usize > MAX_RUNS {
        return Err(PageFrameError::Runs(runs));
    }
    if length < HEAD_BYTES + runs as usize * RUN_BYTES {
        return Err(PageFrameError::Short);
    }
    Ok(Head {
        task: word(bytes, 0),
        round: word(bytes, 4),
        runs: runs as usize,
        codec,
    })
}

/// Decodes the runs of a frame that has `rest` bytes behind them. `runs` is emptied first.
pub(super) fn decode_runs(
    bytes: &[u8],
    codec: Codec,
    rest: usize,
    runs: &mut Vec<Run>,
) -> Result<Totals, PageFrameError> {
    runs.clear();
    // At most MAX_RUNS times 32 bits: no overflow.
    let (mut all, mut contents, mut references) = (0_u64, 0_u64, 0_u64);
    for bytes in bytes.chunks_exact(RUN_BYTES) {
        let kind = word(bytes, 12);
        let kind = RunKind::from_wire(kind).ok_or(PageFrameError::RunKind(kind))?;
        let range = PageRange {
            start: u64::from(word(bytes, 0)) | (u64::from(word(bytes, 4)) << 32),
            pages: u64::from(word(bytes, 8)),
        };
        if !range.is_valid() {
            return Err(PageFrameError::Range(range));
        }
        all += range.pages;
        if kind.has_contents() {
            contents += range.pages;
        } else if kind == RunKind::Reference {
            references += range.pages;
        }
        runs.push(Run { range, kind });
    }
    if contents + references > MAX_PAGES {
        return Err(PageFrameError::Pages(contents + references));
    }
    let totals = Totals {
        pages: all,
        contents: contents as usize,
        references: references as usize,
    };
    let listed = totals.references * REFERENCE_BYTES;
    let got = rest.checked_sub(listed).ok_or(PageFrameError::Short)?;
    let expected = totals.contents * PAGE_BYTES;
    let fits = match codec {
        Codec::None => got == expected,
        // What does not get smaller is not compressed.
        Codec::Lz4 | Codec::Zstd => got > 0 && got < expected,
    };
    if !fits {
        return Err(PageFrameError::Contents {
            expected: expected as u64,
            got,
        });
    }
    Ok(totals)
}

/// Decodes references.
pub(super) fn references(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let entries = bytes.chunks_exact(REFERENCE_BYTES);
    entries.map(|bytes| word(bytes, 0))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What we make ourselves is accepted.
const _: () = assert!(crate::reader::CHUNK_PAGES <= MAX_PAGES);

/// The largest frame of our own making fits the limit of its kind.
const _: () = assert!(
    HEAD_BYTES + MAX_RUNS * RUN_BYTES + crate::reader::CHUNK_PAGES as usize * PAGE_BYTES <= 4 << 20
);

/// A frame of this kind.
pub(super) const KIND: Kind = Kind::Pages;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::{ADDRESS_END, PAGE};

    fn decode(bytes: &[u8], contents: usize) -> Result<(Head, Vec<Run>, Totals), PageFrameError> {
        let mut head = [0; HEAD_BYTES];
        head.copy_from_slice(&bytes[..HEAD_BYTES]);
        let head = decode_head(&head, bytes.len() + contents)?;
        let mut runs = Vec::new();
        let table = &bytes[HEAD_BYTES..HEAD_BYTES + head.runs * RUN_BYTES];
        let rest = contents + bytes.len() - HEAD_BYTES - table.len();
        let totals = decode_runs(table, head.codec, rest, &mut runs)?;
        Ok((head, runs, totals))
    }

    fn zero(start: u64, pages: u64) -> Run {
        Run {
            range: PageRange { start, pages },
            kind: RunKind::Zero,
        }
    }

    fn encoded(codec: Codec, runs: &[Run], references: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(1, 2, codec, runs, references, &mut bytes);
        bytes
    }

    #[test]
    fn hostile_frames_are_refused() {
        let mut many = encoded(Codec::None, &[zero(PAGE, 1)], &[]);
        many[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&many, 0), Err(PageFrameError::Runs(u32::MAX)));
        many[8..12].copy_from_slice(&2_u32.to_le_bytes());
        assert_eq!(decode(&many, 0), Err(PageFrameError::Short));
        many[8..12].copy_from_slice(&0_u32.to_le_bytes());
        assert_eq!(decode(&many, 0), Err(PageFrameError::Runs(0)));
        let mut unknown = encoded(Codec::None, &[zero(PAGE, 1)], &[]);
        unknown[28] = 0x80;
        assert_eq!(decode(&unknown, 0), Err(PageFrameError::RunKind(0x80)));
        unknown[12] = 3;
        assert_eq!(decode(&unknown, 0), Err(PageFrameError::Encoding(3)));
        for bad in [
            zero(1, 1),
            zero(PAGE, 0),
            zero(ADDRESS_END - PAGE, 2),
            zero(!0xFFF, 1),
        ] {
            assert_eq!(
                decode(&encoded(Codec::None, &[bad], &[]), 0),
                Err(PageFrameError::Range(bad.range))
            );
        }
        let contents = |expected, got| Err(PageFrameError::Contents { expected, got });
        let bytes = encoded(Codec::None, &[zero(PAGE, 1)], &[]);
        assert_eq!(decode(&bytes, 4096), contents(0, 4096));
    }

    #[test]
    fn pages_out_of_nothing_are_bounded() {
        let run = |kind, pages| Run {
            range: PageRange { start: PAGE, pages },
            kind,
        };
        let contents = |expected, got| Err(PageFrameError::Contents { expected, got });
        // A bomb: few bytes that claim to be many pages.
        let bytes = encoded(Codec::Zstd, &[run(RunKind::Data, 513)], &[]);
        assert_eq!(decode(&bytes, 20), Err(PageFrameError::Pages(513)));
        let bytes = encoded(Codec::None, &[run(RunKind::Reference, 1025)], &[]);
        assert_eq!(decode(&bytes, 0), Err(PageFrameError::Pages(1025)));
        let bytes = encoded(Codec::None, &[run(RunKind::Reference, 3)], &[1, 2]);
        assert_eq!(decode(&bytes, 0), Err(PageFrameError::Short));
        // Compressed contents are there, and smaller than others.
        for (kind, got) in [
            (RunKind::Data, 0),
            (RunKind::Define, 4096),
            (RunKind::Zero, 1),
        ] {
            let expected = if kind == RunKind::Zero { 0 } else { 4096 };
            let bytes = encoded(Codec::Lz4, &[run(kind, 1)], &[]);
            assert_eq!(decode(&bytes, got), contents(expected, got));
        }
    }

    fn kind() -> impl Strategy<Value = RunKind> {
        prop::sample::select(vec![
            RunKind::Data,
            RunKind::Zero,
            RunKind::Define,
            RunKind::Reference,
        ])
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            task: u32,
            round: u32,
            runs in prop::collection::vec((0..1_u64 << 40, 1..16_u64, kind()), 1..64),
        ) {
            let runs: Vec<Run> = runs
                .into_iter()
                .map(|(page, pages, kind)| Run {
                    range: PageRange { start: page * PAGE, pages },
                    kind,
                })
                .collect();
            let pages = |wanted: fn(RunKind) -> bool| -> u64 {
                let runs = runs.iter().filter(|run| wanted(run.kind));
                runs.map(|run| run.range.pages).sum()
            };
            let contents = pages(RunKind::has_contents) as usize;
            let list: Vec<u32> = (0..pages(|kind| kind == RunKind::Reference) as u32).collect();
            let mut bytes = Vec::new();
            encode(task, round, Codec::None, &runs, &list, &mut bytes);
            let (head, decoded, totals) = decode(&bytes, contents * PAGE_BYTES).unwrap();
            let expected = Head { task, round, runs: runs.len(), codec: Codec::None };
            prop_assert_eq!(head, expected);
            let expected = Totals { pages: pages(|_| true), contents, references: list.len() };
            prop_assert_eq!(totals, expected);
            let behind = HEAD_BYTES + runs.len() * RUN_BYTES;
            prop_assert_eq!(references(&bytes[behind..]).collect::<Vec<_>>(), list);
            prop_assert_eq!(decoded, runs);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 16..400), low: bool) {
            if low {
                bytes[8] %= 24;
                bytes[9..16].fill(0);
                bytes[12] = bytes[0] % 4;
            }
            if let Ok((head, runs, _)) = decode(&bytes, 0) {
                prop_assert_eq!(runs.len(), head.runs);
            }
        }
    }
}
