//! Receiving what is pushed.

use std::thread;
use std::time::Duration;

use haulier_proto::frame::{FrameError, Header, Kind};
use haulier_proto::message::{self, RoundEnd};
use haulier_sys::{priority, tcp};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use rustix::net::sockopt;

use super::client::FaultClient;
use crate::store::PageStore;
use crate::stream::{FrameReceiver, ReceiveStats, StreamError};
use crate::wait::Wait;

/// Free room in the store before a frame is begun: it must not be met full in the middle of one.
const ROOM: u64 = 1 << 20;

/// What a socket may hold for us: so many microseconds of 10 Gbit/s beside what is on the way.
const QUEUE_MICROS: u128 = 200;
const BYTES_PER_MICRO: u128 = 1250;
const LONGEST: u128 = 4 << 20;

/// A connection that has carried no more than this was not used for rounds.
const FRESH: u64 = 64 << 10;

/// How often to look whether there is room again. The fill makes some all the time.
const LOOK: Duration = Duration::from_millis(1);

/// Receives the round that is pushed over one memory channel, to its end. Each channel has a thread
/// of its own for it, which runs ahead of others while a task waits for a page. When the client's store is
/// full it waits until pages have been placed.
///
/// # Errors
/// [`StreamError`]. Pages that came before it are in the store.
pub fn receive_push(
    channel: &mut Channel,
    client: &FaultClient,
    round: u32,
    wait: &Wait,
) -> Result<ReceiveStats, StreamError> {
    // What comes faster than this thread takes it lies in front of a page that a task waits for.
    let _ = priority::brisk();
    let helping = client.helps();
    keep_short(channel);
    let mut receiver = Receiver::new(round);
    let result = loop {
        if client.outstanding() == 0 {
            helping.hand_back();
        }
        let header = match channel.receive_header(wait) {
            Ok(header) => header,
            Err(error) => break Err(error.into()),
        };
        match receiver.receive(channel, &header, client.store(), wait) {
            Ok(None) => {}
            Ok(Some(stats)) => break Ok(stats),
            Err(error) => break Err(error),
        }
    };
    drop(helping);
    let _ = priority::usual();
    result
}

/// Receives the frames of one round of one channel.
pub(super) struct Receiver {
    frames: FrameReceiver,
    stats: ReceiveStats,
    round: u32,
}

impl Receiver {
    pub(super) fn new(round: u32) -> Self {
        Self {
            frames: FrameReceiver::new(),
            stats: ReceiveStats::default(),
            round,
        }
    }

    /// Receives the frame with this header, which was just received. What the channel has carried,
    /// if it was its last.
    pub(super) fn receive(
        &mut self,
        channel: &mut Channel,
        header: &Header,
        store: &PageStore,
        wait: &Wait,
    ) -> Result<Option<ReceiveStats>, StreamError> {
        match header.kind {
            Kind::Pages => {
                await_room(channel, store, wait)?;
                let round = Some(self.round);
                let got = self.frames.receive(channel, header, store, round, wait)?;
                self.stats.pages += got.pages;
                self.stats.zero_pages += got.zero_pages;
                self.stats.duplicates += got.duplicates;
                Ok(None)
            }
            Kind::RoundEnd => {
                let mut body = vec![0; header.length as usize];
                channel.receive_body(header, &mut [&mut body], wait)?;
                let end: RoundEnd = message::decode(Kind::RoundEnd, &body)
                    .map_err(|error| channel.frame_error(error))?;
                self.check(channel, &end)?;
                self.stats.rounds = 1;
                Ok(Some(self.stats))
            }
            got => {
                let error = FrameError::UnexpectedKind {
                    expected: Kind::Pages,
                    got,
                };
                Err(channel.frame_error(error).into())
            }
        }
    }

    fn check(&self, channel: &Channel, end: &RoundEnd) -> Result<(), StreamError> {
        let peer = || channel.peer().to_owned();
        if end.round != self.round {
            return Err(StreamError::Round {
                peer: peer(),
                expected: self.round,
                got: end.round,
            });
        }
        if end.pages != self.stats.pages {
            return Err(StreamError::Count {
                peer: peer(),
                round: self.round,
                expected: end.pages,
                got: self.stats.pages,
            });
        }
        Ok(())
    }
}

/// Keeps what has come and was not taken yet short: a page that a task waits for may be in it. A way
/// so long that it needs more than this is left to the kernel.
fn keep_short(channel: &Channel) {
    // With a smaller buffer the kernel drops what the peer was told there is room for, and that costs
    // a retransmission timeout (seen: 200 ms). Rounds have made the buffer large.
    if channel.received() > FRESH {
        return;
    }
    let Ok(path) = tcp::path(channel.socket()) else {
        return;
    };
    let bytes = (path.round_trip.as_micros() * 3 / 2 + QUEUE_MICROS) * BYTES_PER_MICRO;
    if bytes <= LONGEST {
        let _ = sockopt::set_socket_recv_buffer_size(channel.socket(), bytes as usize);
    }
}

/// Waits until the store takes a frame.
fn await_room(channel: &Channel, store: &PageStore, wait: &Wait) -> Result<(), StreamError> {
    // Nothing is allocated for it: a task may wait for what is in the frame.
    while !store.has_room(ROOM) && !wait.is_cancelled() {
        if std::time::Instant::now() >= wait.deadline() {
            let peer = channel.peer().to_owned();
            let doing = "waiting for room in the page store";
            return Err(TransportError::Deadline { peer, doing }.into());
        }
        thread::sleep(LOOK);
    }
    // Whatever else there is comes out at the frame itself.
    Ok(())
}
