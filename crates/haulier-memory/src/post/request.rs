//! The body of a fault request: any number of entries, none in a keepalive.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | task: its pid in its own PID namespace |
//! | 4..12 | address of the page |
//!
//! Integers are little-endian.

use haulier_proto::frame::Kind;

use crate::page::{PAGE, PageRange};

const ENTRY_BYTES: usize = 12;

/// Entries in a request at most; the limit of the frame allows more.
pub(super) const MAX_ENTRIES: usize = 1024;

/// What is wrong with a fault request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It ends inside an entry, or has too many.
    #[error("a fault request of {0} bytes")]
    Length(usize),
    /// An address is not one of a page.
    #[error("a fault request for address {0:#x}")]
    Address(u64),
}

/// A page of a task.
pub(super) type Entry = (u32, u64);

/// The body that asks for these pages, at most [`MAX_ENTRIES`].
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    debug_assert!(entries.len() <= MAX_ENTRIES, "{}", entries.len());
    let mut body = Vec::with_capacity(entries.len() * ENTRY_BYTES);
    for (task, page) in entries {
        body.extend_from_slice(&task.to_le_bytes());
        body.extend_from_slice(&page.to_le_bytes());
    }
    body
}

pub(super) fn decode(body: &[u8]) -> Result<Vec<Entry>, RequestError> {
    if body.len() % ENTRY_BYTES != 0 || body.len() > MAX_ENTRIES * ENTRY_BYTES {
        return Err(RequestError::Length(body.len()));
    }
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let entry = |bytes: &[u8]| {
        let start = u64::from(word(bytes, 4)) | (u64::from(word(bytes, 8)) << 32);
        if (PageRange { start, pages: 1 }).is_valid() {
            Ok((word(bytes, 0), start))
        } else {
            Err(RequestError::Address(start))
        }
    };
    body.chunks_exact(ENTRY_BYTES).map(entry).collect()
}

const _: () = assert!(PAGE == 4096 && MAX_ENTRIES * ENTRY_BYTES <= 64 << 10);

/// A frame of this kind.
pub(super) const KIND: Kind = Kind::FaultRequest;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_requests_are_refused() {
        assert_eq!(decode(&[0; 11]), Err(RequestError::Length(11)));
        assert_eq!(decode(&encode(&[(1, 5)])), Err(RequestError::Address(5)));
        let beyond = [(1, 1 << 57)];
        assert_eq!(
            decode(&encode(&beyond)),
            Err(RequestError::Address(1 << 57))
        );
        let many = vec![0; (MAX_ENTRIES + 1) * ENTRY_BYTES];
        assert_eq!(decode(&many), Err(RequestError::Length(many.len())));
        assert_eq!(decode(&[]), Ok(vec![]), "a keepalive");
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            entries in prop::collection::vec((any::<u32>(), (0..1_u64 << 45).prop_map(|n| n * PAGE)), 0..99),
        ) {
            prop_assert_eq!(decode(&encode(&entries)), Ok(entries));
        }
    }
}
