//! One migration of a Redis in use, with one fault at one point of it, and what becomes of it.

use std::fmt;
use std::time::{Duration, Instant};

use haulier::checkpoint::{self, HOLD_AT, HOLD_UNTIL};
use haulier_engine::phase::Phase;
use haulier_engine::{destination, source};
use haulier_lab::workloads::{RedisClient, check_redis};
use haulier_lab::{Captured, Process, ProcessInfo, Signal};

use crate::stage::codes::{NEEDS_YOU, NOTHING_TOUCHED};
use crate::stage::redis;
use crate::stage::{GO, LONG, PORT, Stage};

const SEED: u64 = 5;
const DATA: u64 = 8 << 20;
/// How long a side that hears nothing waits, so that a stopped peer is noticed while a test runs.
const TIMES: [&str; 4] = ["--step-time", "2", "--doubt-time", "3"];
/// Longer than those.
const STOPPED: Duration = Duration::from_millis(3500);

/// What is killed or stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Source,
    Destination,
    Dump,
    Restore,
    Guard,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Killed at once.
    Kill(Victim),
    /// Stopped until its peers have lost patience, and then let go on.
    Stop(Victim),
    /// The same, but only when both hosts have been recovered as far as others can.
    Wake(Victim),
    /// Every connection is reset, and none can be made for a moment.
    Cut,
}

/// What became of the one copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Here,
    There,
    /// Lost there with the agent that it depended on, said so, and run on here by a person's word.
    Announced,
    /// Nobody to do it to at that point.
    Nobody,
}

/// Every point of a migration without trouble, from the lists of the engine.
pub(crate) fn points() -> Vec<String> {
    let named =
        |side: &str, action: &dyn fmt::Debug| checkpoint::name(side, format_args!("{action:?}"));
    let phases = Phase::ALL.map(|phase| checkpoint::name("source phase", phase));
    let source = source::Action::STRAIGHT_WAY.map(|action| named("source", &action));
    let destination = destination::Action::STRAIGHT_WAY;
    let destination = destination.map(|action| named("destination", &action));
    phases
        .into_iter()
        .chain(source)
        .chain(destination)
        .collect()
}

/// A row of the table for each point, a column for each fault. And the cases that went wrong.
pub(crate) fn table(mode: &str, faults: &[Fault], points: &[String]) -> (String, Vec<String>) {
    let mut wrong = Vec::new();
    let mut table = format!("| {mode}: fault at |");
    for fault in faults {
        table += &format!(" {fault} |");
    }
    table += "\n|---|";
    table += &"---|".repeat(faults.len());
    for point in points {
        table += &format!("\n| {point} |");
        for fault in faults {
            let began = Instant::now();
            // One that goes wrong has said so; the others are worth knowing.
            let played = std::panic::catch_unwind(|| Case::set(mode, point, *fault).play());
            let end = match &played {
                Ok(end) => end.to_string(),
                Err(_) => "WRONG".to_owned(),
            };
            let line = format!("{mode}: {fault} at {point}: {end} ({:?})", began.elapsed());
            eprintln!("{line}");
            if played.is_err() {
                wrong.push(line);
            }
            table += &format!(" {end} |");
        }
    }
    (table + "\n", wrong)
}

struct Case<'a> {
    stage: Stage,
    redis: Process,
    client: RedisClient,
    mode: &'a str,
    point: &'a str,
    fault: Fault,
}

impl<'a> Case<'a> {
    fn set(mode: &'a str, point: &'a str, fault: Fault) -> Case<'a> {
        let stage = Stage::set(3, env!("CARGO_BIN_EXE_haulier"));
        let redis = redis::start(&stage);
        redis::fill(&stage, SEED, DATA);
        let client = redis::client(&stage);
        Case {
            stage,
            redis,
            client,
            mode,
            point,
            fault,
        }
    }

    fn play(self) -> End {
        let there = self.point.starts_with("destination");
        let mut server = self.start_server(there);
        let migration = self.start_migration(!there);
        let held = match there {
            true => &server,
            false => &migration,
        };
        let said = format!("held at {}", self.point);
        held.wait_for_output(&said, LONG).unwrap();
        let hit = self.strike();
        if hit && self.fault == Fault::Kill(Victim::Destination) {
            let _ = server.finish(LONG).unwrap();
            server = self.start_server(false);
        }
        for host in [1, 2] {
            self.stage.go(host);
        }
        let mut helpers = Vec::new();
        if hit && matches!(self.fault, Fault::Stop(_) | Fault::Wake(_)) {
            self.never_two_for(STOPPED);
            if matches!(self.fault, Fault::Wake(_)) {
                helpers = self.recover_meanwhile();
                self.never_two_for(STOPPED);
            }
            self.signal(Signal::CONT);
            // One that wakes up does no harm.
            let (host, pid) = (self.stage.host(1), migration.process.pid());
            self.never_two(|| host.process_alive(pid));
        }
        let output = migration.finish(LONG).unwrap();
        let code = output.status.code();
        // Who is in doubt, or was killed, is helped by the haulier that starts next.
        let settled = code.is_some_and(|code| code != NEEDS_YOU);
        let helper = match helpers.is_empty() {
            true => (!settled).then(|| self.stage.serve(1)),
            false => helpers.pop(),
        };
        let end = self.wait_settled(&output.stderr, helper.as_ref());
        self.check(end);
        drop((server, helper, helpers));
        match hit {
            true => end,
            false => End::Nobody,
        }
    }

    fn start_server(&self, holds: bool) -> Captured {
        let listen = self.stage.address(2);
        let arguments = ["serve", "--listen", &listen, "--step-time", "2"];
        let mut command = self.stage.haulier(2).args(arguments);
        if holds {
            command = command.env(HOLD_AT, self.point).env(HOLD_UNTIL, GO);
        }
        let server = command.spawn_captured().unwrap();
        server.wait_for_output("listening on", LONG).unwrap();
        server
    }

    fn start_migration(&self, holds: bool) -> Captured {
        let options = ["--mode", self.mode, "--move-ip", "10.77.0.100/24@eth0"];
        let options = [&options[..], &TIMES].concat();
        let mut command = self.stage.migration(1, self.redis.pid(), 2, &options);
        if holds {
            command = command.env(HOLD_AT, self.point).env(HOLD_UNTIL, GO);
        }
        command.spawn_captured().unwrap()
    }

    /// Whether there was somebody to do it to.
    fn strike(&self) -> bool {
        match self.fault {
            Fault::Kill(_) => self.signal(Signal::KILL),
            Fault::Stop(_) | Fault::Wake(_) => self.signal(Signal::STOP),
            Fault::Cut => {
                self.stage.break_connections(1);
                true
            }
        }
    }

    fn signal(&self, signal: Signal) -> bool {
        let (Fault::Kill(victim) | Fault::Stop(victim) | Fault::Wake(victim)) = self.fault else {
            return false;
        };
        let haulier = |process: &ProcessInfo, word: &str| {
            process.is_named("haulier") && process.argv.get(1).is_some_and(|first| first == word)
        };
        let criu = |process: &ProcessInfo| process.is_named("criu");
        let (host, hit) = match victim {
            Victim::Source => (1, self.matching(1, |process| haulier(process, "migrate"))),
            Victim::Destination => (2, self.matching(2, |process| haulier(process, "serve"))),
            Victim::Guard => (2, self.matching(2, |process| haulier(process, "guard"))),
            Victim::Dump => (1, self.matching(1, criu)),
            Victim::Restore => (2, self.matching(2, criu)),
        };
        for pid in &hit {
            // It may have ended by itself.
            let _ = self.stage.host(host).signal(*pid, signal);
        }
        !hit.is_empty()
    }

    fn matching(&self, host: usize, chosen: impl Fn(&ProcessInfo) -> bool) -> Vec<i32> {
        let processes = self.stage.host(host).processes().unwrap();
        let chosen = processes.iter().filter(|process| chosen(process));
        chosen.map(|process| process.pid).collect()
    }

    /// What others do while the victim stands: nothing that could go wrong when it wakes up. Returns a
    /// server on host 2, at another port, and one on host 1.
    fn recover_meanwhile(&self) -> Vec<Captured> {
        let host = self.victims_host();
        for each in [1, 2] {
            let recover = ["recover", "--wait", "1", "--link-time", "4"];
            let output = self.stage.haulier(each).args(recover).output(LONG).unwrap();
            if each == host {
                assert_eq!(output.status.code(), Some(NEEDS_YOU), "{self}");
                assert!(output.stdout.contains("kill -CONT"), "{}", output.stdout);
            }
        }
        let again = [&TIMES[..], &["--link-time", "4"]].concat();
        let again = self.stage.migrate(1, self.redis.pid(), 2, &again);
        assert_eq!(again.status.code(), Some(NOTHING_TOUCHED), "{self}");
        let elsewhere = format!("{}:{}", self.stage.host(2).ipv4(), PORT + 1);
        let elsewhere = self
            .stage
            .haulier(2)
            .args(["serve", "--listen", &elsewhere]);
        let elsewhere = elsewhere.spawn_captured().unwrap();
        elsewhere.wait_for_output("listening on", LONG).unwrap();
        vec![elsewhere, self.stage.serve(1)]
    }

    fn victims_host(&self) -> usize {
        match self.fault {
            Fault::Wake(Victim::Source | Victim::Dump) => 1,
            _ => 2,
        }
    }

    fn never_two_for(&self, time: Duration) {
        let until = Instant::now() + time;
        self.never_two(|| Instant::now() < until);
    }

    /// Two copies run at no moment for as long as that holds.
    fn never_two(&self, mut meanwhile: impl FnMut() -> bool) {
        let deadline = Instant::now() + LONG;
        while meanwhile() {
            self.assert_not_two();
            assert!(Instant::now() < deadline, "it does not end: {self}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Until exactly one copy runs and nobody has anything left to do; never do two run.
    fn wait_settled(&self, said: &str, helper: Option<&Captured>) -> End {
        let deadline = Instant::now() + LONG;
        let pid = self.redis.pid();
        let mut announced = false;
        loop {
            self.assert_not_two();
            let (here, there) = (self.runs(1), self.runs(2));
            let all = helper.map(|helper| helper.stderr().unwrap());
            let all = format!("{said}{}", all.unwrap_or_default());
            let (alive_here, alive_there) = (
                self.stage.host(1).process_alive(pid),
                self.stage.host(2).process_alive(pid),
            );
            let unsettled = self.stage.host(1).shell("ls /var/lib/haulier/*/journal");
            let settled = unsettled.unwrap().stdout.is_empty();
            if settled && here && !alive_there {
                return match announced {
                    true => End::Announced,
                    false => End::Here,
                };
            }
            if settled && there && !alive_here {
                return End::There;
            }
            if !announced && !alive_there && is_announced(&all) {
                announced = true;
                self.run_here();
            }
            assert!(
                Instant::now() < deadline,
                "{self}: alive here {alive_here}, there {alive_there}; runs here {here}, there \
                 {there}; journals settled: {settled}; {all}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn run_here(&self) {
        let id = self.stage.host(1).shell("ls /var/lib/haulier").unwrap();
        let resolve = ["resolve", id.success().trim(), "--run-here"].map(str::to_owned);
        let output = self.stage.haulier(1).args(resolve).output(LONG).unwrap();
        output.success();
    }

    /// Whether a copy that stands on a host is one that can go on by itself. While CRIU is at work it
    /// is CRIU's code that runs in a copy there.
    fn runs(&self, host: usize) -> bool {
        if host == 2
            && !self
                .matching(2, |process| process.is_named("criu"))
                .is_empty()
        {
            return false;
        }
        is_running(&self.told(host))
    }

    /// What the kernel tells of a copy.
    fn told(&self, host: usize) -> String {
        let pid = self.redis.pid();
        let line = format!(
            "cat /sys/fs/cgroup$(sed -n s/^0:://p /proc/{pid}/cgroup)/cgroup.events \
             /proc/{pid}/status; echo stat $(sed 's/.*) //' /proc/{pid}/stat)"
        );
        self.stage.host(host).shell(&line).unwrap().stdout
    }

    #[track_caller]
    fn assert_not_two(&self) {
        let looks = || [1, 2].map(|host| (self.runs(host), self.told(host)));
        if looks().iter().all(|(runs, _)| *runs) {
            // One that is killed at this moment is let go by the freezer before it is told as dying.
            let again = looks();
            let both = again.iter().all(|(runs, _)| *runs);
            assert!(!both, "two run: {self}: {again:#?}");
        }
    }

    /// Memory is right, the client was served without a gap in what it counts, nothing is left.
    fn check(&self, end: End) {
        if end != End::Announced {
            self.client.wait_for_operations(100, LONG).unwrap();
            let report = self.client.snapshot();
            assert_eq!(report.error_count, 0, "{self}: {:?}", report.errors);
        }
        let check = || check_redis(redis::address(), SEED, DATA);
        let check = self.stage.host(3).in_network(check).unwrap().unwrap();
        assert_eq!(check.wrong, 0, "{self}: {:?}", check.first_wrong);
        let (home, other) = match end {
            End::There => (2, 1),
            End::Here | End::Announced | End::Nobody => (1, 2),
        };
        self.stage.assert_clean(other, &["cgroup /redis"]);
        let own = ["cgroup /redis", "cgroup /haulier", "process ", "address "];
        self.stage.assert_clean(home, &own);
    }
}

/// Not frozen, and neither stopped nor about to die.
fn is_running(told: &str) -> bool {
    const KILL: u64 = 1 << 8;
    const EXITING: u64 = 4;
    let word = |name: &str, number: usize| {
        let line = told.lines().find(|line| line.starts_with(name))?;
        line.split_ascii_whitespace().nth(number)
    };
    let killed = ["SigPnd:", "ShdPnd:"].into_iter().any(|name| {
        let pending = word(name, 1).and_then(|hex| u64::from_str_radix(hex, 16).ok());
        pending.is_some_and(|pending| pending & KILL != 0)
    });
    // The state is the first word after the name, the flags the seventh.
    let flags = word("stat", 7).and_then(|flags| flags.parse().ok());
    let exiting = flags.is_none_or(|flags: u64| flags & EXITING != 0);
    let state = word("State:", 1).is_some_and(|state| ["R", "S", "D"].contains(&state));
    word("frozen ", 1) == Some("0") && state && !killed && !exiting
}

/// That the last copy stands on the source, and what to do.
fn is_announced(text: &str) -> bool {
    text.contains("is lost at the destination") || text.contains("the other host has lost")
}

impl fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} at {}", self.mode, self.fault, self.point)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let victim = |victim: &Victim| match victim {
            Victim::Source => "source agent",
            Victim::Destination => "destination agent",
            Victim::Dump => "CRIU's dump",
            Victim::Restore => "CRIU's restore",
            Victim::Guard => "guard of missing pages",
        };
        match self {
            Fault::Kill(who) => write!(f, "{} killed", victim(who)),
            Fault::Stop(who) => write!(f, "{} stopped", victim(who)),
            Fault::Wake(who) => write!(f, "{} woken after a recovery", victim(who)),
            Fault::Cut => f.write_str("link cut"),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::Here => "here",
            End::There => "there",
            End::Announced => "here, announced",
            End::Nobody => "-",
        })
    }
}
