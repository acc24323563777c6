//! Chunks of pages into frames.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulier_proto::frame::Kind;
use haulier_transport::channel::Channel;

use super::changes::{self, ChangedPage};
use super::choice::{Chooser, Cost, Trial};
use super::codec::{Codec, Compressor};
use super::dictionary::{Sent, Verdict};
use super::frame::{self, Run, RunKind};
use super::limiter::Limiter;
use super::versions::{BLOCK_BYTES, Versions};
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
    /// What the peer has, if pages are sent again at all.
    versions: Option<Arc<Versions>>,
    chooser: Chooser,
    compressor: Compressor,
    /// When the last frame was sent, if that was in the same breath.
    last: Option<Instant>,
    runs: Vec<Run>,
    references: Vec<u32>,
    changed: Vec<ChangedPage>,
    /// Their blocks.
    blocks: Vec<u8>,
    head: Vec<u8>,
    joined: Vec<u8>,
}

impl FrameSender {
    /// For a channel on which no page was sent.
    pub fn new(options: &StreamOptions) -> Self {
        let limiter = Arc::new(Limiter::new(options.bandwidth));
        Self::sharing(options, limiter, None)
    }

    /// The same, with a limit and versions that are shared with others.
    pub(super) fn sharing(
        options: &StreamOptions,
        limiter: Arc<Limiter>,
        versions: Option<Arc<Versions>>,
    ) -> Self {
        Self {
            compression: options.compression,
            limiter,
            dictionary: options.deduplicate.then(Sent::default),
            versions,
            chooser: Chooser::new(),
            compressor: Compressor::default(),
            last: None,
            runs: Vec::new(),
            references: Vec::new(),
            changed: Vec::new(),
            blocks: Vec::new(),
            head: Vec::new(),
            joined: Vec::new(),
        }
    }

    /// Says that time passes in which nothing is to be sent, which says nothing about the link.
    pub fn pause(&mut self) {
        self.last = None;
    }

    /// Sends a chunk: a frame of pages, and one of those of which only changes are sent; nothing if it has
    /// no pages. The answer has no round and no duration.
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
        let contents = self.sort(chunk, round);
        if !self.runs.is_empty() {
            let sent = self.transmit(channel, &contents, wait, |this, codec| {
                let (runs, references) = (&this.runs, &this.references);
                frame::encode(chunk.task, round, codec, runs, references, &mut this.head);
                frame::KIND
            })?;
            stats.add(&sent);
            for run in &self.runs {
                let pages = run.range.pages;
                stats.pages += pages;
                match run.kind {
                    RunKind::Zero => stats.zero_pages += pages,
                    RunKind::Reference => stats.duplicates += pages,
                    RunKind::Data | RunKind::Define => stats.normal += pages,
                }
            }
        }
        if !self.changed.is_empty() {
            let blocks = mem::take(&mut self.blocks);
            let sent = self.transmit(channel, &[&blocks], wait, |this, codec| {
                changes::encode(chunk.task, round, codec, &this.changed, &mut this.head);
                changes::KIND
            })?;
            self.blocks = blocks;
            stats.add(&sent);
            stats.pages += self.changed.len() as u64;
            stats.changed += self.changed.len() as u64;
        }
        stats.raw_bytes = stats.pages * PAGE;
        Ok(stats)
    }

    /// Sends a frame with these contents, whose `head` is made once it is known how they are encoded. The
    /// answer has bytes only.
    fn transmit(
        &mut self,
        channel: &mut Channel,
        contents: &[&[u8]],
        wait: &Wait,
        head: impl FnOnce(&mut Self, Codec) -> Kind,
    ) -> Result<RoundStats, StreamError> {
        let raw: usize = contents.iter().map(|part| part.len()).sum();
        let wanted = match self.compression {
            Compression::Auto => self.chooser.codec(),
            Compression::None => Codec::None,
            Compression::Lz4 => Codec::Lz4,
            Compression::Zstd => Codec::Zstd,
        };
        let coding = Instant::now();
        let mut compressor = mem::take(&mut self.compressor);
        let compressed = match wanted {
            Codec::None => None,
            codec if raw > 0 => compressor.compress(codec, join(contents, &mut self.joined)),
            _ => None,
        };
        let coding = coding.elapsed();
        let codec = compressed.map_or(Codec::None, |_| wanted);
        let kind = head(self, codec);
        let mut parts = Vec::with_capacity(1 + contents.len());
        parts.push(&self.head[..]);
        match compressed {
            Some(bytes) => parts.push(bytes),
            None => parts.extend_from_slice(contents),
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let (sent, blocked) = (channel.sent(), channel.blocked());
        let slept = self.limiter.admit(length as u64, channel.peer(), wait)?;
        channel.send(kind, &parts, wait)?;
        self.compressor = compressor;
        let mut stats = RoundStats {
            wire_bytes: channel.sent() - sent,
            ..RoundStats::default()
        };
        let cost = Cost {
            raw: raw as u64,
            wire: stats.wire_bytes,
            elapsed: Duration::ZERO,
            blocked: channel.blocked().saturating_sub(blocked) + slept,
            coding,
        };
        if self.compression == Compression::Auto {
            self.account(cost, contents);
        }
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

    /// Sorts pages into runs, references and changes. Returns the contents that go with the runs.
    fn sort<'a>(&mut self, chunk: &'a Chunk, round: u32) -> Vec<&'a [u8]> {
        self.runs.clear();
        self.references.clear();
        self.changed.clear();
        self.blocks.clear();
        let mut parts = Vec::with_capacity(chunk.runs.len());
        let mut contents = chunk.contents();
        let dictionary = self.dictionary.as_mut();
        let mut dictionary = dictionary.and_then(|sent| sent.wants_chunk().then_some(sent));
        let versions = self.versions.as_deref();
        let versions = versions.filter(|versions| versions.are_kept());
        for run in &chunk.runs {
            if run.zero {
                if let Some(versions) = versions {
                    versions.forget(chunk.task, run.range);
                }
                let kind = RunKind::Zero;
                self.runs.push(Run {
                    range: run.range,
                    kind,
                });
                continue;
            }
            let bytes = contents.next().unwrap_or_default();
            if dictionary.is_none() && versions.is_none() {
                let kind = RunKind::Data;
                self.runs.push(Run {
                    range: run.range,
                    kind,
                });
                parts.push(bytes);
                continue;
            }
            // From where on pages are to be sent.
            let mut from = 0;
            for (number, page) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                let address = run.range.start + number as u64 * PAGE;
                let change =
                    versions.and_then(|known| known.change(chunk.task, address, round, page));
                let kind = match (change, &mut dictionary) {
                    (Some(change), _) => {
                        let changed = ChangedPage { address, change };
                        for block in changed.blocks() {
                            let at = block * BLOCK_BYTES;
                            self.blocks.extend_from_slice(&page[at..at + BLOCK_BYTES]);
                        }
                        self.changed.push(changed);
                        None
                    }
                    (None, Some(dictionary)) => Some(match dictionary.judge(page) {
                        Verdict::New => RunKind::Data,
                        Verdict::Define => RunKind::Define,
                        Verdict::Reference(entry) => {
                            self.references.push(entry);
                            RunKind::Reference
                        }
                    }),
                    (None, None) => Some(RunKind::Data),
                };
                if !kind.is_some_and(RunKind::has_contents) {
                    let at = number * PAGE_BYTES;
                    if from < at {
                        parts.push(&bytes[from..at]);
                    }
                    from = at + PAGE_BYTES;
                }
                if let Some(kind) = kind {
                    add(&mut self.runs, address, kind);
                }
            }
            if from < bytes.len() {
                parts.push(&bytes[from..]);
            }
        }
        parts
    }
}

/// Adds a page with contents to the runs.
fn add(runs: &mut Vec<Run>, address: u64, kind: RunKind) {
    match runs.last_mut() {
        Some(last) if last.kind == kind && last.range.end() == address => last.range.pages += 1,
        _ => runs.push(Run {
            range: PageRange {
                start: address,
                pages: 1,
            },
            kind,
        }),
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
