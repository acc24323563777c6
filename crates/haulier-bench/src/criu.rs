//! The peers: what an expert does with CRIU alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use haulier_lab::{Captured, Host};

use crate::stage::{ADDRESS, Stage};

const PORT: &str = "9000";

/// A gigabyte over a gigabit link, and more.
const PATIENCE: Duration = Duration::from_secs(300);

/// How CRIU is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Dump to tmpfs, copy over TCP, restore.
    Copy,
    /// CRIU's own post-copy.
    Lazy,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Copy => "copy",
            Way::Lazy => "lazy",
        }
    }
}

/// CRIU as haulier would find it.
pub(crate) fn find() -> PathBuf {
    std::env::var_os("HAULIER_CRIU")
        .map_or_else(|| "/opt/haulier/criu/sbin/criu".into(), PathBuf::from)
}

/// Puts the scripts on a host.
pub(crate) fn install(host: &Host) -> Result<()> {
    let bench = std::env::current_exe()?;
    let announce = include_str!("criu/announce.sh")
        .replace("@BENCH@", &bench.to_string_lossy())
        .replace("@ADDRESS@", &format!("{ADDRESS}/24@eth0"));
    host.write_file("/run/dump.sh", include_str!("criu/dump.sh"))?;
    host.write_file("/run/restore.sh", include_str!("criu/restore.sh"))?;
    host.write_file("/run/announce.sh", announce)?;
    Stage::must(host, "chmod +x /run/*.sh")?;
    Ok(())
}

/// Makes the destination listen, which is no part of the migration.
pub(crate) fn prepare(stage: &Stage, way: Way, criu: &Path) -> Result<Captured> {
    let (from, to) = (stage.source(), stage.destination());
    let restore = to
        .command("/run/restore.sh")
        .args([way.name(), &criu.to_string_lossy()])
        .args([ADDRESS, from.name(), PORT])
        .spawn_captured()?;
    restore
        .wait_for_output("ready", PATIENCE)
        .context("the destination cannot receive")?;
    Ok(restore)
}

/// Moves the target from the stage's source to its prepared destination.
pub(crate) fn migrate(
    stage: &Stage,
    way: Way,
    criu: &Path,
    pid: i32,
    restore: Captured,
) -> Result<()> {
    let (from, to) = (stage.source(), stage.destination());
    let dump = from
        .command("/run/dump.sh")
        .args([way.name(), &criu.to_string_lossy(), &pid.to_string()])
        .args([ADDRESS, to.name(), PORT])
        .output(PATIENCE)?;
    let logs = || format!("{}{}", logs_of(from), logs_of(to));
    ensure!(
        dump.status.success(),
        "CRIU's dump: {}{}{}",
        dump.stdout,
        dump.stderr,
        logs()
    );
    let restore = restore.finish(PATIENCE)?;
    ensure!(
        restore.status.success(),
        "CRIU's restore: {}{}",
        restore.stderr,
        logs()
    );
    Ok(())
}

/// Removes what CRIU leaves: the tables of its network lock.
pub(crate) fn clear(host: &Host) -> Result<()> {
    let tables = Stage::must(host, "nft list tables")?;
    for table in tables.lines().filter(|line| line.contains("CRIU")) {
        Stage::must(host, &format!("nft delete {table}"))?;
    }
    Stage::must(host, "echo 0 >/proc/sys/net/ipv4/conf/all/arp_ignore")?;
    Ok(())
}

/// Errors in CRIU's logs, if they are still there.
fn logs_of(host: &Host) -> String {
    let grep = "cd /dev/shm/bench 2>/dev/null && grep -H Error *.log | tail -n 20";
    host.shell(grep)
        .map(|output| format!("\n{}: {}", host.name(), output.stdout))
        .unwrap_or_default()
}
