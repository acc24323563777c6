//! The receiving side: rounds of one channel into the store.

use haulier_proto::frame::{FrameError, Header, Kind};
use haulier_proto::message::{self, RoundEnd};
use haulier_sys::priority;
use haulier_transport::channel::Channel;

use super::changes;
use super::codec::{Codec, Decompressor};
use super::dictionary::Received;
use super::frame::{self, Run, RunKind};
use super::{PageFrameError, ReceiveStats, StreamError, discard};
use crate::page::{PAGE_BYTES, PageRange, PageRun};
use crate::store::{Content, FilledPages, PageStore};
use crate::wait::Wait;

/// Receives all rounds of one channel into the store, until the peer says that none follows. Each
/// channel has a thread of its own for it. What has come so far is in the store; its
/// [`PageStore::received`] tells how much.
///
/// # Errors
/// [`StreamError`]. Pages that came before it are in the store.
pub fn receive_pages(
    channel: &mut Channel,
    store: &PageStore,
    wait: &Wait,
) -> Result<ReceiveStats, StreamError> {
    receive_rounds(channel, store, 0, |_| {}, wait)
}

/// As [`receive_pages`], of a channel whose first round has the number `first`. At the end of each
/// round `each` is told what has come so far.
///
/// # Errors
/// As [`receive_pages`].
pub fn receive_rounds(
    channel: &mut Channel,
    store: &PageStore,
    first: u32,
    mut each: impl FnMut(&ReceiveStats),
    wait: &Wait,
) -> Result<ReceiveStats, StreamError> {
    let mut receiver = FrameReceiver::new();
    let mut sum = ReceiveStats::default();
    // Others live on this host.
    let _ = priority::bulk();
    let result = loop {
        let round = first + sum.rounds;
        match receive_round(channel, &mut receiver, store, round, &mut sum, wait) {
            Ok(more) => {
                each(&sum);
                if !more {
                    break Ok(sum);
                }
            }
            Err(error) => break Err(error),
        }
    };
    let _ = priority::usual();
    result
}

/// Receives a round of a channel. Returns whether another may follow.
fn receive_round(
    channel: &mut Channel,
    receiver: &mut FrameReceiver,
    store: &PageStore,
    round: u32,
    sum: &mut ReceiveStats,
    wait: &Wait,
) -> Result<bool, StreamError> {
    let before = sum.pages;
    loop {
        let header = channel.receive_header(wait)?;
        match header.kind {
            frame::KIND => {
                let got = receiver.receive(channel, &header, store, Some(round), wait)?;
                sum.pages += got.pages;
                sum.zero_pages += got.zero_pages;
                sum.duplicates += got.duplicates;
            }
            changes::KIND => {
                sum.pages += receiver.receive_changes(channel, &header, store, round, wait)?;
            }
            Kind::Discard => {
                let body = receive_body(channel, &header, wait)?;
                let gone = discard::decode(&body).map_err(|reason| invalid(channel, reason))?;
                check_round(channel, round, gone.round)?;
                for range in gone.ranges {
                    store.discard_before(gone.task, gone.round, range)?;
                }
            }
            Kind::RoundEnd => {
                let body = receive_body(channel, &header, wait)?;
                let end: RoundEnd = message::decode(Kind::RoundEnd, &body)
                    .map_err(|error| channel.frame_error(error))?;
                check_round(channel, round, end.round)?;
                if end.pages != sum.pages - before {
                    return Err(StreamError::Count {
                        peer: channel.peer().to_owned(),
                        round,
                        expected: end.pages,
                        got: sum.pages - before,
                    });
                }
                if !end.last {
                    channel.send_message(Kind::RoundEnd, &end, wait)?;
                }
                // The end of all rounds may be said in a round of its own, which has no pages.
                sum.rounds += u32::from(!end.last || end.pages > 0);
                return Ok(!end.last);
            }
            got => {
                let error = FrameError::UnexpectedKind {
                    expected: frame::KIND,
                    got,
                };
                return Err(channel.frame_error(error).into());
            }
        }
    }
}

fn receive_body(
    channel: &mut Channel,
    header: &Header,
    wait: &Wait,
) -> Result<Vec<u8>, StreamError> {
    let mut body = vec![0; header.length as usize];
    channel.receive_body(header, &mut [&mut body], wait)?;
    Ok(body)
}

fn check_round(channel: &Channel, expected: u32, got: u32) -> Result<(), StreamError> {
    if got == expected {
        return Ok(());
    }
    Err(StreamError::Round {
        peer: channel.peer().to_owned(),
        expected,
        got,
    })
}

fn invalid(channel: &Channel, reason: PageFrameError) -> StreamError {
    StreamError::Frame {
        peer: channel.peer().to_owned(),
        reason,
    }
}

/// What a page frame had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedFrame<'a> {
    /// The task whose pages these are.
    pub task: u32,
    /// The round they belong to.
    pub round: u32,
    /// All pages of it, which are in the store now.
    pub pages: u64,
    /// Those of them that are zero.
    pub zero_pages: u64,
    /// Those of them that came as a reference.
    pub duplicates: u64,
    /// Which pages.
    pub runs: &'a [PageRun],
}

/// Receives the page frames of one channel, all of them: a frame may refer to earlier ones.
///
/// It keeps, beside the pages of its dictionary, which are the store's, at most one frame.
#[derive(Debug, Default)]
pub struct FrameReceiver {
    table: Vec<u8>,
    references: Vec<u8>,
    frame_runs: Vec<Run>,
    runs: Vec<PageRun>,
    dictionary: Received,
    decompressor: Decompressor,
    encoded: Vec<u8>,
    decoded: Vec<u8>,
}

impl FrameReceiver {
    /// For a channel on which no page frame came.
    pub fn new() -> Self {
        Self::default()
    }

    /// Receives the page frame with this header, which was just received, into the store. It has to
    /// belong to the `round`, if one is given.
    ///
    /// # Errors
    /// [`StreamError`]; the channel is of no more use then.
    pub fn receive(
        &mut self,
        channel: &mut Channel,
        header: &Header,
        store: &PageStore,
        round: Option<u32>,
        wait: &Wait,
    ) -> Result<ReceivedFrame<'_>, StreamError> {
        let length = header.length as usize;
        if length < frame::HEAD_BYTES {
            return Err(invalid(channel, PageFrameError::Short));
        }
        let mut bytes = [0; frame::HEAD_BYTES];
        channel.receive_part(&mut [&mut bytes], wait)?;
        let head = frame::decode_head(&bytes, length).map_err(|e| invalid(channel, e))?;
        self.table.resize(head.runs * frame::RUN_BYTES, 0);
        channel.receive_part(&mut [&mut self.table], wait)?;
        let rest = length - bytes.len() - self.table.len();
        let totals = frame::decode_runs(&self.table, head.codec, rest, &mut self.frame_runs)
            .map_err(|e| invalid(channel, e))?;
        self.references
            .resize(totals.references * frame::REFERENCE_BYTES, 0);
        let mut pages = store.pages(totals.contents)?;
        if head.codec == Codec::None {
            let mut parts = pages.parts();
            parts.insert(0, &mut self.references);
            channel.receive_part(&mut parts, wait)?;
            let mut read: Vec<&[u8]> = vec![&bytes, &self.table, &self.references];
            read.extend(pages.contents());
            verify(channel, header, &read)?;
        } else {
            self.encoded.resize(rest - self.references.len(), 0);
            let mut parts: [&mut [u8]; 2] = [&mut self.references, &mut self.encoded];
            channel.receive_part(&mut parts, wait)?;
            let read: [&[u8]; 4] = [&bytes, &self.table, &self.references, &self.encoded];
            verify(channel, header, &read)?;
            let expected = totals.contents * PAGE_BYTES;
            self.decoded.resize(expected, 0);
            if !self
                .decompressor
                .decompress(head.codec, &self.encoded, &mut self.decoded)
            {
                return Err(invalid(channel, PageFrameError::Compressed { expected }));
            }
            pages.fill(&self.decoded);
        }
        // Only now: a damaged frame may say anything.
        check_round(channel, round.unwrap_or(head.round), head.round)?;
        let parts = self
            .resolve(pages.freeze())
            .map_err(|e| invalid(channel, e))?;
        store.insert_parts(head.task, head.round, parts)?;
        self.runs.clear();
        let mut zero_pages = 0;
        for run in &self.frame_runs {
            let zero = run.kind == RunKind::Zero;
            zero_pages += if zero { run.range.pages } else { 0 };
            let range = run.range;
            self.runs.push(PageRun { range, zero });
        }
        Ok(ReceivedFrame {
            task: head.task,
            round: head.round,
            pages: totals.pages,
            zero_pages,
            duplicates: totals.references as u64,
            runs: &self.runs,
        })
    }

    /// Receives the frame of changes with this header, which was just received: pages of the store as
    /// they are by now. How many.
    ///
    /// # Errors
    /// [`StreamError`]; the channel is of no more use then.
    fn receive_changes(
        &mut self,
        channel: &mut Channel,
        header: &Header,
        store: &PageStore,
        round: u32,
        wait: &Wait,
    ) -> Result<u64, StreamError> {
        let body = receive_body(channel, header, wait)?;
        let changes = changes::decode(&body).map_err(|reason| invalid(channel, reason))?;
        check_round(channel, round, changes.round)?;
        let mut blocks = changes.blocks;
        if changes.codec != Codec::None {
            let expected = changes.bytes;
            self.decoded.resize(expected, 0);
            let (codec, decoded) = (changes.codec, &mut self.decoded);
            if !self.decompressor.decompress(codec, blocks, decoded) {
                return Err(invalid(channel, PageFrameError::Compressed { expected }));
            }
            blocks = &self.decoded;
        }
        let mut pages = store.pages(changes.pages.len())?;
        let places = pages.parts().into_iter();
        let places = places.flat_map(|part| part.chunks_exact_mut(PAGE_BYTES));
        for (page, place) in changes.pages.iter().zip(places) {
            let address = page.address;
            let Some(base) = store.of_round(changes.task, address, page.change.base) else {
                let round = page.change.base;
                return Err(invalid(channel, PageFrameError::Base { address, round }));
            };
            place.copy_from_slice(&base);
            if !changes::apply(place, page, &mut blocks) {
                return Err(invalid(channel, PageFrameError::Changed { address }));
            }
        }
        let mut filled = pages.freeze();
        let mut parts = Vec::with_capacity(changes.pages.len());
        for page in &changes.pages {
            let contents = filled.take(1);
            let contents = contents.ok_or_else(|| invalid(channel, PageFrameError::Short))?;
            let range = PageRange {
                start: page.address,
                pages: 1,
            };
            parts.push((range, Content::Data(contents)));
        }
        store.insert_parts(changes.task, round, parts)?;
        Ok(changes.pages.len() as u64)
    }

    /// Which pages go where, by the runs of the frame and the contents that came.
    fn resolve(
        &mut self,
        mut filled: FilledPages,
    ) -> Result<Vec<(PageRange, Content)>, PageFrameError> {
        let mut references = frame::references(&self.references);
        let mut parts = Vec::with_capacity(self.frame_runs.len());
        for run in &self.frame_runs {
            if run.kind == RunKind::Zero {
                parts.push((run.range, Content::Zero));
                continue;
            }
            let mut rest = run.range;
            while rest.pages > 0 {
                let pages = if run.kind == RunKind::Reference {
                    // As many as there are pages: the lengths were checked.
                    let entry = references.next().ok_or(PageFrameError::Short)?;
                    let page = self.dictionary.page(entry);
                    page.ok_or(PageFrameError::Reference(entry))?
                } else {
                    filled.take(rest.pages).ok_or(PageFrameError::Short)?
                };
                if run.kind == RunKind::Define {
                    self.dictionary.define(&pages);
                }
                let (part, behind) = rest.split(pages.count() as u64);
                parts.push((part, Content::Data(pages)));
                rest = behind;
            }
        }
        Ok(parts)
    }
}

fn verify(channel: &Channel, header: &Header, parts: &[&[u8]]) -> Result<(), StreamError> {
    let outcome = header.verify(parts);
    Ok(outcome.map_err(|error| channel.frame_error(error))?)
}
