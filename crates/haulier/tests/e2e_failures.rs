//! Whatever fails before the commit: the process runs on where it was, the message says where, in
//! which phase, why and what to do, and nothing is left on either host.

mod stage;

use std::net::SocketAddr;
use std::time::Duration;

use haulier_lab::workloads::RedisClient;
use haulier_lab::{Captured, Output, Process, Signal};
use stage::codes::{NOTHING_TOUCHED, ROLLED_BACK};
use stage::redis::{self, MOVE, served};
use stage::{LONG, MOVING_V4, PORT, Stage, eventually, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

/// A Redis on host 1 with a client that checks every answer: what must not notice.
struct Served {
    stage: Stage,
    redis: Process,
    client: RedisClient,
}

impl Served {
    fn set() -> Served {
        let stage = Stage::set(3, HAULIER);
        let (redis, client) = served(&stage);
        Served {
            stage,
            redis,
            client,
        }
    }

    /// The same with so much memory, and so slow a network from here on, that sending it takes
    /// seconds: it can be met in the middle, when the destination has begun to restore.
    fn set_slow() -> Served {
        let served = Served::set();
        redis::fill(&served.stage, 1, 16 << 20);
        served.stage.lab.shape(Some("20mbit")).unwrap();
        served
    }

    fn migrate(&self, options: &[&str]) -> Output {
        let options: Vec<&str> = MOVE.iter().chain(options).copied().collect();
        self.stage.migrate(1, self.redis.pid(), 2, &options)
    }

    /// It runs here and serves its client, which has seen no error; both hosts are as before.
    #[track_caller]
    fn assert_untouched(self, output: &Output, code: i32, words: &[&str]) {
        let text = &output.stderr;
        assert_eq!(output.status.code(), Some(code), "{text}");
        for word in words {
            assert!(text.contains(word), "no {word:?} in: {text}");
        }
        assert!(text.contains("what to do:"), "{text}");
        assert!(self.stage.host(1).process_alive(self.redis.pid()));
        self.client.wait_for_operations(500, LONG).unwrap();
        self.client.stop().clean();
        let still = self
            .stage
            .host(1)
            .run(["ip", "-o", "addr"])
            .unwrap()
            .success();
        assert!(still.contains(&format!(" {MOVING_V4}/24 ")), "{still}");
        self.stage.assert_clean(1, &["cgroup /redis"]);
        self.stage.assert_clean(2, &[]);
    }
}

#[test]
fn a_closed_port() {
    let served = Served::set();
    let output = served.migrate(&[]);
    let words = ["on host1", "\"connect\"", "10.77.0.2:7000", "haulier serve"];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

#[test]
fn no_criu_at_the_destination() {
    let served = Served::set();
    let server = served
        .stage
        .host(2)
        .command(HAULIER)
        .args([
            "serve",
            "--listen",
            &served.stage.address(2),
            "--criu",
            "/nonexistent/criu",
        ])
        .spawn_captured()
        .unwrap();
    server.wait_for_output("listening on", LONG).unwrap();
    let output = served.migrate(&[]);
    let words = ["on host2", "\"check\"", "/nonexistent/criu"];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

#[test]
fn a_process_number_that_is_taken_there() {
    let served = Served::set();
    let _server = served.stage.serve(2);
    let pid = served.redis.pid();
    let squatter = served
        .stage
        .host(2)
        .command("sleep")
        .arg("1000")
        .pid(pid)
        .spawn()
        .unwrap();
    assert_eq!(squatter.pid(), pid);
    let output = served.migrate(&[]);
    let taken = format!("process number {pid} is taken here, by sleep");
    served.assert_untouched(&output, NOTHING_TOUCHED, &["on host2", "\"check\"", &taken]);
}

#[test]
fn an_address_that_is_there_already_and_one_that_is_not_here() {
    let served = Served::set();
    let _server = served.stage.serve(2);
    let pid = served.redis.pid();
    let absent = served
        .stage
        .migrate(1, pid, 2, &["--move-ip", "10.77.0.99/24@eth0"]);
    assert_eq!(
        absent.status.code(),
        Some(NOTHING_TOUCHED),
        "{}",
        absent.stderr
    );

    let address = format!("{MOVING_V4}/32");
    let on_loopback = ["ip", "addr", "add", &address, "dev", "lo"];
    served.stage.host(2).run(on_loopback).unwrap().success();
    let output = served.migrate(&[]);
    let words = ["on host2", "\"check\"", "10.77.0.100", "here already"];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

#[test]
fn connections_whose_address_stays() {
    let served = Served::set();
    let _server = served.stage.serve(2);
    let output = served.stage.migrate(1, served.redis.pid(), 2, &[]);
    let words = [
        "on host1",
        "TCP connections cannot move",
        "--move-ip 10.77.0.100/",
    ];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

#[test]
fn a_link_that_runs_over_the_moving_address() {
    let served = Served::set();
    // The way to host 2 leads over the address that is about to move.
    let route = [
        "ip",
        "route",
        "add",
        "10.77.0.2/32",
        "dev",
        "eth0",
        "src",
        MOVING_V4,
    ];
    served.stage.host(1).run(route).unwrap().success();
    let _server = served.stage.serve(2);
    let output = served.migrate(&[]);
    let words = [
        "on host1",
        "\"connect\"",
        "itself runs over 10.77.0.100/24@eth0",
    ];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

#[test]
fn too_little_memory_allowed_there() {
    let served = Served::set();
    let _server = served.stage.serve_with(2, &["--max-memory", "1MiB"]);
    let output = served.migrate(&[]);
    let words = ["on host2", "\"check\"", "--max-memory"];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

/// Bytes that host 1 has sent over the connections of a migration.
fn sent(stage: &Stage) -> u64 {
    let told = "ss -Htni dport = :7000 | grep -o 'bytes_sent:[0-9]*'";
    let told = stage.host(1).shell(told).unwrap().stdout;
    let each = told
        .lines()
        .filter_map(|line| line.rsplit(':').next()?.parse::<u64>().ok());
    each.sum()
}

/// Starts a migration and lets something happen while the target is frozen and its memory is on the
/// way; then the network is fast again.
fn amid(served: &Served, options: &[&str], happens: impl FnOnce(&Captured)) -> Output {
    let stage = &served.stage;
    let frozen = ["--mode", "stop-and-copy", "--compress", "none"];
    let options: Vec<&str> = MOVE.iter().chain(&frozen).chain(options).copied().collect();
    let migration = stage.migration(1, served.redis.pid(), 2, &options);
    let migration = stage.held(migration, "source phase send");
    let before = sent(stage);
    stage.go(1);
    eventually("pages are on their way", || {
        sent(stage) > before + (1 << 18)
    });
    happens(&migration);
    let output = migration.finish(LONG).unwrap();
    stage.lab.shape(None).unwrap();
    output
}

#[test]
fn a_link_that_is_cut_while_memory_is_sent() {
    let served = Served::set_slow();
    let _server = served.stage.serve(2);
    let cut = |_: &Captured| served.stage.lab.cut(2).unwrap();
    let output = amid(&served, &["--step-time", "6"], cut);
    served.stage.lab.mend(2).unwrap();
    served.assert_untouched(&output, ROLLED_BACK, &["on host1"]);
}

#[test]
fn ctrl_c_while_memory_is_sent() {
    let served = Served::set_slow();
    let _server = served.stage.serve(2);
    let output = amid(&served, &[], |migration| {
        migration.process.kill(Signal::INT).unwrap();
    });
    served.assert_untouched(&output, ROLLED_BACK, &["on host1", "interrupted"]);
}

#[test]
fn the_destinations_criu_killed_half_way() {
    let served = Served::set_slow();
    let _server = served.stage.serve(2);
    let (host, pid) = (served.stage.host(2), served.redis.pid());
    let output = amid(&served, &[], |_| {
        eventually("CRIU was killed while it restored", || {
            let restoring = host.process_alive(pid);
            restoring
                && !host
                    .kill_all_named("criu", Signal::KILL)
                    .unwrap()
                    .is_empty()
        });
    });
    let words = ["on host2", "\"restore\"", "CRIU"];
    served.assert_untouched(&output, ROLLED_BACK, &words);
}

#[test]
fn the_sources_criu_killed_while_memory_is_sent() {
    let served = Served::set_slow();
    let _server = served.stage.serve(2);
    let (stage, pid) = (&served.stage, served.redis.pid());
    let output = amid(&served, &[], |_| {
        eventually("the destination restores", || {
            stage.host(2).process_alive(pid)
        });
        stage.host(1).kill_all_named("criu", Signal::KILL).unwrap();
    });
    // The cgroup holds what CRIU no longer does: the migration may even succeed, and the client
    // must not notice either way.
    let text = output.stderr;
    assert!(
        matches!(output.status.code(), Some(0 | ROLLED_BACK)),
        "{text}"
    );
    let lives = [1, 2]
        .into_iter()
        .filter(|host| stage.host(*host).process_alive(pid))
        .count();
    assert_eq!(lives, 1, "{text}");
    served.client.wait_for_operations(500, LONG).unwrap();
    served.client.stop().clean();
}

#[test]
fn a_destination_that_is_killed_while_memory_is_sent() {
    let served = Served::set_slow();
    let server = served.stage.serve(2);
    let output = amid(&served, &[], |_| server.process.kill(Signal::KILL).unwrap());
    // What a killed server leaves is the next one's to remove.
    let _server = served.stage.serve(2);
    served.assert_untouched(&output, ROLLED_BACK, &["on host1"]);
}

/// Starts a migration and lets something happen while memory is sent and the target runs.
fn amid_rounds(served: &Served, options: &[&str], happens: impl FnOnce(&Captured)) -> Output {
    let stage = &served.stage;
    let rounds = ["--max-rounds", "3", "--compress", "none"];
    let options: Vec<&str> = MOVE.iter().chain(&rounds).chain(options).copied().collect();
    let migration = stage.migration(1, served.redis.pid(), 2, &options);
    let migration = migration.spawn_captured().unwrap();
    eventually("pages are on their way", || sent(stage) > 1 << 20);
    happens(&migration);
    let output = migration.finish(LONG).unwrap();
    stage.lab.shape(None).unwrap();
    output
}

#[test]
fn a_link_that_is_cut_during_the_rounds() {
    let served = Served::set_slow();
    let _server = served.stage.serve(2);
    let cut = |_: &Captured| served.stage.lab.cut(2).unwrap();
    let output = amid_rounds(&served, &["--step-time", "6"], cut);
    served.stage.lab.mend(2).unwrap();
    served.assert_untouched(&output, NOTHING_TOUCHED, &["on host1", "pre-copy"]);
}

#[test]
fn ctrl_c_during_the_rounds() {
    let served = Served::set_slow();
    let _server = served.stage.serve(2);
    let output = amid_rounds(&served, &["--mode", "hybrid"], |migration| {
        migration.process.kill(Signal::INT).unwrap();
    });
    let words = ["on host1", "interrupted", "pre-copy"];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

#[test]
fn a_destination_that_is_killed_during_the_rounds() {
    let served = Served::set_slow();
    let server = served.stage.serve(2);
    let output = amid_rounds(&served, &[], |_| {
        server.process.kill(Signal::KILL).unwrap();
    });
    let _server = served.stage.serve(2);
    served.assert_untouched(&output, NOTHING_TOUCHED, &["on host1"]);
}

#[test]
fn a_criu_that_is_killed_while_it_waits_for_the_end_of_the_rounds_is_replaced() {
    for host in [1, 2] {
        let served = Served::set_slow();
        let _server = served.stage.serve(2);
        let (stage, pid) = (&served.stage, served.redis.pid());
        let output = amid_rounds(&served, &[], |_| {
            let killed = stage.host(host).kill_all_named("criu", Signal::KILL);
            assert_eq!(killed.unwrap().len(), 1);
            // The rest does not have to be slow.
            stage.lab.shape(None).unwrap();
        });
        let text = output.stderr;
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(stage.host(2).process_alive(pid), "{text}");
        assert!(!stage.host(1).process_alive(pid), "{text}");
        served.client.wait_for_operations(500, LONG).unwrap();
        served.client.stop().clean();
    }
}

#[test]
fn rounds_that_do_not_converge_and_may_not_be_forced() {
    let served = Served::set();
    let _server = served.stage.serve(2);
    let output = served.migrate(&["--max-downtime", "1ms", "--on-stall", "abort"]);
    let words = ["on host1", "pre-copy", "--max-downtime"];
    served.assert_untouched(&output, NOTHING_TOUCHED, &words);
}

/// What a program that writes to a file at `/srv/data`, different on every host, needs.
fn writer(stage: &Stage, sizes: [Option<&str>; 2]) -> Process {
    for (host, contents) in [1, 2].into_iter().zip(sizes) {
        if let Some(contents) = contents {
            stage.host(host).write_file("/srv/data", contents).unwrap();
        }
    }
    start(
        stage.host(1),
        &["sh", "-c", "exec 3<>/srv/data; while :; do sleep 1; done"],
    )
}

#[test]
fn a_file_that_is_missing_there() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let process = writer(&stage, [Some("12345"), None]);
    let output = stage.migrate(1, process.pid(), 2, &[]);
    assert_eq!(
        output.status.code(),
        Some(NOTHING_TOUCHED),
        "{}",
        output.stderr
    );
    assert!(
        output
            .stderr
            .contains("/srv/data (open in the target) does not exist")
    );
    assert!(stage.host(1).process_alive(process.pid()));
    stage.assert_clean(2, &[]);
}

/// What is open for writing may change until the freeze, so only CRIU can tell: at the restore.
#[test]
fn a_file_of_another_size_there() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let process = writer(&stage, [Some("12345"), Some("123456789")]);
    let output = stage.migrate(1, process.pid(), 2, &[]);
    let text = &output.stderr;
    assert_eq!(output.status.code(), Some(ROLLED_BACK), "{text}");
    for words in [
        "on host2",
        "\"restore\"",
        "srv/data has bad size",
        "make the file the same",
    ] {
        assert!(text.contains(words), "no {words:?} in: {text}");
    }
    assert!(stage.host(1).process_alive(process.pid()));
    stage.assert_clean(1, &[]);
    stage.assert_clean(2, &[]);
    // And once the file is the same, it moves.
    stage.host(2).write_file("/srv/data", "12345").unwrap();
    stage.moved(1, process.pid(), 2, &[]);
    stage.assert_clean(1, &[]);
}

#[test]
fn targets_that_cannot_move_at_all() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let nobody = stage.migrate(1, 2999, 2, &[]);
    assert_eq!(nobody.status.code(), Some(NOTHING_TOUCHED));
    assert!(
        nobody.stderr.contains("no process 2999"),
        "{}",
        nobody.stderr
    );

    let pipeline = start(stage.host(1), &["sh", "-c", "sleep 1000 | cat"]);
    let sleep = || {
        let all = stage.host(1).processes().unwrap();
        all.into_iter()
            .find(|process| process.comm == "sleep")
            .map(|process| process.pid)
    };
    eventually("the pipeline runs", || sleep().is_some());
    let half = stage.migrate(1, sleep().unwrap(), 2, &[]);
    assert_eq!(half.status.code(), Some(NOTHING_TOUCHED));
    assert!(
        half.stderr.contains("a pipe that process"),
        "{}",
        half.stderr
    );
    assert!(stage.host(1).process_alive(pipeline.pid()));

    let usage = stage
        .haulier(1)
        .args(["migrate", "1"])
        .output(LONG)
        .unwrap();
    assert_eq!(usage.status.code(), Some(2));
    stage.assert_clean(1, &[]);
    stage.assert_clean(2, &[]);
}

#[test]
fn strangers_at_the_port_do_no_harm() {
    use std::io::Write;
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let address = SocketAddr::from((stage.host(2).ipv4(), PORT));
    for noise in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"",
        b"HLR1\x01\0\0\0\xff\xff\xff\xff0000",
        &[0; 4096],
    ] {
        let result = stage.host(1).in_network(|| {
            let mut stranger =
                std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
            stranger.write_all(noise)
        });
        result.unwrap().unwrap();
    }
    let process = start(stage.host(1), &["sleep", "1000"]);
    stage.moved(1, process.pid(), 2, &[]);
}
