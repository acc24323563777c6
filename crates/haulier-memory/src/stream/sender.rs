//! The sending side: rounds over N channels, a thread for each.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use haulier_proto::frame::Kind;
use haulier_proto::message::RoundEnd;
use haulier_sys::priority;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

use super::ahead;
use super::encoder::FrameSender;
use super::limiter::{self, Limiter};
use super::versions::Versions;
use super::{RoundStats, StreamError, StreamOptions, discard};
use crate::pace::{BESIDE_CLIENTS, Pacer};
use crate::page::PageRange;
use crate::reader::{Chunk, PageReader, TaskPages};
use crate::wait::Wait;

/// Pages from which on a round is worth a thread more: 64 MiB. The last ones are short, and in a hurry.
const AHEAD_PAGES: u64 = 16 << 10;

/// Sends the rounds of a migration over its memory channels.
///
/// Which channel a page takes is not determined: each of the N sending threads takes the next chunk
/// when it is free, so that a slow channel carries less.
#[derive(Debug)]
pub struct PageSender {
    lanes: Vec<Lane>,
    limiter: Arc<Limiter>,
    bandwidth: Option<u64>,
    pacer: Pacer,
    versions: Arc<Versions>,
    processors: usize,
    next_round: u32,
    failed: bool,
}

/// One channel and what its frames are made with.
#[derive(Debug)]
struct Lane {
    channel: Channel,
    frames: FrameSender,
}

impl PageSender {
    /// A sender over these channels, on which nothing but a greeting was sent.
    ///
    /// # Errors
    /// [`StreamError::NoChannel`].
    pub fn new(channels: Vec<Channel>, options: StreamOptions) -> Result<Self, StreamError> {
        if channels.is_empty() {
            return Err(StreamError::NoChannel);
        }
        let limiter = Arc::new(Limiter::new(options.bandwidth));
        let versions = Arc::new(Versions::new());
        if options.bandwidth.or(options.line).is_some() {
            versions.keep();
        }
        let lane = |channel| Lane {
            channel,
            frames: FrameSender::sharing(&options, limiter.clone(), Some(versions.clone())),
        };
        Ok(Self {
            pacer: Pacer::new(&channels, &options, BESIDE_CLIENTS),
            lanes: channels.into_iter().map(lane).collect(),
            versions,
            bandwidth: options.bandwidth,
            limiter,
            processors: thread::available_parallelism().map_or(1, NonZero::get),
            next_round: 0,
            failed: false,
        })
    }

    /// The rounds to come go as fast as they can: without a limit, and over all of the line.
    pub fn hurry(&mut self) {
        self.bandwidth = None;
        self.limiter.set(None);
        self.take_line();
    }

    /// The rounds to come leave nothing of the line to others.
    pub fn take_line(&mut self) {
        self.pacer.release();
    }

    /// The pages of the rounds to come are sent whole: the peer may have put those that it had in their
    /// places.
    pub fn send_whole(&mut self) {
        self.versions.clear();
    }

    /// Whether others are left a part of a line that is full.
    pub fn is_paced(&self) -> bool {
        self.pacer.each().is_some()
    }

    /// Bytes per second of the line, if it was found full.
    pub fn line(&self) -> Option<u64> {
        self.pacer.line()
    }

    /// Sends a round: first, on every channel, that pages older than it are gone (task and ranges),
    /// then the pages of `tasks`. While the tasks are `running`, pages that have vanished are
    /// skipped and counted, and pages may be torn: the caller sends them again in a later round.
    /// No page may be in a round twice. Rounds are numbered from 0 without gaps. When it returns, the
    /// peer has all of it in its store.
    ///
    /// # Errors
    /// The first [`StreamError`] of any channel; the others are shut down then, and no further
    /// round can be sent.
    pub fn send_round(
        &mut self,
        tasks: Vec<TaskPages>,
        discard: &[(u32, Vec<PageRange>)],
        round: u32,
        running: bool,
        wait: &Wait,
    ) -> Result<RoundStats, StreamError> {
        let start = Instant::now();
        let reader = PageReader::new(tasks)?
            .running(running)
            .chunk_pages(limiter::chunk_pages(self.bandwidth));
        let reads_ahead = reader.pages() >= AHEAD_PAGES && self.lanes.len() < self.processors;
        for (task, ranges) in discard {
            for range in ranges {
                self.versions.forget(*task, *range);
            }
        }
        self.pacer.pause();
        let mut stats = self.on_all(reads_ahead, |lane, group| {
            lane.send(&reader, discard, round, group, wait)
        })?;
        self.next_round = round + 1;
        stats.round = round;
        stats.elapsed = start.elapsed();
        Ok(stats)
    }

    /// Says on every channel that no round follows. Returns the channels, for what else may be sent
    /// over them.
    ///
    /// # Errors
    /// As [`Self::send_round`].
    pub fn finish(mut self, wait: &Wait) -> Result<Vec<Channel>, StreamError> {
        let round = self.next_round;
        self.on_all(false, |lane, _| {
            lane.end(round, 0, true, wait)?;
            Ok(RoundStats::default())
        })?;
        Ok(self.lanes.into_iter().map(|lane| lane.channel).collect())
    }

    /// Does the same on all channels at once.
    fn on_all(
        &mut self,
        reads_ahead: bool,
        work: impl Fn(&mut Lane, &Group<'_>) -> Result<RoundStats, StreamError> + Sync,
    ) -> Result<RoundStats, StreamError> {
        if self.failed {
            return Err(StreamError::NoChannel);
        }
        let group = Group::new(&self.lanes, &self.pacer, &self.versions, reads_ahead)?;
        let stats = thread::scope(|scope| {
            let senders: Vec<_> = self
                .lanes
                .iter_mut()
                .map(|lane| {
                    let (group, work) = (&group, &work);
                    scope.spawn(move || {
                        // The target's users do not wait for it.
                        let _ = priority::bulk();
                        work(lane, group).map_err(|error| group.fail(error))
                    })
                })
                .collect();
            let mut sum = RoundStats::default();
            for sender in senders {
                match sender.join() {
                    Ok(Ok(stats)) => sum.add(&stats),
                    Ok(Err(())) => {}
                    Err(_) => group.fail(StreamError::Panicked),
                }
            }
            sum
        });
        let failure = group.failure.into_inner();
        match failure.unwrap_or_else(PoisonError::into_inner) {
            Some(error) => {
                self.failed = true;
                Err(error)
            }
            None => Ok(stats),
        }
    }
}

impl Lane {
    /// Sends what this channel's thread gets hold of.
    fn send(
        &mut self,
        reader: &PageReader,
        discard: &[(u32, Vec<PageRange>)],
        round: u32,
        group: &Group<'_>,
        wait: &Wait,
    ) -> Result<RoundStats, StreamError> {
        let before = self.channel.sent();
        let mut stats = RoundStats::default();
        // On every channel: what came over it before is gone once this has been read from it, so
        // that no channel needs to wait for another.
        for (task, ranges) in discard {
            discard::send(&mut self.channel, *task, round, ranges, wait)?;
        }
        self.frames.pause();
        let mut send = |chunk: &Chunk| -> Result<(), StreamError> {
            group.pacer.tend(&mut self.channel);
            if group.pacer.each().is_some() {
                group.versions.keep();
            }
            stats.add(&self.frames.send(&mut self.channel, chunk, round, wait)?);
            Ok(())
        };
        if group.reads_ahead {
            ahead::for_each_chunk(reader, &group.failed, &mut send)?;
        } else {
            let mut chunk = Chunk::default();
            while !group.failed.load(Ordering::Relaxed) && reader.read(&mut chunk)? {
                send(&chunk)?;
            }
        }
        self.end(round, stats.pages, false, wait)?;
        stats.wire_bytes = self.channel.sent() - before;
        Ok(stats)
    }

    fn end(&mut self, round: u32, pages: u64, last: bool, wait: &Wait) -> Result<(), StreamError> {
        let end = RoundEnd { round, pages, last };
        self.channel.send_message(Kind::RoundEnd, &end, wait)?;
        if last {
            return Ok(());
        }
        // The kernel takes megabytes that the peer has not seen: without its word neither the rate
        // would be known, nor what the store has.
        let taken: RoundEnd = self.channel.receive_message(Kind::RoundEnd, wait)?;
        match taken == end {
            true => Ok(()),
            false => Err(StreamError::Round {
                peer: self.channel.peer().to_owned(),
                expected: round,
                got: taken.round,
            }),
        }
    }
}

/// The channels of one round: what fails on one ends all.
struct Group<'a> {
    handles: Vec<Channel>,
    pacer: &'a Pacer,
    versions: &'a Versions,
    /// Each channel has a second thread, which reads while the first sends.
    reads_ahead: bool,
    failed: AtomicBool,
    failure: Mutex<Option<StreamError>>,
}

impl<'a> Group<'a> {
    fn new(
        lanes: &[Lane],
        pacer: &'a Pacer,
        versions: &'a Versions,
        reads_ahead: bool,
    ) -> Result<Self, TransportError> {
        let clone = |lane: &Lane| {
            let clone = lane.channel.try_clone();
            clone.map_err(|source| TransportError::Broken {
                peer: lane.channel.peer().to_owned(),
                doing: "starting to send pages",
                source,
            })
        };
        Ok(Self {
            handles: lanes.iter().map(clone).collect::<Result<_, _>>()?,
            pacer,
            versions,
            reads_ahead,
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        })
    }

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
