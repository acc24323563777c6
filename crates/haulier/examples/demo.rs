//! The demo: a Redis that is being used moves from one host to another and back.
//!
//! `scripts/demo` builds what it needs and runs it as root. The hosts are simulated on this machine
//! ([`haulier_lab`]); haulier, CRIU, Redis and the client's TCP connection are real. It ends with 0
//! only if the client saw no error, every value is as it was, and nothing was left behind.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use haulier_lab::workloads::{self, RedisClient, check_redis, fill_redis, start_redis};
use haulier_lab::{Captured, Host, HostCommand, Lab, LabConfig, Snapshot, running_labs};

/// The address that moves, with Redis and the client's connection on it.
const ADDRESS: &str = "10.77.0.100";
const MOVE_IP: &str = "10.77.0.100/24@eth0";
const REDIS_PORT: u16 = 6379;
const HAULIER_PORT: u16 = 7000;
/// Random, so that nothing of it can be compressed away.
const DATA: u64 = 256 << 20;
const SEED: u64 = 1;
/// How long the client works undisturbed before and after each migration.
const UNDISTURBED: Duration = Duration::from_secs(1);
/// No step takes longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a host may take to clear up after the target runs elsewhere.
const CLEARING: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        eprintln!("the demo takes no arguments");
        return ExitCode::from(2);
    }
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    let began = Instant::now();
    let haulier = haulier_program()?;
    println!("haulier demo: a Redis in use moves from host1 to host2, and back.");

    section("The stage");
    let lab = Lab::start(LabConfig::hosts(3)).context("cannot start the simulated hosts")?;
    let name = lab.name().to_owned();
    row("hosts", "host1, host2 and host3, simulated on this machine");
    row(
        "",
        "(own namespaces each, one network; nothing slows its links)",
    );
    let seen = play(&lab, &haulier)?;
    lab.stop().context("cannot take the hosts down")?;
    let running = running_labs().context("cannot look for running labs")?;
    ensure!(!running.contains(&name), "the hosts still run (lab {name})");
    row("hosts", "taken down");

    println!(
        "\nDone in {:.0} s. Redis moved twice; its client saw {} errors and waited {} at most.",
        began.elapsed().as_secs_f64(),
        seen.error_count,
        milliseconds(seen.longest_gap()),
    );
    Ok(())
}

/// All that happens on the hosts; what the client saw.
fn play(lab: &Lab, haulier: &Path) -> Result<workloads::Report> {
    let (host1, host3) = (lab.host(1), lab.host(3));
    let server = SocketAddr::new(ADDRESS.parse()?, REDIS_PORT);

    let added = host1.run(["ip", "addr", "add", &format!("{ADDRESS}/24"), "dev", "eth0"])?;
    ensure!(added.status.success(), "ip addr add: {}", added.stderr);
    let redis = start_redis(host1, REDIS_PORT)
        .context("cannot start redis-server (package redis-server)")?
        .pid();
    host3
        .in_network(|| fill_redis(server, SEED, DATA))?
        .context("cannot fill Redis")?;
    row(
        "Redis",
        &format!(
            "pid {redis} on host1, with {} of random values",
            mebibytes(DATA)
        ),
    );
    row("address", &format!("{ADDRESS}, which moves with Redis"));

    let servers = [serve(lab.host(1), haulier)?, serve(lab.host(2), haulier)?];
    row("haulier", "\"haulier serve\" runs on host1 and host2");
    let client = host3
        .in_network(|| RedisClient::start(server))?
        .context("the client cannot use Redis")?;
    row(
        "client",
        "on host3; without pause it increments a counter, writes a random",
    );
    row(
        "",
        "key and reads another, and checks each answer, all over one",
    );
    row("", "TCP connection");
    std::thread::sleep(UNDISTURBED);

    let mut stage = Play {
        lab,
        haulier,
        redis,
        client: &client,
        before: [lab.host(1).snapshot()?, lab.host(2).snapshot()?],
    };
    for (title, from, to) in [
        ("There: host1 to host2", 1, 2),
        ("And back: host2 to host1", 2, 1),
    ] {
        section(title);
        if let Err(error) = stage.act(from, to) {
            print_logs(&servers);
            return Err(error);
        }
    }

    section("In the end");
    let seen = client.stop();
    check_client(&seen)?;
    row(
        "client",
        &format!(
            "{} answers over one connection in {:.1} s, {} wrong",
            thousands(seen.operations),
            seen.duration.as_secs_f64(),
            seen.error_count
        ),
    );
    let check = host3
        .in_network(|| check_redis(server, SEED, DATA))?
        .context("cannot read the data back")?;
    ensure!(
        check.wrong == 0 && check.keys == DATA / 4096,
        "{} of {} values are wrong; the first: {}",
        check.wrong,
        check.keys,
        check.first_wrong.unwrap_or_default()
    );
    row(
        "data",
        &format!(
            "{} of {} values read back, {} in all: every byte is right",
            thousands(check.keys - check.wrong),
            thousands(check.keys),
            mebibytes(DATA)
        ),
    );
    Ok(seen)
}

/// Two hosts between which Redis moves.
struct Play<'a> {
    lab: &'a Lab,
    haulier: &'a Path,
    redis: i32,
    client: &'a RedisClient,
    /// What was on host1 and host2 before.
    before: [Snapshot; 2],
}

impl Play<'_> {
    /// One migration, and what there is to see of it.
    fn act(&mut self, from: usize, to: usize) -> Result<()> {
        let before = self.client.snapshot();
        self.migrate(from, to)?;
        std::thread::sleep(UNDISTURBED);
        // Whether it answers; if not, the report says why.
        let answers = self.client.wait_for_operations(1, PATIENCE);
        let after = self.client.snapshot();
        if let Err(error) = check_client(&after).and(answers.map_err(Into::into)) {
            let place = self.check_place(from, to);
            let place = place.map_or_else(|wrong| wrong.to_string(), |()| "Redis runs".into());
            return Err(error.context(place));
        }

        println!();
        row(
            "client",
            &format!(
                "{} answers before, {} since the command; {} errors",
                thousands(before.operations),
                thousands(after.operations - before.operations),
                after.error_count
            ),
        );
        // Gaps are counted from the client's start; those that ended earlier are not of this move.
        let gap = after
            .gaps
            .iter()
            .filter(|gap| gap.began + gap.length >= before.duration)
            .map(|gap| gap.length)
            .max()
            .context("no gap in the client's answers was long enough to be noted")?;
        row(
            "",
            &format!("the longest wait for an answer was {}", milliseconds(gap)),
        );
        for host in [self.lab.host(from), self.lab.host(to)] {
            row(host.name(), &self.state(host)?);
        }
        self.check_place(from, to)?;
        self.check_clean(from)?;
        self.check_clean(to)?;
        row("left-overs", "none on either host");
        Ok(())
    }

    /// Runs haulier as somebody at the source would, and shows what it says.
    fn migrate(&self, from: usize, to: usize) -> Result<()> {
        let (from, to) = (self.lab.host(from), self.lab.host(to));
        let (pid, destination) = (
            self.redis.to_string(),
            format!("{}:{HAULIER_PORT}", to.name()),
        );
        let arguments = ["migrate", &pid, &destination, "--move-ip", MOVE_IP];
        println!("  {}# haulier {}", from.name(), arguments.join(" "));
        let _ = io::stdout().flush();
        let output = program(from, self.haulier)
            .args(arguments)
            .output(PATIENCE)?;
        for line in output.stderr.lines().chain(output.stdout.lines()) {
            println!("  {line}");
        }
        ensure!(
            output.status.success(),
            "haulier migrate ended with {}",
            output.status
        );
        Ok(())
    }

    /// Redis and its address on a host, in words.
    fn state(&self, host: &Host) -> Result<String> {
        let runs = host
            .processes()?
            .into_iter()
            .filter(|process| process.is_named("redis-server"))
            .map(|process| format!("pid {} {}", process.pid, process.argv.join(" ")))
            .collect::<Vec<_>>();
        let runs = if runs.is_empty() {
            "no redis-server".to_owned()
        } else {
            runs.join("; ")
        };
        let address = if has_address(host)? {
            format!("{ADDRESS} on eth0")
        } else {
            format!("no {ADDRESS}")
        };
        Ok(format!("{runs:<34} {address}"))
    }

    fn check_place(&self, from: usize, to: usize) -> Result<()> {
        let (from, to) = (self.lab.host(from), self.lab.host(to));
        ensure!(
            to.process_alive(self.redis),
            "Redis is not on {}",
            to.name()
        );
        ensure!(
            !from.process_alive(self.redis),
            "Redis is still on {}",
            from.name()
        );
        ensure!(has_address(to)?, "{ADDRESS} is not on {}", to.name());
        ensure!(!has_address(from)?, "{ADDRESS} is still on {}", from.name());
        Ok(())
    }

    /// Nothing is on the host that was not there before, but the cgroup Redis lives in.
    fn check_clean(&self, number: usize) -> Result<()> {
        let host = self.lab.host(number);
        let before = self.before.get(number - 1).context("no such host")?;
        // haulier's server takes a moment to clear up after it has answered.
        let deadline = Instant::now() + CLEARING;
        loop {
            let mut left = host.diff(before)?;
            let home = cgroup_of(host, self.redis)?;
            left.retain(|line| {
                let cgroup = line.strip_prefix("cgroup ");
                !cgroup.is_some_and(|cgroup| Path::new(&home).starts_with(cgroup))
            });
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "left behind on {}: {}",
                host.name(),
                left.join(", ")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// haulier as built beside this example: `target/<profile>/examples/demo`, `target/<profile>/haulier`.
fn haulier_program() -> Result<PathBuf> {
    let this = std::env::current_exe().context("cannot find the running program")?;
    let folder = this.parent().and_then(Path::parent).unwrap_or(&this);
    let haulier = folder.join("haulier");
    ensure!(
        haulier.is_file(),
        "{} is not there; run scripts/demo, which builds it",
        haulier.display()
    );
    Ok(haulier)
}

/// `haulier` on a host, with the CRIU that `scripts/demo` found.
fn program(host: &Host, haulier: &Path) -> HostCommand {
    let command = host.command(haulier);
    match std::env::var_os("HAULIER_CRIU") {
        Some(criu) => command.env("HAULIER_CRIU", criu),
        None => command,
    }
}

fn serve(host: &Host, haulier: &Path) -> Result<Captured> {
    let listen = format!("{}:{HAULIER_PORT}", host.name());
    let mut server = program(host, haulier)
        .args(["serve", "--listen", &listen])
        .spawn_captured()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let look = server.wait_for_output("listening on", Duration::from_millis(100));
        let Err(error) = look else {
            return Ok(server);
        };
        let ended = server.process.try_wait()?;
        if ended.is_some() || Instant::now() >= deadline {
            let said = server.stderr()?;
            let how = ended.map_or_else(|| error.to_string(), |status| status.to_string());
            bail!("haulier serve on {}: {how}: {}", host.name(), said.trim());
        }
    }
}

/// What the servers said, which is of interest only when something failed.
fn print_logs(servers: &[Captured]) {
    for server in servers {
        let log = server.stderr().unwrap_or_default();
        for line in log.lines() {
            println!("  {} serve: {line}", server.process.host().name());
        }
    }
}

fn check_client(seen: &workloads::Report) -> Result<()> {
    ensure!(seen.operations > 0, "the client did nothing");
    ensure!(
        seen.error_count == 0,
        "the client saw errors ({}): {}",
        seen.error_count,
        seen.errors.join("; ")
    );
    Ok(())
}

fn has_address(host: &Host) -> Result<bool> {
    let output = host.run(["ip", "-o", "addr", "show", "to", ADDRESS])?;
    ensure!(output.status.success(), "ip addr show: {}", output.stderr);
    Ok(output.stdout.contains(ADDRESS))
}

/// The cgroup of a process, as the host itself names it; empty if the process is not there.
fn cgroup_of(host: &Host, pid: i32) -> Result<String> {
    // Read on the host: a reader outside its cgroup namespace is told another path.
    let output = host.run(["cat", &format!("/proc/{pid}/cgroup")])?;
    let path = output
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("0::"));
    Ok(path.unwrap_or_default().to_owned())
}

fn section(title: &str) {
    println!("\n{title}\n");
}

fn row(name: &str, text: &str) {
    println!("  {name:<10}  {text}");
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1000.0)
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// `1234567` as `1,234,567`.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
