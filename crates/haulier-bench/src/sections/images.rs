//! CRIU's images to another host: by image-proxy and image-cache, by an expert with tar and TCP, and by
//! criu-image-streamer where it is installed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use haulier_lab::{Captured, Host, HostCommand, Output, Signal};

use crate::record::Run;
use crate::sections::{Bench, LINKS, Link};
use crate::settings::Settings;
use crate::stage::{Stage, sent_bytes, start_threads};

pub(crate) const NAME: &str = "images";

const PORT: &str = "7001";
/// For images, on both hosts, in memory.
const FOLDER: &str = "/dev/shm/images";
/// Four gigabytes over a gigabit link, and more.
const PATIENCE: Duration = Duration::from_secs(300);
const MIB: f64 = 1_048_576.0;

/// How images travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `criu dump --stream`, image-proxy, image-cache, `criu restore --stream`; the restore is first.
    Cast,
    /// `criu dump` into memory, tar over TCP, `criu restore`.
    Tar,
    /// `criu dump --stream`, criu-image-streamer, TCP, criu-image-streamer, `criu restore --stream`.
    Streamer,
}

/// Found in the path.
const STREAMER: &str = "criu-image-streamer";

impl Way {
    const ALL: [Way; 3] = [Way::Cast, Way::Tar, Way::Streamer];

    fn name(self) -> &'static str {
        match self {
            Way::Cast => "proxy-and-cache",
            Way::Tar => "tar",
            Way::Streamer => STREAMER,
        }
    }

    fn is_installed(self) -> bool {
        self != Way::Streamer || streamer().is_some()
    }
}

/// Measures every case asked for.
pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for (case, link, way, memory) in cases(&bench.settings) {
        case_runs(bench, &case, link, way, memory)?;
    }
    Ok(())
}

/// Memory that is in use at the same time, at most: the target and its images, at both hosts.
pub(crate) fn touched(settings: &Settings) -> u64 {
    let largest = cases(settings).into_iter().map(|(.., memory)| memory).max();
    4 * largest.unwrap_or(0)
}

fn cases(settings: &Settings) -> Vec<(String, Link, Way, u64)> {
    let sizes: &[u64] = if settings.quick {
        &[64, 256]
    } else {
        &[64, 1024, 4096]
    };
    let mut cases = Vec::new();
    for link in LINKS {
        for mib in sizes {
            for way in Way::ALL.into_iter().filter(|way| way.is_installed()) {
                let case = format!("{NAME}/{}/{mib}-MiB/{}", link.name, way.name());
                cases.push((case, link, way, mib << 20));
            }
        }
    }
    cases.retain(|(case, ..)| settings.wants(case));
    cases
}

/// All runs of a case, each on hosts of its own.
fn case_runs(bench: &mut Bench, case: &str, link: Link, way: Way, memory: u64) -> Result<()> {
    for number in 1..=bench.settings.runs {
        bench.say(&format!("{case} {number}/{}", bench.settings.runs));
        let mut run = Run::new(case, number);
        if let Err(error) = one(bench, link, way, memory, &mut run) {
            bench.failed(&mut run, &error);
        }
        bench.record.add(run)?;
    }
    Ok(())
}

fn one(bench: &Bench, link: Link, way: Way, memory: u64, run: &mut Run) -> Result<()> {
    let stage = Stage::build(link.rate)?;
    let (from, to) = (stage.source(), stage.destination());
    for host in [from, to] {
        Stage::must(host, &format!("mkdir -p {FOLDER}"))?;
    }
    let pid = start_threads(&stage, memory)?;
    let criu = &bench.settings.criu;
    let servers = match way {
        Way::Cast => serve(&stage, &bench.settings.haulier)?,
        Way::Tar | Way::Streamer => Vec::new(),
    };
    let before = (cpu(from)? + cpu(to)?, sent_bytes(from)?);
    let began = Instant::now();
    match way {
        Way::Cast => cast(&stage, criu, pid)?,
        Way::Tar => tar(&stage, criu, pid)?,
        Way::Streamer => stream(&stage, criu, pid)?,
    }
    let took = began.elapsed();
    stage.check_moved(pid)?;
    let after = (cpu(from)? + cpu(to)?, sent_bytes(from)?);
    drop(servers);
    run.put("restored_ms", took.as_secs_f64() * 1e3);
    run.put("frozen_ms", frozen(from)?);
    let gib = memory as f64 / 1024.0 / MIB;
    run.put("cpu_s_per_gib", (after.0 - before.0) / gib);
    run.put("wire_mib", (after.1 - before.1) as f64 / MIB);
    to.signal(pid, Signal::KILL)?;
    Ok(())
}

fn criu(host: &Host, criu: &Path, command: &str, options: &[&str]) -> HostCommand {
    let command = host.command(criu).args([command, "-D", FOLDER, "-v4"]);
    command.args(["--manage-cgroups=ignore"]).args(options)
}

fn ended_well(what: &str, output: &Output) -> Result<()> {
    ensure!(
        output.status.success(),
        "{what}: {}{}",
        output.stdout,
        output.stderr
    );
    Ok(())
}

fn serve(stage: &Stage, haulier: &Path) -> Result<Vec<Captured>> {
    let address = format!("{}:{PORT}", stage.destination().ipv4());
    let vote = format!("#!/bin/sh\nexec {} image-proxy wait\n", haulier.display());
    stage.source().write_file("/run/vote", vote)?;
    Stage::must(stage.source(), "chmod +x /run/vote")?;
    let start = |host: &Host, arguments: [&str; 3], ready: &str| -> Result<Captured> {
        let command = host.command(haulier).args(arguments);
        let command = command.args(["--dir", FOLDER]).spawn_captured()?;
        command.wait_for_output(ready, PATIENCE)?;
        Ok(command)
    };
    let cache = start(
        stage.destination(),
        ["image-cache", "--listen", &address],
        "serving restores",
    )?;
    let proxy = start(
        stage.source(),
        ["image-proxy", "--to", &address],
        "connected to",
    )?;
    Ok(vec![cache, proxy])
}

fn cast(stage: &Stage, program: &Path, pid: i32) -> Result<()> {
    let stream = ["--stream", "-d", "-o", "restore.log"];
    let restore = criu(stage.destination(), program, "restore", &stream).spawn_captured()?;
    let pid = pid.to_string();
    let options = ["--stream", "-t", &pid, "-o", "dump.log"];
    let dump = criu(stage.source(), program, "dump", &options)
        .args(["--action-script", "/run/vote"])
        .output(PATIENCE)?;
    ended_well("the dump", &dump)?;
    ended_well("the restore", &restore.finish(PATIENCE)?)
}

fn tar(stage: &Stage, program: &Path, pid: i32) -> Result<()> {
    let (from, to) = (stage.source(), stage.destination());
    let unpack = format!("socat -u TCP-LISTEN:{PORT},reuseaddr STDOUT | tar -x -C {FOLDER}");
    let unpack = to.command("sh").args(["-c", &unpack]).spawn_captured()?;
    let pid = pid.to_string();
    let dump = criu(from, program, "dump", &["-t", &pid, "-o", "dump.log"]).output(PATIENCE)?;
    ended_well("the dump", &dump)?;
    // With a block size that is no excuse.
    let pack = format!(
        "tar -c -b 2048 -C {FOLDER} . | socat -b 1048576 -u STDIN TCP:{}:{PORT}",
        to.ipv4()
    );
    Stage::must(from, &pack)?;
    ended_well("tar", &unpack.finish(PATIENCE)?)?;
    let restore = criu(to, program, "restore", &["-d", "-o", "restore.log"]).output(PATIENCE)?;
    ended_well("the restore", &restore)
}

/// Its "serve" takes everything into memory before a restore may begin.
fn stream(stage: &Stage, program: &Path, pid: i32) -> Result<()> {
    let (from, to) = (stage.source(), stage.destination());
    let streamer = streamer().context("criu-image-streamer is not in the path")?;
    let streamer = streamer.display();
    // As "tar" above: the buffer of socat is no excuse.
    let serve = format!(
        "socat -b 1048576 -u TCP-LISTEN:{PORT},reuseaddr STDOUT | {streamer} -D {FOLDER} serve"
    );
    let serve = to.command("sh").args(["-c", &serve]).spawn_captured()?;
    let capture = format!(
        "{streamer} -D {FOLDER} capture | socat -b 1048576 -u STDIN TCP:{}:{PORT},retry=50,interval=0.02",
        to.ipv4()
    );
    let capture = from.command("sh").args(["-c", &capture]).spawn_captured()?;
    capture.wait_for_output("socket-init", PATIENCE)?;
    let pid = pid.to_string();
    let options = ["--stream", "-t", &pid, "-o", "dump.log"];
    ended_well(
        "the dump",
        &criu(from, program, "dump", &options).output(PATIENCE)?,
    )?;
    ended_well("the capture", &capture.finish(PATIENCE)?)?;
    serve.wait_for_output("socket-init", PATIENCE)?;
    let options = ["--stream", "-d", "-o", "restore.log"];
    let restore = criu(to, program, "restore", &options).output(PATIENCE)?;
    ended_well("the restore", &restore)?;
    ended_well("the serving", &serve.finish(PATIENCE)?)
}

fn streamer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(STREAMER))
        .find(|program| program.is_file())
}

/// How long the target was frozen at the source, in milliseconds, by the time stamps of CRIU's log.
fn frozen(host: &Host) -> Result<f64> {
    let log = host.read_file(format!("{FOLDER}/dump.log"))?;
    let log = String::from_utf8_lossy(&log);
    let stamp = |line: &str| -> Option<f64> {
        let inside = line.strip_prefix('(')?.split_once(')')?.0;
        Some(inside.parse::<f64>().ok()? * 1e3)
    };
    let froze = log
        .lines()
        .find(|line| line.contains("Seized task"))
        .and_then(stamp);
    let ended = log.lines().rev().find_map(stamp);
    let times = froze.zip(ended);
    let (froze, ended) = times.context("CRIU's log does not tell when it froze the target")?;
    Ok(ended - froze)
}

/// Processor time of everything on a host so far, in seconds.
fn cpu(host: &Host) -> Result<f64> {
    let stat = host.read_file("/sys/fs/cgroup/cpu.stat")?;
    let stat = String::from_utf8_lossy(&stat);
    stat.lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .and_then(|number| number.trim().parse::<f64>().ok())
        .map(|microseconds| microseconds / 1e6)
        .context("no usage_usec in the cpu.stat of a host")
}
