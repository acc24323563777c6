//! IP packets as bytes: making one complete that the kernel would have completed later, and
//! composing one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;
/// Extension headers that are walked through before a packet is taken as it is.
const MAX_EXTENSIONS: usize = 8;

/// Why a captured packet cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unusable {
    /// It is not IP, or its headers do not fit it.
    Malformed,
    /// Its checksum is wrong: its receiver would have dropped it.
    Corrupt,
    /// The kernel merged several datagrams into it, and where they begin is not known.
    Merged,
    /// It is longer than what is captured of one, and cannot be cut.
    TooLong,
}

/// Where a packet comes from and goes to, and what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outline {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    /// Protocol number of what begins at `payload`; none for a fragment and for what is behind
    /// extension headers that are not known here.
    pub(super) transport: Option<u8>,
    /// Where that begins.
    pub(super) payload: usize,
    /// Length of the packet according to its header; 0 if that cannot say (a packet of more
    /// than 64 KiB that the kernel merged).
    length: usize,
}

impl Outline {
    /// Reads the headers. The packet may be cut off, but not within them.
    pub(super) fn of(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::of_v4(packet),
            6 => Self::of_v6(packet),
            _ => None,
        }
    }

    fn of_v4(packet: &[u8]) -> Option<Self> {
        let header = usize::from(packet[0] & 15) * 4;
        if header < V4_HEADER || packet.len() < header {
            return None;
        }
        // More fragments, or an offset.
        let fragment = word(packet, 6)? & 0x3fff != 0;
        Some(Self {
            from: Ipv4Addr::from(<[u8; 4]>::try_from(&packet[12..16]).ok()?).into(),
            to: Ipv4Addr::from(<[u8; 4]>::try_from(&packet[16..20]).ok()?).into(),
            transport: (!fragment).then_some(packet[9]),
            payload: header,
            length: word(packet, 2)?.into(),
        })
    }

    fn of_v6(packet: &[u8]) -> Option<Self> {
        let from = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?);
        let to = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?);
        let length = match usize::from(word(packet, 4)?) {
            0 => 0,
            length => V6_HEADER + length,
        };
        let mut next = packet[6];
        let mut payload = V6_HEADER;
        for _ in 0..MAX_EXTENSIONS {
            if !matches!(next, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) {
                break;
            }
            next = *packet.get(payload)?;
            payload += 8 * (1 + usize::from(*packet.get(payload + 1)?));
        }
        Some(Self {
            from: from.into(),
            to: to.into(),
            transport: matches!(next, TCP | UDP).then_some(next),
            payload,
            length,
        })
    }

    /// The ports of a TCP segment or UDP datagram: from, to.
    pub(super) fn ports(&self, packet: &[u8]) -> Option<(u16, u16)> {
        self.transport
            .filter(|transport| matches!(*transport, TCP | UDP))?;
        Some((word(packet, self.payload)?, word(packet, self.payload + 2)?))
    }

    /// Whether the packet is as long as its header says.
    pub(super) fn is_whole(&self, packet: &[u8]) -> bool {
        self.length == packet.len() && self.payload <= packet.len()
    }

    fn pseudo_header(&self, transport: u8, length: usize) -> Sum {
        let mut sum = Sum::default();
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                sum.add(&from.octets());
                sum.add(&to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                sum.add(&from.octets());
                sum.add(&to.octets());
            }
            // Not of one packet.
            _ => {}
        }
        sum.add(&u32::from(transport).to_be_bytes());
        sum.add(&(length as u32).to_be_bytes());
        sum
    }
}

/// Makes a packet that was captured on its way in one that may come in anywhere else.
///
/// Between virtual interfaces, and when segments were merged, the field of the checksum holds
/// only the sum over the pseudo-header (`CHECKSUM_PARTIAL`, Documentation/networking/
/// checksum-offloads.rst); it is completed here. A checksum that is wrong stays wrong: the
/// packet is refused. `mtu` is that of the interface the packet came in on; a datagram whose
/// checksum is not complete and that is longer was merged from several
/// (a datagram in fragments has been summed up by its sender).
pub(super) fn complete(packet: &mut Vec<u8>, mtu: usize) -> Result<(), Unusable> {
    let outline = Outline::of(packet).ok_or(Unusable::Malformed)?;
    let cut = outline.length == 0 || outline.length > packet.len();
    if !cut {
        // Padding of the link layer.
        packet.truncate(outline.length);
    }
    if packet.len() > usize::from(u16::MAX) {
        return Err(Unusable::TooLong);
    }
    let Some(transport) = outline.transport else {
        return if cut { Err(Unusable::TooLong) } else { Ok(()) };
    };
    let (field, least) = match transport {
        TCP => (16, 20),
        UDP => (6, UDP_HEADER),
        _ => return if cut { Err(Unusable::TooLong) } else { Ok(()) },
    };
    if packet.len() < outline.payload + least {
        return Err(Unusable::Malformed);
    }
    if cut && transport != TCP {
        return Err(Unusable::TooLong);
    }
    let field = outline.payload + field;
    let found = word(packet, field).ok_or(Unusable::Malformed)?;
    if transport == UDP && found == 0 {
        // Without a checksum, as IPv4 allows.
        return match outline.to {
            IpAddr::V4(_) => Ok(()),
            IpAddr::V6(_) => Err(Unusable::Corrupt),
        };
    }
    if cut {
        let whole = outline.length.saturating_sub(outline.payload);
        let partial = outline.pseudo_header(transport, whole).fold();
        if outline.length != 0 && !same(found, partial) {
            return Err(Unusable::TooLong);
        }
        shorten_segment(packet, &outline)?;
    }
    let length = packet.len() - outline.payload;
    let mut sum = outline.pseudo_header(transport, length);
    let partial = sum.fold();
    sum.add(&packet[outline.payload..field]);
    sum.add(&packet[field + 2..]);
    let right = checksum_field(transport, sum);
    if !cut && same(found, right) {
        return Ok(());
    }
    if !cut && !same(found, partial) {
        return Err(Unusable::Corrupt);
    }
    if transport == UDP && packet.len() > mtu {
        return Err(Unusable::Merged);
    }
    packet[field..field + 2].copy_from_slice(&right.to_be_bytes());
    Ok(())
}

/// The segment ends where the packet was cut off; its sender will send the rest again.
fn shorten_segment(packet: &mut [u8], outline: &Outline) -> Result<(), Unusable> {
    const FLAGS: usize = 13;
    /// What belongs to the last byte: FIN and PSH.
    const OF_THE_END: u8 = 0x09;
    let flags = packet
        .get_mut(outline.payload + FLAGS)
        .ok_or(Unusable::Malformed)?;
    *flags &= !OF_THE_END;
    match outline.to {
        IpAddr::V4(_) => {
            let length = packet.len() as u16;
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            packet[10..12].copy_from_slice(&[0, 0]);
            let mut sum = Sum::default();
            sum.add(&packet[..outline.payload]);
            let sum = !sum.fold();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpAddr::V6(_) => {
            // A jumbo payload option would contradict the length.
            if outline.payload != V6_HEADER {
                return Err(Unusable::TooLong);
            }
            let length = (packet.len() - V6_HEADER) as u16;
            packet[4..6].copy_from_slice(&length.to_be_bytes());
        }
    }
    Ok(())
}

/// A UDP datagram as a packet. None if the two addresses are not of one family, or the datagram
/// is longer than any can be.
pub(super) fn datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    const HOPS: u8 = 64;
    let length = UDP_HEADER + data.len();
    let mut packet = Vec::with_capacity(V6_HEADER + length);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(V4_HEADER + length).ok()?;
            packet.extend([0x45, 0]);
            packet.extend(total.to_be_bytes());
            // No identification, not a fragment.
            packet.extend([0, 0, 0x40, 0, HOPS, UDP, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let mut sum = Sum::default();
            sum.add(&packet);
            let sum = !sum.fold();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = u16::try_from(length).ok()?;
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, HOPS]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        _ => return None,
    }
    let outline = Outline::of(&packet)?;
    let mut header = [0; UDP_HEADER];
    header[0..2].copy_from_slice(&from.port().to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    header[4..6].copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
    let mut sum = outline.pseudo_header(UDP, length);
    sum.add(&header);
    sum.add(data);
    header[6..8].copy_from_slice(&checksum_field(UDP, sum).to_be_bytes());
    packet.extend(header);
    packet.extend(data);
    Some(packet)
}

fn checksum_field(transport: u8, sum: Sum) -> u16 {
    match !sum.fold() {
        // Zero says that there is no checksum, RFC 768.
        0 if transport == UDP => 0xffff,
        field => field,
    }
}

/// Both zeros of ones' complement are zero.
fn same(a: u16, b: u16) -> bool {
    let normal = |value| if value == 0xffff { 0 } else { value };
    normal(a) == normal(b)
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

/// Ones' complement sum of RFC 1071. Every addition but the last is of an even length.
#[derive(Debug, Clone, Copy, Default)]
struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            self.0 += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        }
        let mut rest = [0; 4];
        let remainder = words.remainder();
        rest[..remainder.len()].copy_from_slice(remainder);
        self.0 += u64::from(u32::from_be_bytes(rest));
    }

    fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

#[cfg(test)]
mod tests;
