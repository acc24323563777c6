//! What a migration may leave behind on a host.

use crate::{Error, Host, Result, network};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The traces on a host at one moment, a line each. The first word says what it is:
///
/// | line | trace |
/// |---|---|
/// | `cgroup /a/b`, `frozen-cgroup /a/b` | a cgroup below the host's root; one that is frozen itself |
/// | `nft table inet x` | an nftables table |
/// | `mount TYPE PATH` | a mount in PID 1's namespace |
/// | `socket PATH` | a unix socket of haulier or CRIU, bound to a path or an abstract name |
/// | `process PID COMM ARGV` | a process of haulier or CRIU |
/// | `stopped-process PID COMM` | a process stopped or traced, of whatever name |
/// | `file PATH` | a file under `/run/haulier*`, or in `/dev/shm` |
///
/// Journals under `/var/lib/haulier` are no trace: they are meant to stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    lines: BTreeSet<String>,
}

impl Snapshot {
    /// The lines, sorted.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}

impl Host {
    /// Takes down what is there now; see [`Host::diff`].
    ///
    /// # Errors
    /// If the host is down or `nft` fails.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let mut lines = BTreeSet::new();
        lines.extend(mounts_of(self.init_pid())?);
        let root = self.root();
        cgroups(&root.join("sys/fs/cgroup"), "", &mut lines)?;
        let tables = self.in_network(|| network::output("nft", "list tables"))??;
        lines.extend(tables.lines().map(|line| format!("nft {line}")));
        self.sockets(&mut lines)?;
        for process in self.processes()? {
            if ours(&process.comm) || process.argv.first().is_some_and(|program| ours(program)) {
                let (pid, comm) = (process.pid, &process.comm);
                lines.insert(format!("process {pid} {comm} {}", process.argv.join(" ")));
            }
            if matches!(process.state, 'T' | 't') {
                lines.insert(format!("stopped-process {} {}", process.pid, process.comm));
            }
        }
        files(
            &root.join("run"),
            "/run",
            &|name| name.starts_with("haulier"),
            &mut lines,
        );
        files(&root.join("dev/shm"), "/dev/shm", &|_| true, &mut lines);
        Ok(Snapshot { lines })
    }

    /// What is there now and was not in the snapshot.
    ///
    /// # Errors
    /// As [`Host::snapshot`].
    pub fn diff(&self, before: &Snapshot) -> Result<Vec<String>> {
        Ok(self
            .snapshot()?
            .lines
            .difference(&before.lines)
            .cloned()
            .collect())
    }

    /// What is there now and was not when the host started.
    ///
    /// # Errors
    /// As [`Host::snapshot`].
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let pristine = Snapshot {
            lines: self.initial_mounts().iter().cloned().collect(),
        };
        self.diff(&pristine)
    }

    /// Paths and abstract names of unix sockets, from the last column of /proc/net/unix.
    fn sockets(&self, lines: &mut BTreeSet<String>) -> Result<()> {
        let path = format!("/proc/{}/net/unix", self.init_pid());
        let table = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        for name in table
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(7))
        {
            // The one PID 1 listens on is outside the host's /run.
            if (name.contains("haulier") || name.contains("criu")) && !name.contains("haulier-lab")
            {
                lines.insert(format!("socket {name}"));
            }
        }
        Ok(())
    }
}

/// Whether a program's name or path is haulier's or CRIU's, and not the lab's.
fn ours(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    name == "haulier" || name.starts_with("criu")
}

/// Mount lines of the process, as the snapshot writes them (fields of proc_pid_mountinfo(5)).
pub(crate) fn mounts_of(pid: i32) -> Result<Vec<String>> {
    let path = format!("/proc/{pid}/mountinfo");
    let table = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    Ok(table
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let (kind, target) = (after.split(' ').next()?, before.split(' ').nth(4)?);
            Some(format!("mount {kind} {target}"))
        })
        .collect())
}

fn cgroups(folder: &Path, name: &str, lines: &mut BTreeSet<String>) -> Result<()> {
    // A cgroup may go while we look.
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        lines.insert(format!("cgroup {name}"));
        if fs::read_to_string(entry.path().join("cgroup.freeze")).is_ok_and(|f| f.trim() == "1") {
            lines.insert(format!("frozen-cgroup {name}"));
        }
        cgroups(&entry.path(), &name, lines)?;
    }
    Ok(())
}

fn files(folder: &Path, name: &str, wanted: &dyn Fn(&str) -> bool, lines: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let file_name = entry.file_name().to_string_lossy().into_owned();
        if !wanted(&file_name) {
            continue;
        }
        let name = format!("{name}/{file_name}");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), &name, &|_| true, lines);
        }
        lines.insert(format!("file {name}"));
    }
}
