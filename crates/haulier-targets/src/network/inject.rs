use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use rustix::net::{SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use super::Error;
use super::ip_packet::{Outline, TCP, UDP};
use super::netlink::Netlink;
use super::room::Room;

const ICMP: u8 = 1;
/// For so long it is believed that an address is still here.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Delivers packets to addresses of this host, as if they had come in from outside.
///
/// They are sent by raw sockets, header included, to the address itself. So they take the way
/// of local packets, over `lo`, with a route that has been found already: there is no check of
/// the source address (`rp_filter`), and usual firewalls let `lo` pass. The kernel takes them
/// for received on the interface that has the address, so a socket bound to it gets them. They
/// pass the `output` hooks of netfilter too. Nothing is left in the system.
///
/// Belongs to the network namespace of the threads that use it, which must be the same.
#[derive(Debug)]
pub struct Injector {
    addresses: Vec<IpAddr>,
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
    netlink: Option<Netlink>,
    seen_here: HashMap<IpAddr, Instant>,
    /// None: the kernel does not tell.
    room: Option<Room>,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// The kernel has it.
    Done,
    /// It is a datagram whose socket has more than half of its buffer full: later.
    NoRoom,
}

impl Injector {
    /// For packets to `addresses`, which need not be here yet, and for datagrams that a host
    /// sends to itself over loopback addresses. Costs next to nothing.
    pub fn open(addresses: &[IpAddr]) -> Self {
        let room = Room::open()
            .inspect_err(|error| tracing::debug!(%error, "UDP sockets may overflow"))
            .ok();
        Self {
            addresses: addresses.to_vec(),
            v4: None,
            v6: None,
            netlink: None,
            seen_here: HashMap::new(),
            room,
        }
    }

    /// Delivers a packet, complete from its IP header on, unless its socket has little room:
    /// many packets at once, of many senders, would fill the buffer of a target that has just
    /// begun to run.
    ///
    /// # Errors
    /// [`Error::PacketRefused`] for a packet that may not be delivered: to another address, from
    /// an address that no host can have, or not whole. [`Error::Inject`] if the address is not
    /// here, or sending fails.
    pub fn inject(&mut self, packet: &[u8]) -> Result<Delivery, Error> {
        let outline = self.check(packet)?;
        if !self.has_room(&outline, packet) {
            return Ok(Delivery::NoRoom);
        }
        self.send(&outline, packet)?;
        Ok(Delivery::Done)
    }

    /// Delivers a packet whether there is room for it or not.
    ///
    /// # Errors
    /// As for [`Injector::inject`].
    pub fn force(&mut self, packet: &[u8]) -> Result<(), Error> {
        let outline = self.check(packet)?;
        self.send(&outline, packet)
    }

    /// The socket address that a UDP datagram is for: what must stay in order when one of them
    /// has to wait. None for other packets.
    pub fn lane(packet: &[u8]) -> Option<SocketAddr> {
        let outline = Outline::of(packet)?;
        outline.transport.filter(|transport| *transport == UDP)?;
        let (_, port) = outline.ports(packet)?;
        Some(SocketAddr::new(outline.to, port))
    }

    fn check(&self, packet: &[u8]) -> Result<Outline, Error> {
        let refused = Error::PacketRefused;
        let outline = Outline::of(packet).ok_or(refused("it is not an IP packet"))?;
        if !outline.is_whole(packet) {
            return Err(refused("its length is not what its header says"));
        }
        let among_ourselves = outline.from.is_loopback() && outline.to.is_loopback();
        if among_ourselves && outline.transport == Some(UDP) {
            return Ok(outline);
        }
        if !self.addresses.contains(&outline.to) {
            return Err(refused("it is for an address that has not moved"));
        }
        let broadcast = outline.from == IpAddr::V4(Ipv4Addr::BROADCAST);
        if outline.from.is_loopback()
            || outline.from.is_multicast()
            || outline.from.is_unspecified()
            || broadcast
        {
            return Err(refused("its source is an address that no other host has"));
        }
        let usual = match outline.transport {
            Some(transport) => [TCP, UDP, ICMP].contains(&transport),
            // Fragments, and ICMP for IPv6.
            None => true,
        };
        if !usual {
            return Err(refused("its protocol is not one that is forwarded"));
        }
        Ok(outline)
    }

    fn has_room(&mut self, outline: &Outline, packet: &[u8]) -> bool {
        if outline.transport != Some(UDP) {
            return true;
        }
        let (Some(room), Some((from, to))) = (&mut self.room, outline.ports(packet)) else {
            return true;
        };
        let from = SocketAddr::new(outline.from, from);
        let to = SocketAddr::new(outline.to, to);
        match room.of(from, to) {
            // Half: what has been read is given back to the buffer a quarter at a time
            // (udp_rmem_release(), net/ipv4/udp.c).
            Ok(Some(fill)) => fill.used <= fill.limit / 2,
            // A socket that there is not has no room either, and its sender is to be told.
            Ok(None) => true,
            Err(error) => {
                tracing::debug!(%error, "UDP sockets may overflow");
                self.room = None;
                true
            }
        }
    }

    fn send(&mut self, outline: &Outline, packet: &[u8]) -> Result<(), Error> {
        self.look_for(outline.to)?;
        let failed = |operation| failed(operation, outline.to);
        let socket = match outline.to {
            IpAddr::V4(_) => raw_socket(&mut self.v4, outline.to),
            IpAddr::V6(_) => raw_socket(&mut self.v6, outline.to),
        };
        let socket = socket.map_err(failed("open a raw socket"))?;
        let to = SocketAddr::new(outline.to, 0);
        let sent = loop {
            match sendto(socket, packet, SendFlags::NOSIGNAL, &to) {
                Err(Errno::INTR) => {}
                sent => break sent,
            }
        };
        match sent {
            Ok(_) => Ok(()),
            Err(errno) => Err(failed("send a packet")(errno.into())),
        }
    }

    /// A packet for an address that is not here would be sent out, in somebody else's name.
    fn look_for(&mut self, address: IpAddr) -> Result<(), Error> {
        let now = Instant::now();
        let seen = self.seen_here.get(&address);
        if seen.is_some_and(|seen| now.duration_since(*seen) < LOOK_AGAIN) {
            return Ok(());
        }
        let mut netlink = match self.netlink.take() {
            Some(netlink) => netlink,
            None => Netlink::open()?,
        };
        let here = is_here(&mut netlink, address);
        self.netlink = Some(netlink);
        if !here.map_err(failed("find the address", address))? {
            let missing = io::ErrorKind::AddrNotAvailable.into();
            return Err(failed("find the address here", address)(missing));
        }
        self.seen_here.insert(address, now);
        Ok(())
    }
}

fn failed(operation: &'static str, address: IpAddr) -> impl Fn(io::Error) -> Error {
    move |source| Error::Inject {
        operation,
        address,
        source,
    }
}

fn raw_socket(socket: &mut Option<OwnedFd>, address: IpAddr) -> io::Result<&OwnedFd> {
    let family = match address {
        IpAddr::V4(_) => rustix::net::AddressFamily::INET,
        IpAddr::V6(_) => rustix::net::AddressFamily::INET6,
    };
    let opened = match socket.take() {
        Some(opened) => opened,
        // Protocol RAW stands for all of them: the header is the sender's, and nothing is
        // received (raw(7)).
        None => socket_with(
            family,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(ipproto::RAW),
        )?,
    };
    Ok(socket.insert(opened))
}

/// Whether the kernel's way to an address ends in this host.
fn is_here(netlink: &mut Netlink, address: IpAddr) -> io::Result<bool> {
    const UNREACHABLE: [Errno; 4] = [
        Errno::NETUNREACH,
        Errno::HOSTUNREACH,
        Errno::ACCESS,
        Errno::INVAL,
    ];
    let mut request = RouteMessage::default();
    let (family, bits, address) = match address {
        IpAddr::V4(ip) => (AddressFamily::Inet, 32, RouteAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(ip)),
    };
    request.header.address_family = family;
    request.header.destination_prefix_length = bits;
    request
        .attributes
        .push(RouteAttribute::Destination(address));
    let answers = match netlink.ask(RouteNetlinkMessage::GetRoute(request), 0) {
        Err(error) => {
            let unreachable = UNREACHABLE
                .iter()
                .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
            return if unreachable { Ok(false) } else { Err(error) };
        }
        answers => answers?,
    };
    Ok(answers.iter().any(|answer| match answer {
        RouteNetlinkMessage::NewRoute(route) => route.header.kind == RouteType::Local,
        _ => false,
    }))
}
