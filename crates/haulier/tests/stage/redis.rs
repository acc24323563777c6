//! A Redis on host 1, at an address that moves with it, and its clients on host 3.

use std::net::SocketAddr;

use haulier_lab::Process;
use haulier_lab::workloads::{RedisClient, check_redis, fill_redis, start_redis};

use super::{LONG, MOVING_V4, Stage};

/// Moves its address along.
pub const MOVE: [&str; 2] = ["--move-ip", "10.77.0.100/24@eth0"];

/// Where its clients reach it.
pub fn address() -> SocketAddr {
    SocketAddr::new(MOVING_V4.parse().unwrap(), 6379)
}

/// Starts it.
pub fn start(stage: &Stage) -> Process {
    stage.give_addresses(1);
    start_redis(stage.host(1), 6379).unwrap()
}

/// Gives it so many bytes of values, which the seed determines.
pub fn fill(stage: &Stage, seed: u64, bytes: u64) {
    let fill = || fill_redis(address(), seed, bytes);
    stage.host(3).in_network(fill).unwrap().unwrap();
}

/// A client that uses it without pause and checks every answer.
pub fn client(stage: &Stage) -> RedisClient {
    let client = stage.host(3).in_network(|| RedisClient::start(address()));
    let client = client.unwrap().unwrap();
    assert_served(&client);
    client
}

/// An empty one in use.
pub fn served(stage: &Stage) -> (Process, RedisClient) {
    (start(stage), client(stage))
}

/// Its client goes on to be served.
#[track_caller]
pub fn assert_served(client: &RedisClient) {
    client.wait_for_operations(500, LONG).unwrap();
}

/// Every value it was filled with is right.
#[track_caller]
pub fn assert_whole(stage: &Stage, seed: u64, bytes: u64) {
    let check = || check_redis(address(), seed, bytes);
    let check = stage.host(3).in_network(check).unwrap().unwrap();
    assert_eq!(check.wrong, 0, "{:?}", check.first_wrong);
}
