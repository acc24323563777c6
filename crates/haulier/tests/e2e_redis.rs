//! A Redis moves, and its clients notice nothing but a short gap.

mod stage;

use std::net::SocketAddr;

use haulier_lab::workloads::{RedisClient, check_redis, fill_redis, start_redis};
use stage::{LONG, MOVING_V4, MOVING_V6, Stage};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
const SEED: u64 = 4711;
const FILL: u64 = 32 << 20;

fn redis_moves_and_returns(address: &str, move_ip: &str) {
    let stage = Stage::set(3, HAULIER);
    let (_one, _two) = (stage.serve(1), stage.serve(2));
    stage.give_addresses(1);
    let redis = start_redis(stage.host(1), 6379).unwrap();
    let server: SocketAddr = address.parse().unwrap();
    let observer = stage.host(3);
    observer
        .in_network(|| fill_redis(server, SEED, FILL))
        .unwrap()
        .unwrap();
    let client = observer
        .in_network(|| RedisClient::start(server))
        .unwrap()
        .unwrap();
    client.wait_for_operations(1000, LONG).unwrap();

    for (from, to) in [(1, 2), (2, 1)] {
        stage.moved(from, redis.pid(), to, &["--move-ip", move_ip]);
        client.wait_for_operations(1000, LONG).unwrap();
        let addresses = |host| {
            stage
                .host(host)
                .run(["ip", "-o", "addr"])
                .unwrap()
                .success()
        };
        let address = move_ip.split('/').next().unwrap();
        assert!(addresses(to).contains(&format!(" {address}/")));
        assert!(!addresses(from).contains(&format!(" {address}/")));
        stage.assert_clean(from, &["cgroup /redis"]);
    }
    let report = client.stop().clean();
    eprintln!(
        "{} operations, longest gap {:?}",
        report.operations,
        report.longest_gap()
    );
    let check = observer
        .in_network(|| check_redis(server, SEED, FILL))
        .unwrap()
        .unwrap();
    assert_eq!((check.wrong, check.first_wrong), (0, None));
    assert_eq!(check.keys, FILL / 4096);
}

#[test]
fn redis_moves_over_ipv4() {
    redis_moves_and_returns(
        &format!("{MOVING_V4}:6379"),
        &format!("{MOVING_V4}/24@eth0"),
    );
}

#[test]
fn redis_moves_over_ipv6() {
    redis_moves_and_returns(
        &format!("[{MOVING_V6}]:6379"),
        &format!("{MOVING_V6}/64@eth0"),
    );
}

#[test]
fn two_addresses_move_at_once_each_with_its_client() {
    let stage = Stage::set(3, HAULIER);
    let _server = stage.serve(2);
    stage.give_addresses(1);
    let redis = start_redis(stage.host(1), 6379).unwrap();
    let observer = stage.host(3);
    let clients = [format!("{MOVING_V4}:6379"), format!("[{MOVING_V6}]:6379")].map(|address| {
        let server: SocketAddr = address.parse().unwrap();
        let client = observer.in_network(|| RedisClient::start(server));
        client.unwrap().unwrap()
    });
    let all_go_on = || {
        for client in &clients {
            client.wait_for_operations(500, LONG).unwrap();
        }
    };
    all_go_on();
    let (v4, v6) = (
        format!("{MOVING_V4}/24@eth0"),
        format!("{MOVING_V6}/64@eth0"),
    );
    stage.moved(1, redis.pid(), 2, &["--move-ip", &v4, "--move-ip", &v6]);
    all_go_on();
    for client in clients {
        client.stop().clean();
    }
    stage.assert_clean(1, &["cgroup /redis"]);
}
