//! The hand-over around the commit, with answers that are lost or do not come, and what a person does
//! then.
//!
//! The source is the real program, the destination is played by the test, which decides what is said.

mod script;
mod stage;

use haulier::journal::{self, Entry};
use haulier_engine::journal::SourceRecord;
use haulier_lab::{Process, Signal};
use haulier_proto::message::{Commit, Role, control};
use script::scene::Scene;
use script::{Destination, Incoming, failed, lost, resumed};
use stage::codes::{MOVED, NEEDS_YOU, NOTHING_TOUCHED, ROLLED_BACK, ended};
use stage::redis::{self, MOVE, assert_served, served};
use stage::sight::{journals, locks, stands_still};
use stage::{LONG, MOVING_V4, Stage, eventually};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

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
        let redis = redis::start(&stage);
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

#[test]
fn a_migration_is_cancelled_by_its_name() {
    let stage = Stage::set(3, HAULIER);
    let (redis, client) = served(&stage);
    redis::fill(&stage, 1, 32 << 20);
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
