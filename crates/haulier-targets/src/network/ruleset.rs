//! The text of the batches: which packets a lock drops.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::lock::LockScope;
use super::nf_tables::Family;

/// All names of ours begin so.
pub(super) const PREFIX: &str = "haulier_";

/// Before conntrack, NAT and every usual filter, after defragmentation (NF_IP_PRI_RAW).
const PRIORITY: i32 = -300;

/// Errors about what was sent, and pings, so that who watches a target by them sees no gap.
const ICMP: &str = "icmp type { destination-unreachable, time-exceeded, parameter-problem, \
                    echo-request }";
const ICMPV6: &str = "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, \
                      parameter-problem, echo-request }";

/// One batch that creates the lock's tables, in place of any that are there, and the families
/// it has tables in.
///
/// - `input`, not `prerouting`: what the host merely forwards to or from the address (the
///   destination may be a router on the target's way) is none of the lock's business. The
///   kernel has answered nothing before this hook: no RST, no ICMP.
/// - `output` lets `lo` pass, and `input` drops what comes from there: a packet dropped on
///   output fails its sender's `sendto` with EPERM, which a local UDP client would see.
/// - Neighbour discovery names the address in its payload: the target of solicitations
///   (resolution, duplicate detection) and advertisements is at byte 8 of both, RFC 4861
///   4.3 and 4.4. nft before 1.0.9 knows no `icmpv6 taddr`.
/// - ARP: neither asked for the address, nor announced, nor used as the sender of questions
///   for others (which teach its hardware address just as well), nor asked about.
/// - What `input` drops goes to the group of the packet log `log`, if there is one: what a host
///   is to receive at an address of its own, by the protocols that can be delivered elsewhere.
///   `ip saddr` comes first: what an address sends to itself never leaves the host.
pub(super) fn engage(table: &str, scope: &LockScope, log: Option<u16>) -> (String, Vec<Family>) {
    let mut v4: Vec<Ipv4Addr> = Vec::new();
    let mut v6: Vec<Ipv6Addr> = Vec::new();
    for ip in &scope.addresses {
        match ip {
            IpAddr::V4(ip) => v4.push(*ip),
            IpAddr::V6(ip) => v6.push(*ip),
        }
    }
    let mut families = vec![Family::Inet];
    let mut text = replace(Family::Inet, table);
    inet(&mut text, table, "", &v4, &v6, scope, log);
    if !v4.is_empty() {
        families.push(Family::Arp);
        text += &replace(Family::Arp, table);
        arp(&mut text, table, "", &v4);
    }
    (text, families)
}

/// One batch that deletes the tables, whether they are there or not (`destroy` does that only
/// from nft 1.0.7 and kernel 6.3).
pub(super) fn lift(table: &str, families: &[Family]) -> String {
    families
        .iter()
        .map(|family| replace(*family, table))
        .collect()
}

/// A batch that creates a table with every kind of rule the lock has, dormant, and deletes it:
/// the kernel checks it all, and no packet ever meets it.
/// With `log`, also rules that log to that group.
pub(super) fn probe(table: &str, family: Family, log: Option<u16>) -> String {
    let v4 = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    let v6 = [1, 2].map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
    let pair = |local: IpAddr, remote: IpAddr| super::Connection {
        local: SocketAddr::new(local, 1),
        remote: SocketAddr::new(remote, 2),
    };
    let scope = LockScope {
        addresses: Vec::new(),
        connections: vec![
            pair(v4[0].into(), v4[1].into()),
            pair(v6[0].into(), v6[1].into()),
        ],
    };
    let mut text = String::new();
    match family {
        Family::Inet => inet(&mut text, table, "flags dormant;", &v4, &v6, &scope, log),
        Family::Arp => arp(&mut text, table, "flags dormant;", &v4),
    }
    text + &format!("delete table {} {table}\n", family.name())
}

fn replace(family: Family, table: &str) -> String {
    let family = family.name();
    format!("add table {family} {table}\ndelete table {family} {table}\n")
}

fn inet(
    text: &mut String,
    table: &str,
    flags: &str,
    v4: &[Ipv4Addr],
    v6: &[Ipv6Addr],
    scope: &LockScope,
    log: Option<u16>,
) {
    let log = log.map(|group| format!("log group {group}"));
    let mut input = String::new();
    let mut output = String::from("oifname \"lo\" accept\n");
    if !v4.is_empty() {
        let set = set(v4);
        for rules in [&mut input, &mut output] {
            line(rules, format_args!("ip saddr {set} drop"));
        }
        if let Some(log) = &log {
            for kind in ["meta l4proto { tcp, udp }", ICMP] {
                line(&mut input, format_args!("ip daddr {set} {kind} {log}"));
            }
        }
        for rules in [&mut input, &mut output] {
            line(rules, format_args!("ip daddr {set} drop"));
        }
    }
    if !v6.is_empty() {
        let set = set(v6);
        let targets: Vec<String> = v6
            .iter()
            .map(|ip| format!("0x{:032x}", ip.to_bits()))
            .collect();
        let targets = targets.join(", ");
        for rules in [&mut input, &mut output] {
            line(rules, format_args!("ip6 saddr {set} drop"));
        }
        if let Some(log) = &log {
            for kind in ["meta l4proto { tcp, udp }", ICMPV6] {
                line(&mut input, format_args!("ip6 daddr {set} {kind} {log}"));
            }
        }
        for rules in [&mut input, &mut output] {
            line(rules, format_args!("ip6 daddr {set} drop"));
            line(
                rules,
                format_args!(
                    "icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} \
                     @th,64,128 {{ {targets} }} drop"
                ),
            );
        }
    }
    for (family, pairs) in ["ip", "ip6"].into_iter().zip(pairs(scope)) {
        if pairs.is_empty() {
            continue;
        }
        let set = |reverse: bool| {
            let tuples = pairs.iter().map(|(local, remote)| {
                let (from, to) = if reverse {
                    (local, remote)
                } else {
                    (remote, local)
                };
                format!(
                    "{} . {} . {} . {}",
                    from.ip(),
                    to.ip(),
                    from.port(),
                    to.port()
                )
            });
            tuples.collect::<Vec<_>>().join(", ")
        };
        let key = format!("{family} saddr . {family} daddr . tcp sport . tcp dport");
        let log = log.as_deref().unwrap_or_default();
        line(
            &mut input,
            format_args!("{key} {{ {} }} {log} drop", set(false)),
        );
        line(&mut output, format_args!("{key} {{ {} }} drop", set(true)));
    }
    create(text, Family::Inet, table, flags, &input, &output);
}

fn arp(text: &mut String, table: &str, flags: &str, v4: &[Ipv4Addr]) {
    let set = set(v4);
    let input = format!("arp daddr ip {set} drop\n");
    let output = format!("arp saddr ip {set} drop\narp daddr ip {set} drop\n");
    create(text, Family::Arp, table, flags, &input, &output);
}

fn create(text: &mut String, family: Family, table: &str, flags: &str, input: &str, output: &str) {
    let family = family.name();
    line(text, format_args!("table {family} {table} {{ {flags}"));
    for (hook, rules) in [("input", input), ("output", output)] {
        line(
            text,
            format_args!(
                "chain {hook} {{ type filter hook {hook} priority {PRIORITY}; policy accept;\n\
                 {rules}}}"
            ),
        );
    }
    line(text, format_args!("}}"));
}

/// Connections by family, without those an address rule covers and without repetitions: nft
/// refuses a set that names an element twice.
fn pairs(scope: &LockScope) -> [Vec<(SocketAddr, SocketAddr)>; 2] {
    let mut pairs = [Vec::new(), Vec::new()];
    for connection in &scope.connections {
        let pair = (connection.local, connection.remote);
        match pair {
            (SocketAddr::V4(_), SocketAddr::V4(_)) => pairs[0].push(pair),
            (SocketAddr::V6(local), SocketAddr::V6(remote)) => {
                // nft knows no scope ids; the same pair on two links is dropped on both.
                let local = SocketAddr::new((*local.ip()).into(), local.port());
                let remote = SocketAddr::new((*remote.ip()).into(), remote.port());
                pairs[1].push((local, remote));
            }
            // Not a pair that a connection can have.
            _ => {}
        }
    }
    for pairs in &mut pairs {
        pairs.sort_unstable();
        pairs.dedup();
    }
    pairs
}

fn set<T: ToString + Ord>(elements: &[T]) -> String {
    let mut elements: Vec<&T> = elements.iter().collect();
    elements.sort_unstable();
    elements.dedup();
    let elements: Vec<String> = elements.into_iter().map(T::to_string).collect();
    format!("{{ {} }}", elements.join(", "))
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{content}");
}
