//! Image-proxy on host 1, image-cache on host 2, and plain CRIU on both.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test uses some of it"
)]

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use haulier_lab::workloads::{check_redis, fill_redis, start_redis, threads};
use haulier_lab::{Captured, HostCommand, Output, Signal};
use tempfile::TempDir;

use crate::stage::play::{found, shared_folder};
use crate::stage::{LONG, Stage, eventually, lab_program, start};

pub const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
/// Where Redis is, on its host.
pub const REDIS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6379);
/// The port that the cache listens on.
pub const PORT: u16 = 7001;

/// The options of a dump that becomes a page server.
pub const LEAVING: [&str; 5] = ["--lazy-pages", "--address", "127.0.0.1", "--port", "9100"];

/// Two hosts, their directories for CRIU, and the vote.
pub struct Cast {
    pub stage: Stage,
    pub folder: TempDir,
}

impl Cast {
    pub fn new() -> Cast {
        let cast = Cast {
            stage: Stage::set(2, HAULIER),
            folder: shared_folder(),
        };
        for host in [1, 2] {
            cast.stage
                .host(host)
                .shell("mkdir -p /srv/images")
                .unwrap()
                .success();
        }
        let vote = format!("#!/bin/sh\nexec {HAULIER} image-proxy wait \"$@\"\n");
        fs::write(cast.vote(), vote).unwrap();
        fs::set_permissions(cast.vote(), fs::Permissions::from_mode(0o755)).unwrap();
        cast
    }

    /// The action script that makes the delivery a condition of the dump.
    pub fn vote(&self) -> PathBuf {
        self.folder.path().join("vote")
    }

    pub fn to_cache(&self) -> String {
        format!("{}:{PORT}", self.stage.host(2).ipv4())
    }

    /// The cache, serving `/srv/images`.
    pub fn cache(&self, options: &[&str]) -> Captured {
        let cache = self
            .stage
            .haulier(2)
            .args(["image-cache", "--listen", &self.to_cache()])
            .args(["--dir", "/srv/images"])
            .args(options)
            .spawn_captured()
            .unwrap();
        cache.wait_for_output("serving restores", LONG).unwrap();
        cache
    }

    /// The proxy, serving `/srv/images`.
    pub fn proxy(&self, options: &[&str]) -> Captured {
        let proxy = self
            .stage
            .haulier(1)
            .args(["image-proxy", "--to", &self.to_cache()])
            .args(["--dir", "/srv/images"])
            .args(options)
            .spawn_captured()
            .unwrap();
        proxy.wait_for_output("taking dumps", LONG).unwrap();
        proxy
    }

    /// A cache that is the lazy-pages daemon of its restores.
    pub fn lazy_cache(&self, options: &[&str]) -> Captured {
        let mut all = vec!["--lazy-pages"];
        all.extend(options);
        self.cache(&all)
    }

    /// A proxy that fetches what dumps with [`LEAVING`] leave, when it is connected.
    pub fn lazy_proxy(&self, options: &[&str]) -> Captured {
        let mut all = vec!["--lazy-pages", "--page-server", "127.0.0.1:9100"];
        all.extend(options);
        let proxy = self.proxy(&all);
        let connected = proxy.wait_for_output("connected to the image-cache", LONG);
        connected.unwrap();
        proxy
    }

    /// The restore of such a dump.
    pub fn lazy_restore(&self) -> HostCommand {
        self.restore("/srv/images", &["--lazy-pages"])
    }

    /// `haulier inspect` on host 2.
    pub fn inspect(&self, options: &[&str]) -> Output {
        let inspect = self.stage.haulier(2).arg("inspect").args(options);
        inspect.output(LONG).unwrap()
    }

    /// The same, as JSON.
    #[track_caller]
    pub fn inspected(&self, options: &[&str]) -> serde_json::Value {
        let said = self.inspect(&[options, &["--json"]].concat()).success();
        serde_json::from_str(&said).unwrap()
    }

    pub fn criu(&self, host: usize, arguments: &[&str]) -> HostCommand {
        let criu = std::env::var("HAULIER_CRIU")
            .unwrap_or_else(|_| "/opt/haulier/criu/sbin/criu".to_owned());
        let command = self.stage.host(host).command(criu).args(arguments);
        // Redis has had connections of its clients.
        command.args(["--manage-cgroups=ignore", "--tcp-close", "-v4"])
    }

    /// `criu dump --stream` of a process on host 1.
    pub fn dump(&self, pid: i32, options: &[&str]) -> HostCommand {
        let pid = pid.to_string();
        self.criu(1, &["dump", "--stream", "-D", "/srv/images", "-t", &pid])
            .args(["-o", "dump.log"])
            .args(options)
    }

    /// The same, with the delivery as a condition.
    pub fn dump_with_vote(&self, pid: i32, options: &[&str]) -> HostCommand {
        let vote = self.vote();
        self.dump(pid, &["--action-script", vote.to_str().unwrap()])
            .args(options)
    }

    /// `criu restore --stream` on host 2, from a directory of the cache.
    pub fn restore(&self, directory: &str, options: &[&str]) -> HostCommand {
        self.criu(2, &["restore", "--stream", "-D", directory])
            .args(["-d", "-W", "/srv", "-o", "restore.log"])
            .args(options)
    }

    #[track_caller]
    fn succeeds(&self, host: usize, log: &str, output: Output) {
        if !output.status.success() {
            let log = self.stage.host(host).read_file(log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).into_owned();
            let end: Vec<&str> = log.lines().rev().take(40).collect();
            let end: Vec<&str> = end.into_iter().rev().collect();
            panic!(
                "{}\n{}\n{}\nlog:\n{}",
                output.status,
                output.stdout,
                output.stderr,
                end.join("\n")
            );
        }
    }

    /// The dump was successful. What the vote said, which CRIU puts into its log.
    #[track_caller]
    pub fn dumped(&self, output: Output) -> String {
        let log = "/srv/images/dump.log";
        self.succeeds(1, log, output);
        let log = self.stage.host(1).read_file(log).unwrap();
        let log = String::from_utf8_lossy(&log).into_owned();
        let line = log.lines().find(|line| line.contains("delivered as dump"));
        line.unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub fn restored(&self, output: Output) {
        self.succeeds(2, "/srv/restore.log", output);
    }

    /// Threads on host 1 that rewrite memory and check it. They sleep with their stack pointers not at
    /// the beginning of a page: of such a process a lazy dump leaves nothing behind.
    pub fn counter(&self, mib: usize) -> Counter {
        loop {
            let counter = self.any_counter(mib);
            if !self.sleeps_at_a_page(counter.pid) {
                return counter;
            }
            let host = self.stage.host(1);
            host.signal(counter.pid, Signal::KILL).unwrap();
            eventually("it is gone", || host.process(counter.pid).is_none());
        }
    }

    /// Whether a thread of a process on host 1 sleeps with its stack pointer at the beginning of a page.
    pub fn sleeps_at_a_page(&self, pid: i32) -> bool {
        let calls = format!("cat /proc/{pid}/task/*/syscall");
        let calls = self.stage.host(1).shell(&calls).unwrap().success();
        // The number and six arguments are before it; a thread that runs has none.
        let mut pointers = calls.lines().filter_map(|line| line.split(' ').nth(7));
        pointers.any(|pointer| pointer.ends_with("000"))
    }

    fn any_counter(&self, mib: usize) -> Counter {
        let report = self.folder.path().join("report");
        let pid = start(
            self.stage.host(1),
            &[
                &lab_program(),
                "workload",
                "threads",
                "--threads",
                "2",
                "--memory",
                &mib.to_string(),
                "--pages-per-second",
                "500",
                "--report",
                report.to_str().unwrap(),
            ],
        )
        .pid();
        let counter = Counter { pid, report };
        counter.goes_on();
        counter
    }

    /// A Redis on host 1 with so much data.
    pub fn redis(&self, mib: u64) -> i32 {
        let redis = start_redis(self.stage.host(1), 6379).unwrap();
        self.fill(1, mib);
        redis.pid()
    }

    /// Fills the first `mib` of the Redis on host 1 anew.
    pub fn fill(&self, seed: u64, mib: u64) {
        let fill = || fill_redis(REDIS, seed, mib << 20);
        self.stage.host(1).in_network(fill).unwrap().unwrap();
    }

    /// The Redis on host 2 has in its first `mib` what it was filled with; then it is killed.
    #[track_caller]
    pub fn is_right_then_ends(&self, pid: i32, seed: u64, mib: u64) {
        let host = self.stage.host(2);
        let check = || check_redis(REDIS, seed, mib << 20);
        let checked = host.in_network(check).unwrap().unwrap();
        assert!(checked.wrong == 0 && checked.keys > 0, "{checked:?}");
        host.signal(pid, Signal::KILL).unwrap();
        eventually("its number is free", || host.process(pid).is_none());
    }

    /// Dumps the Redis `count` times, the last time for good, and fills `mib` of it anew in between.
    /// The bytes of its images in the end, and what each dump sent.
    pub fn dumps(&self, pid: i32, count: u64, mib: u64) -> (u64, Vec<u64>) {
        let (mut bytes, mut sent) = (0, Vec::new());
        for dump in 1..=count {
            let options: &[&str] = if dump < count {
                &["--leave-running"]
            } else {
                &[]
            };
            let said = self.dumped(self.dump_with_vote(pid, options).output(LONG).unwrap());
            let numbers: Vec<u64> = said
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|number| number.parse().ok())
                .collect();
            // CRIU's time stamp may be in front.
            let [.., all, had_to_be_sent] = numbers[..] else {
                panic!("{said}")
            };
            bytes = all;
            sent.push(had_to_be_sent);
            if dump < count {
                self.fill(1 + dump, mib);
            }
        }
        (bytes, sent)
    }

    /// `haulier image-cache list` says that each dump can be restored.
    pub fn all_released(&self, dumps: usize) {
        eventually("all can be restored", || {
            let list = self.list();
            let snapshots = list["snapshots"].as_array().unwrap();
            let released = snapshots.iter().filter(|s| s["state"] == "released");
            released.count() == dumps
        });
    }

    /// CRIU's crit, where there is one (`HAULIER_CRIT`, that of `scripts/setup`, or in the path), reads
    /// every image of a directory.
    #[track_caller]
    pub fn crit_reads(&self, host: usize, directory: &str) {
        let given = std::env::var_os("HAULIER_CRIT").map(PathBuf::from);
        let ours = Some(PathBuf::from("/opt/haulier/criu/bin/crit")).filter(|crit| crit.exists());
        let Some(crit) = given.or(ours).or_else(|| found("crit")) else {
            return;
        };
        let host = self.stage.host(host);
        let list = host.shell(&format!("ls {directory}")).unwrap().success();
        // Images of pages are no messages: crit says so of them.
        let images: Vec<&str> = list
            .lines()
            .filter(|name| name.ends_with(".img") && !name.starts_with("pages-"))
            .collect();
        assert!(images.len() > 10, "{list}");
        for image in images {
            let path = format!("{directory}/{image}");
            for arguments in [["decode", "-i", &path], ["show", &path, ""]] {
                let arguments = arguments.iter().filter(|argument| !argument.is_empty());
                let command = host.command(&crit).args(arguments);
                let said = command.output(LONG).unwrap().success();
                let said: serde_json::Value = serde_json::from_str(&said).unwrap();
                assert!(said["entries"].is_array(), "{image}: {said}");
            }
        }
    }

    /// What `haulier image-cache list` says.
    pub fn list(&self) -> serde_json::Value {
        let output = self
            .stage
            .haulier(2)
            .args(["image-cache", "list", "--dir", "/srv/images", "--json"])
            .output(LONG)
            .unwrap()
            .success();
        serde_json::from_str(&output).unwrap()
    }
}

/// A running `haulier-lab workload threads`.
pub struct Counter {
    pub pid: i32,
    pub report: PathBuf,
}

impl Counter {
    /// It counts, wherever it runs, and its memory is what it should be.
    #[track_caller]
    pub fn goes_on(&self) {
        let status = || threads::read_report(&fs::read(&self.report).unwrap_or_default()).ok();
        let (line, iterations) = status().map_or((0, 0), |seen| (seen.line, seen.iterations));
        eventually("pages are rewritten, lines are reported", || {
            status().is_some_and(|seen| {
                assert_eq!(seen.errors, 0);
                seen.line > line + 3 && seen.iterations > iterations
            })
        });
    }
}
