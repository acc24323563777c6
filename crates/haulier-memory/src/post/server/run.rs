//! One call of `serve`: a thread for each channel.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use haulier_proto::frame::Kind;
use haulier_proto::message::RoundEnd;
use haulier_sys::priority;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use rustix::event::{EventfdFlags, eventfd};

use super::super::lending::Helpers;
use super::super::push::Window;
use super::{PageServer, ServeError, ServeOptions, ServeStats};
use crate::pace::{BESIDE_ANSWERS, Pacer};
use crate::page::{PAGE, PageRange};
use crate::reader::Chunk;
use crate::stream::{FrameSender, StreamError, StreamOptions};
use crate::wait::Wait;

/// The push pauses no longer for answers that do not end: they bring pages too, but not all.
const PAUSE: Duration = Duration::from_millis(1);

/// How long a chunk may take that is pushed over a line that is full.
const IN_HAND: Duration = Duration::from_micros(500);

/// The longest a push sleeps to keep a limit of bandwidth before it looks around.
const NAP: Duration = Duration::from_millis(20);

pub(super) struct Run<'a> {
    pub(super) server: &'a PageServer,
    pub(super) options: &'a ServeOptions,
    /// Every channel, to be shut down together.
    handles: Vec<Channel>,
    failed: AtomicBool,
    failure: Mutex<Option<ServeError>>,
    /// Wakes the answering thread: all is taken, or something failed.
    pub(super) wake: OwnedFd,
    started: Instant,
    /// Of the connections that push.
    pacer: Pacer,
    /// Bytes that were pushed.
    pushed: AtomicU64,
    /// Threads that push: a task may wait for a page that one of them has in hand, and there is no
    /// telling which one it is.
    pub(super) helpers: Helpers,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        server: &'a PageServer,
        options: &'a ServeOptions,
        faults: &Channel,
        memory: &[Channel],
    ) -> Result<Self, ServeError> {
        let system = |doing| move |source| ServeError::System { doing, source };
        let clone = |channel: &Channel| channel.try_clone();
        let handles: Result<Vec<_>, _> = std::iter::once(faults).chain(memory).map(clone).collect();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| system("make an eventfd")(errno.into()))?;
        Ok(Self {
            server,
            options,
            handles: handles.map_err(system("duplicate a socket"))?,
            pacer: match memory {
                [] => Pacer::new([faults], &options.stream, BESIDE_ANSWERS),
                memory => Pacer::new(memory, &options.stream, BESIDE_ANSWERS),
            },
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            wake,
            started: Instant::now(),
            pushed: AtomicU64::new(0),
            helpers: Helpers::default(),
        })
    }

    /// Serves over all channels, to the end.
    pub(super) fn all(
        &self,
        faults: &mut Channel,
        memory: &mut [Channel],
        wait: &Wait,
    ) -> Result<ServeStats, ServeError> {
        let alone = memory.is_empty();
        let sum = thread::scope(|scope| {
            let mut threads = Vec::new();
            let answering = thread::Builder::new().name("post-answer".to_owned());
            threads.push(
                answering.spawn_scoped(scope, || self.watched(|| self.answer(faults, alone, wait))),
            );
            for channel in memory {
                let pushing = thread::Builder::new().name("post-push".to_owned());
                threads.push(
                    pushing.spawn_scoped(scope, || self.watched(|| self.push(channel, wait))),
                );
            }
            // One that could not be started ends the others before they are waited for.
            let started: Vec<_> = threads
                .into_iter()
                .filter_map(|thread| {
                    let doing = "start a thread";
                    let failed = |source| self.fail(ServeError::System { doing, source });
                    thread.map_err(failed).ok()
                })
                .collect();
            let mut sum = ServeStats::default();
            for thread in started {
                match thread.join() {
                    Ok(stats) => sum.add(&stats),
                    Err(_) => self.fail(ServeError::Panicked),
                }
            }
            sum
        });
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        match failure.take() {
            Some(error) => Err(error),
            None => Ok(sum),
        }
    }

    fn watched(&self, work: impl FnOnce() -> Result<ServeStats, ServeError>) -> ServeStats {
        // A thread that panics must not leave the others waiting for it.
        let guard = PanicGuard(self);
        let result = work();
        drop(guard);
        result.unwrap_or_else(|error| {
            self.fail(error);
            ServeStats::default()
        })
    }

    fn fail(&self, error: ServeError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        // What follows is mostly the consequence of the shutdown.
        failure.get_or_insert(error);
        self.failed.store(true, Ordering::Relaxed);
        for channel in &self.handles {
            channel.shutdown();
        }
        self.wake();
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Bytes per second that the push makes; `None` before that says anything.
    pub(super) fn rate(&self) -> Option<u64> {
        let pushed = self.pushed.load(Ordering::Relaxed);
        let micros = self.started.elapsed().as_micros();
        if pushed < 1 << 20 || micros == 0 {
            return None;
        }
        u64::try_from(u128::from(pushed) * 1_000_000 / micros).ok()
    }

    /// Pushes over one memory channel.
    fn push(&self, channel: &mut Channel, wait: &Wait) -> Result<ServeStats, ServeError> {
        // Those who answer faults go first.
        let _ = priority::bulk();
        let helping = self.helpers.join();
        let mut lane = Lane::new(self, channel);
        while lane.push_next(self, channel, true, wait)? {
            helping.hand_back();
        }
        // The answering thread may wait for nothing but this.
        self.wake();
        self.end(channel, lane.stats.pages, wait)?;
        Ok(lane.stats)
    }

    pub(super) fn end(
        &self,
        channel: &mut Channel,
        pages: u64,
        wait: &Wait,
    ) -> Result<(), ServeError> {
        let end = RoundEnd {
            round: self.options.round,
            pages,
            last: true,
        };
        Ok(channel.send_message(Kind::RoundEnd, &end, wait)?)
    }

    /// Takes what is to be pushed next.
    fn take(&self, pause: bool, ranges: &mut Vec<PageRange>) -> Option<usize> {
        let mut state = self.server.state();
        if pause && state.urgent {
            let calm = &self.server.calm;
            let waited = calm.wait_timeout_while(state, PAUSE, |state| state.urgent);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if self.has_failed() {
            return None;
        }
        // What is in hand cannot be answered with before it is its turn.
        let most = self.options.chunk_pages;
        let pages = self.pacer.each().map_or(most, |rate| {
            let bytes = u128::from(rate) * IN_HAND.as_micros() / 1_000_000;
            u64::try_from(bytes).map_or(most, |bytes| (bytes / PAGE).clamp(1, most))
        });
        state.order.push(pages, ranges)
    }

    /// Reads and sends pages that were taken. They are put back if that fails.
    pub(super) fn send(
        &self,
        channel: &mut Channel,
        taken: (usize, &[PageRange]),
        chunk: &mut Chunk,
        frames: &mut FrameSender,
        wait: &Wait,
    ) -> Result<Sent, ServeError> {
        let (index, ranges) = taken;
        let mut attempt = || {
            chunk.read(&self.server.memories[index], ranges, false)?;
            let sent = frames.send(channel, chunk, self.options.round, wait);
            sent.map_err(send_error)
        };
        let sent = attempt();
        let mut state = self.server.state();
        match sent {
            Ok(sent) => {
                state.sent += sent.pages;
                Ok(Sent {
                    pages: sent.pages,
                    zero_pages: sent.zero_pages,
                    wire_bytes: sent.wire_bytes,
                })
            }
            Err(error) => {
                state.order.put_back(index, ranges);
                Err(error)
            }
        }
    }
}

pub(super) struct Sent {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) wire_bytes: u64,
}

impl Sent {
    pub(super) fn count(&self, stats: &mut ServeStats) {
        stats.pages += self.pages;
        stats.zero_pages += self.zero_pages;
        stats.wire_bytes += self.wire_bytes;
    }
}

fn send_error(error: StreamError) -> ServeError {
    match error {
        StreamError::Channel(error) => ServeError::Link(error),
        StreamError::Read(error) => ServeError::Read(error),
        other => ServeError::Stream(other),
    }
}

/// What pushing over one channel needs.
pub(super) struct Lane {
    window: Window,
    pub(super) frames: FrameSender,
    pub(super) chunk: Chunk,
    ranges: Vec<PageRange>,
    pub(super) stats: ServeStats,
}

impl Lane {
    pub(super) fn new(run: &Run<'_>, channel: &Channel) -> Self {
        // The limit is one for all channels, and kept here.
        let options = StreamOptions {
            bandwidth: None,
            ..run.options.stream.clone()
        };
        Self {
            window: Window::new(channel),
            frames: FrameSender::new(&options),
            chunk: Chunk::default(),
            ranges: Vec::new(),
            stats: ServeStats::default(),
        }
    }

    /// Pushes a chunk. False if there is none.
    pub(super) fn push_next(
        &mut self,
        run: &Run<'_>,
        channel: &mut Channel,
        pause: bool,
        wait: &Wait,
    ) -> Result<bool, ServeError> {
        self.keep_limit(run, channel, wait)?;
        run.pacer.tend(channel);
        let paced = run.pacer.each();
        self.window
            .adjust(channel, self.stats.wire_bytes, paced.is_some());
        let Some(index) = run.take(pause, &mut self.ranges) else {
            return Ok(false);
        };
        let taken = (index, &self.ranges[..]);
        let sent = run.send(channel, taken, &mut self.chunk, &mut self.frames, wait)?;
        sent.count(&mut self.stats);
        self.stats.pushed += sent.pages;
        run.pushed.fetch_add(sent.wire_bytes, Ordering::Relaxed);
        Ok(true)
    }

    /// Sleeps for as long as more was pushed than the limit of bandwidth allows.
    fn keep_limit(&self, run: &Run<'_>, channel: &Channel, wait: &Wait) -> Result<(), ServeError> {
        let Some(limit) = run.options.stream.bandwidth.filter(|limit| *limit > 0) else {
            return Ok(());
        };
        loop {
            let pushed = run.pushed.load(Ordering::Relaxed);
            let due = Duration::from_secs_f64(pushed as f64 / limit as f64);
            let early = due.saturating_sub(run.started.elapsed());
            if early.is_zero() || run.has_failed() {
                return Ok(());
            }
            if wait.is_cancelled() {
                let doing = "keeping the limit of bandwidth";
                return Err(TransportError::Cancelled { doing }.into());
            }
            tracing::trace!(peer = channel.peer(), "waiting to keep the limit");
            thread::sleep(early.min(NAP));
        }
    }
}

/// Ends the whole run when a thread of it panics.
struct PanicGuard<'a>(&'a Run<'a>);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(ServeError::Panicked);
        }
    }
}
