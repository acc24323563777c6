use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::netlink::{Netlink, family};
use super::promote::PromoteSecondaries;
use super::routes::{Restored, Routes};
use super::{Error, MoveIp};

/// How long the kernel's work queue may take to put a new IPv6 address into its local table.
const USABLE_WITHIN: Duration = Duration::from_secs(1);

/// An address configured on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface that has it.
    pub interface: String,
    /// The address; of a point-to-point pair, our own.
    pub ip: IpAddr,
    /// How many leading bits name the subnet.
    pub prefix: u8,
    /// Another IPv4 address of the same subnet came first; the kernel normally deletes this
    /// one with it. For IPv6: a temporary (privacy) address.
    pub secondary: bool,
    /// IPv6: duplicate address detection is under way, the address cannot be used yet.
    pub tentative: bool,
    /// IPv6: someone else has it.
    pub duplicate: bool,
    /// It has a lifetime: DHCP, router advertisements or a lease manager gave it, and may
    /// take it away or give it again.
    pub leased: bool,
}

impl Address {
    /// Whether this is the address, on the interface, that `address` names.
    pub fn is(&self, address: &MoveIp) -> bool {
        self.ip == address.ip()
            && self.prefix == address.prefix()
            && self.interface == address.interface()
    }
}

/// What [`remove`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removal {
    /// False: the address was not there (any more).
    pub removed: bool,
    /// IPv4 routes that the kernel deleted with the address and that were put back, because
    /// they hold without it. In the manner of `ip route`.
    pub routes_restored: Vec<String>,
    /// IPv4 routes that went with the address, each with the reason.
    pub routes_lost: Vec<String>,
    /// IPv4 routes that still send from the address, although it is gone: the kernel clears
    /// them out of the main table only. They are the administrator's to change.
    pub routes_stale: Vec<String>,
}

/// All addresses in the network namespace of the calling thread.
///
/// # Errors
/// [`Error::Netlink`].
pub fn addresses() -> Result<Vec<Address>, Error> {
    list(&mut Netlink::open()?)
}

/// Gives an address to its interface, usable for receiving and sending when this returns:
/// an IPv6 address without duplicate address detection, which would hold it back for a second
/// or more and find the source's.
///
/// Returns false if the interface had it already (recovery calls this again).
///
/// # Errors
/// [`Error::NoSuchInterface`], [`Error::Netlink`], [`Error::NotUsable`]; in the last case the
/// address stays.
pub fn add(address: &MoveIp) -> Result<bool, Error> {
    let mut netlink = Netlink::open()?;
    let index = netlink.link(address.interface())?.index;
    let mut message = message(address, index);
    if address.ip().is_ipv6() {
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    let request = RouteNetlinkMessage::NewAddress(message);
    let added = match netlink.ask(request, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(_) => true,
        Err(error) if is(&error, Errno::EXIST) => false,
        Err(source) => return Err(failed("add address", address, source)),
    };
    // The kernel inserts an IPv4 address's local route before it answers; an IPv6 address's
    // from a work queue (addrconf_dad_work), and until then packets to it find no one.
    if address.ip().is_ipv6() {
        wait_until_local(&mut netlink, address)?;
    }
    Ok(added)
}

/// Takes an address from its interface, and nothing else with it: the kernel would delete
/// the other IPv4 addresses of the subnet if this is the first of them, and IPv4 routes that
/// name one of them as their source.
///
/// An address that is not there is no error: `removed` is false.
///
/// # Errors
/// [`Error::ConfiguredDifferently`] if the interface has it with another prefix length,
/// [`Error::Sysctl`] if secondary addresses cannot be saved: nothing is changed then.
/// [`Error::Netlink`].
pub fn remove(address: &MoveIp) -> Result<Removal, Error> {
    let mut netlink = Netlink::open()?;
    let index = netlink.link(address.interface())?.index;
    let mut here = list(&mut netlink)?;
    here.retain(|other| other.interface == address.interface());
    if !here.iter().any(|other| other.is(address)) {
        return match here.iter().find(|other| other.ip == address.ip()) {
            None => Ok(Removal::default()),
            Some(other) => Err(Error::ConfiguredDifferently {
                wanted: address.clone(),
                found: format!("{}/{}@{}", other.ip, other.prefix, other.interface),
            }),
        };
    }
    let others = here
        .iter()
        .any(|other| other.ip != address.ip() && other.ip.is_ipv4());
    let routes = match address.ip() {
        IpAddr::V4(ip) => Some(Routes::before_removal(&mut netlink, ip, index, others)?),
        // IPv6 keeps routes that name the address as source, and only forgets the name.
        IpAddr::V6(_) => None,
    };
    let promote = match address.ip() {
        IpAddr::V4(_)
            if here
                .iter()
                .any(|other| other.secondary && other.ip.is_ipv4()) =>
        {
            Some(PromoteSecondaries::on(address.interface())?)
        }
        _ => None,
    };
    let request = RouteNetlinkMessage::DelAddress(message(address, index));
    let removed = match netlink.ask(request, 0) {
        Ok(_) => true,
        Err(error) if is(&error, Errno::ADDRNOTAVAIL) => false,
        Err(source) => return Err(failed("remove address", address, source)),
    };
    drop(promote);
    let Restored {
        restored,
        lost,
        stale,
    } = match routes {
        Some(routes) => routes.restore(&mut netlink)?,
        None => Restored::default(),
    };
    Ok(Removal {
        removed,
        routes_restored: restored,
        routes_lost: lost,
        routes_stale: stale,
    })
}

fn message(address: &MoveIp, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip());
    message.header.prefix_len = address.prefix();
    message.header.index = index;
    message.header.scope = match address.ip() {
        IpAddr::V4(ip) if ip.is_link_local() => AddressScope::Link,
        // IPv6: the kernel finds the scope itself.
        _ => AddressScope::Universe,
    };
    message
        .attributes
        .push(AddressAttribute::Local(address.ip()));
    message
        .attributes
        .push(AddressAttribute::Address(address.ip()));
    message
}

fn list(netlink: &mut Netlink) -> Result<Vec<Address>, Error> {
    let fail = |source| Error::Netlink {
        operation: "list",
        subject: "the addresses of this host".to_owned(),
        source,
    };
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let messages = netlink
        .dump(&request, |message| match message {
            RouteNetlinkMessage::NewAddress(message) => Some(message),
            _ => None,
        })
        .map_err(fail)?;
    let mut known = HashMap::new();
    let mut addresses = Vec::new();
    for message in messages {
        let index = message.header.index;
        let interface = match known.get(&index) {
            Some(name) => Clone::clone(name),
            None => match netlink.interface_name(index) {
                Ok(name) => known.entry(index).or_insert(name).clone(),
                // The interface went away since the list was made.
                Err(Errno::NODEV) => continue,
                Err(error) => return Err(fail(error.into())),
            },
        };
        addresses.extend(decode(&message, interface));
    }
    Ok(addresses)
}

fn decode(message: &AddressMessage, interface: String) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let mut address = None;
    let mut local = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(Address {
        interface,
        ip: local.or(address)?,
        prefix: message.header.prefix_len,
        secondary: flags.contains(AddressFlags::Secondary),
        tentative: flags.contains(AddressFlags::Tentative),
        duplicate: flags.contains(AddressFlags::Dadfailed),
        leased: !flags.contains(AddressFlags::Permanent),
    })
}

fn wait_until_local(netlink: &mut Netlink, address: &MoveIp) -> Result<(), Error> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet6;
    request.header.destination_prefix_length = 128;
    request
        .attributes
        .push(RouteAttribute::Destination(address.ip().into()));
    let request = RouteNetlinkMessage::GetRoute(request);
    let deadline = Instant::now() + USABLE_WITHIN;
    loop {
        let local = match netlink.ask(request.clone(), 0) {
            Ok(answers) => answers.iter().any(|answer| {
                matches!(answer, RouteNetlinkMessage::NewRoute(route)
                    if route.header.kind == RouteType::Local)
            }),
            Err(error) if is(&error, Errno::NETUNREACH) => false,
            Err(source) => return Err(failed("look up the route to", address, source)),
        };
        if local {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::NotUsable {
                address: address.clone(),
                waited: USABLE_WITHIN,
            });
        }
        thread::sleep(Duration::from_micros(100));
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn failed(operation: &'static str, address: &MoveIp, source: io::Error) -> Error {
    Error::Netlink {
        operation,
        subject: address.to_string(),
        source,
    }
}
