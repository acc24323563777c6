//! Packets that reach a host while it is locked, on their way to where the target runs.
//!
//! Source: [`Forwarder`], from the lock until nothing comes any more. Destination:
//! [`PacketReceiver`], which keeps what comes until its own lock is lifted. A frame is a packet,
//! from its IP header on; the end of the connection is the end.

mod delivery;
mod forward;
mod receive;

pub(crate) use delivery::deliver;
pub(crate) use forward::{ForwardStats, Forwarder};
pub(crate) use receive::PacketReceiver;

/// Of packets that are kept: as many, and as many bytes. A quarter of a second of 1 Gbit/s is
/// half of it. The oldest go first.
const MOST_PACKETS: usize = 64 * 1024;
const MOST_BYTES: usize = 64 << 20;

/// Packets in order, no more than there may be.
#[derive(Debug, Default)]
struct Kept {
    packets: std::collections::VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Kept {
    /// Keeps a packet; returns how many others had to go.
    fn push(&mut self, packet: Vec<u8>) -> u64 {
        self.bytes += packet.len();
        self.packets.push_back(packet);
        let mut gone = 0;
        while self.packets.len() > MOST_PACKETS || self.bytes > MOST_BYTES {
            let Some(oldest) = self.packets.pop_front() else {
                break;
            };
            self.bytes -= oldest.len();
            gone += 1;
        }
        gone
    }

    fn take(&mut self) -> Vec<Vec<u8>> {
        self.bytes = 0;
        std::mem::take(&mut self.packets).into()
    }
}

#[cfg(test)]
mod tests;
