use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use haulier_targets::network::{Delivery, Injector};
use tracing::debug;

use super::MOST_BYTES;
use super::receive::ReceiveStats;

/// How long a datagram waits for its socket to be read before it is delivered all the same: a
/// target that does not read for so long loses datagrams wherever it runs. So it is when more than
/// [`MOST_BYTES`] wait.
const PATIENCE: Duration = Duration::from_secs(1);
/// When a socket that had no room is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Delivers packets that a lock of this host has dropped, since the target goes on here. Waits
/// for sockets that have no room, a second each at most.
pub(crate) fn deliver(injector: Injector, packets: Vec<Vec<u8>>) -> ReceiveStats {
    let mut lanes = Lanes::new(injector);
    let mut stats = ReceiveStats {
        received: packets.len() as u64,
        ..ReceiveStats::default()
    };
    for packet in packets {
        lanes.take(packet, &mut stats);
    }
    while !lanes.is_empty() {
        thread::sleep(LOOK_AGAIN);
        lanes.retry(&mut stats);
    }
    stats
}

/// Delivers in order, as far as one packet has to do with another: datagrams for a socket
/// without room wait, the rest goes on.
#[derive(Debug)]
pub(super) struct Lanes {
    injector: Injector,
    waiting: HashMap<SocketAddr, VecDeque<(Instant, Vec<u8>)>>,
    /// Bytes that wait.
    bytes: usize,
}

impl Lanes {
    pub(super) fn new(injector: Injector) -> Lanes {
        Lanes {
            injector,
            waiting: HashMap::new(),
            bytes: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Delivers a packet, or keeps it for later.
    pub(super) fn take(&mut self, packet: Vec<u8>, stats: &mut ReceiveStats) {
        let lane = Injector::lane(&packet);
        let queue = lane.and_then(|lane| self.waiting.get_mut(&lane));
        let Some(queue) = queue else {
            if !stats.note(self.injector.inject(&packet)) {
                stats.delayed += 1;
                if let Some(lane) = lane {
                    self.bytes += packet.len();
                    let queue = VecDeque::from([(Instant::now(), packet)]);
                    self.waiting.insert(lane, queue);
                }
            }
            return;
        };
        stats.delayed += 1;
        self.bytes += packet.len();
        queue.push_back((Instant::now(), packet));
    }

    /// Delivers what has room now, or has waited for too long.
    pub(super) fn retry(&mut self, stats: &mut ReceiveStats) {
        for queue in self.waiting.values_mut() {
            while let Some((since, packet)) = queue.front() {
                let may_wait = since.elapsed() < PATIENCE && self.bytes < MOST_BYTES;
                let tried = if may_wait {
                    self.injector.inject(packet)
                } else {
                    self.injector.force(packet).map(|()| Delivery::Done)
                };
                if !stats.note(tried) {
                    break;
                }
                self.bytes -= packet.len();
                queue.pop_front();
            }
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
    }
}

impl ReceiveStats {
    /// Counts what came of a packet; false: it has to wait.
    fn note(&mut self, tried: Result<Delivery, haulier_targets::network::Error>) -> bool {
        match tried {
            Ok(Delivery::Done) => self.delivered += 1,
            Ok(Delivery::NoRoom) => return false,
            Err(error) => {
                debug!(%error, "a packet was not delivered");
                self.undelivered += 1;
            }
        }
        true
    }
}
