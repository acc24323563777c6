//! Pages that arrive after the target: over a link that breaks, to a host whose server is killed, and
//! for a target that somebody wants to move on meanwhile.

mod stage;

use haulier_lab::workloads::RedisClient;
use haulier_lab::{Captured, Process, Signal};
use stage::codes::{NEEDS_YOU, NOTHING_TOUCHED};
use stage::redis;
use stage::{LONG, MOVING_V4, Stage, eventually};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
/// Bytes of values, which at [`RATE`] take some seconds.
const DATA: u64 = 24 << 20;
const RATE: &str = "60mbit";
const SEED: u64 = 11;

/// A Redis that runs on host 2 while its pages are still on host 1.
struct Moving {
    stage: Stage,
    servers: Vec<Captured>,
    redis: Process,
    client: RedisClient,
    migration: Captured,
}

impl Moving {
    fn set(mode: &str) -> Moving {
        let stage = Stage::set(3, HAULIER);
        let redis = redis::start(&stage);
        redis::fill(&stage, SEED, DATA);
        let client = redis::client(&stage);
        let servers = vec![stage.serve(1), stage.serve(2)];
        stage.lab.shape(Some(RATE)).unwrap();
        let options = [
            "--move-ip",
            "10.77.0.100/24@eth0",
            "--mode",
            mode,
            "--compress",
            "none",
            "--json",
        ];
        let migration = stage.migration(1, redis.pid(), 2, &options);
        let migration = migration.spawn_captured().unwrap();
        servers[1]
            .wait_for_output("the target runs here", LONG)
            .unwrap();
        Moving {
            stage,
            servers,
            redis,
            client,
            migration,
        }
    }
}

#[test]
fn a_link_that_breaks_is_made_anew_and_every_page_comes() {
    let moving = Moving::set("post-copy");
    moving.stage.break_connections(1);
    let Moving {
        stage,
        client,
        migration,
        servers: _servers,
        ..
    } = moving;
    let output = migration.finish(LONG).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
    let report: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
    assert!(
        report["post_copy"]["reconnects"].as_u64().unwrap() > 0,
        "{report}"
    );
    stage.lab.shape(None).unwrap();
    redis::assert_whole(&stage, SEED, DATA);
    client.stop().clean();
    stage.assert_clean(1, &["cgroup /redis"]);
}

#[test]
fn a_target_whose_pages_still_arrive_cannot_be_moved_on() {
    let moving = Moving::set("post-copy");
    let pid = moving.redis.pid();
    let options = ["--move-ip", "10.77.0.100/24@eth0"];
    let refused = moving.stage.migrate(2, pid, 1, &options);
    assert_eq!(
        refused.status.code(),
        Some(NOTHING_TOUCHED),
        "{}",
        refused.stderr
    );
    assert!(
        refused.stderr.contains("still arriving"),
        "{}",
        refused.stderr
    );
    moving.stage.lab.shape(None).unwrap();
    let output = moving.migration.finish(LONG).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
    redis::assert_whole(&moving.stage, SEED, DATA);
    // Whole, it can.
    moving.stage.moved(2, pid, 1, &options);
    moving.client.stop().clean();
}

#[test]
fn a_server_that_is_killed_takes_a_target_that_lacks_pages_with_it() {
    let moving = Moving::set("post-copy");
    let pid = moving.redis.pid();
    moving.servers[1].process.kill(Signal::KILL).unwrap();
    eventually("the target is gone, rather than left with zeros", || {
        !moving.stage.host(2).process_alive(pid)
    });
    // Its clients have not been told that their connections are over: it may go on with them.
    assert_eq!(moving.client.snapshot().error_count, 0);
    // Its frozen tasks are still where they were, and a person may let them run on from there.
    assert!(moving.stage.host(1).process_alive(pid));
    moving.migration.process.kill(Signal::KILL).unwrap();
    let _ = moving.migration.finish(LONG).unwrap();
    moving.stage.lab.shape(None).unwrap();
    // The server that starts next removes what the killed one left there.
    let _server = moving.stage.serve(2);
    run_here(&moving.stage);
    redis::assert_whole(&moving.stage, SEED, DATA);
}

/// It has outlived whoever could have heard it.
#[test]
fn what_a_guard_could_not_do_is_told_by_a_status() {
    let moving = Moving::set("post-copy");
    let host = moving.stage.host(2);
    // From now on nothing can be silenced there.
    let spoil = "mount --bind /bin/false $(command -v nft)";
    let mend = "umount $(command -v nft)";
    host.shell(spoil).unwrap().success();
    moving.servers[1].process.kill(Signal::KILL).unwrap();
    eventually("the target is gone", || {
        !host.process_alive(moving.redis.pid())
    });
    let words = "its peers will see the end of their connections";
    let status = moving.stage.haulier(2).arg("status").output(LONG).unwrap();
    let line = status.stdout.lines().find(|line| line.contains(words));
    let line = line.unwrap_or_else(|| panic!("{}", status.stdout));
    assert!(line.starts_with("  its guard says: "), "{line}");
    let json = moving.stage.haulier(2).args(["status", "--json"]);
    let json = json.output(LONG).unwrap().stdout;
    let told: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(told[0]["guard"].to_string().contains(words), "{json}");
    // Its client waits for an answer, and this test for the client.
    host.shell(mend).unwrap().success();
    moving.stage.lab.shape(None).unwrap();
    moving.migration.process.kill(Signal::KILL).unwrap();
    let _ = moving.migration.finish(LONG).unwrap();
    let _server = moving.stage.serve(2);
    run_here(&moving.stage);
}

#[test]
fn a_server_that_starts_after_a_loss_tells_the_source_that_asks() {
    let moving = Moving::set("post-copy");
    let pid = moving.redis.pid();
    moving.servers[1].process.kill(Signal::KILL).unwrap();
    let _server = moving.stage.serve(2);
    // Told at once, though it would have asked for ever.
    let output = moving.migration.finish(LONG).unwrap();
    assert_eq!(output.status.code(), Some(NEEDS_YOU), "{}", output.stderr);
    assert!(
        output.stderr.contains("is lost at the destination"),
        "{}",
        output.stderr
    );
    moving.stage.lab.shape(None).unwrap();
    assert!(!moving.stage.host(2).process_alive(pid));
    let addresses = |host: usize| {
        let shown = moving.stage.host(host).run(["ip", "addr", "show", "eth0"]);
        shown.unwrap().success().contains(MOVING_V4)
    };
    assert!(!addresses(2), "the lost target's address is still there");
    run_here(&moving.stage);
    assert!(addresses(1));
    redis::assert_whole(&moving.stage, SEED, DATA);
}

#[test]
fn a_server_that_is_killed_before_all_that_came_is_placed_does_not_cost_the_last_copy() {
    let moving = Moving::set("pre-copy");
    moving.servers[1].process.kill(Signal::KILL).unwrap();
    let _server = moving.stage.serve(2);
    let output = moving.migration.finish(LONG).unwrap();
    moving.stage.lab.shape(None).unwrap();
    // The server may just have been quick enough.
    match output.status.code() {
        Some(0) => assert!(moving.stage.host(2).process_alive(moving.redis.pid())),
        Some(NEEDS_YOU) => run_here(&moving.stage),
        other => panic!("{other:?}: {}", output.stderr),
    }
    redis::assert_whole(&moving.stage, SEED, DATA);
}

#[test]
fn a_killed_sources_pages_are_brought_by_the_haulier_that_starts_next() {
    let mut moving = Moving::set("post-copy");
    moving.migration.process.kill(Signal::KILL).unwrap();
    let _ = moving.migration.finish(LONG).unwrap();
    // Nobody else on host 1 works on it.
    let server = moving.servers.remove(0);
    server.process.kill(Signal::KILL).unwrap();
    let _ = server.finish(LONG).unwrap();
    let server = moving.stage.serve(1);
    server
        .wait_for_output("the target runs there, and is removed here", LONG)
        .unwrap();
    moving.stage.lab.shape(None).unwrap();
    redis::assert_whole(&moving.stage, SEED, DATA);
    moving.client.stop().clean();
    let tasks = "cat /sys/fs/cgroup/*/haulier-*/cgroup.procs /var/lib/haulier/*/journal";
    let left = moving.stage.host(1).shell(tasks).unwrap();
    assert_eq!(left.stdout, "", "left on the source");
}

/// A person lets the target run on on its source, from where it was frozen.
#[track_caller]
fn run_here(stage: &Stage) {
    let id = stage.host(1).shell("ls /var/lib/haulier").unwrap();
    let resolve = ["resolve", id.success().trim(), "--run-here"].map(str::to_owned);
    let output = stage.haulier(1).args(resolve).output(LONG).unwrap();
    output.success();
}
