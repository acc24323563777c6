//! Chunks of pages into frames.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulier_transport::channel::Channel;

use super::choice::{Chooser, Cost, Trial};
use super::codec::{Codec, Compressor};
use super::dictionary::{Sent, Verdict};
use super::frame::{self, Run, RunKind};
use super::limiter::Limiter;
use super::{Compression, RoundStats, StreamError, StreamOptions};
use crate::page::{PAGE, PAGE_BYTES, PageRange};
use crate::reader::Chunk;
use crate::wait::Wait;

/// Bytes that the codecs are tried on.
const SAMPLE: usize = 64 << 10;

/// Sends chunks as page frames over one channel, of which it is the only sender of pages: what it
/// has sent decides how it sends what follows.
#[derive(Debug)]
pub struct FrameSender {
    compression: Compression,
    limiter: Arc<Limiter>,
    dictionary: Option<Sent>,
    chooser: Chooser,
    compressor: Compressor,
    /// When the last frame was sent, if that was in the same breath.
    last: Option<Instant>,
    runs: Vec<Run>,
    references: Vec<u32>,
    head: Vec<u8>,
    joined: Vec<u8>,
}

impl FrameSender {
    /// For a channel on which no page was sent.
    pub fn new(options: &StreamOptions) -> Self {
        Self::limited(options, Arc::new(Limiter::new(options.bandwidth)))
    }

    /// The same, with a limit that is shared with others.
    pub(super) fn limited(options: &StreamOptions, limiter: Arc<Limiter>) -> Self {
        Self {
            compression: options.compression,
            limiter,
            dictionary: options.deduplicate.then(Sent::default),
            chooser: Chooser::new(),
            compressor: Compressor::default(),
            last: None,
            runs: Vec::new(),
            references: Vec::new(),
            head: Vec::new(),
            joined: Vec::new(),
        }
    }

    /// Says that time passes in which nothing is to be sent, which says nothing about the link.
    pub fn pause(&mut self) {
        self.last = None;
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
        let contents = self.sort(chunk);
        let raw: usize = contents.iter().map(|part| part.len()).sum();
        let wanted = match self.compression {
            Compression::Auto => self.chooser.codec(),
            Compression::None => Codec::None,
            Compression::Lz4 => Codec::Lz4,
            Compression::Zstd => Codec::Zstd,
        };
        let coding = Instant::now();
        let compressed = match wanted {
            Codec::None => None,
            codec if raw > 0 => {
                let whole = join(&contents, &mut self.joined);
                self.compressor.compress(codec, whole)
            }
            _ => None,
        };
        let coding = coding.elapsed();
        let codec = compressed.map_or(Codec::None, |_| wanted);
        frame::encode(
            chunk.task,
            round,
            codec,
            &self.runs,
            &self.references,
            &mut self.head,
        );
        let mut parts = Vec::with_capacity(1 + contents.len());
        parts.push(&self.head[..]);
        match compressed {
            Some(bytes) => parts.push(bytes),
            None => parts.extend_from_slice(&contents),
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let (sent, blocked) = (channel.sent(), channel.blocked());
        let slept = self.limiter.admit(length as u64, channel.peer(), wait)?;
        channel.send(frame::KIND, &parts, wait)?;
        stats.wire_bytes = channel.sent() - sent;
        let cost = Cost {
            raw: raw as u64,
            wire: stats.wire_bytes,
            elapsed: Duration::ZERO,
            blocked: channel.blocked().saturating_sub(blocked) + slept,
            coding,
        };
        if self.compression == Compression::Auto {
            self.account(cost, &contents);
        }
        for run in &self.runs {
            let pages = run.range.pages;
            stats.pages += pages;
            match run.kind {
                RunKind::Zero => stats.zero_pages += pages,
                RunKind::Reference => stats.duplicates += pages,
                RunKind::Data | RunKind::Define => stats.normal += pages,
            }
        }
        stats.raw_bytes = stats.pages * PAGE;
        let by_codec = match codec {
            Codec::None => &mut stats.by_codec.none,
            Codec::Lz4 => &mut stats.by_codec.lz4,
            Codec::Zstd => &mut stats.by_codec.zstd,
        };
        *by_codec = raw as u64;
        Ok(stats)
    }

    /// Has the chooser know what a frame cost, and gives it the trials it asks for.
    fn account(&mut self, mut cost: Cost, contents: &[&[u8]]) {
        let now = Instant::now();
        let Some(last) = self.last.replace(now) else {
            return;
        };
        cost.elapsed = now - last;
        if !self.chooser.note(cost) {
            return;
        }
        let Some(sample) = contents.iter().max_by_key(|part| part.len()) else {
            return;
        };
        let sample = &sample[..sample.len().min(SAMPLE)];
        let mut trial = |codec| {
            let start = Instant::now();
            let bytes = self.compressor.compress(codec, sample);
            Trial {
                raw: sample.len() as u64,
                wire: bytes.map_or(sample.len(), <[u8]>::len) as u64,
                coding: start.elapsed(),
            }
        };
        // The first use of a codec has to set it up.
        let _ = trial(Codec::Lz4);
        let _ = trial(Codec::Zstd);
        let trials = [trial(Codec::Lz4), trial(Codec::Zstd)];
        self.chooser.tried(trials);
        self.last = Some(Instant::now());
    }

    /// Sorts pages into runs and references. Returns the contents that go with them.
    fn sort<'a>(&mut self, chunk: &'a Chunk) -> Vec<&'a [u8]> {
        self.runs.clear();
        self.references.clear();
        let mut parts = Vec::with_capacity(chunk.runs.len());
        let mut contents = chunk.contents();
        let dictionary = self.dictionary.as_mut();
        let mut dictionary = dictionary.and_then(|sent| sent.wants_chunk().then_some(sent));
        for run in &chunk.runs {
            if run.zero {
                let kind = RunKind::Zero;
                self.runs.push(Run {
                    range: run.range,
                    kind,
                });
                continue;
            }
            let bytes = contents.next().unwrap_or_default();
            let Some(dictionary) = &mut dictionary else {
                let kind = RunKind::Data;
                self.runs.push(Run {
                    range: run.range,
                    kind,
                });
                parts.push(bytes);
                continue;
            };
            let first = self.runs.len();
            // From where on pages are to be sent.
            let mut from = 0;
            for (number, page) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                let kind = match dictionary.judge(page) {
                    Verdict::New => RunKind::Data,
                    Verdict::Define => RunKind::Define,
                    Verdict::Reference(entry) => {
                        self.references.push(entry);
                        let at = number * PAGE_BYTES;
                        if from < at {
                            parts.push(&bytes[from..at]);
                        }
                        from = at + PAGE_BYTES;
                        RunKind::Reference
                    }
                };
                match self.runs[first..].last_mut() {
                    Some(last) if last.kind == kind => last.range.pages += 1,
                    _ => self.runs.push(Run {
                        range: PageRange {
                            start: run.range.start + number as u64 * PAGE,
                            pages: 1,
                        },
                        kind,
                    }),
                }
            }
            if from < bytes.len() {
                parts.push(&bytes[from..]);
            }
        }
        parts
    }
}

/// The parts as one, which they often are already.
fn join<'a>(parts: &[&'a [u8]], joined: &'a mut Vec<u8>) -> &'a [u8] {
    if let [part] = parts {
        return part;
    }
    let mut all = mem::take(joined);
    all.clear();
    parts.iter().for_each(|part| all.extend_from_slice(part));
    *joined = all;
    joined
}

/// Sends a chunk as one frame that refers to nothing sent before, uncompressed: for a page that
/// somebody waits for. No limit applies. Returns the bytes sent.
///
/// # Errors
/// [`StreamError::Channel`].
pub fn send_chunk(
    channel: &mut Channel,
    chunk: &Chunk,
    round: u32,
    wait: &Wait,
) -> Result<u64, StreamError> {
    if chunk.runs.is_empty() {
        return Ok(0);
    }
    let before = channel.sent();
    let kind = |zero| if zero { RunKind::Zero } else { RunKind::Data };
    let run = |run: &crate::page::PageRun| Run {
        range: run.range,
        kind: kind(run.zero),
    };
    let runs: Vec<Run> = chunk.runs.iter().map(run).collect();
    let mut head = Vec::new();
    frame::encode(chunk.task, round, Codec::None, &runs, &[], &mut head);
    let mut parts = vec![&head[..]];
    parts.extend(chunk.contents());
    channel.send(frame::KIND, &parts, wait)?;
    Ok(channel.sent() - before)
}
