use haulier_targets::network::{
    Announcement, Announcer, ArmedLock, Error, LockScope, MoveIp, add, announce, remove,
};

use crate::world::{MOVED, connection, eventually, world};

#[test]
fn a_neighbour_learns_the_new_hardware_address() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    for (number, moved) in MOVED.into_iter().enumerate() {
        let moved: MoveIp = moved.parse().unwrap();
        b.run(|| add(&moved).unwrap());
        drop(connection(&world, moved.ip()));
        // The address comes from another machine now, as far as the neighbour can tell.
        let hardware = format!("02:00:00:00:01:{number:02}");
        b.sh(&format!("ip link set vb address {hardware}"));
        assert!(!a.neighbour(moved.ip()).contains(&hardware));
        b.run(|| announce(&moved).unwrap());
        eventually("the neighbour learns", || {
            a.neighbour(moved.ip()).contains(&hardware)
        });
    }
}

#[test]
fn an_announcement_is_repeated() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let moved = MOVED.map(|moved| moved.parse::<MoveIp>().unwrap());
    let hardware = "02:00:00:00:02:00";
    for moved in &moved {
        b.run(|| add(moved).unwrap());
        drop(connection(&world, moved.ip()));
    }
    b.sh(&format!("ip link set vb address {hardware}"));
    let prepared = b.run(|| {
        moved
            .iter()
            .map(|moved| Announcement::prepare(moved).unwrap())
            .collect::<Vec<_>>()
    });
    b.run(|| Announcer::start(prepared).unwrap()).finish();
    for moved in &moved {
        assert!(a.neighbour(moved.ip()).contains(hardware));
    }
    // Stopped at once, it has sent nothing.
    let hardware = "02:00:00:00:02:01";
    b.sh(&format!("ip link set vb address {hardware}"));
    let prepared = b.run(|| Announcement::prepare(&moved[0]).unwrap());
    drop(b.run(|| Announcer::start(vec![prepared]).unwrap()));
    assert!(!a.neighbour(moved[0].ip()).contains(hardware));
}

#[test]
fn an_address_that_moves_on_is_not_called_back() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let moved: MoveIp = MOVED[0].parse().unwrap();
    b.run(|| add(&moved).unwrap());
    drop(connection(&world, moved.ip()));
    let hardware = "02:00:00:00:03:00";
    b.sh(&format!("ip link set vb address {hardware}"));
    let repeat = || {
        let prepared = Announcement::prepare(&moved).unwrap();
        Announcer::start(vec![prepared]).unwrap()
    };
    let scope = LockScope::new(std::slice::from_ref(&moved), &[]);
    let lock = b.run(|| ArmedLock::arm("0a0b").unwrap().engage(&scope).unwrap());
    b.run(repeat).finish();
    assert!(!a.neighbour(moved.ip()).contains(hardware), "it was locked");
    drop(lock);
    b.run(|| remove(&moved).unwrap());
    b.run(repeat).finish();
    assert!(
        !a.neighbour(moved.ip()).contains(hardware),
        "it was removed"
    );
}

#[test]
fn an_interface_without_neighbours_needs_no_announcement() {
    let Some(world) = world() else { return };
    let on = |interface: &str| MOVED[0].parse::<MoveIp>().unwrap().on(interface).unwrap();
    world.b.run(|| announce(&on("lo")).unwrap());
    let error = world.b.run(|| announce(&on("gone0")).unwrap_err());
    assert!(matches!(error, Error::NoSuchInterface(name) if name == "gone0"));
}
