//! The wire form of image data that is made of pages.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | number of the image, with [`PAGED`] set |
//! | 4..8 | number of runs |
//! | 8 each | a run: kind (upper 2 bits) and count of pages, then the first page's number in the bank (0 but for bank runs) |
//! | 4096 each | the contents of the pages of all literal runs |
//!
//! All integers are little-endian. The runs stand for pages one behind the other.

use crate::page::PAGE;

/// Set in the image number that leads the data: what follows are runs of pages. Image numbers stay
/// far below it.
pub const PAGED: u32 = 1 << 31;

/// Most pages that a frame of runs stands for when we send: as many literal pages fit, each in a
/// run of its own.
pub const FRAME_PAGES: usize = 240;

/// Bytes of a run in front of the literal pages.
pub const RUN_BYTES: usize = 8;
const COUNT_BITS: u32 = 30;
/// Most pages of a run.
const MOST_PAGES: u32 = (1 << COUNT_BITS) - 1;

/// Where the contents of some pages of an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// They are zero.
    Zero {
        /// How many.
        pages: u32,
    },
    /// The peer has them: they were sent before.
    Bank {
        /// Number of the first page among them.
        first: u32,
        /// How many.
        pages: u32,
    },
    /// They are in this frame.
    Literal {
        /// How many.
        pages: u32,
    },
}

impl Run {
    /// Pages it stands for.
    pub fn pages(self) -> u32 {
        match self {
            Run::Zero { pages } | Run::Bank { pages, .. } | Run::Literal { pages } => pages,
        }
    }

    /// Takes `next` in, if it goes on where this one ends.
    pub fn join(&mut self, next: Run) -> bool {
        let joined = match (*self, next) {
            (Run::Zero { pages: a }, Run::Zero { pages: b }) => Run::Zero { pages: a + b },
            (Run::Literal { pages: a }, Run::Literal { pages: b }) => Run::Literal { pages: a + b },
            (
                Run::Bank { first, pages: a },
                Run::Bank {
                    first: next,
                    pages: b,
                },
            ) if first.checked_add(a) == Some(next) => Run::Bank {
                first,
                pages: a + b,
            },
            _ => return false,
        };
        *self = joined;
        true
    }

    fn encode(self) -> [u8; RUN_BYTES] {
        let (kind, first) = match self {
            Run::Zero { .. } => (0, 0),
            Run::Bank { first, .. } => (1, first),
            Run::Literal { .. } => (2, 0),
        };
        let head = (kind << COUNT_BITS) | self.pages();
        let mut bytes = [0; RUN_BYTES];
        bytes[..4].copy_from_slice(&head.to_le_bytes());
        bytes[4..].copy_from_slice(&u32::to_le_bytes(first));
        bytes
    }

    fn decode(bytes: [u8; RUN_BYTES]) -> Result<Run, String> {
        let word = |from: usize| {
            u32::from_le_bytes([
                bytes[from],
                bytes[from + 1],
                bytes[from + 2],
                bytes[from + 3],
            ])
        };
        let (head, first) = (word(0), word(4));
        let pages = head & MOST_PAGES;
        if pages == 0 {
            return Err("a run of no pages".to_owned());
        }
        match (head >> COUNT_BITS, first) {
            (0, 0) => Ok(Run::Zero { pages }),
            (1, first) => Ok(Run::Bank { first, pages }),
            (2, 0) => Ok(Run::Literal { pages }),
            (kind, first) => Err(format!("a run of kind {kind} at page {first}")),
        }
    }
}

/// The bytes in front of the literal pages.
pub fn encode(image: u32, runs: &[Run]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + runs.len() * RUN_BYTES);
    bytes.extend_from_slice(&(image | PAGED).to_le_bytes());
    bytes.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        bytes.extend_from_slice(&run.encode());
    }
    bytes
}

/// The runs of a body, which begins behind the image number, and the contents of its literal
/// pages, of exactly the length that the runs ask for.
///
/// # Errors
/// What is wrong with it.
pub fn decode(body: &[u8]) -> Result<(Vec<Run>, &[u8]), String> {
    let (runs, literal) = decode_table(body)?;
    check_literal(&runs, literal.len())?;
    Ok((runs, literal))
}

/// The runs of a body, which begins behind the image number, and what follows them.
///
/// # Errors
/// What is wrong with it.
pub fn decode_table(body: &[u8]) -> Result<(Vec<Run>, &[u8]), String> {
    let Some((count, rest)) = body.split_first_chunk::<4>() else {
        return Err("page runs without their number".to_owned());
    };
    let count = u32::from_le_bytes(*count) as usize;
    // Compared with what came before anything is allocated.
    let Some((table, literal)) = count
        .checked_mul(RUN_BYTES)
        .and_then(|bytes| rest.split_at_checked(bytes))
    else {
        return Err(format!("{count} page runs in {} bytes", rest.len()));
    };
    let mut runs = Vec::with_capacity(count);
    for bytes in table.chunks_exact(RUN_BYTES) {
        let mut run = [0; RUN_BYTES];
        run.copy_from_slice(bytes);
        runs.push(Run::decode(run)?);
    }
    Ok((runs, literal))
}

/// Whether `bytes` bytes are what the literal runs ask for.
///
/// # Errors
/// What is wrong.
pub fn check_literal(runs: &[Run], bytes: usize) -> Result<(), String> {
    let pages = runs.iter().map(|run| match run {
        Run::Literal { pages } => u64::from(*pages),
        _ => 0,
    });
    let wanted = pages.sum::<u64>() * PAGE as u64;
    if wanted == bytes as u64 {
        Ok(())
    } else {
        Err(format!("{bytes} bytes for pages that have {wanted}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: [Run; 3] = [
        Run::Bank {
            first: u32::MAX,
            pages: MOST_PAGES,
        },
        Run::Zero { pages: 7 },
        Run::Literal { pages: 1 },
    ];

    #[test]
    fn runs_survive_the_wire() {
        let mut body = encode(5, &RUNS);
        assert_eq!(body[..4], (PAGED | 5).to_le_bytes());
        body.extend_from_slice(&[9; PAGE]);
        let (runs, literal) = decode(&body[4..]).unwrap();
        assert_eq!(runs, RUNS);
        assert_eq!(literal, [9; PAGE]);
    }

    #[test]
    fn hostile_runs_are_refused() {
        let good = encode(5, &RUNS);
        assert!(decode(&good[4..]).is_err(), "no contents");
        assert!(decode(&good[4..7]).is_err(), "a cut count");
        assert!(decode(&good[4..20]).is_err(), "a cut table");
        assert!(decode(&[255; 64]).is_err(), "a huge count");
        let one = |head: u32, first: u32| {
            let mut body = 1_u32.to_le_bytes().to_vec();
            body.extend_from_slice(&head.to_le_bytes());
            body.extend_from_slice(&first.to_le_bytes());
            decode(&body).is_ok()
        };
        assert!(one(1, 0));
        assert!(!one(0, 0), "no pages");
        assert!(!one(1, 1), "a zero run with a number");
        assert!(!one((3 << COUNT_BITS) | 1, 0), "an unknown kind");
        assert!(!one((2 << COUNT_BITS) | MOST_PAGES, 0), "contents missing");
    }

    #[test]
    fn runs_join_only_where_they_go_on() {
        let mut run = Run::Bank { first: 3, pages: 2 };
        assert!(run.join(Run::Bank { first: 5, pages: 1 }));
        assert_eq!(run, Run::Bank { first: 3, pages: 3 });
        assert!(!run.join(Run::Bank { first: 7, pages: 1 }));
        assert!(!run.join(Run::Zero { pages: 1 }));
        let mut last = Run::Bank {
            first: u32::MAX,
            pages: 1,
        };
        assert!(!last.join(Run::Bank { first: 0, pages: 1 }));
    }
}
