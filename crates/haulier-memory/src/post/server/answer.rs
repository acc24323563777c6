//! The fault channel: what is asked for, ahead of everything.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use haulier_proto::frame::{FrameError, Kind};
use haulier_sys::priority;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::super::KEEPALIVE;
use super::super::order::Asked;
use super::super::request::{self, Entry};
use super::run::{Lane, Run};
use super::{ServeError, ServeStats};
use crate::page::{PAGE, PageRange};
use crate::reader::Chunk;
use crate::stream::{Compression, FrameSender, StreamOptions};
use crate::wait::Wait;

/// How often to look whether it was cancelled.
const LOOK: Duration = Duration::from_millis(100);

/// How much of the link's time the neighbours of one page may take.
const NEIGHBOURS_MICROS: u64 = 50;

const DOING: &str = "waiting for requests for pages";

impl Run<'_> {
    /// Answers requests until everything is sent; `alone`: there is no other channel to push over.
    pub(super) fn answer(
        &self,
        channel: &mut Channel,
        alone: bool,
        wait: &Wait,
    ) -> Result<ServeStats, ServeError> {
        // Tasks stand still while this thread waits for its turn. With the push to do as well it
        // would take the processor from everybody.
        if !alone {
            if let Err(error) = priority::urgent() {
                tracing::debug!(%error, "faults are answered at the usual priority");
            }
        }
        let mut lane = alone.then(|| Lane::new(self, channel));
        let mut desk = Answers::new();
        while !self.has_failed() && !self.server.state().order.is_empty() {
            let pause = if alone { Duration::ZERO } else { LOOK };
            if self.is_asked(channel, pause)? {
                self.server.state().urgent = true;
                let answered = self.answer_all(channel, &mut desk, wait);
                self.server.state().urgent = false;
                self.server.calm.notify_all();
                answered?;
            } else if let Some(lane) = &mut lane {
                lane.push_next(self, channel, false, wait)?;
                desk.said = Instant::now();
            }
            if wait.is_cancelled() {
                return Err(TransportError::Cancelled { doing: DOING }.into());
            }
            if desk.heard.elapsed() > wait.remaining() {
                let peer = channel.peer().to_owned();
                return Err(TransportError::Deadline { peer, doing: DOING }.into());
            }
            if desk.said.elapsed() >= KEEPALIVE {
                channel.send(request::KIND, &[], wait)?;
                desk.said = Instant::now();
            }
        }
        let mut stats = desk.stats;
        if let Some(lane) = &lane {
            stats.add(&lane.stats);
        }
        if !self.has_failed() {
            self.end(channel, stats.pages, wait)?;
        }
        Ok(stats)
    }

    /// Waits for a request, or to be woken. True for a request.
    fn is_asked(&self, channel: &Channel, at_most: Duration) -> Result<bool, ServeError> {
        let socket = channel.socket();
        let mut fds = [
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: at_most.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(ServeError::System {
                    doing: "poll",
                    source: errno.into(),
                });
            }
        }
        if !fds[1].revents().is_empty() {
            // Empties the counter; that it was empty already is as good.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        Ok(!fds[0].revents().is_empty())
    }

    /// Answers what is asked: first the very pages, and when nobody asks for more, their neighbours.
    fn answer_all(
        &self,
        channel: &mut Channel,
        desk: &mut Answers,
        wait: &Wait,
    ) -> Result<(), ServeError> {
        loop {
            for (task, page) in receive(channel, wait)? {
                self.answer_one(channel, desk, (task, page), wait)?;
            }
            desk.heard = Instant::now();
            while !self.is_asked(channel, Duration::ZERO)? {
                let Some((index, page)) = desk.places.pop_front() else {
                    return Ok(());
                };
                let pages = self.neighbours();
                let ranges = self.server.state().order.neighbours(index, page, pages);
                if !ranges.is_empty() {
                    let sent = desk.send(self, channel, (index, &ranges), wait)?;
                    desk.stats.neighbours += sent;
                }
            }
        }
    }

    fn answer_one(
        &self,
        channel: &mut Channel,
        desk: &mut Answers,
        (task, page): Entry,
        wait: &Wait,
    ) -> Result<(), ServeError> {
        let range = PageRange {
            start: page,
            pages: 1,
        };
        let asked = self.server.state().order.ask(task, page);
        let index = match asked {
            Asked::Send(index) => index,
            Asked::UnderWay => {
                desk.stats.under_way += 1;
                self.helpers.lend();
                return Ok(());
            }
            Asked::NoTask => return Err(ServeError::NoTask { task }),
            Asked::Unlisted(index) => {
                // The task stands still, and its memory is the truth. What it does not have is zero
                // at the destination when all has come.
                let memory = &self.server.memories[index];
                if let Err(error) = desk.chunk.read(memory, &[range], false) {
                    tracing::warn!(%error, task, page, "a page that is not here is asked for");
                    return Ok(());
                }
                index
            }
        };
        let sent = desk.send(self, channel, (index, &[range]), wait)?;
        desk.stats.answered += sent;
        desk.places.push_back((index, page));
        Ok(())
    }

    /// How many neighbours the link carries without making the next fault wait.
    fn neighbours(&self) -> u64 {
        let most = self.options.neighbours;
        let fits = |rate: u64| rate / PAGE * NEIGHBOURS_MICROS / 1_000_000;
        self.rate().map_or(most, |rate| fits(rate).min(most))
    }
}

/// What answering needs.
struct Answers {
    frames: FrameSender,
    chunk: Chunk,
    stats: ServeStats,
    /// Pages that were sent and whose neighbours were not: task's index and page.
    places: VecDeque<(usize, u64)>,
    said: Instant,
    heard: Instant,
}

impl Answers {
    fn new() -> Self {
        // Each by itself: nobody waits for a page longer than for its own bytes.
        let options = StreamOptions {
            compression: Compression::None,
            deduplicate: false,
            ..StreamOptions::default()
        };
        Self {
            frames: FrameSender::new(&options),
            chunk: Chunk::default(),
            stats: ServeStats::default(),
            places: VecDeque::new(),
            said: Instant::now(),
            heard: Instant::now(),
        }
    }

    fn send(
        &mut self,
        run: &Run<'_>,
        channel: &mut Channel,
        taken: (usize, &[PageRange]),
        wait: &Wait,
    ) -> Result<u64, ServeError> {
        let sent = run.send(channel, taken, &mut self.chunk, &mut self.frames, wait)?;
        sent.count(&mut self.stats);
        self.said = Instant::now();
        Ok(sent.pages)
    }
}

/// The next request.
fn receive(channel: &mut Channel, wait: &Wait) -> Result<Vec<Entry>, ServeError> {
    let (header, body) = channel.receive(wait)?;
    if header.kind != request::KIND {
        let error = FrameError::UnexpectedKind {
            expected: Kind::FaultRequest,
            got: header.kind,
        };
        return Err(channel.frame_error(error).into());
    }
    request::decode(&body).map_err(|source| ServeError::Request {
        peer: channel.peer().to_owned(),
        source,
    })
}
