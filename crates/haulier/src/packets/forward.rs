use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use haulier_proto::frame::Kind;
use haulier_sys::wait::{Cancel, Wait};
use haulier_targets::network::{self, Capture, CaptureStats};
use haulier_transport::channel::Channel;
use tracing::warn;

use super::Kept;

/// A connection that takes nothing for so long is given up.
const SEND_TIME: Duration = Duration::from_secs(10);
/// When stopping, what has been captured is read for so long at most.
const DRAIN_TIME: Duration = Duration::from_millis(200);
/// How long packets are let gather before they are sent on together. Each would cost the destination a wake-up
/// and both hosts a segment, of processors that dump and restore; and before the thaw nobody has them.
const GATHER: Duration = Duration::from_millis(1);
/// So many are not waited for others.
const MANY: usize = 32;
/// A wait that is not meant to end by itself.
const LONG: Duration = Duration::from_secs(3600);

/// What went from the source to the destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ForwardStats {
    /// What became of the packets that the lock dropped.
    pub(crate) capture: CaptureStats,
    /// Datagrams that the target had received and not read.
    pub(crate) queued: u64,
    /// Packets sent, those datagrams among them.
    pub(crate) sent: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// Packets that could not be sent, and those that were to go together with such.
    pub(crate) unsent: u64,
}

/// Sends what the lock of the source drops to the destination, on a thread of its own.
///
/// Until the migration is committed, it also keeps what it sends: if the target goes on here,
/// so must its packets. Dropped, it stops at once.
#[derive(Debug)]
pub(crate) struct Forwarder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is an order.
    ordered: Cancel,
    /// Sending is over.
    stopped: Cancel,
}

#[derive(Debug)]
struct State {
    order: Order,
    kept: Option<Kept>,
    stats: ForwardStats,
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Go,
    /// Go on until nothing has come for `quiet`, or until the time is up.
    Finish {
        quiet: Duration,
        until: Instant,
    },
    /// Take what is there and stop.
    Stop {
        until: Instant,
    },
}

impl Forwarder {
    /// Starts sending: `queued` first, which came first, and then what `capture` has seen since
    /// the lock was engaged.
    ///
    /// # Errors
    /// What starting a thread says, or running out of descriptors.
    pub(crate) fn start(
        capture: Capture,
        queued: Vec<Vec<u8>>,
        channel: Channel,
    ) -> io::Result<Forwarder> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                order: Order::Go,
                kept: Some(Kept::default()),
                stats: ForwardStats::default(),
            }),
            ordered: Cancel::new()?,
            stopped: Cancel::new()?,
        });
        let run = Run {
            shared: Arc::clone(&shared),
            capture,
            channel,
            broken: false,
        };
        let thread = thread::Builder::new()
            .name("forward packets".to_owned())
            .spawn(move || run.run(queued))?;
        Ok(Forwarder {
            shared,
            thread: Some(thread),
        })
    }

    /// The target will not run here again: what is kept may go.
    pub(crate) fn committed(&self) {
        self.shared.state().kept = None;
    }

    /// What happened so far.
    pub(crate) fn stats(&self) -> ForwardStats {
        self.shared.state().stats
    }

    /// Goes on until nothing has come for `quiet`, or for `at_most`; then ends the connection.
    /// Waits for it. The address must stay with this host, and locked, until this returns.
    pub(crate) fn finish(mut self, quiet: Duration, at_most: Duration) -> ForwardStats {
        let until = Instant::now() + at_most;
        self.order(Order::Finish { quiet, until });
        self.stats()
    }

    /// The target goes on here. Stops, and returns the packets it has missed, in their order;
    /// none if the migration was committed. To be called when the lock is lifted; the target's
    /// own queues still have what was queued, so that is not among them.
    pub(crate) fn abort(mut self) -> Vec<Vec<u8>> {
        self.stop();
        let kept = self.shared.state().kept.take();
        kept.map(|mut kept| kept.take()).unwrap_or_default()
    }

    fn stop(&mut self) {
        self.shared.stopped.cancel();
        let until = Instant::now() + DRAIN_TIME;
        self.order(Order::Stop { until });
    }

    fn order(&mut self, order: Order) {
        self.shared.state().order = order;
        self.shared.ordered.cancel();
        if let Some(thread) = self.thread.take() {
            // Its own panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // It is whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread has.
struct Run {
    shared: Arc<Shared>,
    capture: Capture,
    channel: Channel,
    broken: bool,
}

impl Run {
    fn run(mut self, queued: Vec<Vec<u8>>) {
        self.shared.state().stats.queued = queued.len() as u64;
        self.forward(queued, false);
        loop {
            let order = self.shared.state().order;
            let now = Instant::now();
            let wait = match order {
                Order::Go => self.shared.ordered.wait(LONG),
                Order::Finish { until, .. } | Order::Stop { until } if now >= until => break,
                Order::Finish { quiet, until } => {
                    Wait::uncancellable(quiet.min(until.saturating_duration_since(now)))
                }
                Order::Stop { .. } => Wait::uncancellable(Duration::ZERO),
            };
            let mut packets = Vec::new();
            let taken = self.take(&wait, &mut packets);
            self.shared.state().stats.capture = self.capture.stats();
            let count = packets.len();
            // Those that came before an error too.
            self.forward(packets, true);
            if let Err(error) = taken {
                warn!(%error, "packets that reach this host are lost from now on");
                break;
            }
            match (count, order) {
                (0, Order::Go) => {}
                (0, _) => break,
                // An order that comes meanwhile ends the pause.
                (..MANY, Order::Go) => drop(self.shared.ordered.sleep(GATHER)),
                _ => {}
            }
        }
        self.channel.shutdown();
    }

    /// Waits for a packet, and takes what has come with it.
    fn take(&mut self, wait: &Wait, packets: &mut Vec<Vec<u8>>) -> Result<(), network::Error> {
        let mut packet = self.capture.next(wait)?;
        while let Some(next) = packet {
            packets.push(next.to_vec());
            if packets.len() == MANY {
                break;
            }
            packet = self.capture.next(&Wait::uncancellable(Duration::ZERO))?;
        }
        Ok(())
    }

    fn forward(&mut self, packets: Vec<Vec<u8>>, missed_here: bool) {
        if !self.broken {
            let send = |few: &[Vec<u8>]| {
                let wait = self.shared.stopped.wait(SEND_TIME);
                self.channel.send_all(Kind::Packet, few, &wait)
            };
            if let Err(error) = packets.chunks(MANY).try_for_each(send) {
                if !self.shared.stopped.is_cancelled() {
                    warn!(%error, "packets that reach this host are lost from now on");
                }
                self.broken = true;
            }
        }
        let mut state = self.shared.state();
        let count = packets.len() as u64;
        if self.broken {
            state.stats.unsent += count;
        } else {
            state.stats.sent += count;
            state.stats.bytes += packets
                .iter()
                .map(|packet| packet.len() as u64)
                .sum::<u64>();
        }
        if let Some(kept) = state.kept.as_mut().filter(|_| missed_here) {
            for packet in packets {
                kept.push(packet);
            }
        }
    }
}
