//! The hand-over around the commit: lost answers, liars, silence, and what a killed haulier leaves.
//!
//! One side is the real program, the other one is played by the test, which decides what is said.

mod script;
mod stage;

use std::net::SocketAddr;

use haulier::journal::{self, Entry};
use haulier_engine::journal::SourceRecord;
use haulier_lab::workloads::{RedisClient, fill_redis, start_redis};
use haulier_lab::{Captured, Process, Signal};
use haulier_proto::frame::{HEADER_BYTES, Kind, MAGIC};
use haulier_proto::message::{Commit, ImagesDone, Role, RoundEnd, control};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use script::{Destination, Incoming, Source, failed, long, lost, resumed};
use stage::sight::{goes_on, journals, locks, stands_still};
use stage::{LONG, MOVING_V4, Stage, eventually, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
const MOVED: i32 = 0;
const NOTHING_TOUCHED: i32 = 3;
const ROLLED_BACK: i32 = 4;
const NEEDS_YOU: i32 = 5;
const MOVE: [&str; 2] = ["--move-ip", "10.77.0.100/24@eth0"];

/// A process on host 1 that does nothing but make progress, and a scripted destination on host 2.
struct Scene {
    stage: Stage,
    counter: Process,
    destination: Destination,
}

impl Scene {
    fn set() -> Scene {
        let stage = Stage::set(2, HAULIER);
        let counter = start(stage.host(1), &["sh", "-c", "while :; do :; done"]);
        let destination = Destination::open(&stage);
        Scene {
            stage,
            counter,
            destination,
        }
    }

    fn migrate(&self, options: &[&str]) -> Captured {
        let migration = self.stage.migration(1, self.counter.pid(), 2, options);
        migration.spawn_captured().unwrap()
    }

    /// It runs on host 1, and nothing of the migration is left there.
    #[track_caller]
    fn assert_back(&self) {
        goes_on(&self.stage, self.counter.pid());
        self.stage.assert_clean(1, &[]);
        assert_eq!(journals(&self.stage, 1), "");
    }
}

#[track_caller]
fn ended(migration: Captured, code: i32, words: &[&str]) -> String {
    let output = migration.finish(LONG).unwrap();
    let text = output.stderr;
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
    text
}

#[test]
fn an_answer_that_was_lost_is_given_again() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    let incoming = scene.destination.until_committed();
    stands_still(&scene.stage, scene.counter.pid());
    let mut incoming = scene.destination.asked_again(incoming);
    stands_still(&scene.stage, scene.counter.pid());
    incoming.say(resumed());
    ended(migration, MOVED, &["the connection to host2 broke"]);
    assert!(!scene.stage.host(1).process_alive(scene.counter.pid()));
    scene.stage.assert_clean(1, &[]);
    assert_eq!(journals(&scene.stage, 1), "");
}

#[test]
fn an_answer_is_asked_for_until_it_comes() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    let mut incoming = scene.destination.until_committed();
    for _ in 0..3 {
        incoming = scene.destination.asked_again(incoming);
    }
    // Noise is no answer, and neither is what has no place here.
    incoming.say(control::Body::Commit(Commit {}));
    incoming.utter(b"HTTP/1.1 200 OK\r\n\r\n");
    let mut incoming = scene.destination.asked_again(incoming);
    stands_still(&scene.stage, scene.counter.pid());
    incoming.say(resumed());
    ended(migration, MOVED, &[]);
    assert!(!scene.stage.host(1).process_alive(scene.counter.pid()));
    scene.stage.assert_clean(1, &[]);
}

#[test]
fn a_refusal_after_the_commit_brings_it_back() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    let incoming = scene.destination.until_committed();
    let mut incoming = scene.destination.asked_again(incoming);
    incoming.say(failed("it was never committed"));
    ended(migration, ROLLED_BACK, &["it was never committed"]);
    scene.assert_back();
}

/// A Redis on host 1, in doubt: the destination has not answered the commit, and `haulier migrate`
/// has given up asking.
struct Doubt {
    stage: Stage,
    redis: Process,
    id: String,
    said: String,
}

impl Doubt {
    /// Of a Redis that nobody uses.
    fn unused() -> Doubt {
        let stage = Stage::set(2, HAULIER);
        stage.give_addresses(1);
        let redis = start_redis(stage.host(1), 6379).unwrap();
        Doubt::of(stage, redis)
    }

    fn of(stage: Stage, redis: Process) -> Doubt {
        let destination = Destination::open(&stage);
        let options = [&MOVE[..], &["--doubt-time", "3"]].concat();
        let migration = stage.migration(1, redis.pid(), 2, &options);
        let migration = migration.spawn_captured().unwrap();
        let incoming = destination.until_committed();
        let id = incoming.purpose.migration.to_string();
        incoming.command.shutdown();
        drop((incoming, destination));
        let words = "the connection to host2 broke after the commit";
        migration.wait_for_output(words, LONG).unwrap();
        // Ctrl-C is no answer.
        migration.process.kill(Signal::INT).unwrap();
        let said = ended(migration, NEEDS_YOU, &["stands frozen here", &id]);
        Doubt {
            stage,
            redis,
            id,
            said,
        }
    }

    #[track_caller]
    fn assert_still(&self) {
        stands_still(&self.stage, self.redis.pid());
        let mut locks = locks(&self.stage);
        locks.sort();
        let both = ["arp", "inet"].map(|family| format!("{family} haulier_{}", self.id));
        assert_eq!(locks, both);
        assert!(has_address(&self.stage));
    }

    /// Does what the message says for one of the cases.
    fn follow(&self, word: &str) {
        let command = format!("haulier resolve {} {word}", self.id);
        assert!(self.said.contains(&command), "{}", self.said);
        let arguments = command.split(' ').skip(1);
        let output = self.stage.haulier(1).args(arguments).output(LONG);
        output.unwrap().success();
    }

    #[track_caller]
    fn assert_gone(&self) {
        assert!(!self.stage.host(1).process_alive(self.redis.pid()));
        assert!(!has_address(&self.stage));
        self.stage.assert_clean(1, &["cgroup /redis"]);
        assert_eq!(journals(&self.stage, 1), "");
    }
}

#[test]
fn silence_after_the_commit_leaves_it_frozen_until_a_person_lets_it_run() {
    let stage = Stage::set(3, HAULIER);
    let (redis, client) = served(&stage);
    let doubt = Doubt::of(stage, redis);
    doubt.assert_still();
    let server = doubt.stage.serve(1);
    doubt.assert_still();
    server.process.kill(Signal::TERM).unwrap();
    let _ = server.finish(LONG).unwrap();
    // Another migration asks as well, and is not held up for long.
    let said = doubt.stage.migrate(1, 1 << 22, 2, &[]).stderr;
    let hint = format!("haulier resolve {}", doubt.id);
    assert!(said.contains(&hint), "{said}");
    doubt.assert_still();

    doubt.follow("--run-here");
    assert_served(&client);
    client.stop().clean();
    assert!(doubt.stage.host(1).process_alive(doubt.redis.pid()));
    doubt.stage.assert_clean(1, &["cgroup /redis"]);
    assert_eq!(journals(&doubt.stage, 1), "");
}

#[test]
fn silence_after_the_commit_leaves_it_frozen_until_a_person_knows_it_elsewhere() {
    let doubt = Doubt::unused();
    // About another one nothing is known.
    let other = ["resolve", "0123456789abcdef", "--discard"];
    let other = doubt.stage.haulier(1).args(other).output(LONG).unwrap();
    assert_eq!(other.status.code(), Some(1), "{}", other.stderr);
    doubt.assert_still();
    doubt.follow("--discard");
    doubt.assert_gone();
}

/// The haulier that starts next asks, and does as it is told.
#[test]
fn a_destination_that_is_heard_again_settles_what_was_in_doubt() {
    // What it says, whether the target runs here then, and whether it stands here.
    let refused = failed("it was never committed");
    for (answer, runs, stands) in [
        (refused, true, false),
        (resumed(), false, false),
        (lost(), false, true),
    ] {
        let doubt = Doubt::unused();
        let destination = Destination::open(&doubt.stage);
        let server = doubt.stage.serve(1);
        let (command, purpose) = destination.accept(Role::Command);
        assert_eq!(purpose.migration.to_string(), doubt.id);
        let mut asked = Incoming::again(command, purpose);
        assert_eq!(asked.hear(), control::Body::Commit(Commit {}));
        asked.say(answer);
        if stands {
            let hint = format!("haulier resolve {} --run-here", doubt.id);
            server.wait_for_output(&hint, LONG).unwrap();
            doubt.assert_still();
        } else if runs {
            eventually("nothing is left", || journals(&doubt.stage, 1).is_empty());
            assert!(doubt.stage.host(1).process_alive(doubt.redis.pid()));
            assert!(has_address(&doubt.stage));
            doubt.stage.assert_clean(1, &["cgroup /redis"]);
        } else {
            eventually("nothing is left", || journals(&doubt.stage, 1).is_empty());
            doubt.assert_gone();
        }
    }
}

/// Whoever asks in the background gives way to a person.
#[test]
fn a_person_settles_what_a_server_keeps_asking_about() {
    let doubt = Doubt::unused();
    let _server = doubt.stage.serve(1);
    doubt.assert_still();
    doubt.follow("--run-here");
    assert!(doubt.stage.host(1).process_alive(doubt.redis.pid()));
    assert!(has_address(&doubt.stage));
    doubt.stage.assert_clean(1, &["cgroup /redis"]);
    assert_eq!(journals(&doubt.stage, 1), "");
}

#[test]
fn a_status_tells_what_waits_and_a_late_cancel_changes_nothing() {
    let doubt = Doubt::unused();
    let haulier = |arguments: &[&str]| {
        let command = doubt.stage.haulier(1).args(arguments.iter().copied());
        command.output(LONG).unwrap()
    };
    let status = haulier(&["status", "--json"]);
    assert_eq!(status.status.code(), Some(NEEDS_YOU), "{}", status.stderr);
    let told: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    let told = &told[0];
    assert_eq!(told["id"], doubt.id.as_str());
    assert_eq!(told["side"], "source");
    assert_eq!(told["needs_you"], true);
    assert_eq!(told["records"], serde_json::json!(["Freezing", "InDoubt"]));
    let holdings = told["holdings"].to_string();
    assert!(
        holdings.contains("address 10.77.0.100/24@eth0"),
        "{holdings}"
    );
    let status = haulier(&["status", &doubt.id]);
    assert_eq!(status.status.code(), Some(NEEDS_YOU));
    assert!(status.stdout.contains("in doubt"), "{}", status.stdout);
    let other = haulier(&["status", "0123456789abcdef"]);
    assert_eq!(other.status.code(), Some(1), "{}", other.stdout);

    let late = haulier(&["cancel", &doubt.id]);
    assert_eq!(late.status.code(), Some(NOTHING_TOUCHED), "{}", late.stderr);
    assert!(
        late.stdout.contains("nothing was changed"),
        "{}",
        late.stdout
    );
    let asked = haulier(&["recover", "--wait", "1"]);
    assert_eq!(asked.status.code(), Some(NEEDS_YOU), "{}", asked.stderr);
    assert!(
        asked.stdout.contains("which nobody asks"),
        "{}",
        asked.stdout
    );
    doubt.assert_still();
}

/// From a journal that is damaged nobody takes a decision.
#[test]
fn a_damaged_journal_is_told_and_changes_nothing() {
    let doubt = Doubt::unused();
    let damage = format!(
        "sed -i s/InDoubt/InDaubt/ /var/lib/haulier/{}/journal",
        doubt.id
    );
    doubt.stage.host(1).shell(&damage).unwrap().success();
    let _server = doubt.stage.serve(1);
    doubt.assert_still();
    for arguments in [&["status"][..], &["recover", "--wait", "1"]] {
        let said = doubt.stage.haulier(1).args(arguments.iter().copied());
        let said = said.output(LONG).unwrap();
        assert_eq!(said.status.code(), Some(NEEDS_YOU), "{}", said.stderr);
        let words = "does not match its checksum";
        assert!(said.stdout.contains(words), "{}", said.stdout);
    }
    let resolve = ["resolve", &doubt.id, "--run-here"];
    let said = doubt.stage.haulier(1).args(resolve).output(LONG).unwrap();
    assert_eq!(said.status.code(), Some(1), "{}", said.stderr);
    doubt.assert_still();
}

/// Between the record that it was released and the end of what it had here, haulier was killed.
#[test]
fn a_killed_source_that_had_released_takes_its_address_away_at_the_next_start() {
    let doubt = Doubt::unused();
    let record = journal::lines_for(1, &Entry::Source(SourceRecord::Released));
    let append = format!("cat >> /var/lib/haulier/{}/journal", doubt.id);
    let append = format!("printf %s '{record}' | {append}");
    doubt.stage.host(1).shell(&append).unwrap().success();
    let _server = doubt.stage.serve(1);
    doubt.assert_gone();
}

fn has_address(stage: &Stage) -> bool {
    let addresses = stage.host(1).run(["ip", "-o", "addr"]).unwrap().success();
    addresses.contains(&format!(" {MOVING_V4}/24 "))
}

/// A Redis on host 1, and a client on host 3 that checks every answer.
fn served(stage: &Stage) -> (Process, RedisClient) {
    stage.give_addresses(1);
    let redis = start_redis(stage.host(1), 6379).unwrap();
    let address = redis_address();
    let client = stage
        .host(3)
        .in_network(|| RedisClient::start(address))
        .unwrap()
        .unwrap();
    client.wait_for_operations(500, LONG).unwrap();
    (redis, client)
}

fn redis_address() -> SocketAddr {
    SocketAddr::new(MOVING_V4.parse().unwrap(), 6379)
}

#[track_caller]
fn assert_served(client: &RedisClient) {
    client.wait_for_operations(500, LONG).unwrap();
}

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

/// A Redis on host 1 that is frozen half way, its haulier killed.
struct Orphan {
    stage: Stage,
    redis: Process,
    client: RedisClient,
    server: Captured,
}

impl Orphan {
    fn make() -> Orphan {
        let stage = Stage::set(3, HAULIER);
        let (redis, client) = served(&stage);
        let fill = || fill_redis(redis_address(), 1, 32 << 20);
        stage.host(3).in_network(fill).unwrap().unwrap();
        stage.lab.shape(Some("20mbit")).unwrap();
        let server = stage.serve(2);
        // Frozen for some seconds before there is anything to commit.
        let options = [&MOVE[..], &["--mode", "stop-and-copy"]].concat();
        let migration = stage.migration(1, redis.pid(), 2, &options);
        let migration = migration.spawn_captured().unwrap();
        eventually("it is frozen", || {
            let left = stage.leftovers(1);
            left.iter().any(|line| line.starts_with("frozen-cgroup "))
        });
        migration.process.kill(Signal::KILL).unwrap();
        migration.finish(LONG).unwrap();
        stage.lab.shape(None).unwrap();
        let left = stage.leftovers(1);
        let frozen = left.iter().any(|line| line.starts_with("frozen-cgroup "));
        assert!(frozen, "it does not run by itself: {left:?}");
        Orphan {
            stage,
            redis,
            client,
            server,
        }
    }
}

#[test]
fn a_killed_sources_target_runs_on_at_the_next_start() {
    let orphan = Orphan::make();
    let server = orphan.stage.serve(1);
    assert_served(&orphan.client);
    orphan.client.stop().clean();
    assert!(orphan.stage.host(1).process_alive(orphan.redis.pid()));
    orphan.stage.assert_clean(1, &["cgroup /redis"]);
    orphan.stage.assert_clean(2, &[]);
    assert_eq!(journals(&orphan.stage, 1), "");
    drop((server, orphan.server));
}

#[test]
fn a_killed_sources_target_runs_on_when_it_is_recovered() {
    let orphan = Orphan::make();
    let recover = || {
        let recover = orphan.stage.haulier(1).args(["recover"]);
        recover.output(LONG).unwrap().success()
    };
    let status = orphan.stage.haulier(1).args(["status"]);
    let status = status.output(LONG).unwrap();
    assert_eq!(status.status.code(), Some(NEEDS_YOU), "{}", status.stdout);
    let words = "what to do: haulier recover";
    assert!(status.stdout.contains(words), "{}", status.stdout);
    assert!(recover().contains("nothing is left to be done"));
    assert_served(&orphan.client);
    assert!(recover().contains("nothing is left to be done"));
    orphan.client.stop().clean();
    orphan.stage.assert_clean(1, &["cgroup /redis"]);
    assert_eq!(journals(&orphan.stage, 1), "");
}

#[test]
fn a_migration_is_cancelled_by_its_name() {
    let stage = Stage::set(3, HAULIER);
    let (redis, client) = served(&stage);
    let fill = || fill_redis(redis_address(), 1, 32 << 20);
    stage.host(3).in_network(fill).unwrap().unwrap();
    stage.lab.shape(Some("20mbit")).unwrap();
    let _server = stage.serve(2);
    for mode in ["pre-copy", "stop-and-copy"] {
        let options = [&MOVE[..], &["--mode", mode]].concat();
        let migration = stage.migration(1, redis.pid(), 2, &options);
        let migration = migration.spawn_captured().unwrap();
        let told = |words: &str| {
            let status = stage.haulier(1).args(["status", "--json"]);
            let status = status.output(LONG).unwrap().stdout;
            let told: serde_json::Value = serde_json::from_str(&status).unwrap();
            let state = told[0]["state"].as_str().unwrap_or_default();
            let id = told[0]["id"].as_str().unwrap_or_default();
            state.contains(words).then(|| id.to_owned())
        };
        let words = match mode {
            "pre-copy" => "its memory is sent",
            _ => "stands still here",
        };
        eventually("it is at work", || told(words).is_some());
        let id = told(words).unwrap();
        let cancel = stage.haulier(1).args(["cancel", &id]);
        let said = cancel.output(LONG).unwrap().success();
        assert!(said.contains("it runs here"), "{said}");
        let code = match mode {
            "pre-copy" => NOTHING_TOUCHED,
            _ => ROLLED_BACK,
        };
        ended(migration, code, &["it was interrupted"]);
        assert_served(&client);
        stage.assert_clean(1, &["cgroup /redis"]);
        assert_eq!(journals(&stage, 1), "");
    }
    client.stop().clean();
}

#[test]
fn a_killed_sources_target_moves_at_the_next_try() {
    let orphan = Orphan::make();
    let pid = orphan.redis.pid();
    orphan.stage.moved(1, pid, 2, &MOVE);
    assert_served(&orphan.client);
    orphan.client.stop().clean();
    orphan.stage.assert_clean(1, &["cgroup /redis"]);
    assert_eq!(journals(&orphan.stage, 1), "");
    drop(orphan.server);
}
