use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use haulier_sys::wait::{Wait, WaitError};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::Error;
use super::ip_packet::{Unusable, complete};
use super::lock::probe_log;
use super::netlink::Netlink;
use super::nflog::{Logged, PacketLog, Read};

/// For an interface that has come since the capture was opened.
const USUAL_MTU: usize = 1500;

/// The incoming packets that a network lock drops.
///
/// TCP, UDP, ICMP errors and pings, to an address of the lock or of a connection of the lock.
/// Not what comes from such an address, and nothing of neighbour discovery. The kernel copies a
/// packet in the rule that drops it: what is captured is what was dropped, from the first
/// packet on, and nothing besides. Belongs to the network namespace of the thread that opened
/// it; dropped, it leaves nothing.
#[derive(Debug)]
pub struct Capture {
    log: PacketLog,
    mtus: HashMap<u32, usize>,
    packet: Vec<u8>,
    stats: CaptureStats,
}

/// What became of the packets that a lock dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CaptureStats {
    /// Packets captured.
    pub captured: u64,
    /// Packets that found no room, and are lost.
    pub missed: u64,
    /// Datagrams that the kernel had merged, in a way that cannot be undone here; lost.
    pub merged: u64,
    /// Packets that are longer than what can be captured of one; lost.
    pub too_long: u64,
    /// Packets with wrong checksums or headers, which nobody would have received.
    pub corrupt: u64,
}

impl Capture {
    /// Readies the capture for the lock of migration `id`: hand it to
    /// [`super::ArmedLock::capture_to`] before that is engaged. Takes 10 to 20 ms: do it
    /// before the freeze.
    ///
    /// # Errors
    /// [`Error::CaptureUnsupported`] if this kernel has no packet log; a lock without a
    /// capture still works. [`Error::NftMissing`], [`Error::NftProcess`], [`Error::Netlink`].
    pub fn open(id: &str) -> Result<Self, Error> {
        let log = PacketLog::open(seed(id)).map_err(Error::CaptureUnsupported)?;
        probe_log(log.group())?;
        Ok(Self {
            log,
            mtus: mtus()?,
            packet: Vec::new(),
            stats: CaptureStats::default(),
        })
    }

    /// The next packet, from its IP header on, complete with checksums. None when `wait` has
    /// ended, one way or the other.
    ///
    /// # Errors
    /// [`Error::Capture`] if the kernel's log cannot be read any more.
    pub fn next(&mut self, wait: &Wait) -> Result<Option<&[u8]>, Error> {
        loop {
            match self.log.read().map_err(Error::Capture)? {
                Read::Packet(logged) => {
                    let mtu = self.mtus.get(&logged.interface);
                    let mtu = mtu.copied().unwrap_or(USUAL_MTU);
                    if self.stats.take(&logged, &mut self.packet, mtu) {
                        break;
                    }
                }
                Read::Nothing => {}
                Read::Empty => match wait.readable(&self.log) {
                    Ok(()) => {}
                    Err(WaitError::Deadline | WaitError::Cancelled) => return Ok(None),
                    Err(WaitError::Io(source)) => return Err(Error::Capture(source)),
                },
            }
        }
        Ok(Some(&self.packet))
    }

    /// What there was so far.
    pub fn stats(&self) -> CaptureStats {
        self.stats
    }

    /// The group that rules must log to.
    pub(super) fn group(&self) -> u16 {
        self.log.group()
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.log.as_fd()
    }
}

impl CaptureStats {
    /// Counts a packet, and leaves it in `packet` if it is of use.
    fn take(&mut self, logged: &Logged<'_>, packet: &mut Vec<u8>, mtu: usize) -> bool {
        self.missed += u64::from(logged.missed);
        packet.clear();
        packet.extend(logged.packet);
        let result = complete(packet, mtu);
        let counter = match result {
            Ok(()) => &mut self.captured,
            Err(Unusable::Merged) => &mut self.merged,
            Err(Unusable::TooLong) => &mut self.too_long,
            Err(Unusable::Corrupt | Unusable::Malformed) => &mut self.corrupt,
        };
        *counter += 1;
        result.is_ok()
    }
}

fn seed(id: &str) -> u16 {
    let hash = blake3::hash(id.as_bytes());
    u16::from_ne_bytes([hash.as_bytes()[0], hash.as_bytes()[1]])
}

fn mtus() -> Result<HashMap<u32, usize>, Error> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let links = Netlink::open()?.dump(&request, |answer| match answer {
        RouteNetlinkMessage::NewLink(link) => {
            let mtu = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Mtu(mtu) => Some(*mtu as usize),
                    _ => None,
                })?;
            Some((link.header.index, mtu))
        }
        _ => None,
    });
    let links = links.map_err(|source: io::Error| Error::Netlink {
        operation: "list",
        subject: "the interfaces".to_owned(),
        source,
    })?;
    Ok(links.into_iter().collect())
}
