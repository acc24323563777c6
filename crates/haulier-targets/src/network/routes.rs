//! IPv4 routes that the kernel deletes along with an address although they hold without it.
//!
//! Deleting an address deletes every route of the main table whose preferred source it is
//! (fib_sync_down_addr(), net/ipv4/fib_semantics.c); promoting a secondary address does the
//! same to routes from that one, and the kernel puts back only those it made itself.

use std::collections::HashSet;
use std::io;
use std::net::Ipv4Addr;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::Error;
use super::netlink::Netlink;

/// `RT_TABLE_LOCAL`: the kernel's own addresses and broadcasts.
const TABLE_LOCAL: u8 = 255;

/// Routes that may vanish with an address, as they were before it was removed.
#[derive(Debug)]
pub(super) struct Routes {
    ip: Ipv4Addr,
    interface: u32,
    /// The interface keeps an IPv4 address.
    others: bool,
    before: Vec<RouteMessage>,
}

/// What became of the routes that vanished, each in the manner of `ip route`.
#[derive(Debug, Default)]
pub(super) struct Restored {
    pub(super) restored: Vec<String>,
    pub(super) lost: Vec<String>,
    /// Still there, sending from an address that is not.
    pub(super) stale: Vec<String>,
}

impl Routes {
    /// Remembers the routes that name any source address, or use the interface.
    pub(super) fn before_removal(
        netlink: &mut Netlink,
        ip: Ipv4Addr,
        interface: u32,
        others: bool,
    ) -> Result<Self, Error> {
        let before = list(netlink, interface)?;
        Ok(Self {
            ip,
            interface,
            others,
            before,
        })
    }

    /// Puts back those that are gone and that the kernel takes without the address; it
    /// refuses a gateway that no remaining address reaches.
    pub(super) fn restore(self, netlink: &mut Netlink) -> Result<Restored, Error> {
        let mut result = Restored::default();
        if self.before.is_empty() {
            return Ok(result);
        }
        let after = list(netlink, self.interface)?;
        let source = RouteAttribute::PrefSource(RouteAddress::Inet(self.ip));
        let stale = after
            .iter()
            .filter(|route| route.attributes.contains(&source));
        result.stale = stale.map(|route| describe(netlink, route)).collect();
        let after: HashSet<String> = after.iter().map(identity).collect();
        let mut gone = self.before;
        gone.retain(|route| !after.contains(&identity(route)));
        // A gateway is found through the routes of its interface: those first.
        gone.sort_by_key(|route| std::cmp::Reverse(u8::from(route.header.scope)));
        for mut route in gone {
            // With its last address the kernel clears an interface (fib_disable_ip); a route
            // put back there would send with another interface's address.
            if !self.others && interface(&route) == Some(self.interface) {
                result.lost.push(format!(
                    "{}: no IPv4 address left there",
                    describe(netlink, &route)
                ));
                continue;
            }
            prepare(&mut route, self.ip);
            let text = describe(netlink, &route);
            let request = RouteNetlinkMessage::NewRoute(route);
            match netlink.ask(request, NLM_F_CREATE | NLM_F_APPEND) {
                Ok(_) => result.restored.push(text),
                Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
                Err(error) => result.lost.push(format!("{text}: {error}")),
            }
        }
        Ok(result)
    }
}

fn list(netlink: &mut Netlink, interface: u32) -> Result<Vec<RouteMessage>, Error> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    let request = RouteNetlinkMessage::GetRoute(request);
    netlink
        .dump(&request, |message| match message {
            RouteNetlinkMessage::NewRoute(route) if concerns(&route, interface) => Some(route),
            _ => None,
        })
        .map_err(|source: io::Error| Error::Netlink {
            operation: "list",
            subject: "the IPv4 routes of this host".to_owned(),
            source,
        })
}

fn concerns(route: &RouteMessage, index: u32) -> bool {
    let own = route.header.protocol == RouteProtocol::Kernel || route.header.table == TABLE_LOCAL;
    !own && (interface(route) == Some(index)
        || route.attributes.iter().any(|attribute| {
            matches!(
                attribute,
                RouteAttribute::PrefSource(_) | RouteAttribute::MultiPath(_)
            )
        }))
}

/// What makes it the same route before and after: all but its state.
fn identity(route: &RouteMessage) -> String {
    let mut route = route.clone();
    clean(&mut route);
    format!("{route:?}")
}

/// Takes off what the kernel reports and does not accept back.
fn clean(route: &mut RouteMessage) {
    route.header.flags &= RouteFlags::Onlink;
    route
        .attributes
        .retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
}

fn prepare(route: &mut RouteMessage, without: Ipv4Addr) {
    clean(route);
    let source = RouteAttribute::PrefSource(RouteAddress::Inet(without));
    route.attributes.retain(|attribute| *attribute != source);
    // The kernel lists a nexthop object's contents beside its id and takes only the id.
    if route
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, RouteAttribute::NhId(_)))
    {
        route.attributes.retain(|attribute| {
            !matches!(
                attribute,
                RouteAttribute::Gateway(_)
                    | RouteAttribute::Via(_)
                    | RouteAttribute::Oif(_)
                    | RouteAttribute::MultiPath(_)
                    | RouteAttribute::Encap(_)
                    | RouteAttribute::EncapType(_)
            )
        });
        route.header.scope = RouteScope::Universe;
    }
}

fn interface(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

fn describe(netlink: &Netlink, route: &RouteMessage) -> String {
    let find = |wanted: fn(&RouteAttribute) -> Option<String>| {
        route.attributes.iter().find_map(wanted).unwrap_or_default()
    };
    let destination = find(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(ip.to_string()),
        _ => None,
    });
    let gateway = find(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some(format!(" via {ip}")),
        _ => None,
    });
    let device = match interface(route).map(|index| (index, netlink.interface_name(index))) {
        None => String::new(),
        Some((_, Ok(name))) => format!(" dev {name}"),
        Some((index, Err(_))) => format!(" dev if{index}"),
    };
    let source = find(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(format!(" src {ip}")),
        _ => None,
    });
    let metric = find(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(format!(" metric {metric}")),
        _ => None,
    });
    let table = find(|attribute| match attribute {
        RouteAttribute::Table(table) if *table != u32::from(RouteHeader::RT_TABLE_MAIN) => {
            Some(format!(" table {table}"))
        }
        _ => None,
    });
    let destination = match destination.as_str() {
        "" => "default".to_owned(),
        ip => format!("{ip}/{}", route.header.destination_prefix_length),
    };
    [destination, gateway, device, source, metric, table].concat()
}
