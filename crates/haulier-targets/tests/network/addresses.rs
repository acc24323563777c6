use std::net::{IpAddr, TcpListener};

use haulier_targets::network::{Address, Error, MoveIp, add, addresses, remove};

use crate::world::{MOVED, Namespace, PATIENCE, connection, world};

const PROMOTE: &str = "cat /proc/sys/net/ipv4/conf/vb/promote_secondaries";

fn parse(text: &str) -> MoveIp {
    text.parse().unwrap()
}

fn found(host: &Namespace, address: &MoveIp) -> Option<Address> {
    host.run(|| addresses().unwrap())
        .into_iter()
        .find(|other| other.is(address))
}

#[test]
fn an_address_is_usable_as_soon_as_it_is_added() {
    let Some(world) = world() else { return };
    // As on any host: detection would take a second.
    world.b.sysctl("ipv6/conf/vb/accept_dad", "1");
    for moved in MOVED.map(parse) {
        assert_eq!(found(&world.b, &moved), None);
        let listener = world.b.run(|| {
            assert!(add(&moved).unwrap());
            TcpListener::bind((moved.ip(), 0)).unwrap()
        });
        let to = listener.local_addr().unwrap();
        world.b.connect(to, PATIENCE).unwrap();
        world.a.connect(to, PATIENCE).unwrap();
        let address = found(&world.b, &moved).unwrap();
        assert!(
            !address.tentative && !address.duplicate && !address.leased,
            "{address:?}"
        );
        assert_eq!(address.secondary, moved.ip().is_ipv4());
        assert!(!world.b.run(|| add(&moved).unwrap()), "added twice");

        let removal = world.b.run(|| remove(&moved).unwrap());
        assert!(removal.removed);
        assert_eq!(found(&world.b, &moved), None);
        assert!(
            !world.b.run(|| remove(&moved).unwrap()).removed,
            "removed twice"
        );
    }
}

#[test]
fn what_is_not_as_described_is_not_touched() {
    let Some(world) = world() else { return };
    let error = world
        .b
        .run(|| remove(&parse("10.0.0.6/25@vb")).unwrap_err());
    assert!(error.to_string().contains("10.0.0.6/24@vb"), "{error}");
    assert!(matches!(error, Error::ConfiguredDifferently { .. }));
    assert!(found(&world.b, &parse("10.0.0.6/24@vb")).is_some());
    for result in world.b.run(|| {
        let gone = parse("10.0.0.5/24@gone0");
        [add(&gone).map(drop), remove(&gone).map(drop)]
    }) {
        assert!(matches!(result, Err(Error::NoSuchInterface(name)) if name == "gone0"));
    }
}

#[test]
fn an_address_with_a_lifetime_is_known_as_leased() {
    let Some(world) = world() else { return };
    world
        .b
        .sh("ip addr add 10.0.0.7/24 dev vb valid_lft 600 preferred_lft 600");
    assert!(found(&world.b, &parse("10.0.0.7/24@vb")).unwrap().leased);
}

/// 10.0.0.6 is the first address of the subnet, and is the one that moves away.
#[test]
fn removing_a_primary_address_leaves_the_rest_of_the_host() {
    let Some(world) = world() else { return };
    let b = &world.b;
    b.sh("ip addr add 10.0.0.7/24 dev vb && ip addr add 10.0.0.8/24 dev vb");
    b.sh("ip route add default via 10.0.0.1");
    b.sh("ip route add 10.20.0.0/16 via 10.0.0.1 src 10.0.0.6 metric 7");
    b.sh("ip route add 10.21.0.0/16 via 10.0.0.1 src 10.0.0.7");
    b.sh("ip route add 10.22.0.0/16 dev vb scope link src 10.0.0.6");
    b.sh("ip route add 10.23.0.0/16 via 10.0.0.1 src 10.0.0.6 table 100");
    b.sh("ip -6 route add default via fd00::1");
    b.sysctl("ipv4/conf/vb/promote_secondaries", "0");
    let (_listener, _client, server) = connection(&world, IpAddr::from([10, 0, 0, 7]));

    let moved = parse("10.0.0.6/24@vb");
    let removal = b.run(|| remove(&moved).unwrap());
    assert_eq!(b.sh(PROMOTE).trim(), "0");
    let left: Vec<Address> = b.run(|| addresses().unwrap());
    let left: Vec<(IpAddr, bool)> = left
        .into_iter()
        .filter(|address| address.interface == "vb" && address.ip.is_ipv4())
        .map(|address| (address.ip, address.secondary))
        .collect();
    assert_eq!(
        left,
        [([10, 0, 0, 7].into(), false), ([10, 0, 0, 8].into(), true)]
    );

    let routes = b.sh("ip route show table all | sed 's/ *$//'");
    for route in [
        "default via 10.0.0.1 dev vb",
        "10.20.0.0/16 via 10.0.0.1 dev vb metric 7",
        "10.21.0.0/16 via 10.0.0.1 dev vb src 10.0.0.7",
        "10.22.0.0/16 dev vb scope link",
        "10.0.0.0/24 dev vb proto kernel scope link src 10.0.0.7",
    ] {
        assert!(
            routes.lines().any(|line| line == route),
            "{route} is gone:\n{routes}"
        );
    }
    assert_eq!(removal.routes_lost, [""; 0]);
    for wanted in [
        "10.20.0.0/16 via 10.0.0.1 dev vb metric 7",
        "10.22.0.0/16 dev vb",
    ] {
        assert!(
            removal
                .routes_restored
                .iter()
                .any(|route| route.starts_with(wanted)),
            "{wanted}: {removal:?}"
        );
    }
    assert_eq!(removal.routes_stale.len(), 1, "{removal:?}");
    assert!(
        removal.routes_stale[0].starts_with("10.23.0.0/16"),
        "{removal:?}"
    );
    assert!(b.sh("ip -6 route show default").contains("via fd00::1"));
    // And the neighbour still talks to the addresses that stayed.
    drop(connection(&world, IpAddr::from([10, 0, 0, 7])));
    assert_eq!(
        server.take_error().unwrap().map(|error| error.to_string()),
        None
    );
}

#[test]
fn removing_the_only_ipv6_address_of_a_prefix_keeps_the_default_route() {
    let Some(world) = world() else { return };
    world.b.sh("ip -6 route add default via fd00::1");
    let moved = parse(MOVED[1]);
    world.b.run(|| add(&moved).unwrap());
    assert!(
        world
            .b
            .run(|| remove(&parse("fd00::6/64@vb")).unwrap())
            .removed
    );
    assert!(
        world
            .b
            .sh("ip -6 route show default")
            .contains("via fd00::1")
    );
    drop(connection(&world, moved.ip()));
}

#[test]
fn routes_that_cannot_stay_are_named() {
    let Some(world) = world() else { return };
    let b = &world.b;
    b.sh("ip addr add 10.9.0.5/24 dev vb");
    b.sh("ip route add 10.30.0.0/16 via 10.9.0.1 src 10.9.0.5");
    let removal = b.run(|| remove(&parse("10.9.0.5/24@vb")).unwrap());
    assert_eq!(removal.routes_lost.len(), 1, "{removal:?}");
    assert!(
        removal.routes_lost[0].starts_with("10.30.0.0/16 via 10.9.0.1"),
        "{removal:?}"
    );
    // With the last address of the interface everything through it goes.
    b.sh("ip route add default via 10.0.0.1");
    let removal = b.run(|| remove(&parse("10.0.0.6/24@vb")).unwrap());
    assert!(
        removal
            .routes_lost
            .iter()
            .any(|route| route.starts_with("default via 10.0.0.1"))
    );
    assert_eq!(removal.routes_restored, [""; 0]);
}

#[test]
fn removals_at_the_same_time_keep_each_others_promotion() {
    let Some(world) = world() else { return };
    let b = &world.b;
    let mut all = Vec::new();
    for subnet in 40..48 {
        for last in 1..4 {
            b.sh(&format!("ip addr add 10.{subnet}.0.{last}/24 dev vb"));
        }
        all.push(parse(&format!("10.{subnet}.0.1/24@vb")));
    }
    b.sysctl("ipv4/conf/vb/promote_secondaries", "0");
    std::thread::scope(|scope| {
        for address in &all {
            scope.spawn(|| b.run(|| assert!(remove(address).unwrap().removed)));
        }
    });
    assert_eq!(b.sh(PROMOTE).trim(), "0");
    let left = b.run(|| addresses().unwrap());
    let left: Vec<_> = left.iter().filter(|address| address.prefix == 24).collect();
    // Two of each subnet, and 10.0.0.6.
    assert_eq!(left.len(), 2 * all.len() + 1, "{left:?}");
}
