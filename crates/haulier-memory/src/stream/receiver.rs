//! The receiving side: rounds of one channel into the store.

use haulier_proto::frame::{FrameError, Header, Kind};
use haulier_proto::message::{self, RoundEnd};
use haulier_transport::channel::Channel;

use super::{PageFrameError, ReceiveStats, StreamError, discard, frame};
use crate::page::PageRun;
use crate::store::PageStore;
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
    loop {
        let round = first + sum.rounds;
        let more = receive_round(channel, &mut receiver, store, round, &mut sum, wait)?;
        each(&sum);
        if !more {
            return Ok(sum);
        }
    }
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
#[derive(Debug, Default)]
pub struct FrameReceiver {
    table: Vec<u8>,
    runs: Vec<PageRun>,
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
        let contents = length - bytes.len() - self.table.len();
        frame::decode_runs(&self.table, contents, &mut self.runs)
            .map_err(|e| invalid(channel, e))?;
        let mut data = store.buffer(contents)?;
        channel.receive_part(&mut [&mut data], wait)?;
        header
            .verify(&[&bytes, &self.table, &data])
            .map_err(|error| channel.frame_error(error))?;
        // Only now: a damaged frame may say anything.
        check_round(channel, round.unwrap_or(head.round), head.round)?;
        store.insert(head.task, head.round, &self.runs, data)?;
        let pages = |runs: &[PageRun]| runs.iter().map(|run| run.range.pages).sum();
        let zeros = self.runs.iter().filter(|run| run.zero);
        Ok(ReceivedFrame {
            task: head.task,
            round: head.round,
            pages: pages(&self.runs),
            zero_pages: zeros.map(|run| run.range.pages).sum(),
            duplicates: 0,
            runs: &self.runs,
        })
    }
}
