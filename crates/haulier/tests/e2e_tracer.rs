//! A haulier that is killed while it begins to track its target leaves it as it was.

mod stage;

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use haulier::checkpoint::{self, HOLD_AT, HOLD_UNTIL};
use haulier::directories::STATE;
use haulier::tracer::{HOLDING, SIDE};
use haulier_lab::workloads::{RedisClient, start_redis};
use haulier_lab::{Process, Signal};
use stage::{GO, LONG, MOVING_V4, Stage, eventually, play, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
const MOVE: [&str; 2] = ["--move-ip", "10.77.0.100/24@eth0"];
/// Kills while a thread is held, and at moments around that.
const HELD: u64 = 6;
const AROUND: u64 = 12;

struct Scene {
    stage: Stage,
    redis: Process,
    client: RedisClient,
}

impl Scene {
    fn set() -> Scene {
        let stage = Stage::set(3, HAULIER);
        stage.give_addresses(1);
        let address = SocketAddr::new(MOVING_V4.parse().unwrap(), 6379);
        let redis = start_redis(stage.host(1), 6379).unwrap();
        let connect = || RedisClient::start(address);
        let client = stage.host(3).in_network(connect).unwrap().unwrap();
        Scene {
            stage,
            redis,
            client,
        }
    }

    fn has_userfaultfd(&self) -> bool {
        let list = format!("ls -l /proc/{}/fd", self.redis.pid());
        let files = self.stage.host(1).shell(&list).unwrap().success();
        files.contains("userfaultfd")
    }

    fn go_away(&self) {
        let away = format!("rm {GO}");
        self.stage.host(1).shell(&away).unwrap().success();
    }

    fn assert_untouched(&self) {
        eventually("nothing is left in the target", || !self.has_userfaultfd());
        if let Err(error) = self.client.wait_for_operations(100, LONG) {
            let report = self.client.snapshot();
            panic!("{error}: {:?}", report.errors);
        }
        assert!(self.stage.host(1).process_alive(self.redis.pid()));
    }
}

#[test]
fn a_source_that_is_killed_when_it_begins_to_track_leaves_the_target_as_it_was() {
    let scene = Scene::set();
    let stage = &scene.stage;
    let pid = scene.redis.pid();
    let server = stage.serve(2);
    let migration = || stage.migration(1, pid, 2, &MOVE);
    for _ in 0..HELD {
        let point = checkpoint::name(SIDE, HOLDING);
        let migration = migration().env(HOLD_AT, point).env(HOLD_UNTIL, GO);
        let migration = migration.spawn_captured().unwrap();
        eventually("it is held", || scene.has_userfaultfd());
        migration.process.kill(Signal::KILL).unwrap();
        migration.finish(LONG).unwrap();
        assert!(scene.has_userfaultfd(), "it is held by another process");
        stage.go(1);
        scene.assert_untouched();
        scene.go_away();
    }
    for round in 0..AROUND {
        let held = stage.held(migration(), "source phase pre-copy");
        stage.go(1);
        thread::sleep(Duration::from_micros(round * 1500));
        held.process.kill(Signal::KILL).unwrap();
        held.finish(LONG).unwrap();
        // It may have come as far as the freeze. A child that it has just forked has its lock until it
        // executes its program.
        eventually("it is recovered", || {
            let recover = stage.haulier(1).args(["recover"]);
            recover.output(LONG).unwrap().status.success()
        });
        scene.assert_untouched();
        scene.go_away();
    }
    stage.moved(1, pid, 2, &MOVE);
    scene.client.wait_for_operations(500, LONG).unwrap();
    scene.client.stop().clean();
    drop(server);
}

/// A program that makes a userfaultfd as a tracer does, and then does this with it.
fn with_userfaultfd(stage: &Stage, python: &str, then: &str) -> i32 {
    let script = format!(
        "import ctypes, fcntl, os, struct, time\n\
         made = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)\n\
         {then}\n\
         while True: time.sleep(0.01)"
    );
    let pid = start(stage.host(1), &[python, "-c", &script]).pid();
    let list = format!("ls -l /proc/{pid}/fd");
    eventually("it has a userfaultfd", || {
        let files = stage.host(1).shell(&list).unwrap();
        files.stdout.contains("userfaultfd")
    });
    pid
}

#[test]
fn what_an_earlier_tracer_has_left_is_closed_and_what_is_the_programs_own_is_not() {
    let Some(python) = play::found("python3") else {
        return;
    };
    let python = python.to_str().unwrap();
    let stage = Stage::set(2, HAULIER);
    let server = stage.serve(2);
    let left = with_userfaultfd(&stage, python, "");
    // As a tracer does before it begins.
    let record = format!(
        "mkdir -p {STATE} && : > {STATE}/.tracing-{left}-$(cut -d ' ' -f 22 /proc/{left}/stat)"
    );
    stage.host(1).shell(&record).unwrap().success();
    let moved = stage.migrate(1, left, 2, &[]);
    let words = "which was killed, had left";
    assert!(moved.stderr.contains(words), "{moved:?}");
    moved.success();
    // It just has one; one that was asked for its interface; and one that others may inherit.
    for then in [
        "pass",
        "fcntl.ioctl(made, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))",
        "os.set_inheritable(made, True)",
    ] {
        let own = with_userfaultfd(&stage, python, &format!("{then}; os.chdir('/')"));
        eventually("it has come to its loop", || {
            let cwd = format!("readlink /proc/{own}/cwd");
            stage.host(1).shell(&cwd).unwrap().stdout.trim() == "/"
        });
        let refused = stage.migrate(1, own, 2, &[]);
        assert_eq!(refused.status.code(), Some(3), "{refused:?}");
        let words = "userfaultfd, which CRIU cannot save";
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
    drop(server);
}
