use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream, UdpSocket};

use haulier_targets::network::{
    ArmedLock, Connection, EngagedLock, Error, LockScope, MoveIp, add, announce, id_of, lift_by_id,
    probe, tables_of_haulier,
};

use crate::world::{MOVED, Namespace, PATIENCE, SILENCE, STAYING, connection, eventually, world};

const NEW_HARDWARE: &str = "02:00:00:00:00:77";

fn engage(host: &Namespace, id: &str, scope: &LockScope) -> EngagedLock {
    host.run(|| ArmedLock::arm(id).unwrap().engage(scope).unwrap())
}

fn lift(host: &Namespace, lock: &mut EngagedLock) {
    host.run(|| lock.lift().unwrap());
}

fn ruleset(host: &Namespace) -> String {
    host.sh("nft list ruleset")
}

/// Nothing comes: neither data nor an end nor a reset.
fn is_silent(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    // A thread that was stopped meanwhile (a debugger, a freezer) is interrupted: signal(7).
    let error = loop {
        let error = stream.read(&mut [0; 64]).unwrap_err();
        if error.kind() != ErrorKind::Interrupted {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
}

fn receives(stream: &mut TcpStream, expected: &[u8]) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = vec![0; expected.len()];
    stream.read_exact(&mut received).unwrap();
    assert_eq!(received, expected);
}

fn closed_port(host: &Namespace, ip: IpAddr) -> u16 {
    host.listen((ip, 0).into()).local_addr().unwrap().port()
}

#[test]
fn a_moved_address_is_silent_while_locked() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let hardware = b.sh("cat /sys/class/net/vb/address 2>/dev/null || ip -o link show vb");
    let hardware = hardware
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1);
    let hardware = hardware
        .unwrap_or_else(|| panic!("no link/ether of vb"))
        .to_owned();
    for (moved, staying) in MOVED.into_iter().zip(STAYING) {
        let moved: MoveIp = moved.parse().unwrap();
        let ip = moved.ip();
        assert!(b.run(|| add(&moved).unwrap()));
        let (listener, mut client, mut server) = connection(&world, ip);
        let server_address = listener.local_addr().unwrap();
        let closed = (ip, closed_port(b, ip)).into();
        let refused = a.connect(closed, PATIENCE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

        let scope = LockScope::new(std::slice::from_ref(&moved), &[]);
        let mut lock = engage(b, "ab01", &scope);
        assert_eq!(b.run(|| tables_of_haulier().unwrap()), ["haulier_ab01"]);

        // The neighbour knows the hardware address: what fails now fails by the packet rules.
        a.sh(&format!(
            "ip neigh replace {ip} lladdr {hardware} dev va nud permanent"
        ));
        client.write_all(b"to b").unwrap();
        server.write_all(b"to a").unwrap();
        is_silent(&mut client);
        is_silent(&mut server);
        // No listener's answer, and no reset of the kernel's own.
        for to in [server_address, closed] {
            assert_eq!(
                a.connect(to, SILENCE).unwrap_err().kind(),
                ErrorKind::TimedOut,
                "{to}"
            );
        }
        // Nor to a client on the host itself, who is not told of an error either.
        assert_eq!(
            b.connect(server_address, SILENCE).unwrap_err().kind(),
            ErrorKind::TimedOut
        );
        b.run(|| {
            let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            assert_eq!(socket.send_to(b"x", server_address).unwrap(), 1);
        });

        // The neighbour forgot: it gets no answer to its question.
        a.sh(&format!("ip neigh del {ip} dev va"));
        let unreachable = a.connect(server_address, PATIENCE).unwrap_err();
        assert_eq!(unreachable.kind(), ErrorKind::HostUnreachable);
        assert!(a.neighbour(ip).contains("FAILED"), "{}", a.neighbour(ip));
        // The host's other address is as reachable as ever.
        let staying: IpAddr = staying.parse().unwrap();
        drop(connection(&world, staying));

        lift(b, &mut lock);
        assert_eq!(ruleset(b), "");
        assert_eq!(b.run(|| tables_of_haulier().unwrap()), [""; 0]);
        lift(b, &mut lock);
        a.sh("ip neigh flush dev va");
        receives(&mut client, b"to a");
        receives(&mut server, b"to b");
        drop(a.connect(server_address, PATIENCE).unwrap());
        let refused = a.connect(closed, PATIENCE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn an_idle_connection_survives_the_lock() {
    let Some(world) = world() else { return };
    for moved in MOVED {
        let moved: MoveIp = moved.parse().unwrap();
        world.b.run(|| add(&moved).unwrap());
        let (_listener, mut client, mut server) = connection(&world, moved.ip());
        let scope = LockScope::new(std::slice::from_ref(&moved), &[]);
        let mut lock = engage(&world.b, "ab02", &scope);
        is_silent(&mut client);
        lift(&world.b, &mut lock);
        client.write_all(b"ping").unwrap();
        receives(&mut server, b"ping");
        server.write_all(b"pong").unwrap();
        receives(&mut client, b"pong");
    }
}

#[test]
fn a_locked_connection_leaves_its_neighbours_alone() {
    let Some(world) = world() else { return };
    for ip in STAYING {
        let ip: IpAddr = ip.parse().unwrap();
        let (listener, mut client, mut server) = connection(&world, ip);
        let mut other = world
            .a
            .connect(listener.local_addr().unwrap(), PATIENCE)
            .unwrap();
        let (mut other_server, _) = listener.accept().unwrap();
        let locked = Connection {
            local: server.local_addr().unwrap(),
            remote: server.peer_addr().unwrap(),
        };
        let scope = LockScope::new(&[], &[locked, locked]);
        let mut lock = engage(&world.b, "ab03", &scope);
        client.write_all(b"to b").unwrap();
        server.write_all(b"to a").unwrap();
        is_silent(&mut client);
        is_silent(&mut server);
        other.write_all(b"x").unwrap();
        receives(&mut other_server, b"x");
        lift(&world.b, &mut lock);
        receives(&mut client, b"to a");
        receives(&mut server, b"to b");
        assert_eq!(ruleset(&world.b), "");
    }
}

/// The kernel announces a new hardware address if told to; under the lock it does so for the
/// address that stays, and not for the one that is locked.
#[test]
fn the_kernel_announces_no_locked_address() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let moved = MOVED.map(|moved| moved.parse::<MoveIp>().unwrap());
    for (moved, staying) in moved.iter().zip(STAYING) {
        b.run(|| add(moved).unwrap());
        drop(connection(&world, moved.ip()));
        drop(connection(&world, staying.parse().unwrap()));
    }
    b.sysctl("ipv4/conf/vb/arp_notify", "1");
    b.sysctl("ipv6/conf/vb/ndisc_notify", "1");
    let mut lock = engage(b, "ab04", &LockScope::new(&moved, &[]));
    b.sh(&format!("ip link set vb address {NEW_HARDWARE}"));
    for (moved, staying) in moved.iter().zip(STAYING) {
        let staying: IpAddr = staying.parse().unwrap();
        eventually("the staying address is announced", || {
            a.neighbour(staying).contains(NEW_HARDWARE)
        });
        let neighbour = a.neighbour(moved.ip());
        assert!(neighbour.contains("lladdr"), "{neighbour:?}");
        assert!(!neighbour.contains(NEW_HARDWARE), "{neighbour:?}");
        // Our own announcement goes past the lock.
        b.run(|| announce(moved).unwrap());
        eventually("the moved address is announced", || {
            a.neighbour(moved.ip()).contains(NEW_HARDWARE)
        });
    }
    lift(b, &mut lock);
}

/// Both hosts of a migration have the address for a while: neither may notice the other,
/// whichever of them asks.
#[test]
fn duplicate_address_detection_finds_nobody_locked() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let scope = LockScope::new(&[MOVED[1].parse().unwrap()], &[]);
    for (asking, device, having, other) in [(a, "va", b, "vb"), (b, "vb", a, "va")] {
        asking.sysctl(&format!("ipv6/conf/{device}/accept_dad"), "1");
        having.sh(&format!("ip addr add fd00::5/64 dev {other} nodad"));
        let detect = || {
            asking.sh(&format!("ip addr add fd00::5/64 dev {device}"));
            let mut shown = String::new();
            eventually("duplicate address detection ends", || {
                shown = asking.sh(&format!("ip -6 addr show dev {device} to fd00::5"));
                !shown.contains("tentative") || shown.contains("dadfailed")
            });
            asking.sh(&format!("ip addr del fd00::5/64 dev {device}"));
            shown
        };
        let shown = detect();
        assert!(
            shown.contains("dadfailed"),
            "without a lock it is found: {shown}"
        );
        let lock = engage(b, "ab05", &scope);
        let shown = detect();
        assert!(
            shown.contains("fd00::5") && !shown.contains("dadfailed"),
            "{shown}"
        );
        b.run(|| drop(lock));
        having.sh(&format!("ip addr del fd00::5/64 dev {other}"));
    }
}

/// A probe for duplicates names the address in its payload only: it comes from `::`, and goes
/// to a multicast group.
#[test]
fn a_probe_for_a_locked_address_does_not_reach_the_wire() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    a.sh("nft add table ip6 seen");
    a.sh("nft 'add set ip6 seen targets { type ipv6_addr; size 99; flags dynamic; }'");
    a.sh("nft 'add chain ip6 seen in { type filter hook prerouting priority 0; }'");
    a.sh(
        "nft 'add rule ip6 seen in icmpv6 type nd-neighbor-solicit ip6 saddr :: \
          update @targets { ip6 daddr }'",
    );
    b.sysctl("ipv6/conf/vb/accept_dad", "1");
    let lock = engage(
        b,
        "ab0a",
        &LockScope::new(&[MOVED[1].parse().unwrap()], &[]),
    );
    // fd00::5 is locked, fd00::9 is not; each has a solicited-node group of its own.
    b.sh("ip addr add fd00::5/64 dev vb && ip addr add fd00::9/64 dev vb");
    eventually("both probes are over", || {
        !b.sh("ip -6 addr show dev vb").contains("tentative")
    });
    let seen = a.sh("nft list set ip6 seen targets");
    assert!(seen.contains("ff02::1:ff00:9"), "{seen}");
    assert!(!seen.contains("ff02::1:ff00:5"), "{seen}");
    b.run(|| drop(lock));
}

#[test]
fn a_lock_ends_with_its_object_unless_it_is_kept() {
    let Some(world) = world() else { return };
    let b = &world.b;
    let scope = LockScope::new(&MOVED.map(|moved| moved.parse().unwrap()), &[]);
    b.run(|| drop(ArmedLock::arm("ab06").unwrap()));
    assert_eq!(ruleset(b), "");
    let lock = engage(b, "ab06", &scope);
    assert!(ruleset(b).contains("table arp haulier_ab06"));
    b.run(|| drop(lock));
    assert_eq!(ruleset(b), "");

    b.run(|| engage(b, "ab06", &scope).keep());
    let kept = ruleset(b);
    assert!(kept.contains("table inet haulier_ab06") && kept.contains("table arp haulier_ab06"));
    // Engaged again after a crash: the same lock, not the same rules twice.
    b.run(|| engage(b, "ab06", &scope).keep());
    assert_eq!(ruleset(b), kept);
    // Another migration's lock, and a table of somebody else, are left alone.
    b.run(|| engage(b, "cd07", &LockScope::default()).keep());
    b.sh("nft add table inet haulier_of_someone");
    assert_eq!(
        b.run(|| tables_of_haulier().unwrap()),
        ["haulier_ab06", "haulier_cd07"]
    );
    for id in ["ab06", "ab06", "cd07"] {
        b.run(|| lift_by_id(id).unwrap());
    }
    assert_eq!(b.run(|| tables_of_haulier().unwrap()), [""; 0]);
    assert!(ruleset(b).contains("haulier_of_someone"));
}

#[test]
fn a_lock_that_someone_else_lifted_is_no_error() {
    let Some(world) = world() else { return };
    let scope = LockScope::new(&MOVED.map(|moved| moved.parse().unwrap()), &[]);
    let mut lock = engage(&world.b, "ab08", &scope);
    world.b.sh("nft flush ruleset");
    lift(&world.b, &mut lock);
    assert_eq!(ruleset(&world.b), "");
}

#[test]
fn many_connections_fit_one_batch() {
    let Some(world) = world() else { return };
    let connections: Vec<Connection> = (0..20_000_u32)
        .map(|n| Connection {
            local: ([10, 0, 0, 6], 80).into(),
            remote: ([10, 1, (n >> 8) as u8, n as u8], 4000).into(),
        })
        .collect();
    let mut lock = engage(&world.b, "ab09", &LockScope::new(&[], &connections));
    assert!(ruleset(&world.b).contains("10.1.78.31"));
    lift(&world.b, &mut lock);
    assert_eq!(ruleset(&world.b), "");
}

#[test]
fn the_probe_leaves_nothing() {
    let Some(world) = world() else { return };
    world.b.run(|| probe().unwrap());
    assert_eq!(ruleset(&world.b), "");
}

#[test]
fn a_lock_is_named_by_a_hexadecimal_id() {
    for id in ["", "AB", "x", "a b", &"a".repeat(65)] {
        assert!(
            matches!(ArmedLock::arm(id), Err(Error::BadLockId(_))),
            "{id:?}"
        );
    }
    assert_eq!(id_of("haulier_ab06"), Some("ab06"));
    assert_eq!(id_of("haulier_of_someone"), None);
    assert_eq!(id_of("filter"), None);
}
