//! The lab's part of the cgroup v2 tree: `haulier-lab-<name>/host<N>` below the mounted root.

use crate::{Error, Result};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or below it on machines that mount v1 as well.
pub(crate) fn cgroup2_root() -> Result<PathBuf> {
    let path = "/proc/self/mountinfo";
    let mounts = fs::read_to_string(path).map_err(Error::file("read", path))?;
    find_cgroup2(&mounts).ok_or(Error::NoCgroup2)
}

/// The last cgroup2 mount listed, being the one on top. Fields are those of proc_pid_mountinfo(5).
fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let kind = after.split(' ').next()?;
            (kind == "cgroup2").then(|| before.split(' ').nth(4).map(PathBuf::from))?
        })
        .next_back()
}

/// Creates a cgroup and those above it.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::file("create cgroup", path))
}

/// Moves the calling process there.
pub(crate) fn enter(path: &Path) -> Result<()> {
    let procs = path.join("cgroup.procs");
    fs::write(&procs, "0").map_err(Error::file("enter cgroup", procs))
}

/// Kills every process below `path`, frozen ones too, and removes the cgroups. Nothing there is
/// fine.
pub(crate) fn destroy(path: &Path, deadline: Duration) -> Result<()> {
    let until = Instant::now() + deadline;
    loop {
        match fs::write(path.join("cgroup.kill"), "1") {
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(other) => return Err(Error::file("kill", path)(other)),
            Ok(()) => {}
        }
        match remove_tree(path) {
            Ok(()) => return Ok(()),
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(5)),
            Err(left) => return Err(Error::file("remove cgroup", path)(left)),
        }
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::find_cgroup2;
    use std::path::PathBuf;

    #[test]
    fn finds_both_layouts() {
        let unified = "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(
            find_cgroup2(hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(
            find_cgroup2("32 31 0:29 / /cpu rw - cgroup cgroup rw,cpu\n"),
            None
        );
    }
}
