use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, io};

use haulier_sys::packet::LinkSocket;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType};

use super::netlink::Netlink;
use super::{Error, MoveIp, addresses, tables_of_haulier};

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const BROADCAST: [u8; 6] = [0xff; 6];
/// Where ff02::1 goes on Ethernet, RFC 2464 section 7.
const ALL_NODES_LINK: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Rounds after the first announcement, and the pause before the first of them; each pause is
/// twice the one before. QEMU announces five times from 50 ms on, with pauses up to 550 ms.
const ROUNDS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Tells the neighbours of an interface, once, that it has the address now.
///
/// # Errors
/// As for [`Announcement::prepare`] and [`Announcement::send`].
pub fn announce(address: &MoveIp) -> Result<(), Error> {
    Announcement::prepare(address)?.send()
}

/// The frames that announce an address, and a socket to send them with.
///
/// IPv4: a gratuitous ARP as a request and as a reply. The kernel announces by request
/// (`arp_notify`), `arping -A` by reply; switches learn from either, but hosts and their
/// filters differ in which they believe. IPv6: an unsolicited neighbour advertisement with the
/// override flag. They are sent past netfilter, so a network lock does not hold them back.
#[derive(Debug)]
pub struct Announcement {
    address: MoveIp,
    /// None: the interface has no neighbours to tell.
    socket: Option<LinkSocket>,
    to: [u8; 6],
    frames: Vec<Vec<u8>>,
}

impl Announcement {
    /// Looks up the interface and composes the frames, so that sending them takes two system
    /// calls. An interface without neighbour resolution (loopback, a tunnel) needs no frames.
    ///
    /// # Errors
    /// [`Error::NoSuchInterface`], [`Error::Netlink`]; [`Error::CannotAnnounce`] for a link
    /// layer other than Ethernet; [`Error::Announce`] if there is no socket to be had.
    pub fn prepare(address: &MoveIp) -> Result<Self, Error> {
        let link = Netlink::open()?.link(address.interface())?;
        let header = &link.message.header;
        let mut announcement = Self {
            address: address.clone(),
            socket: None,
            to: BROADCAST,
            frames: Vec::new(),
        };
        if header
            .flags
            .intersects(LinkFlags::Noarp | LinkFlags::Loopback)
        {
            return Ok(announcement);
        }
        let hardware = link
            .message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                _ => None,
            });
        let hardware = match hardware {
            Some(hardware) if header.link_layer_type == LinkLayerType::Ether => hardware,
            _ => {
                return Err(Error::CannotAnnounce {
                    address: address.ip(),
                    interface: address.interface().to_owned(),
                    kind: header.link_layer_type.to_string(),
                });
            }
        };
        let ethertype = match address.ip() {
            IpAddr::V4(ip) => {
                announcement.frames = gratuitous_arp(hardware, ip).to_vec();
                ETHERTYPE_ARP
            }
            IpAddr::V6(ip) => {
                let router = forwards(address.interface())?;
                announcement.to = ALL_NODES_LINK;
                announcement
                    .frames
                    .push(unsolicited_advertisement(hardware, ip, router));
                ETHERTYPE_IPV6
            }
        };
        let socket = LinkSocket::open(link.index, ethertype);
        announcement.socket = Some(socket.map_err(announcement.failed("open a packet socket"))?);
        Ok(announcement)
    }

    /// Sends the frames; never waits.
    ///
    /// # Errors
    /// [`Error::Announce`], with the interface down or its queue full.
    pub fn send(&self) -> Result<(), Error> {
        if let Some(socket) = &self.socket {
            for frame in &self.frames {
                socket
                    .send(self.to, frame)
                    .map_err(self.failed("send a frame"))?;
            }
        }
        Ok(())
    }

    /// Whether the address is still here and no migration is taking it away: it may have moved on
    /// within the second and a half of repetitions, and would be called back.
    fn may_be_repeated(&self) -> bool {
        let here = addresses().is_ok_and(|all| all.iter().any(|found| found.is(&self.address)));
        here && tables_of_haulier().is_ok_and(|tables| tables.is_empty())
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let address = self.address.clone();
        move |source| Error::Announce {
            operation,
            address,
            source,
        }
    }
}

/// Repeats announcements for one and a half seconds, on a thread of its own: a neighbour may
/// have missed the first, and a switch may have heard the source since.
///
/// Dropped, it stops.
#[derive(Debug)]
pub struct Announcer {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Announcer {
    /// Starts repeating, 50 ms from now and four times more at doubling distances. The first
    /// announcement, before the thaw, is the caller's own. What cannot be sent is logged.
    ///
    /// # Errors
    /// What starting a thread says.
    pub fn start(announcements: Vec<Announcement>) -> io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let run = move || {
            let mut pause = FIRST_PAUSE;
            for _ in 0..ROUNDS {
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                for announcement in announcements.iter().filter(|a| a.may_be_repeated()) {
                    if let Err(error) = announcement.send() {
                        tracing::warn!(%error, "an address was not announced again");
                    }
                }
                pause *= 2;
            }
        };
        let thread = thread::Builder::new()
            .name("announce".to_owned())
            .spawn(run)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Waits for the last round: 1.55 s after the start.
    pub fn finish(mut self) {
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Its own panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.join();
    }
}

/// RFC 826 packets whose sender and target protocol address are both `ip`: a request as in RFC
/// 5227 section 2.3, and a reply. Linux believes such a reply at once only if its target
/// hardware address is the sender's (arp_is_garp(), net/ipv4/arp.c).
fn gratuitous_arp(hardware: [u8; 6], ip: Ipv4Addr) -> [Vec<u8>; 2] {
    let packet = |operation: u16, target: [u8; 6]| {
        // Ethernet, IPv4, and the lengths of their addresses.
        let mut packet = vec![0, 1, 8, 0, 6, 4];
        packet.extend(operation.to_be_bytes());
        packet.extend(hardware);
        packet.extend(ip.octets());
        packet.extend(target);
        packet.extend(ip.octets());
        packet
    };
    [packet(1, [0; 6]), packet(2, hardware)]
}

/// IPv6 header and ICMPv6 message, RFC 4861 section 4.4, to all nodes. `router` as the kernel
/// sets it (ndisc_send_unsol_na()): a neighbour that uses the address as its router and sees
/// the flag gone drops its routes through it.
fn unsolicited_advertisement(hardware: [u8; 6], ip: Ipv6Addr, router: bool) -> Vec<u8> {
    const NEXT_HEADER_ICMPV6: u8 = 58;
    const ADVERTISEMENT: u8 = 136;
    const ROUTER: u8 = 0x80;
    const OVERRIDE: u8 = 0x20;
    let flags = OVERRIDE | if router { ROUTER } else { 0 };
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(ip.octets());
    // Target link-layer address, in units of 8 bytes.
    message.extend([2, 1]);
    message.extend(hardware);

    let length = message.len() as u16;
    // Pseudo-header, RFC 8200 section 8.1; length and next header are 32 bits there.
    let pseudo = [
        &ip.octets()[..],
        &ALL_NODES.octets(),
        &u32::from(length).to_be_bytes(),
        &[0, 0, 0, NEXT_HEADER_ICMPV6],
        &message,
    ];
    let sum = checksum(&pseudo.concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    // Hop limit 255: a receiver knows by it that no router passed the message on.
    packet.extend([NEXT_HEADER_ICMPV6, 255]);
    packet.extend(ip.octets());
    packet.extend(ALL_NODES.octets());
    packet.extend(message);
    packet
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

fn forwards(interface: &str) -> Result<bool, Error> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/forwarding");
    match fs::read_to_string(&path) {
        Ok(value) => Ok(value.trim() != "0"),
        // IPv6 is off on the interface: it will not have the address either.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Sysctl {
            operation: "read",
            path: path.into(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARDWARE: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];

    #[test]
    fn gratuitous_arp_has_two_forms() {
        let [request, reply] = gratuitous_arp(HARDWARE, Ipv4Addr::new(10, 0, 0, 5));
        let head = [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 0xaa, 10, 0, 0, 5];
        assert_eq!(
            request,
            [&head[..], &[0, 0, 0, 0, 0, 0, 10, 0, 0, 5]].concat()
        );
        let head = [0, 1, 8, 0, 6, 4, 0, 2, 2, 0, 0, 0, 0, 0xaa, 10, 0, 0, 5];
        assert_eq!(
            reply,
            [&head[..], &[2, 0, 0, 0, 0, 0xaa, 10, 0, 0, 5]].concat()
        );
    }

    #[test]
    fn the_advertisement_is_complete_and_its_checksum_right() {
        let ip: Ipv6Addr = "fd00::5".parse().unwrap();
        for router in [false, true] {
            let packet = unsolicited_advertisement(HARDWARE, ip, router);
            assert_eq!(packet.len(), 40 + 32);
            assert_eq!(packet[4..8], [0, 32, 58, 255]);
            assert_eq!(packet[8..24], ip.octets());
            assert_eq!(packet[40], 136);
            assert_eq!(packet[44], if router { 0xa0 } else { 0x20 });
            assert_eq!(packet[48..64], ip.octets());
            assert_eq!(packet[64..72], [2, 1, 2, 0, 0, 0, 0, 0xaa]);
            let pseudo = [&packet[8..40], &[0, 0, 0, 32, 0, 0, 0, 58], &packet[40..]].concat();
            assert_eq!(checksum(&pseudo), 0);
        }
    }
}
