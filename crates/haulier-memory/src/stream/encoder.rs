//! Chunks of pages into frames.

use haulier_transport::channel::Channel;

use super::{CodecBytes, RoundStats, StreamError, StreamOptions, frame};
use crate::page::PAGE;
use crate::reader::Chunk;
use crate::wait::Wait;

/// Sends chunks as page frames over one channel, of which it is the only sender of pages: what it
/// has sent decides how it sends what follows.
#[derive(Debug)]
pub struct FrameSender {
    head: Vec<u8>,
}

impl FrameSender {
    /// For a channel on which no page was sent.
    pub fn new(options: &StreamOptions) -> Self {
        let _ = options;
        Self { head: Vec::new() }
    }

    /// Sends a chunk as one frame, nothing if it has no pages. The answer has no round and no
    /// duration.
    ///
    /// # Errors
    /// [`StreamError::Channel`].
    pub fn send(
        &mut self,
        channel: &mut Channel,
        chunk: &Chunk,
        round: u32,
        wait: &Wait,
    ) -> Result<RoundStats, StreamError> {
        let mut stats = RoundStats {
            vanished: chunk.vanished,
            ..RoundStats::default()
        };
        if chunk.runs.is_empty() {
            return Ok(stats);
        }
        let before = channel.sent();
        frame::encode(chunk.task, round, &chunk.runs, &mut self.head);
        let mut parts = Vec::with_capacity(1 + chunk.runs.len());
        parts.push(&self.head[..]);
        parts.extend(chunk.contents());
        channel.send(frame::KIND, &parts, wait)?;
        stats.pages = chunk.pages();
        stats.zero_pages = chunk.zero_pages();
        stats.normal = stats.pages - stats.zero_pages;
        stats.raw_bytes = stats.pages * PAGE;
        stats.wire_bytes = channel.sent() - before;
        stats.by_codec = CodecBytes {
            none: stats.normal * PAGE,
            ..CodecBytes::default()
        };
        Ok(stats)
    }
}

/// Sends a chunk as one frame that refers to nothing sent before, uncompressed: for a page that
/// somebody waits for. Returns the bytes sent.
///
/// # Errors
/// [`StreamError::Channel`].
pub fn send_chunk(
    channel: &mut Channel,
    chunk: &Chunk,
    round: u32,
    wait: &Wait,
) -> Result<u64, StreamError> {
    let options = StreamOptions {
        compression: super::Compression::None,
        bandwidth: None,
        deduplicate: false,
    };
    let stats = FrameSender::new(&options).send(channel, chunk, round, wait)?;
    Ok(stats.wire_bytes)
}
