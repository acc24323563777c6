//! The stage that tests and demo play on: simulated hosts with `haulier serve` on some of them.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test uses some of it"
)]

pub mod codes;
pub mod database;
pub mod play;
pub mod redis;
pub mod sight;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use haulier::checkpoint::{HOLD_AT, HOLD_UNTIL};
use haulier_lab::{Captured, Host, HostCommand, Lab, LabConfig, Output, Process, Snapshot};

/// The port `haulier serve` listens on.
pub const PORT: u16 = 7000;
/// The address that moves in most tests, beside those the hosts have themselves.
pub const MOVING_V4: &str = "10.77.0.100";
/// The same for IPv6.
pub const MOVING_V6: &str = "fd77::100";
/// No step of a test takes longer, unless something hangs.
pub const LONG: Duration = Duration::from_secs(120);

/// Ends the hold of [`Stage::held`].
pub const GO: &str = "/run/haulier-test-go";

/// Hosts, what was on them at the beginning, and the program under test.
pub struct Stage {
    pub lab: Lab,
    haulier: PathBuf,
    before: Vec<Snapshot>,
}

impl Stage {
    /// Hosts with nothing of haulier on them. `haulier` is the program under test.
    pub fn set(hosts: usize, haulier: &str) -> Stage {
        let lab = Lab::start(LabConfig::hosts(hosts)).expect("the lab starts");
        let before = lab
            .hosts()
            .iter()
            .map(|host| host.snapshot().unwrap())
            .collect();
        Stage {
            lab,
            haulier: PathBuf::from(haulier),
            before,
        }
    }

    /// A host, from 1 on.
    pub fn host(&self, number: usize) -> &Host {
        self.lab.host(number)
    }

    /// `haulier` on a host.
    pub fn haulier(&self, host: usize) -> HostCommand {
        let command = self.host(host).command(&self.haulier);
        match std::env::var_os("HAULIER_CRIU") {
            Some(criu) => command.env("HAULIER_CRIU", criu),
            None => command,
        }
    }

    /// Starts `haulier serve` on a host and waits until it listens.
    pub fn serve(&self, host: usize) -> Captured {
        self.serve_with(host, &[])
    }

    /// The same with further options.
    pub fn serve_with(&self, host: usize, options: &[&str]) -> Captured {
        let server = self
            .haulier(host)
            .args(["serve", "--listen", &self.address(host)])
            .args(options)
            .spawn_captured()
            .unwrap();
        server.wait_for_output("listening on", LONG).unwrap();
        server
    }

    /// The address `haulier serve` listens on, on a host.
    pub fn address(&self, host: usize) -> String {
        format!("{}:{PORT}", self.host(host).ipv4())
    }

    /// `haulier migrate`, ready to run. From the first host memory is hidden from CRIU's dump however
    /// little it is, from others as haulier sees fit.
    pub fn migration(&self, from: usize, pid: i32, to: usize, options: &[&str]) -> HostCommand {
        let veil = if from == 1 { "always" } else { "auto" };
        self.haulier(from)
            .env("HAULIER_VEIL", veil)
            .args(["migrate", &pid.to_string(), &self.address(to)])
            .args(options)
    }

    /// Starts an agent that stops before a point of [`haulier::checkpoint`] until [`Stage::go`], and
    /// waits until it has come there.
    #[track_caller]
    pub fn held(&self, agent: HostCommand, point: &str) -> Captured {
        let agent = agent.env(HOLD_AT, point).env(HOLD_UNTIL, GO);
        let agent = agent.spawn_captured().unwrap();
        let said = format!("held at {point}");
        agent.wait_for_output(&said, LONG).unwrap();
        agent
    }

    /// Lets the agents of a host that are held go on.
    pub fn go(&self, host: usize) {
        self.host(host).write_file(GO, b"").unwrap();
    }

    /// Moves a process and returns what haulier said.
    pub fn migrate(&self, from: usize, pid: i32, to: usize, options: &[&str]) -> Output {
        self.migration(from, pid, to, options).output(LONG).unwrap()
    }

    /// Moves a process that can be moved.
    #[track_caller]
    pub fn moved(&self, from: usize, pid: i32, to: usize, options: &[&str]) -> String {
        let output = self.migrate(from, pid, to, options);
        let text = output.success();
        assert!(
            self.host(to).process_alive(pid),
            "{pid} does not run on host {to}\n{text}"
        );
        assert!(
            !self.host(from).process_alive(pid),
            "{pid} still runs on host {from}\n{text}"
        );
        text
    }

    /// Gives a host the addresses that move.
    pub fn give_addresses(&self, host: usize) {
        let host = self.host(host);
        host.run([
            "ip",
            "addr",
            "add",
            &format!("{MOVING_V4}/24"),
            "dev",
            "eth0",
        ])
        .unwrap()
        .success();
        host.run([
            "ip",
            "addr",
            "add",
            &format!("{MOVING_V6}/64"),
            "dev",
            "eth0",
            "nodad",
        ])
        .unwrap()
        .success();
    }

    /// What a host has now beyond the beginning, without the server under test, the cgroup that a
    /// restored tree lives in, and the one of the workload itself.
    pub fn leftovers(&self, host: usize) -> Vec<String> {
        let left = self.host(host).diff(&self.before[host - 1]).unwrap();
        left.into_iter()
            .filter(|line| !(line.starts_with("process ") && line.contains(" serve ")))
            .filter(|line| !line.starts_with(&format!("file {GO}")))
            .collect()
    }

    /// Every connection of haulier's from a host is reset, and none can be made for a moment.
    pub fn break_connections(&self, from: usize) {
        let host = self.host(from);
        let nft = |line: &str| host.run(["nft", line]).unwrap().success();
        nft("add table ip breaker");
        nft("add chain ip breaker out { type filter hook output priority 0; }");
        nft("add rule ip breaker out tcp dport 7000 reject with tcp reset");
        // Those that are silent at this moment are reset as well.
        let line = "ss -HK state established dport = :7000; \
                    ss -Htn state established dport = :7000";
        eventually("no connection is left", || {
            host.shell(line).unwrap().success().is_empty()
        });
        nft("delete table ip breaker");
    }

    /// Nothing of a migration is left on a host, where nothing of the target is any more.
    #[track_caller]
    pub fn assert_clean(&self, host: usize, but: &[&str]) {
        // The server takes a moment to take its work directory away after it has answered.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let mut left = self.leftovers(host);
            left.retain(|line| !but.iter().any(|allowed| line.starts_with(allowed)));
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left on host {host}: {left:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Waits until `ready` holds.
#[track_caller]
pub fn eventually(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !ready() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A program that is started so that it can move: no terminal, no open descriptors, own session.
pub fn start(host: &Host, argv: &[&str]) -> Process {
    host.command(argv[0])
        .args(&argv[1..])
        .setsid()
        .spawn()
        .unwrap()
}

/// The haulier-lab program, as a workload on a host.
pub fn lab_program() -> String {
    let program = haulier_lab::program().expect("haulier-lab is built");
    assert!(Path::new(&program).exists());
    program.to_string_lossy().into_owned()
}
