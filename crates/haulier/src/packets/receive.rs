use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use haulier_proto::frame::{FrameError, Kind};
use haulier_sys::wait::Cancel;
use haulier_targets::network::{Capture, Injector};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use tracing::warn;

use super::Kept;
use super::delivery::{LOOK_AGAIN, Lanes};

/// A peer that has begun a packet has so long for the rest of it.
const BODY_TIME: Duration = Duration::from_secs(30);
/// A wait that is not meant to end by itself.
const LONG: Duration = Duration::from_secs(3600);

/// What came to the destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ReceiveStats {
    /// Packets from the source, and those that the destination's own lock dropped.
    pub(crate) received: u64,
    /// Packets that the kernel has taken.
    pub(crate) delivered: u64,
    /// Packets that it has not, or that were not fit for it.
    pub(crate) undelivered: u64,
    /// Of all those, datagrams that had to wait for room in their socket.
    pub(crate) delayed: u64,
    /// Packets for which there was no room here; lost.
    pub(crate) overflowed: u64,
}

/// Keeps the packets that the source sends until they may be delivered, and then delivers them
/// as they come, on threads of its own. Dropped, it stops.
#[derive(Debug)]
pub(crate) struct PacketReceiver {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// No more packets are wanted.
    stop: Cancel,
    /// The lock of this host is lifted.
    lifted: Cancel,
}

#[derive(Debug)]
struct State {
    waiting: Kept,
    injector: Option<Injector>,
    /// Threads that packets may still come from.
    feeders: usize,
    /// All that came has been delivered, and nothing more will come.
    done: bool,
    stats: ReceiveStats,
}

impl PacketReceiver {
    /// Starts receiving. `local` has what the lock of this host drops: a neighbour that learns
    /// early where the address is, or a network that knows before it is told.
    ///
    /// # Errors
    /// What starting a thread says, or running out of descriptors.
    pub(crate) fn start(channel: Channel, local: Option<Capture>) -> io::Result<PacketReceiver> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                waiting: Kept::default(),
                injector: None,
                feeders: 1 + usize::from(local.is_some()),
                done: false,
                stats: ReceiveStats::default(),
            }),
            changed: Condvar::new(),
            stop: Cancel::new()?,
            lifted: Cancel::new()?,
        });
        let mut receiver = PacketReceiver {
            shared,
            threads: Vec::new(),
        };
        receiver.spawn("receive packets", move |shared| shared.receive(channel))?;
        if let Some(local) = local {
            receiver.spawn("capture packets", move |shared| shared.watch(local))?;
        }
        Ok(receiver)
    }

    /// Begins to deliver, through `injector`, on a thread of its own. The lock of this host must
    /// be lifted: neither could a packet come in before, nor would one be captured after.
    ///
    /// # Errors
    /// What starting a thread says.
    pub(crate) fn release(&mut self, injector: Injector) -> io::Result<()> {
        self.shared.lifted.cancel();
        self.shared.state().injector = Some(injector);
        self.spawn("deliver packets", Shared::deliver)
    }

    /// What happened so far.
    #[cfg(test)]
    pub(crate) fn stats(&self) -> ReceiveStats {
        self.shared.state().stats
    }

    /// Waits until the source has ended the connection and all is delivered, and then stops.
    pub(crate) fn finish(self, at_most: Duration) -> ReceiveStats {
        let until = Instant::now() + at_most;
        let mut state = self.shared.state();
        while !state.done {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.shared.wait(state, left);
        }
        state.stats
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce(&Shared) + Send + 'static) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&shared))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for PacketReceiver {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.lifted.cancel();
        // Whoever holds it has not begun to wait, and may have looked already.
        drop(self.shared.state());
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // Its own panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn receive(&self, mut channel: Channel) {
        if let Err(error) = self.receive_all(&mut channel) {
            warn!(%error, "packets that reach the source are lost from now on");
        }
        self.feeder_ended();
    }

    fn receive_all(&self, channel: &mut Channel) -> Result<(), TransportError> {
        loop {
            let header = match channel.receive_header(&self.stop.wait(LONG)) {
                Ok(header) => header,
                Err(TransportError::Deadline { .. }) => continue,
                // The source ends the connection when it has no more.
                Err(TransportError::Closed { .. } | TransportError::Cancelled { .. }) => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            if header.kind != Kind::Packet {
                return Err(channel.frame_error(FrameError::UnexpectedKind {
                    expected: Kind::Packet,
                    got: header.kind,
                }));
            }
            let mut packet = vec![0; header.length as usize];
            let wait = self.stop.wait(BODY_TIME);
            match channel.receive_body(&header, &mut [&mut packet], &wait) {
                Ok(()) => self.push(packet),
                Err(TransportError::Cancelled { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Until the lock is lifted, and then what is still there.
    fn watch(&self, mut local: Capture) {
        loop {
            match local.next(&self.lifted.wait(LONG)) {
                Ok(Some(packet)) => self.push(packet.to_vec()),
                Ok(None) if self.lifted.is_cancelled() => break,
                Ok(None) => {}
                Err(error) => {
                    warn!(%error, "packets that reach this host early are lost");
                    break;
                }
            }
        }
        self.feeder_ended();
    }

    fn push(&self, packet: Vec<u8>) {
        let mut state = self.state();
        state.stats.received += 1;
        let gone = state.waiting.push(packet);
        state.stats.overflowed += gone;
        drop(state);
        self.changed.notify_all();
    }

    fn feeder_ended(&self) {
        self.state().feeders -= 1;
        self.changed.notify_all();
    }

    fn deliver(&self) {
        let mut state = self.state();
        let Some(injector) = state.injector.take() else {
            return;
        };
        let mut lanes = Lanes::new(injector);
        while !self.stop.is_cancelled() {
            let packets = state.waiting.take();
            if packets.is_empty() {
                if state.feeders == 0 && lanes.is_empty() {
                    state.done = true;
                    break;
                }
                let pause = if lanes.is_empty() { LONG } else { LOOK_AGAIN };
                state = self.wait(state, pause);
                if lanes.is_empty() {
                    continue;
                }
            }
            let mut stats = state.stats;
            drop(state);
            let before = stats;
            lanes.retry(&mut stats);
            for packet in packets {
                lanes.take(packet, &mut stats);
            }
            state = self.state();
            state.stats.delivered += stats.delivered - before.delivered;
            state.stats.undelivered += stats.undelivered - before.undelivered;
            state.stats.delayed += stats.delayed - before.delayed;
        }
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // It is whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, at_most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}
