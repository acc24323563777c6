//! The hosts, Redis with its address on one of them, and what both ways of moving it need.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use haulier_lab::workloads::start_redis;
use haulier_lab::{Host, Lab, LabConfig};

use crate::writer::{fill, keys_for};

/// The address that moves.
pub(crate) const ADDRESS: &str = "10.77.0.100";
const PORT: u16 = 6379;
/// 4 GiB of memory that the machine's host has yet to provide take a minute.
const FILLING: Duration = Duration::from_secs(180);

/// Touches memory and gives it back: a virtual machine's memory that was never used before takes
/// its host many times as long to provide, and would be counted against whoever comes first.
pub(crate) fn touch(bytes: u64) -> Result<()> {
    let info = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let free = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .context("no MemAvailable in /proc/meminfo")?;
    let bytes = bytes.min(free * 1024 / 2);
    let memory = vec![1_u8; usize::try_from(bytes).unwrap_or(0)];
    std::hint::black_box(&memory);
    Ok(())
}

/// Two hosts between which a target moves, and a third for its clients.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    /// Where the target is, 1 or 2.
    at: usize,
}

impl Stage {
    /// The hosts, with the address on the first.
    pub(crate) fn build(rate: Option<&str>) -> Result<Stage> {
        let lab = Lab::start(LabConfig::hosts(3)).context("cannot start the simulated hosts")?;
        let added = format!("ip addr add {ADDRESS}/24 dev eth0");
        ensure!(lab.host(1).shell(&added)?.status.success(), "{added}");
        // The resolver caches of three hosts on one machine would age while a stage is used.
        lab.shape(rate).context("cannot limit the links")?;
        Ok(Stage { lab, at: 1 })
    }

    pub(crate) fn source(&self) -> &Host {
        self.lab.host(self.at)
    }

    pub(crate) fn destination(&self) -> &Host {
        self.lab.host(3 - self.at)
    }

    pub(crate) fn client(&self) -> &Host {
        self.lab.host(3)
    }

    /// The target has moved.
    pub(crate) fn moved(&mut self) {
        self.at = 3 - self.at;
    }

    /// Runs a shell command line on a host; it has to succeed.
    pub(crate) fn must(host: &Host, line: &str) -> Result<String> {
        let output = host.shell(line)?;
        ensure!(
            output.status.success(),
            "on {}: {line}: {}{}",
            host.name(),
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    /// Waits until a process runs on the destination and not on the source.
    pub(crate) fn check_moved(&self, pid: i32) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(10);
        let (from, to) = (self.source(), self.destination());
        while from.process_alive(pid) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure!(to.process_alive(pid), "{pid} is not on {}", to.name());
        ensure!(
            !from.process_alive(pid),
            "{pid} is still on {}",
            from.name()
        );
        Ok(())
    }
}

/// Bytes that a host has sent over its link so far.
pub(crate) fn sent_bytes(host: &Host) -> Result<u64> {
    let path = "/sys/class/net/eth0/statistics/tx_bytes";
    let text = String::from_utf8_lossy(&host.read_file(path)?).into_owned();
    text.trim()
        .parse()
        .with_context(|| format!("{path}: {text}"))
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident(host: &Host, pid: i32) -> Result<u64> {
    let status = host.read_file(format!("/proc/{pid}/status"))?;
    let status = String::from_utf8_lossy(&status);
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .context("no RssAnon in a process's status")?;
    Ok(kib * 1024)
}

/// Starts a memory workload of haulier-lab on the stage's source, and waits until its memory is
/// there.
pub(crate) fn start_workload(
    stage: &Stage,
    workload: &[&str],
    pages_per_second: &str,
    memory: u64,
) -> Result<i32> {
    let host = stage.source();
    let process = host
        .command(haulier_lab::program()?)
        .arg("workload")
        .args(workload)
        .args(["--pages-per-second", pages_per_second])
        .setsid()
        .cgroup("bench")
        .spawn()?;
    let until = Instant::now() + FILLING;
    while resident(host, process.pid())? < memory {
        ensure!(
            Instant::now() < until,
            "{workload:?} does not fill its memory"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(process.pid())
}

/// Starts a workload whose memory is random and mostly clean: 100 pages a second are rewritten.
pub(crate) fn start_threads(stage: &Stage, memory: u64) -> Result<i32> {
    let mib = (memory >> 20).to_string();
    let threads = [
        "threads",
        "--threads",
        "1",
        "--memory",
        &mib,
        "--report",
        "/dev/null",
    ];
    start_workload(stage, &threads, "100", memory)
}

/// A Redis with random values of 1 KB.
pub(crate) struct Redis {
    pub(crate) pid: i32,
    pub(crate) keys: u64,
    pub(crate) server: SocketAddr,
}

impl Redis {
    /// Starts it on the stage's source and fills it.
    pub(crate) fn start(stage: &Stage, bytes: u64) -> Result<Redis> {
        let pid = start_redis(stage.source(), PORT)
            .context("cannot start redis-server (package redis-server)")?
            .pid();
        let redis = Redis {
            pid,
            keys: keys_for(bytes),
            server: SocketAddr::new(ADDRESS.parse()?, PORT),
        };
        // From its own host, since a limited link would take its time.
        stage
            .source()
            .in_network(|| fill(redis.server, redis.keys))?
            .context("cannot fill Redis")?;
        Ok(redis)
    }
}
