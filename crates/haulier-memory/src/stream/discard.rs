//! The body of a discard frame: pages of a task that are gone.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | task: its pid in its own PID namespace |
//! | 4..8 | round: what came in an earlier one is to be forgotten |
//! | 16 each | ranges: address (8), pages (8) |
//!
//! Integers are little-endian.

use haulier_proto::frame::Kind;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

use super::PageFrameError;
use crate::page::PageRange;
use crate::wait::Wait;

const HEAD_BYTES: usize = 8;
const RANGE_BYTES: usize = 16;

/// Ranges in one frame.
const MAX_RANGES: usize = 4095;

const _: () = assert!(HEAD_BYTES + MAX_RANGES * RANGE_BYTES <= 64 << 10);

/// Says that pages of a task that were sent before `round` are gone, in as many frames as needed.
pub(super) fn send(
    channel: &mut Channel,
    task: u32,
    round: u32,
    ranges: &[PageRange],
    wait: &Wait,
) -> Result<(), TransportError> {
    let mut body = Vec::new();
    for ranges in ranges.chunks(MAX_RANGES) {
        encode(task, round, ranges, &mut body);
        channel.send(Kind::Discard, &[&body], wait)?;
    }
    Ok(())
}

fn encode(task: u32, round: u32, ranges: &[PageRange], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&task.to_le_bytes());
    out.extend_from_slice(&round.to_le_bytes());
    for range in ranges {
        out.extend_from_slice(&range.start.to_le_bytes());
        out.extend_from_slice(&range.pages.to_le_bytes());
    }
}

/// What a discard frame says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Discard {
    pub(super) task: u32,
    pub(super) round: u32,
    pub(super) ranges: Vec<PageRange>,
}

/// Decodes a body, whose length the limit of its kind bounds.
pub(super) fn decode(body: &[u8]) -> Result<Discard, PageFrameError> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?))
    };
    let (Some(task), Some(round)) = (word(0), word(4)) else {
        return Err(PageFrameError::Short);
    };
    let table = body[HEAD_BYTES..].chunks_exact(RANGE_BYTES);
    if !table.remainder().is_empty() {
        return Err(PageFrameError::Short);
    }
    let mut ranges = Vec::with_capacity(table.len());
    for bytes in table {
        let mut halves = [0; RANGE_BYTES];
        halves.copy_from_slice(bytes);
        let both = u128::from_le_bytes(halves);
        let range = PageRange {
            start: both as u64,
            pages: (both >> 64) as u64,
        };
        if !range.is_valid() {
            return Err(PageFrameError::Range(range));
        }
        ranges.push(range);
    }
    Ok(Discard {
        task,
        round,
        ranges,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::{ADDRESS_END, PAGE};

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            task: u32,
            round: u32,
            ranges in prop::collection::vec((0..1_u64 << 40, 1..1_u64 << 40), 0..50),
        ) {
            let range = |(page, pages)| PageRange { start: page * PAGE, pages };
            let ranges: Vec<PageRange> = ranges.into_iter().map(range).collect();
            let mut body = Vec::new();
            encode(task, round, &ranges, &mut body);
            prop_assert_eq!(decode(&body), Ok(Discard { task, round, ranges }));
        }

        #[test]
        fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&body);
        }
    }

    #[test]
    fn hostile_ranges_are_refused() {
        for (start, pages) in [(1, 1), (PAGE, 0), (ADDRESS_END, 1), (0, u64::MAX)] {
            let range = PageRange { start, pages };
            let mut body = Vec::new();
            encode(1, 1, &[range], &mut body);
            assert_eq!(decode(&body), Err(PageFrameError::Range(range)));
            body.pop();
            assert_eq!(decode(&body), Err(PageFrameError::Short));
        }
    }
}
