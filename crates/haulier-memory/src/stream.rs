//! Memory streams: pages from frozen tasks over N channels into the store.
//!
//! On each channel come rounds, and of each round any number of page frames and a `RoundEnd` that
//! says how many pages there were. Which channel a page takes is not determined: each of the N
//! sending threads takes the next chunk when it is free, so that a slow channel carries less.

mod frame;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use haulier_proto::frame::{FrameError, Header, Kind};
use haulier_proto::message::{self, RoundEnd};
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

pub use crate::reader::TaskPages;
use crate::reader::{Chunk, PageReader, ReadError};
use crate::store::{PageStore, StoreError};
pub use frame::PageFrameError;

/// Why pages did not get through.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A page could not be read.
    #[error("the pages could not be read")]
    Read(#[from] ReadError),
    /// The channel failed.
    #[error("the pages did not get through")]
    Channel(#[from] TransportError),
    /// The store refused them.
    #[error("the pages could not be taken")]
    Store(#[from] StoreError),
    /// The peer sent a frame that is none.
    #[error("{peer} sent a page frame that is not valid: {reason}")]
    Frame {
        /// The peer's address.
        peer: String,
        /// What is wrong with it.
        reason: PageFrameError,
    },
    /// The peer is in another round.
    #[error("{peer} sent pages of round {got} in round {expected}")]
    Round {
        /// The peer's address.
        peer: String,
        /// The round that is going on.
        expected: u32,
        /// The round the peer says.
        got: u32,
    },
    /// Not every page of a round arrived.
    #[error("{peer} says it sent {expected} pages in round {round}, {got} came")]
    Count {
        /// The peer's address.
        peer: String,
        /// The round.
        round: u32,
        /// Pages the peer says it sent.
        expected: u64,
        /// Pages that came.
        got: u64,
    },
    /// There is no channel to send on.
    #[error("no memory channel is open")]
    NoChannel,
    /// Another sending thread panicked.
    #[error("a sender of pages panicked")]
    Panicked,
}

/// What was sent in a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendStats {
    /// Pages sent, the zero ones included.
    pub pages: u64,
    /// Pages of which only the address was sent, since they are zero.
    pub zero_pages: u64,
    /// Bytes sent, headers included.
    pub bytes_on_wire: u64,
}

/// What came on a channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiveStats {
    /// Pages received, the zero ones included.
    pub pages: u64,
    /// Pages of which only the address came.
    pub zero_pages: u64,
    /// Rounds that were completed.
    pub rounds: u32,
}

/// Reads all pages of the tasks, which must not run, and sends them over the channels as the only
/// round.
///
/// # Errors
/// The first [`StreamError`] of any channel; the others are shut down then.
pub fn send_pages(
    mut channels: Vec<Channel>,
    tasks: Vec<TaskPages>,
    wait: &Wait,
) -> Result<SendStats, StreamError> {
    send_round(&mut channels, tasks, 0, true, wait)
}

/// Reads all pages of the tasks and sends them as round number `round`, after which, unless it is
/// the `last`, others may be sent. Pages of a running task may be torn: they have to be sent again.
///
/// # Errors
/// As [`send_pages`].
pub fn send_round(
    channels: &mut [Channel],
    tasks: Vec<TaskPages>,
    round: u32,
    last: bool,
    wait: &Wait,
) -> Result<SendStats, StreamError> {
    if channels.is_empty() {
        return Err(StreamError::NoChannel);
    }
    let reader = PageReader::new(tasks)?;
    let handles = channels
        .iter()
        .map(Channel::try_clone)
        .collect::<Result<Vec<_>, _>>();
    let handles = handles.map_err(|source| TransportError::Broken {
        peer: channels[0].peer().to_owned(),
        doing: "starting to send pages",
        source,
    })?;
    let group = Group {
        handles,
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    let stats = thread::scope(|scope| {
        let senders: Vec<_> = channels
            .iter_mut()
            .map(|channel| {
                let (group, reader) = (&group, &reader);
                scope.spawn(move || {
                    send_part(channel, reader, round, last, group, wait)
                        .map_err(|error| group.fail(error))
                })
            })
            .collect();
        let mut sum = SendStats::default();
        for sender in senders {
            match sender.join() {
                Ok(Ok(stats)) => {
                    sum.pages += stats.pages;
                    sum.zero_pages += stats.zero_pages;
                    sum.bytes_on_wire += stats.bytes_on_wire;
                }
                Ok(Err(())) => {}
                Err(_) => group.fail(StreamError::Panicked),
            }
        }
        sum
    });
    match group
        .failure
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => Ok(stats),
    }
}

/// The channels of one round: what fails on one ends all.
struct Group {
    handles: Vec<Channel>,
    failed: AtomicBool,
    failure: Mutex<Option<StreamError>>,
}

impl Group {
    fn fail(&self, error: StreamError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        // What follows is mostly the consequence of the shutdown.
        failure.get_or_insert(error);
        self.failed.store(true, Ordering::Relaxed);
        for channel in &self.handles {
            channel.shutdown();
        }
    }
}

/// Sends what this channel's thread gets hold of.
fn send_part(
    channel: &mut Channel,
    reader: &PageReader,
    round: u32,
    last: bool,
    group: &Group,
    wait: &Wait,
) -> Result<SendStats, StreamError> {
    let before = channel.sent();
    let mut stats = SendStats::default();
    let mut chunk = Chunk::default();
    let mut head = Vec::new();
    while !group.failed.load(Ordering::Relaxed) && reader.read(&mut chunk)? {
        frame::encode(chunk.task, round, &chunk.runs, &mut head);
        let mut parts = Vec::with_capacity(1 + chunk.runs.len());
        parts.push(&head[..]);
        parts.extend(chunk.contents());
        channel.send(frame::KIND, &parts, wait)?;
        stats.pages += chunk.pages();
        stats.zero_pages += chunk.zero_pages();
    }
    let end = RoundEnd {
        round,
        pages: stats.pages,
        last,
    };
    channel.send_message(Kind::RoundEnd, &end, wait)?;
    stats.bytes_on_wire = channel.sent() - before;
    Ok(stats)
}

/// Receives all rounds of one channel into the store, up to the end of the last. Each channel has a
/// thread of its own for it.
///
/// # Errors
/// [`StreamError`]. Pages that came before it are in the store.
pub fn receive_pages(
    channel: &mut Channel,
    store: &PageStore,
    wait: &Wait,
) -> Result<ReceiveStats, StreamError> {
    let mut sum = ReceiveStats::default();
    loop {
        let (stats, last) = receive_round(channel, store, sum.rounds, wait)?;
        sum.pages += stats.pages;
        sum.zero_pages += stats.zero_pages;
        sum.rounds += 1;
        if last {
            return Ok(sum);
        }
    }
}

/// Receives round number `round` of one channel into the store. Also returns whether it was the last.
///
/// # Errors
/// As [`receive_pages`].
pub fn receive_round(
    channel: &mut Channel,
    store: &PageStore,
    round: u32,
    wait: &Wait,
) -> Result<(ReceiveStats, bool), StreamError> {
    let mut stats = ReceiveStats {
        rounds: 1,
        ..ReceiveStats::default()
    };
    let mut frame = ReceivedFrame::default();
    loop {
        let header = channel.receive_header(wait)?;
        match header.kind {
            frame::KIND => frame.receive(channel, &header, store, round, &mut stats, wait)?,
            Kind::RoundEnd => {
                let mut body = vec![0; header.length as usize];
                channel.receive_body(&header, &mut [&mut body], wait)?;
                let end: RoundEnd = message::decode(Kind::RoundEnd, &body)
                    .map_err(|error| channel.frame_error(error))?;
                check_round(channel, round, end.round)?;
                if end.pages != stats.pages {
                    return Err(StreamError::Count {
                        peer: channel.peer().to_owned(),
                        round,
                        expected: end.pages,
                        got: stats.pages,
                    });
                }
                return Ok((stats, end.last));
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

/// Buffers for the beginnings of page frames, reused from frame to frame.
#[derive(Default)]
struct ReceivedFrame {
    table: Vec<u8>,
    runs: Vec<crate::page::PageRun>,
}

impl ReceivedFrame {
    fn receive(
        &mut self,
        channel: &mut Channel,
        header: &Header,
        store: &PageStore,
        round: u32,
        stats: &mut ReceiveStats,
        wait: &Wait,
    ) -> Result<(), StreamError> {
        let invalid = |channel: &Channel, reason| StreamError::Frame {
            peer: channel.peer().to_owned(),
            reason,
        };
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
        check_round(channel, round, head.round)?;
        for run in &self.runs {
            stats.pages += run.range.pages;
            stats.zero_pages += if run.zero { run.range.pages } else { 0 };
        }
        Ok(store.insert(head.task, round, &self.runs, data)?)
    }
}

#[cfg(test)]
mod tests;
