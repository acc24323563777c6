//! Memory streams: pages from tasks over N channels into the store.
//!
//! On each channel come rounds, and of each round what is gone ([`discard`]), any number of frames of
//! pages ([`frame`]) and of changes to pages ([`changes`]), and a `RoundEnd` that says how many pages
//! there were. Nothing on one channel depends on what another has brought in the same round.

mod ahead;
mod changes;
mod choice;
mod codec;
mod dictionary;
mod discard;
mod encoder;
mod frame;
mod limiter;
mod options;
mod receiver;
mod sender;
mod stats;
mod versions;

use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

use crate::reader::ReadError;
pub use crate::reader::TaskPages;
use crate::store::StoreError;
pub use encoder::{FrameSender, send_chunk};
pub use frame::PageFrameError;
pub use options::{Compression, StreamOptions, UnknownCompression};
pub use receiver::{FrameReceiver, ReceivedFrame, receive_pages, receive_rounds};
pub use sender::PageSender;
pub use stats::{CodecBytes, ReceiveStats, RoundStats};

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

/// What was sent by [`send_pages`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendStats {
    /// Pages sent, the zero ones included.
    pub pages: u64,
    /// Pages of which only the address was sent, since they are zero.
    pub zero_pages: u64,
    /// Bytes sent, headers included.
    pub bytes_on_wire: u64,
}

/// Reads all pages of the tasks, which must not run, and sends them over the channels as the only
/// round.
///
/// # Errors
/// The first [`StreamError`] of any channel; the others are shut down then.
pub fn send_pages(
    channels: Vec<Channel>,
    tasks: Vec<TaskPages>,
    wait: &Wait,
) -> Result<SendStats, StreamError> {
    let mut sender = PageSender::new(channels, StreamOptions::default())?;
    let stats = sender.send_round(tasks, &[], 0, false, wait)?;
    sender.finish(wait)?;
    Ok(SendStats {
        pages: stats.pages,
        zero_pages: stats.zero_pages,
        bytes_on_wire: stats.wire_bytes,
    })
}

#[cfg(test)]
mod tests;
