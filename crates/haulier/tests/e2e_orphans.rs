//! What a killed source leaves: a server that runs looks after it, or whatever of haulier starts next. And a
//! server that is told to stop while it waits.

mod stage;

use haulier_lab::workloads::RedisClient;
use haulier_lab::{Captured, Process, Signal};
use stage::codes::NEEDS_YOU;
use stage::redis::{self, MOVE, assert_served, served};
use stage::sight::{goes_on, journals, stands_still};
use stage::{LONG, Stage, eventually, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

fn counter(stage: &Stage) -> Process {
    start(stage.host(1), &["sh", "-c", "while :; do :; done"])
}

#[test]
fn a_running_server_lets_a_killed_sources_target_run_on_and_leaves_the_others_alone() {
    let stage = Stage::set(3, HAULIER);
    let (redis, client) = served(&stage);
    let other = counter(&stage);
    let servers = [1, 2].map(|host| stage.serve(host));
    let held = |pid, options: &[&str]| {
        let migration = stage.migration(1, pid, 2, options);
        stage.held(migration, "source phase send")
    };
    let orphan = held(redis.pid(), &MOVE);
    let alive = held(other.pid(), &[]);
    orphan.process.kill(Signal::KILL).unwrap();
    orphan.finish(LONG).unwrap();
    client.wait_for_operations(500, LONG).unwrap();
    eventually("only one is left", || {
        journals(&stage, 1).lines().count() == 1
    });
    stands_still(&stage, other.pid());
    stage.go(1);
    alive.finish(LONG).unwrap().success();
    assert!(stage.host(2).process_alive(other.pid()));
    assert!(!stage.host(1).process_alive(other.pid()));
    assert!(stage.host(1).process_alive(redis.pid()));
    client.stop().clean();
    stage.assert_clean(1, &["cgroup /redis"]);
    drop(servers);
}

#[test]
fn a_running_server_brings_a_committed_target_what_its_killed_source_owes() {
    let stage = Stage::set(3, HAULIER);
    let (redis, client) = served(&stage);
    let servers = [1, 2].map(|host| stage.serve(host));
    let options = [&MOVE[..], &["--mode", "post-copy"]].concat();
    let migration = stage.migration(1, redis.pid(), 2, &options);
    let migration = stage.held(migration, "source Record(Serving)");
    migration.process.kill(Signal::KILL).unwrap();
    migration.finish(LONG).unwrap();
    eventually("nothing is left to be done", || {
        journals(&stage, 1).is_empty()
    });
    client.wait_for_operations(500, LONG).unwrap();
    client.stop().clean();
    assert!(stage.host(2).process_alive(redis.pid()));
    assert!(!stage.host(1).process_alive(redis.pid()));
    stage.assert_clean(1, &["cgroup /redis"]);
    drop(servers);
}

/// It would wait for another migration's end, in whose place the target might be.
#[test]
fn a_server_that_is_told_to_stop_while_it_checks_does_not_wait_for_others() {
    let stage = Stage::set(2, HAULIER);
    // Its check could take a quarter of that.
    let server = stage.serve_with(2, &["--link-time", "3600"]);
    let first = counter(&stage);
    let moving = stage.held(stage.migration(1, first.pid(), 2, &[]), "source phase send");
    let second = counter(&stage);
    let squatter = stage.host(2).command("sleep").arg("1000").pid(second.pid());
    let _squatter = squatter.spawn().unwrap();
    let connections = || {
        let line = "ss -Htn state established dport = :7000 | wc -l";
        let told = stage.host(1).shell(line).unwrap().success();
        told.trim().parse::<u32>().unwrap()
    };
    let before = connections();
    let waiting = stage.migration(1, second.pid(), 2, &[]);
    let waiting = waiting.spawn_captured().unwrap();
    eventually("it is being checked", || connections() > before);
    server.process.kill(Signal::TERM).unwrap();
    let output = waiting.finish(LONG).unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", output.stderr);
    goes_on(&stage, second.pid());
    // What it has begun it brings to an end.
    stage.go(1);
    moving.finish(LONG).unwrap().success();
    let said = server.finish(LONG).unwrap();
    assert!(
        !said.stderr.contains("did not come to an end"),
        "{}",
        said.stderr
    );
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
        redis::fill(&stage, 1, 32 << 20);
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
