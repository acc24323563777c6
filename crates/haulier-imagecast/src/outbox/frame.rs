//! Frames of a session, and what they are made of.

use std::ops::Range;

use haulier_images::page::{PAGE, PageHash};
use haulier_images::runs::{self, Run};
use haulier_proto::frame::{HEADER_BYTES, Kind};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::wait::Wait;
use prost::Message;

use crate::compress::{self, COMPRESSED, Compression};
use crate::history::Known;
use crate::message::Session;
use crate::message::session::Body;
use crate::pages::LazyPages;
use crate::shelf::Bytes;

/// A frame of the session.
#[derive(Debug)]
pub(crate) struct Frame {
    kind: Kind,
    head: Vec<u8>,
    data: Bytes,
    /// The parts of the data that belong to it, behind the head.
    parts: Vec<Range<usize>>,
}

impl Frame {
    pub(super) fn message(kind: Kind, message: &impl Message) -> Frame {
        Frame {
            kind,
            head: message.encode_to_vec(),
            data: Vec::new().into(),
            parts: Vec::new(),
        }
    }

    pub(super) fn session(body: Body) -> Frame {
        Frame::message(Kind::ImageSession, &Session::from(body))
    }

    /// Bytes that it takes on the wire.
    pub(super) fn length(&self) -> usize {
        HEADER_BYTES + self.head.len() + self.parts.iter().map(Range::len).sum::<usize>()
    }

    /// Bytes that it takes here.
    pub(super) fn cost(&self) -> usize {
        size_of::<Frame>() + self.head.len() + self.data.cost()
    }

    /// Sends it.
    pub(crate) fn send(
        &self,
        compression: Compression,
        channel: &mut Channel,
        wait: &Wait,
    ) -> Result<(), TransportError> {
        if let Some((number, small)) = self.compressed(compression) {
            return channel.send(self.kind, &[&number.to_le_bytes(), &small], wait);
        }
        if self.kind == Kind::LazyPages {
            if let Some(body) = LazyPages::compressed(compression, &self.head, &self.data) {
                return channel.send(self.kind, &[&body], wait);
            }
        }
        let mut parts: Vec<&[u8]> = vec![&self.head];
        parts.extend(self.parts.iter().map(|part| &self.data[part.clone()]));
        channel.send(self.kind, &parts, wait)
    }

    /// Image data in fewer bytes, with the number that leads it; `None` if it goes as it is.
    fn compressed(&self, how: Compression) -> Option<(u32, Vec<u8>)> {
        if self.kind != Kind::ImageData || how == Compression::None {
            return None;
        }
        let (number, head) = self.head.split_first_chunk::<4>()?;
        let mut all = Vec::with_capacity(self.length());
        all.extend_from_slice(head);
        for part in &self.parts {
            all.extend_from_slice(&self.data[part.clone()]);
        }
        let small = compress::compress(how, &all)?;
        Some((u32::from_le_bytes(*number) | COMPRESSED, small))
    }

    #[cfg(test)]
    pub(crate) fn body(&self) -> (Kind, Vec<u8>) {
        let mut body = self.head.clone();
        for part in &self.parts {
            body.extend_from_slice(&self.data[part.clone()]);
        }
        (self.kind, body)
    }
}

/// A part of an image, to be sent in its turn.
#[derive(Debug)]
pub(crate) enum Item {
    /// Some of its bytes.
    Plain(Bytes),
    /// Some of its pages, with their hashes (`None`: zero).
    Pages {
        /// Whole pages, [`runs::FRAME_PAGES`] at most.
        data: Bytes,
        /// A hash each.
        hashes: Vec<Option<PageHash>>,
    },
    /// Its end.
    End {
        /// Its length.
        length: u64,
        /// Its checksum.
        blake3: [u8; 32],
    },
}

impl Item {
    pub(super) fn cost(&self) -> usize {
        let more = match self {
            Item::Plain(data) => data.cost(),
            Item::Pages { data, hashes } => data.cost() + hashes.len() * size_of::<PageHash>(),
            Item::End { .. } => 0,
        };
        size_of::<Item>() + more
    }
}

/// Bytes of an image.
pub(super) fn plain(number: u32, data: Bytes) -> Frame {
    Frame {
        kind: Kind::ImageData,
        head: number.to_le_bytes().to_vec(),
        parts: std::iter::once(0..data.len()).collect(),
        data,
    }
}

/// Pages by what the cache has of them.
pub(super) fn pages(
    number: u32,
    data: Bytes,
    hashes: &[Option<PageHash>],
    known: &mut Known,
) -> Frame {
    let mut runs: Vec<Run> = Vec::new();
    let mut parts: Vec<Range<usize>> = Vec::new();
    for (index, hash) in hashes.iter().enumerate() {
        let run = match hash.as_ref().map(|hash| known.refer_or_add(hash)) {
            None => Run::Zero { pages: 1 },
            Some(Some(first)) => Run::Bank { first, pages: 1 },
            Some(None) => {
                let page = index * PAGE..(index + 1) * PAGE;
                match parts.last_mut() {
                    Some(part) if part.end == page.start => part.end = page.end,
                    _ => parts.push(page),
                }
                Run::Literal { pages: 1 }
            }
        };
        if !runs.last_mut().is_some_and(|last| last.join(run)) {
            runs.push(run);
        }
    }
    let literal: usize = parts.iter().map(Range::len).sum();
    // It may be kept for long: not with pages that need not be sent.
    let (data, parts) = if literal < data.len() {
        let mut packed = Vec::with_capacity(literal);
        for part in parts {
            packed.extend_from_slice(&data[part]);
        }
        (packed.into(), std::iter::once(0..literal).collect())
    } else {
        (data, parts)
    };
    Frame {
        kind: Kind::ImageData,
        head: runs::encode(number, &runs),
        data,
        parts,
    }
}

/// Pages that were left behind.
pub(super) fn lazy_pages(pages: &LazyPages, contents: Vec<u8>) -> Frame {
    Frame {
        kind: Kind::LazyPages,
        head: pages.head().to_vec(),
        parts: std::iter::once(0..contents.len()).collect(),
        data: contents.into(),
    }
}
