//! What reaches the source after its lock is sent on to the destination, or, if the target goes on
//! here, delivered late.

use std::net::IpAddr;
use std::time::Duration;

use haulier_proto::id::MigrationId;
use haulier_targets::network::{ArmedLock, Capture, Injector, MoveIp, queued_datagrams_of};
use haulier_transport::channel::Channel;
use tracing::{debug, info, warn};

use crate::packets::{self, ForwardStats, Forwarder};

/// Neighbours have learnt the new place when nothing has come for so long,
const QUIET: Duration = Duration::from_millis(250);
/// or at the latest after this.
const LINGER: Duration = Duration::from_secs(3);

/// The packets of a migration.
#[derive(Debug)]
pub(super) struct Forwarding {
    addresses: Vec<IpAddr>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// There is nothing to be captured, or this host cannot.
    Off,
    Armed(Capture),
    Going(Forwarder),
}

impl Forwarding {
    /// Readies the lock to keep what it drops, if addresses move.
    pub(super) fn arm(id: MigrationId, moved: &[MoveIp], lock: &mut ArmedLock) -> Forwarding {
        let addresses: Vec<IpAddr> = moved.iter().map(MoveIp::ip).collect();
        if addresses.is_empty() {
            return Forwarding::off(addresses);
        }
        match Capture::open(&id.to_string()) {
            Ok(capture) => {
                lock.capture_to(&capture);
                Forwarding {
                    addresses,
                    stage: Stage::Armed(capture),
                }
            }
            Err(error) => {
                warn!(%error, "packets that come during the switchover will be lost");
                Forwarding::off(addresses)
            }
        }
    }

    fn off(addresses: Vec<IpAddr>) -> Forwarding {
        Forwarding {
            addresses,
            stage: Stage::Off,
        }
    }

    /// Whether a connection for packets is of use.
    pub(super) fn is_armed(&self) -> bool {
        matches!(self.stage, Stage::Armed(_))
    }

    /// Begins to send them, with the target frozen and the lock engaged: first the datagrams that
    /// it has not read, which CRIU does not save.
    pub(super) fn start(&mut self, pids: &[i32], channel: Channel) {
        let Stage::Armed(capture) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        let queued = queued_datagrams_of(pids, &self.addresses);
        let queued = match queued {
            Ok(queued) => {
                debug!(
                    packets = queued.packets.len(),
                    left = queued.left,
                    "queued datagrams"
                );
                queued.packets
            }
            Err(error) => {
                warn!(%error, "datagrams that the target has not read are lost");
                Vec::new()
            }
        };
        match Forwarder::start(capture, queued, channel) {
            Ok(forwarder) => self.stage = Stage::Going(forwarder),
            Err(error) => warn!(%error, "packets that come during the switchover are lost"),
        }
    }

    /// The target runs at the destination: goes on until neighbours send there. The address must
    /// stay with this host, and locked, until then.
    pub(super) fn finish(&mut self) -> Option<ForwardStats> {
        let Stage::Going(forwarder) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return None;
        };
        forwarder.committed();
        let stats = forwarder.finish(QUIET, LINGER);
        info!(?stats, "packets forwarded");
        Some(stats)
    }

    /// The target runs here again, with its lock lifted: it gets what it has missed.
    pub(super) fn give_back(&mut self) {
        let Stage::Going(forwarder) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        let missed = forwarder.abort();
        if !missed.is_empty() {
            let stats = packets::deliver(Injector::open(&self.addresses), missed);
            info!(?stats, "packets delivered late");
        }
    }
}
