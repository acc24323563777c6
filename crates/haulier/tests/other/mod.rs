//! A Redis in use that is moved from host 1 to host 2 while something goes wrong there.

mod disk;
mod liars;
mod memory;
mod twice;

use haulier::checkpoint::{HOLD_AT, HOLD_UNTIL};
use haulier_lab::workloads::RedisClient;
use haulier_lab::{Captured, Process, ProcessInfo, Signal};

use crate::stage::redis::{self, MOVE};
use crate::stage::{GO, LONG, Stage, eventually};

pub(crate) const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

const SEED: u64 = 7;
const DATA: u64 = 4 << 20;

/// A Redis on host 1 and a client on host 3 that checks every answer.
pub(crate) struct Scene {
    pub(crate) stage: Stage,
    pub(crate) redis: Process,
    pub(crate) client: RedisClient,
}

impl Scene {
    pub(crate) fn set() -> Scene {
        let stage = Stage::set(3, HAULIER);
        let redis = redis::start(&stage);
        redis::fill(&stage, SEED, DATA);
        let client = redis::client(&stage);
        Scene {
            stage,
            redis,
            client,
        }
    }

    /// `haulier serve` on host 2, held at a point.
    pub(crate) fn server(&self, point: &str, options: &[&str]) -> Captured {
        let listen = self.stage.address(2);
        let server = self.agent(
            2,
            point,
            &[&["serve", "--listen", &listen], options].concat(),
        );
        server.wait_for_output("listening on", LONG).unwrap();
        server
    }

    /// `haulier migrate` on host 1, held at a point.
    pub(crate) fn migration(&self, point: &str, options: &[&str]) -> Captured {
        let (pid, to) = (self.redis.pid().to_string(), self.stage.address(2));
        let arguments = [&["migrate", &pid, &to][..], &MOVE, options].concat();
        self.agent(1, point, &arguments)
    }

    /// An agent that outlives a file that may not grow. What it says goes through a pipe, to standard
    /// output: the file it ends in is not to be one of those.
    fn agent(&self, host: usize, point: &str, arguments: &[&str]) -> Captured {
        let line = "trap '' XFSZ; \"$@\" 2>&1 | cat; exit ${PIPESTATUS[0]}";
        let _ = self.stage.host(host).shell(&format!("rm -f {GO}"));
        let command = self.stage.host(host).command("bash");
        let command = command.args(["-c", line, "bash", HAULIER]).args(arguments);
        let command = command.env(HOLD_AT, point).env(HOLD_UNTIL, GO);
        let command = match std::env::var_os("HAULIER_CRIU") {
            Some(criu) => command.env("HAULIER_CRIU", criu),
            None => command,
        };
        command.spawn_captured().unwrap()
    }

    /// Lets a held agent go on.
    pub(crate) fn go(&self, host: usize) {
        self.stage.host(host).write_file(GO, b"").unwrap();
    }

    /// The process number of an agent on a host, by its command.
    pub(crate) fn pid_of(&self, host: usize, word: &str) -> i32 {
        let matches = |process: &&ProcessInfo| {
            process.is_named("haulier") && process.argv.get(1).is_some_and(|first| first == word)
        };
        let processes = self.stage.host(host).processes().unwrap();
        let agent = processes.iter().find(matches);
        agent
            .unwrap_or_else(|| panic!("no {word} on host {host}"))
            .pid
    }

    /// From now on no file of an agent can grow, as on a disk that is full; or it can again.
    pub(crate) fn choke(&self, host: usize, word: &str, full: bool) {
        let limit = if full { "1" } else { "unlimited" };
        self.limit(host, self.pid_of(host, word), &format!("--fsize={limit}:"));
    }

    pub(crate) fn limit(&self, host: usize, pid: i32, limit: &str) {
        let line = format!("prlimit --pid {pid} {limit}");
        self.stage.host(host).shell(&line).unwrap().success();
    }

    /// Gives a folder of a host so few bytes.
    pub(crate) fn shrink(&self, host: usize, folder: &str, size: &str) {
        let line = format!("mount -o remount,size={size} {folder}");
        self.stage.host(host).shell(&line).unwrap().success();
    }

    /// Fills a folder up.
    pub(crate) fn fill(&self, host: usize, folder: &str) {
        let line = format!("head -c 64m /dev/zero > {folder}/filler 2>/dev/null; df {folder}");
        let said = self.stage.host(host).shell(&line).unwrap().stdout;
        assert!(said.contains("100%"), "{said}");
    }

    pub(crate) fn empty(&self, host: usize, folder: &str) {
        let line = format!("rm {folder}/filler");
        self.stage.host(host).shell(&line).unwrap().success();
    }

    /// Ends a server, as a crash does.
    pub(crate) fn kill_server(&self, server: Captured) {
        let pid = self.pid_of(2, "serve");
        self.stage.host(2).signal(pid, Signal::KILL).unwrap();
        server.finish(LONG).unwrap();
    }

    /// Redis runs on that host and not on the other; memory is right, the client noticed nothing, and
    /// nothing is left to be done or lying about.
    #[track_caller]
    pub(crate) fn assert_lives_on(&self, home: usize) {
        let pid = self.redis.pid();
        let other = 3 - home;
        assert!(self.stage.host(home).process_alive(pid));
        eventually("the other one is gone", || {
            !self.stage.host(other).process_alive(pid)
        });
        self.client.wait_for_operations(100, LONG).unwrap();
        let report = self.client.snapshot();
        assert_eq!(report.error_count, 0, "{:?}", report.errors);
        redis::assert_whole(&self.stage, SEED, DATA);
        for host in [1, 2] {
            let recover = self.stage.haulier(host).args(["recover", "--wait", "5"]);
            let said = recover.output(LONG).unwrap().success();
            assert!(said.contains("nothing is left"), "{said}");
            let go = format!("file {GO}");
            let own = [
                "cgroup /redis",
                "cgroup /haulier",
                "process ",
                "address ",
                &go,
            ];
            let but = if host == home {
                &own[..]
            } else {
                &[own[0], &go][..]
            };
            self.stage.assert_clean(host, but);
        }
    }
}
