//! A server that runs looks after what dies on its host, and is itself told to stop while it waits.

mod stage;

use std::net::SocketAddr;

use haulier_lab::workloads::{RedisClient, start_redis};
use haulier_lab::{Process, Signal};
use stage::sight::{goes_on, journals, stands_still};
use stage::{LONG, MOVING_V4, Stage, eventually, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
const MOVE: [&str; 2] = ["--move-ip", "10.77.0.100/24@eth0"];

/// A Redis on host 1 with a client that checks every answer.
fn served(stage: &Stage) -> (Process, RedisClient) {
    stage.give_addresses(1);
    let redis = start_redis(stage.host(1), 6379).unwrap();
    let address = SocketAddr::new(MOVING_V4.parse().unwrap(), 6379);
    let client = stage.host(3).in_network(|| RedisClient::start(address));
    let client = client.unwrap().unwrap();
    client.wait_for_operations(500, LONG).unwrap();
    (redis, client)
}

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
