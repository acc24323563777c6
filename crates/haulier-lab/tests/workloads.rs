//! The workloads run, and their checks notice what they should.

use haulier_lab::workloads::{
    OpenLoop, OpenLoopClient, Protocol, RedisClient, check_redis, connections, fill_redis,
    start_redis, threads,
};
use haulier_lab::{Lab, LabConfig, Signal, program};
use std::net::SocketAddr;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

fn lab() -> Lab {
    Lab::start(LabConfig::hosts(2)).unwrap()
}

#[test]
fn a_good_redis_gives_a_clean_report() {
    let lab = lab();
    start_redis(lab.host(1), 6379).unwrap();
    let server = SocketAddr::from((lab.host(1).ipv4(), 6379));
    let client = lab
        .host(2)
        .in_network(|| RedisClient::start(server))
        .unwrap()
        .unwrap();
    client.wait_for_operations(1000, SOON).unwrap();
    let report = client.stop().clean();
    assert!(report.operations >= 1000 && report.longest_gap() > Duration::ZERO);
    assert!(report.gaps.is_sorted_by(|a, b| a.length >= b.length));
}

#[test]
fn a_wrong_redis_is_found_out() {
    let lab = lab();
    start_redis(lab.host(1), 6379).unwrap();
    let server = SocketAddr::from((lab.host(1).ipv4(), 6379));
    let client = lab
        .host(2)
        .in_network(|| RedisClient::start(server))
        .unwrap()
        .unwrap();
    client.wait_for_operations(1000, SOON).unwrap();
    // As if it had been restored from before the client came.
    lab.host(1)
        .run(["redis-cli", "flushall"])
        .unwrap()
        .success();
    client.wait_for_operations(10_000, SOON).unwrap();
    let report = client.stop();
    assert!(
        report.errors.iter().any(|error| error.contains("counter")),
        "{:?}",
        report.errors
    );
    assert!(
        report.errors.iter().any(|error| error.contains("bytes")),
        "{:?}",
        report.errors
    );
}

#[test]
fn a_lost_connection_is_an_error() {
    let lab = lab();
    let redis = start_redis(lab.host(1), 6379).unwrap();
    let server = SocketAddr::from((lab.host(1).ipv4(), 6379));
    let client = lab
        .host(2)
        .in_network(|| RedisClient::start(server))
        .unwrap()
        .unwrap();
    client.wait_for_operations(100, SOON).unwrap();
    redis.kill(Signal::KILL).unwrap();
    assert!(client.wait_for_operations(1_000_000, SOON).is_err());
    assert!(client.has_ended());
    assert_eq!(client.stop().error_count, 1);
}

#[test]
fn stored_data_is_compared_byte_by_byte() {
    let lab = lab();
    let host = lab.host(1);
    start_redis(host, 6379).unwrap();
    let server = SocketAddr::from((host.ipv4(), 6379));
    let size = 3 << 20;
    let check = || {
        host.in_network(|| check_redis(server, 42, size))
            .unwrap()
            .unwrap()
    };
    host.in_network(|| fill_redis(server, 42, size))
        .unwrap()
        .unwrap();
    assert_eq!((check().keys, check().wrong), (768, 0));
    host.run(["redis-cli", "setrange", "fill:100", "4000", "x"])
        .unwrap()
        .success();
    host.run(["redis-cli", "del", "fill:767"])
        .unwrap()
        .success();
    assert_eq!(check().wrong, 2);
    assert_eq!(
        check().first_wrong.as_deref(),
        Some("fill:100 holds something else")
    );
}

#[test]
fn threads_report_and_end_well() {
    let lab = lab();
    let host = lab.host(1);
    let mut workload = host
        .command(program().unwrap())
        .args(["workload", "threads", "--threads", "3", "--memory", "8"])
        .args(["--report", "/srv/report"])
        .setsid()
        .spawn()
        .unwrap();
    let status = || threads::read_report(&host.read_file("/srv/report").unwrap_or_default());
    let until = std::time::Instant::now() + SOON;
    while !status().is_ok_and(|status| status.line >= 3 && status.iterations > 0) {
        assert!(std::time::Instant::now() < until, "{:?}", status());
        std::thread::sleep(Duration::from_millis(10));
    }
    workload.kill(Signal::TERM).unwrap();
    assert!(workload.wait(SOON).unwrap().success());
    assert_eq!(status().unwrap().errors, 0);
}

#[test]
fn two_hundred_connections_keep_their_state() {
    let lab = lab();
    let host = lab.host(1);
    let server = SocketAddr::from((host.ipv4(), 7000));
    host.command(program().unwrap())
        .args(["workload", "connections"])
        .setsid()
        .spawn()
        .unwrap();
    let open = || connections::Client::open(server, 200);
    let until = std::time::Instant::now() + SOON;
    let mut client = loop {
        match lab.host(2).in_network(open).unwrap() {
            Ok(client) => break client,
            Err(error) => assert!(std::time::Instant::now() < until, "{error}"),
        }
    };
    assert_eq!(client.count(), 200);
    client.round().unwrap();
    client.begin().unwrap();
    client.finish().unwrap();
    client.round().unwrap();
    host.kill_where(
        |process| process.argv.iter().any(|a| a == "connections"),
        Signal::KILL,
    )
    .unwrap();
    assert!(client.round().is_err());
}

/// What a cut takes away is sent again by TCP, and is lost for UDP.
#[test]
fn open_loop_clients_tell_what_a_cut_costs() {
    let lab = lab();
    let host = lab.host(1);
    let server = SocketAddr::from((host.ipv4(), 6100));
    let listen = server.to_string();
    let echo = ["workload", "echo", "--memory", "4", "--listen", &listen];
    let echo = host.command(program().unwrap()).args(echo).setsid();
    echo.spawn().unwrap();
    let config = OpenLoop {
        server,
        tcp: 10,
        udp: 2,
        interval: Duration::from_millis(5),
        protocol: Protocol::Echo,
    };
    let until = std::time::Instant::now() + SOON;
    let start = || OpenLoopClient::start(config);
    let clients = loop {
        match lab.host(2).in_network(start).unwrap() {
            Ok(clients) => break clients,
            Err(error) => assert!(std::time::Instant::now() < until, "{error}"),
        }
    };
    let wait_for = |what: &dyn Fn() -> bool| {
        let until = std::time::Instant::now() + SOON;
        while !what() {
            assert!(
                std::time::Instant::now() < until,
                "{:?}",
                clients.snapshot()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let seen = || clients.snapshot();
    wait_for(&|| seen().tcp.answered > 100 && seen().udp.answered > 20);
    lab.cut(2).unwrap();
    let before = seen().udp.sent;
    wait_for(&|| seen().udp.sent > before + 100);
    lab.mend(2).unwrap();
    let answered = seen().udp.answered;
    wait_for(&|| seen().udp.answered > answered + 20);
    let report = clients.stop();
    assert_eq!(report.errors(), Vec::<&str>::new());
    assert_eq!(report.tcp.lost, 0, "{report:?}");
    assert!(report.udp.lost >= 50, "{report:?}");
    assert!(report.tcp.longest_ms > 200.0, "{report:?}");
}
