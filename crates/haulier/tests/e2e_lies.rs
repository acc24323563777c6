//! What is said where it is not due: by a destination before the commit, and by a source.
//!
//! One side is the real program, the other one is played by the test, which decides what is said. More
//! destinations that lie are in `other/liars.rs`.

mod script;
mod stage;

use haulier_proto::frame::{HEADER_BYTES, Kind, MAGIC};
use haulier_proto::message::{Commit, ImagesDone, Role, RoundEnd, control};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use script::scene::Scene;
use script::{Incoming, Source, long, resumed};
use stage::codes::{NOTHING_TOUCHED, ROLLED_BACK, ended};
use stage::sight::stands_still;
use stage::{Stage, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

/// What a destination says where it should not.
type Lie = fn(&mut Incoming);

#[test]
fn lies_before_the_commit_bring_it_back() {
    let too_long: Lie = |incoming| {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&(Kind::Control as u16).to_le_bytes());
        header[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        incoming.utter(&header);
    };
    let lies: [(Lie, &str); 7] = [
        (
            |incoming| incoming.say(resumed()),
            "sent resumed where held was due",
        ),
        (too_long, "over the limit"),
        (
            |incoming| incoming.utter(&[0xa5; 4096]),
            "expected a haulier frame",
        ),
        (|incoming| incoming.utter(b"HLR1"), "closed the connection"),
        (
            |incoming| {
                let frame = incoming.command.send(Kind::Pages, &[b"no"], &long());
                frame.unwrap();
            },
            "expected a Control frame",
        ),
        (
            |incoming| {
                // A message that is none, with a checksum that is right.
                let frame = incoming.command.send(Kind::Control, &[&[0xff; 9]], &long());
                frame.unwrap();
            },
            "does not decode",
        ),
        (
            |incoming| {
                // Of a later version.
                let frame = incoming.command.send(Kind::Control, &[], &long());
                frame.unwrap();
            },
            "unknown to this version",
        ),
    ];
    let scene = Scene::set();
    for (lie, words) in lies {
        let migration = scene.migrate(&[]);
        let mut incoming = scene.destination.until_offered();
        stands_still(&scene.stage, scene.counter.pid());
        lie(&mut incoming);
        if words == "closed the connection" {
            incoming.command.shutdown();
        }
        ended(migration, ROLLED_BACK, &["on host1", words]);
        scene.assert_back();
    }
}

#[test]
fn lies_before_the_freeze_touch_nothing() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    scene.destination.until_checked().say(resumed());
    ended(migration, NOTHING_TOUCHED, &["instead of findings"]);
    scene.assert_back();

    let migration = scene.migrate(&[]);
    let (mut incoming, _) = scene.destination.until_begun();
    incoming.say(resumed());
    let words = ["sent resumed where prepared was due"];
    ended(migration, NOTHING_TOUCHED, &words);
    scene.assert_back();
}

/// Number of a process that a scripted source moves, free on host 2.
const MADE_UP: i32 = 2500;

#[track_caller]
fn assert_refused(command: &mut Channel) {
    let answer = command.receive_control("a refusal", &long()).unwrap();
    assert!(matches!(answer, control::Body::Failed(_)), "{answer:?}");
}

#[test]
fn a_commit_of_nothing_is_not_obeyed() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let commit = || control::Body::Commit(Commit {});

    // Before anything was begun: it may be of what has run here long ago, and whoever asks is not to
    // be told that it has not.
    let source = Source::new(&stage, 1, 1);
    let mut command = source.connect(Role::Command).unwrap();
    command.send_control(commit(), &long()).unwrap();
    let error = command.receive_control("silence", &long()).unwrap_err();
    assert!(matches!(error, TransportError::Closed { .. }), "{error}");

    // Before anything was sent.
    let source = Source::new(&stage, 2, 1);
    let mut command = source.begin(MADE_UP, 1);
    command.send_control(commit(), &long()).unwrap();
    assert_refused(&mut command);

    // Where there is nothing to restore.
    let source = Source::new(&stage, 3, 1);
    let mut command = source.begin(MADE_UP, 1);
    let mut images = source.connect(Role::Images).unwrap();
    let mut memory = source.connect(Role::Memory).unwrap();
    command.send_control(commit(), &long()).unwrap();
    let end = RoundEnd {
        round: 0,
        pages: 0,
        last: true,
    };
    memory.send_message(Kind::RoundEnd, &end, &long()).unwrap();
    let done = ImagesDone::default();
    // It may have been closed by now.
    let _ = images.send_message(Kind::ImagesDone, &done, &long());
    assert_refused(&mut command);

    assert!(!stage.host(2).process_alive(MADE_UP));
    stage.assert_clean(2, &[]);
    // And it is as good as before.
    let process = start(stage.host(1), &["sleep", "1000"]);
    stage.moved(1, process.pid(), 2, &[]);
}

#[test]
fn only_who_knows_the_secret_is_heard() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let command = Source::new(&stage, 1, 1).begin(MADE_UP, 1);
    let stranger = Source::new(&stage, 1, 2);
    let turned_away = || {
        for role in [Role::Command, Role::Images, Role::Memory] {
            let error = stranger.connect(role).unwrap_err();
            let refused = matches!(&error, TransportError::Refused { .. });
            assert!(refused, "{role:?}: {error}");
        }
    };
    turned_away();
    let error = stranger.connect(Role::Command).unwrap_err().to_string();
    assert!(error.contains("the secret is wrong"), "{error}");
    command.shutdown();
    stage.assert_clean(2, &[]);
    // Also once it is over.
    turned_away();
}

#[test]
fn a_source_that_begins_and_is_gone_or_silent_leaves_nothing() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve_with(2, &["--step-time", "2"]);
    let gone = Source::new(&stage, 1, 1).begin(MADE_UP, 2);
    drop(gone);
    stage.assert_clean(2, &[]);

    // Silent from the beginning, after the beginning, and when all connections are open.
    let source = Source::new(&stage, 2, 1);
    let mut command = source.connect(Role::Command).unwrap();
    assert_refused(&mut command);
    let source = Source::new(&stage, 3, 1);
    let mut command = source.begin(MADE_UP, 1);
    assert_refused(&mut command);
    let source = Source::new(&stage, 4, 1);
    let mut command = source.begin(MADE_UP, 1);
    let _streams = [Role::Images, Role::Memory].map(|role| source.connect(role).unwrap());
    assert_refused(&mut command);
    stage.assert_clean(2, &[]);
}
