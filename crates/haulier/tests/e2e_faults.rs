//! The fault matrix: whatever is killed, stopped or cut, and whenever, exactly one copy lives.
//!
//! In the usual run some columns; `scripts/fault-matrix` plays all of them and prints the table.

mod faults;
mod stage;

use faults::{Fault, Victim, points, table};

/// Plays columns at the points that `chosen` picks, or at those that the environment names.
fn play(mode: &str, faults: &[Fault], chosen: impl Fn(&str) -> bool) {
    let wanted = std::env::var("HAULIER_FAULT_POINTS").unwrap_or_default();
    let named = |point: &str| wanted.split(',').any(|word| point.contains(word));
    let mut points = points();
    points.retain(|point| chosen(point) && named(point));
    let (table, wrong) = table(mode, faults, &points);
    println!("{table}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn everywhere(_point: &str) -> bool {
    true
}

/// Before that, leaving pages behind changes nothing.
fn from_the_commit_on(point: &str) -> bool {
    let before = [
        "examine",
        "connect",
        "check",
        "prepare",
        "pre-copy",
        "freeze",
        "Freez",
        "dump",
        "send",
        "restore",
        "SendOffer",
        "Receiving",
        "SendPrepared",
        "SendHeld",
    ];
    !before.iter().any(|word| point.contains(word))
}

#[test]
fn a_source_that_is_killed_anywhere_in_pre_copy() {
    play("pre-copy", &[Fault::Kill(Victim::Source)], everywhere);
}

#[test]
fn a_destination_that_is_killed_anywhere_in_pre_copy() {
    play("pre-copy", &[Fault::Kill(Victim::Destination)], everywhere);
}

#[test]
fn a_link_that_is_cut_anywhere_in_pre_copy() {
    play("pre-copy", &[Fault::Cut], everywhere);
}

#[test]
fn agents_that_are_killed_from_the_commit_on_in_hybrid() {
    let agents = [Victim::Source, Victim::Destination].map(Fault::Kill);
    play("hybrid", &agents, from_the_commit_on);
}

/// For as long as it lives nobody else decides anything, and what it does then is right.
#[test]
fn agents_that_wake_up_after_a_recovery() {
    let (source, destination) = (Victim::Source, Victim::Destination);
    for (mode, victim, points) in [
        ("pre-copy", source, &["source SendCommit"][..]),
        (
            "pre-copy",
            destination,
            &["destination Record(Committed)", "destination Thaw"],
        ),
        ("hybrid", source, &["source Serve"]),
        ("hybrid", destination, &["destination Thaw"]),
    ] {
        play(mode, &[Fault::Wake(victim)], |point| {
            points.contains(&point)
        });
    }
}

#[test]
#[ignore = "takes half an hour and more: scripts/fault-matrix"]
fn everything_anywhere() {
    let victims = [
        Victim::Source,
        Victim::Destination,
        Victim::Dump,
        Victim::Restore,
        Victim::Guard,
    ];
    let kills = victims.map(Fault::Kill).into_iter();
    let stops = victims.map(Fault::Stop).into_iter();
    let mut faults: Vec<Fault> = kills.chain(stops).chain([Fault::Cut]).collect();
    let wanted = std::env::var("HAULIER_FAULTS").unwrap_or_default();
    faults.retain(|fault| {
        wanted
            .split(',')
            .any(|word| fault.to_string().contains(word))
    });
    let modes = std::env::var("HAULIER_MODES").unwrap_or_else(|_| "pre-copy,hybrid".to_owned());
    for mode in modes.split(',') {
        play(mode, &faults, everywhere);
    }
}
