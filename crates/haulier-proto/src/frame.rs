//! The fixed header in front of every body, its limits and its checksum.

use thiserror::Error;

/// First bytes of every frame; a peer that is not haulier is recognised by their absence.
pub const MAGIC: [u8; 4] = *b"HLR1";

/// Bytes of an encoded [`Header`].
pub const HEADER_BYTES: usize = 16;

/// What a frame's body is. The discriminant is the wire value; zero is never sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// The first frame of a connection: a protobuf [`crate::message::Hello`].
    Hello = 1,
    /// The answer to a hello: a protobuf [`crate::message::Welcome`].
    Welcome = 2,
    /// A protobuf [`crate::message::Control`].
    Control = 3,
    /// A protobuf [`crate::message::ImageHeader`]: an image begins.
    ImageHeader = 4,
    /// Raw bytes of an image, led by its number (see `haulier-images`).
    ImageData = 5,
    /// A protobuf [`crate::message::ImageEnd`]: an image is complete.
    ImageEnd = 6,
    /// A protobuf [`crate::message::ImagesDone`]: no further image will come.
    ImagesDone = 7,
    /// Page runs and their contents (see `haulier-memory`).
    Pages = 8,
    /// A protobuf [`crate::message::RoundEnd`]: this stream has sent all of its part of a round.
    RoundEnd = 9,
    /// Which pages a task waits for, from the destination (see `haulier-memory`).
    FaultRequest = 10,
    /// Pages that later image data may refer to by number (see `haulier-images`).
    BankPages = 11,
    /// A network packet that reached the source too late, to be delivered at the destination.
    Packet = 12,
    /// Pages of a task that a stream's receiver no longer needs (see `haulier-memory`).
    Discard = 13,
    /// A message between an image-proxy and an image-cache (see `haulier-imagecast`).
    ImageSession = 14,
    /// Pages that a dump left behind, and their contents (see `haulier-imagecast`).
    LazyPages = 15,
    /// What changed of pages that were sent before (see `haulier-memory`).
    PageChanges = 16,
}

impl Kind {
    /// Every kind, in wire order.
    pub const ALL: [Kind; 16] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::Control,
        Kind::ImageHeader,
        Kind::ImageData,
        Kind::ImageEnd,
        Kind::ImagesDone,
        Kind::Pages,
        Kind::RoundEnd,
        Kind::FaultRequest,
        Kind::BankPages,
        Kind::Packet,
        Kind::Discard,
        Kind::ImageSession,
        Kind::LazyPages,
        Kind::PageChanges,
    ];

    /// The longest body a frame of this kind may have, in bytes. A receiver refuses a longer one
    /// before it allocates anything.
    pub fn limit(self) -> usize {
        match self {
            // What anybody may send who reaches the port.
            Kind::Hello => 4 << 10,
            Kind::Welcome | Kind::ImageHeader | Kind::ImageEnd => 64 << 10,
            Kind::ImagesDone | Kind::RoundEnd => 64 << 10,
            // The list of files and mappings of a large tree travels in one message.
            Kind::Control => 16 << 20,
            Kind::ImageData | Kind::LazyPages => (1 << 20) + 64,
            // 1024 pages of 4 KiB and their run table.
            Kind::Pages | Kind::BankPages | Kind::PageChanges => (4 << 20) + (64 << 10),
            Kind::FaultRequest | Kind::Discard | Kind::ImageSession => 64 << 10,
            // The longest packet that offloading makes, and what goes with it.
            Kind::Packet => (64 << 10) + 256,
        }
    }

    fn from_wire(value: u16) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u16 == value)
    }
}

/// The header of a frame.
///
/// | bytes | field |
/// |---|---|
/// | 0..4 | [`MAGIC`] |
/// | 4..6 | kind |
/// | 6..8 | zero |
/// | 8..12 | body length |
/// | 12..16 | CRC-32 of bytes 4..12 followed by the body |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the body is.
    pub kind: Kind,
    /// Length of the body in bytes.
    pub length: u32,
    /// CRC-32 over kind, length and body.
    pub checksum: u32,
}

/// Why bytes are not an acceptable frame.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// The peer does not speak this protocol at all.
    #[error("expected a haulier frame, got bytes {0:02x?}")]
    Magic([u8; 4]),
    /// The kind is not one that this version knows.
    #[error("unknown frame kind {0}")]
    UnknownKind(u16),
    /// A frame of another kind was due.
    #[error("expected a {expected:?} frame, got {got:?}")]
    UnexpectedKind {
        /// What the protocol asks for here.
        expected: Kind,
        /// What came.
        got: Kind,
    },
    /// The body is longer than its kind allows.
    #[error("a {kind:?} frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// The length its header gives.
        length: usize,
        /// The limit of that kind.
        limit: usize,
    },
    /// The body was damaged on the way.
    #[error("checksum of a {kind:?} frame is {got:08x}, its header says {expected:08x}")]
    Checksum {
        /// The frame's kind.
        kind: Kind,
        /// What the header says.
        expected: u32,
        /// What the received bytes give.
        got: u32,
    },
    /// The body is not the protobuf message its kind asks for.
    #[error("a {kind:?} frame does not decode: {reason}")]
    Body {
        /// The frame's kind.
        kind: Kind,
        /// The decoder's reason.
        reason: String,
    },
}

impl Header {
    /// The header for a body given in parts that will be sent one after the other.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if the parts exceed the limit of the kind.
    pub fn for_body(kind: Kind, parts: &[&[u8]]) -> Result<Header, FrameError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        check_length(kind, length)?;
        let length = length as u32;
        let mut sum = Checksum::new(kind, length);
        for part in parts {
            sum.update(part);
        }
        Ok(Header {
            kind,
            length,
            checksum: sum.value(),
        })
    }

    /// The header as it goes over the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    /// Reads a header and checks its magic, kind and length. The body's checksum is checked with
    /// [`Header::verify`] once the body is there.
    ///
    /// # Errors
    /// [`FrameError::Magic`], [`FrameError::UnknownKind`], [`FrameError::TooLong`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let kind = u16::from_le_bytes([bytes[4], bytes[5]]);
        let kind = Kind::from_wire(kind).ok_or(FrameError::UnknownKind(kind))?;
        let length = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        check_length(kind, length as usize)?;
        let checksum = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        Ok(Header {
            kind,
            length,
            checksum,
        })
    }

    /// Checks a received body, given in the parts it was read into, against the header.
    ///
    /// # Errors
    /// [`FrameError::Checksum`].
    pub fn verify(&self, parts: &[&[u8]]) -> Result<(), FrameError> {
        let mut sum = Checksum::new(self.kind, self.length);
        for part in parts {
            sum.update(part);
        }
        let got = sum.value();
        if got == self.checksum {
            Ok(())
        } else {
            Err(FrameError::Checksum {
                kind: self.kind,
                expected: self.checksum,
                got,
            })
        }
    }
}

fn check_length(kind: Kind, length: usize) -> Result<(), FrameError> {
    let limit = kind.limit();
    if length > limit {
        Err(FrameError::TooLong {
            kind,
            length,
            limit,
        })
    } else {
        Ok(())
    }
}

struct Checksum(crc32fast::Hasher);

impl Checksum {
    fn new(kind: Kind, length: u32) -> Checksum {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&(kind as u16).to_le_bytes());
        hasher.update(&[0, 0]);
        hasher.update(&length.to_le_bytes());
        Checksum(hasher)
    }

    fn update(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    fn value(self) -> u32 {
        self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in Kind::ALL {
            let header = Header::for_body(kind, &[b"ab", b"c"]).unwrap();
            assert_eq!(Header::decode(&header.encode()), Ok(header));
            assert_eq!(header.verify(&[b"abc"]), Ok(()));
        }
    }

    #[test]
    fn a_changed_body_kind_or_length_is_noticed() {
        let header = Header::for_body(Kind::Pages, &[b"abc"]).unwrap();
        assert!(matches!(
            header.verify(&[b"abd"]),
            Err(FrameError::Checksum { .. })
        ));
        let other_kind = Header {
            kind: Kind::Control,
            ..header
        };
        assert!(matches!(
            other_kind.verify(&[b"abc"]),
            Err(FrameError::Checksum { .. })
        ));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_on_both_sides() {
        let body = vec![0; Kind::Hello.limit() + 1];
        assert!(matches!(
            Header::for_body(Kind::Hello, &[&body]),
            Err(FrameError::TooLong {
                kind: Kind::Hello,
                ..
            })
        ));
        let mut bytes = Header::for_body(Kind::Hello, &[b""]).unwrap().encode();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            Header::decode(&bytes),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn a_stranger_is_recognised() {
        assert_eq!(
            Header::decode(b"GET / HTTP/1.1\r\n"),
            Err(FrameError::Magic([b'G', b'E', b'T', b' ']))
        );
        let mut bytes = Header::for_body(Kind::Hello, &[b""]).unwrap().encode();
        bytes[4] = 200;
        assert_eq!(Header::decode(&bytes), Err(FrameError::UnknownKind(200)));
    }
}
