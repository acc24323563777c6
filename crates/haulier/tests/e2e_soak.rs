//! A Redis and a PostgreSQL at work move back and forth for hours, in random modes and with random
//! faults, and every answer is checked. By `scripts/soak`.

mod stage;

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use haulier_lab::workloads::{RedisClient, check_redis, fill_redis, start_redis};
use haulier_lab::{Captured, Process, Signal};
use stage::codes::NEEDS_YOU;
use stage::database::{Cluster, ended};
use stage::{LONG, MOVING_V4, Stage, eventually};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
const MODES: [&str; 4] = ["pre-copy", "hybrid", "post-copy", "stop-and-copy"];
const REDIS: &str = "10.77.0.101";
const DATA: u64 = 48 << 20;
const DATA_SEED: u64 = 3;

/// A fault comes somewhere in the first moments of a move.
const LATEST_FAULT: u64 = 1500;

#[test]
#[ignore = "takes minutes: scripts/soak"]
fn back_and_forth() {
    let moves = number("HAULIER_SOAK_MOVES").unwrap_or(200);
    let seed = number("HAULIER_SOAK_SEED").unwrap_or(0x5eed);
    println!("{moves} moves, HAULIER_SOAK_SEED={seed}");
    let mut soak = Soak::begin(Random(seed | 1));
    let mut ends = [0_u64; 3];
    for number in 1..=moves {
        let end = soak.one_move(number);
        ends[end as usize] += 1;
    }
    soak.end();
    let [moved, stayed, announced] = ends;
    println!(
        "{moves} moves: {moved} moved, {stayed} stayed where they were, {announced} announced"
    );
}

/// How a move ended.
#[derive(Debug, Clone, Copy)]
enum End {
    Moved,
    Stayed,
    /// Lost at the destination together with its agent, and run on from the source's copy by a
    /// person's word: its clients begin anew.
    Announced,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Source,
    Destination,
    Link,
}

struct Target {
    name: &'static str,
    process: Process,
    address: &'static str,
    at: usize,
}

struct Soak {
    random: Random,
    stage: Stage,
    servers: [Captured; 2],
    targets: [Target; 2],
    cluster: Cluster,
    redis: RedisClient,
    /// Pgbench at work, and what its predecessors have done.
    bench: Captured,
    transactions: i64,
}

impl Soak {
    fn begin(random: Random) -> Soak {
        let cluster = Cluster::create().expect("PostgreSQL is installed");
        let stage = Stage::set(3, HAULIER);
        let servers = [stage.serve(1), stage.serve(2)];
        stage.give_addresses(1);
        let add = format!("ip addr add {REDIS}/24 dev eth0");
        stage.host(1).shell(&add).unwrap().success();
        let redis = start_redis(stage.host(1), 6379).unwrap();
        let observer = stage.host(3);
        let fill = || fill_redis(redis_address(), DATA_SEED, DATA);
        observer.in_network(fill).unwrap().unwrap();
        let postgres = cluster.start(stage.host(1));
        cluster.fill(observer);
        let client = observer.in_network(|| RedisClient::start(redis_address()));
        let bench = cluster.bench(observer);
        let target = |name, process, address| Target {
            name,
            process,
            address,
            at: 1,
        };
        Soak {
            random,
            servers,
            targets: [
                target("redis", redis, REDIS),
                target("postgres", postgres, MOVING_V4),
            ],
            cluster,
            redis: client.unwrap().unwrap(),
            bench,
            transactions: 0,
            stage,
        }
    }

    fn one_move(&mut self, number: u64) -> End {
        let which = self.random.below(2) as usize;
        let mode = MODES[self.random.below(4) as usize];
        let fault = [
            None,
            None,
            Some(Fault::Source),
            Some(Fault::Destination),
            Some(Fault::Link),
        ][self.random.below(5) as usize];
        let delay = Duration::from_millis(self.random.below(LATEST_FAULT));
        let (name, from) = (self.targets[which].name, self.targets[which].at);
        let pid = self.targets[which].process.pid();
        let to = 3 - from;
        let said =
            format!("move {number}: {name} {from} -> {to}, {mode}, {fault:?} after {delay:?}");
        println!("{said}");
        let move_ip = format!("{}/24@eth0", self.targets[which].address);
        let options = ["--mode", mode, "--move-ip", &move_ip, "--doubt-time", "5"];
        let migration = self.stage.migration(from, pid, to, &options);
        let migration = migration.spawn_captured().unwrap();
        if let Some(fault) = fault {
            thread::sleep(delay);
            self.strike(fault, &migration, to);
        }
        let output = migration.finish(LONG).unwrap();
        if fault.is_none() {
            let moved = output.status.success();
            assert!(moved, "{said}: {}\n{}", output.stderr, self.scene());
        }
        let end = self.settle(which, &output.stderr, output.status.code());
        // Nobody lost an answer, unless told.
        if !matches!(end, End::Announced) {
            self.assert_served(&said);
        }
        end
    }

    fn strike(&mut self, fault: Fault, migration: &Captured, to: usize) {
        match fault {
            // It may have ended by itself.
            Fault::Source => drop(migration.process.kill(Signal::KILL)),
            Fault::Destination => {
                self.servers[to - 1].process.kill(Signal::KILL).unwrap();
                self.servers[to - 1] = self.stage.serve(to);
            }
            Fault::Link => self.stage.break_connections(3 - to),
        }
    }

    /// Has haulier recover until exactly one copy runs, and says where that is.
    fn settle(&mut self, which: usize, said: &str, code: Option<i32>) -> End {
        let (pid, from) = (self.targets[which].process.pid(), self.targets[which].at);
        let to = 3 - from;
        let mut announced = false;
        if code.is_none() || code == Some(NEEDS_YOU) {
            let recovered = self.stage.haulier(from).arg("recover");
            let recovered = recovered.output(LONG).unwrap();
            let lost = "lost";
            announced = said.contains(lost) || recovered.stderr.contains(lost);
            if announced {
                self.run_here(from);
            }
        }
        eventually("exactly one copy is there", || {
            let alive = |host| self.stage.host(host).process_alive(pid);
            alive(from) != alive(to)
        });
        if self.stage.host(to).process_alive(pid) {
            self.targets[which].at = to;
            return End::Moved;
        }
        if announced {
            self.begin_anew(which);
            return End::Announced;
        }
        End::Stayed
    }

    fn run_here(&self, host: usize) {
        let status = self.stage.haulier(host).args(["status", "--json"]);
        let status = status.output(LONG).unwrap().stdout;
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        for migration in status.as_array().unwrap() {
            let id = migration["id"].as_str().unwrap();
            let resolve = ["resolve", id, "--run-here"];
            // Of the other ones it is refused.
            let _ = self.stage.haulier(host).args(resolve).output(LONG).unwrap();
        }
    }

    /// The clients of a target that was set back.
    fn begin_anew(&mut self, which: usize) {
        let observer = self.stage.host(3);
        match which {
            0 => {
                let client = observer.in_network(|| RedisClient::start(redis_address()));
                self.redis = client.unwrap().unwrap();
            }
            _ => {
                let _ = self.bench.process.kill(Signal::KILL);
                let count = "select count(*) from pgbench_history";
                self.transactions = self.cluster.ask(observer, count).parse().unwrap();
                self.bench = self.cluster.bench(observer);
            }
        }
    }

    fn assert_served(&self, said: &str) {
        if let Err(error) = self.redis.wait_for_operations(100, LONG) {
            let report = self.redis.snapshot();
            panic!("{said}: {error}: {:?}\n{}", report.errors, self.scene());
        }
        let report = self.redis.snapshot();
        assert_eq!(report.error_count, 0, "{said}: {:?}", report.errors);
        let observer = self.stage.host(3);
        if !self.cluster.commits(observer) {
            let activity = self.cluster.activity(observer);
            panic!("{said}: no transactions\n{activity}\n{}", self.scene());
        }
    }

    /// What a person would look at first.
    fn scene(&self) -> String {
        let pids = self.targets.each_ref().map(|target| target.process.pid());
        let mut scene = String::new();
        for host in [1, 2] {
            let look = format!(
                "ip -br addr; nft list ruleset; ls /var/lib/haulier /run; ss -tnpoi state all; \
                 ps -ef; for t in /proc/$(pgrep -x haulier | head -1)/task/*; do \
                 echo $(cat $t/comm $t/wchan); done; \
                 for p in {} {}; do grep -E 'State|Threads' /proc/$p/status; cat /proc/$p/wchan; \
                 cat /proc/$p/stack; g=/sys/fs/cgroup$(sed -n s/^0:://p /proc/$p/cgroup); \
                 echo $g; cat $g/cgroup.events; done",
                pids[0], pids[1]
            );
            let seen = self.stage.host(host).shell(&look).unwrap();
            scene += &format!("host {host}: {}{}\n", seen.stdout, seen.stderr);
        }
        for server in &self.servers {
            let log = server.stderr().unwrap();
            let last = log.lines().rev().take(12).collect::<Vec<_>>();
            scene += &format!("\na server said, the last first:\n{}\n", last.join("\n"));
        }
        let client = "ip neigh; ss -tnoi state all";
        scene + &self.stage.host(3).shell(client).unwrap().stdout
    }

    fn end(self) {
        self.redis.stop().clean();
        let transactions = self.transactions + ended(self.bench);
        let observer = self.stage.host(3);
        let check = || check_redis(redis_address(), DATA_SEED, DATA);
        let check = observer.in_network(check).unwrap().unwrap();
        assert_eq!(check.wrong, 0, "{:?}", check.first_wrong);
        self.cluster.assert_whole(observer, transactions);
    }
}

fn redis_address() -> SocketAddr {
    SocketAddr::new(REDIS.parse().unwrap(), 6379)
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Xorshift64*: a soak that failed is played again by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}
