//! The body of a page frame.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | task: its pid in its own PID namespace |
//! | 4..8 | round, from zero |
//! | 8..12 | number of runs, 1 to [`MAX_RUNS`] |
//! | 12..16 | zero; a later version says here how the contents are encoded |
//! | 16 each | runs: address (8), pages (4), flags (4; bit 0: all pages are zero) |
//! | rest | contents of the runs that are not zero, in their order |
//!
//! Integers are little-endian. The frame's checksum covers all of it.

use haulier_proto::frame::Kind;

use crate::page::{PAGE_BYTES, PageRange, PageRun};

/// Bytes before the runs.
pub(super) const HEAD_BYTES: usize = 16;

/// Bytes of one run.
pub(super) const RUN_BYTES: usize = 16;

/// Runs in a frame at most.
pub(super) const MAX_RUNS: usize = 1024;

const ZERO: u32 = 1;

/// What is wrong with a page frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageFrameError {
    /// It is too short for its head or its runs.
    #[error("it ends inside its head")]
    Short,
    /// It has no run, or too many.
    #[error("it has {0} runs")]
    Runs(u32),
    /// Bits are set that this version does not know.
    #[error("it has unknown flags {0:#x}")]
    Flags(u32),
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
}

/// The head of a page frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) task: u32,
    pub(super) round: u32,
    pub(super) runs: usize,
}

/// Encodes head and runs into `out`, which is emptied first.
pub(super) fn encode(task: u32, round: u32, runs: &[PageRun], out: &mut Vec<u8>) {
    debug_assert!((1..=MAX_RUNS).contains(&runs.len()), "{} runs", runs.len());
    out.clear();
    for word in [task, round, runs.len() as u32, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for run in runs {
        debug_assert!(run.range.pages <= u64::from(u32::MAX), "{}", run.range);
        out.extend_from_slice(&run.range.start.to_le_bytes());
        out.extend_from_slice(&(run.range.pages as u32).to_le_bytes());
        out.extend_from_slice(&(if run.zero { ZERO } else { 0 }).to_le_bytes());
    }
}

/// Decodes the head of a frame of `length` bytes.
pub(super) fn decode_head(bytes: &[u8; HEAD_BYTES], length: usize) -> Result<Head, PageFrameError> {
    let runs = word(bytes, 8);
    if word(bytes, 12) != 0 {
        return Err(PageFrameError::Flags(word(bytes, 12)));
    }
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
    })
}

/// Decodes the runs of a frame that has `contents` bytes behind them. `runs` is emptied first.
pub(super) fn decode_runs(
    bytes: &[u8],
    contents: usize,
    runs: &mut Vec<PageRun>,
) -> Result<(), PageFrameError> {
    runs.clear();
    // At most MAX_RUNS times 32 bits: no overflow.
    let mut pages = 0_u64;
    for bytes in bytes.chunks_exact(RUN_BYTES) {
        let flags = word(bytes, 12);
        if flags & !ZERO != 0 {
            return Err(PageFrameError::Flags(flags));
        }
        let start = u64::from(word(bytes, 0)) | (u64::from(word(bytes, 4)) << 32);
        let range = PageRange {
            start,
            pages: u64::from(word(bytes, 8)),
        };
        if !range.is_valid() {
            return Err(PageFrameError::Range(range));
        }
        let zero = flags & ZERO != 0;
        pages += if zero { 0 } else { range.pages };
        runs.push(PageRun { range, zero });
    }
    let expected = pages * PAGE_BYTES as u64;
    if expected != contents as u64 {
        return Err(PageFrameError::Contents {
            expected,
            got: contents,
        });
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

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

    fn decode(bytes: &[u8], contents: usize) -> Result<(Head, Vec<PageRun>), PageFrameError> {
        let mut head = [0; HEAD_BYTES];
        head.copy_from_slice(&bytes[..HEAD_BYTES]);
        let head = decode_head(&head, bytes.len() + contents)?;
        let mut runs = Vec::new();
        let table = &bytes[HEAD_BYTES..HEAD_BYTES + head.runs * RUN_BYTES];
        decode_runs(
            table,
            contents + bytes.len() - HEAD_BYTES - table.len(),
            &mut runs,
        )?;
        Ok((head, runs))
    }

    #[test]
    fn hostile_frames_are_refused() {
        let run = |start, pages| PageRun {
            range: PageRange { start, pages },
            zero: true,
        };
        let encoded = |runs: &[PageRun]| {
            let mut bytes = Vec::new();
            encode(1, 2, runs, &mut bytes);
            bytes
        };
        let mut many = encoded(&[run(PAGE, 1)]);
        many[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&many, 0), Err(PageFrameError::Runs(u32::MAX)));
        many[8..12].copy_from_slice(&2_u32.to_le_bytes());
        assert_eq!(decode(&many, 0), Err(PageFrameError::Short));
        many[8..12].copy_from_slice(&0_u32.to_le_bytes());
        assert_eq!(decode(&many, 0), Err(PageFrameError::Runs(0)));
        let mut flags = encoded(&[run(PAGE, 1)]);
        flags[28] = 0x80;
        assert_eq!(decode(&flags, 0), Err(PageFrameError::Flags(0x80)));
        for bad in [
            run(1, 1),
            run(PAGE, 0),
            run(ADDRESS_END - PAGE, 2),
            run(!0xFFF, 1),
        ] {
            assert_eq!(
                decode(&encoded(&[bad]), 0),
                Err(PageFrameError::Range(bad.range))
            );
        }
        let contents = decode(&encoded(&[run(PAGE, 1)]), 4096);
        assert_eq!(
            contents,
            Err(PageFrameError::Contents {
                expected: 0,
                got: 4096
            })
        );
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            task: u32,
            round: u32,
            runs in prop::collection::vec((0..1_u64 << 40, 1..1000_u64, any::<bool>()), 1..64),
        ) {
            let runs: Vec<PageRun> = runs
                .into_iter()
                .map(|(page, pages, zero)| PageRun {
                    range: PageRange { start: page * PAGE, pages },
                    zero,
                })
                .collect();
            let pages: u64 = runs.iter().filter(|run| !run.zero).map(|run| run.range.pages).sum();
            let mut bytes = Vec::new();
            encode(task, round, &runs, &mut bytes);
            let (head, decoded) = decode(&bytes, (pages * PAGE) as usize).unwrap();
            prop_assert_eq!(head, Head { task, round, runs: runs.len() });
            prop_assert_eq!(decoded, runs);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 16..400), low: bool) {
            if low {
                bytes[8] %= 24;
                bytes[9..16].fill(0);
            }
            if let Ok((head, runs)) = decode(&bytes, 0) {
                prop_assert_eq!(runs.len(), head.runs);
            }
        }
    }
}
