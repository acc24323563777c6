//! What a running lab keeps under `/run/haulier-lab/<name>/`, and clearing up after a dead one.
//!
//! | file | holds |
//! |---|---|
//! | `lock` | locked (flock) by the supervisor as long as it lives |
//! | `lab.json` | [`LabState`], written once the lab is ready |
//! | `host<N>.sock` | PID 1's socket |
//! | `log` | what supervisor and PID 1s had to say |
//!
//! `/run/haulier-lab/.lock` is held while a folder is created or a dead lab is cleared away.

use crate::{Error, Result, cgroup};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Where the folders of running labs are.
pub(crate) const LABS: &str = "/run/haulier-lab";

/// How long killing and clearing away a lab may take.
pub(crate) const TEARDOWN: Duration = Duration::from_secs(20);

/// What others need to know of a running lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LabState {
    pub(crate) name: String,
    /// PID of the supervisor, whose network namespace is the fabric.
    pub(crate) supervisor: i32,
    pub(crate) hosts: Vec<HostState>,
}

/// What others need to know of a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HostState {
    /// From 1.
    pub(crate) number: usize,
    pub(crate) name: String,
    /// PID of the host's PID 1 as the machine sees it.
    pub(crate) init: i32,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    /// The mounts the host began with, as [`crate::Snapshot`] writes them.
    pub(crate) mounts: Vec<String>,
}

/// The folder of a lab.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(LABS).join(name)
}

/// The socket of a host's PID 1.
pub(crate) fn host_socket(lab: &str, host: usize) -> PathBuf {
    folder(lab).join(format!("host{host}.sock"))
}

/// The cgroup that holds all hosts of a lab.
pub(crate) fn lab_cgroup(name: &str) -> Result<PathBuf> {
    Ok(cgroup::cgroup2_root()?.join(format!("haulier-lab-{name}")))
}

/// Refuses names that would make a bad path, cgroup or socket address (108 bytes at most).
pub(crate) fn check_name(name: &str) -> Result<()> {
    let fits = (1..=40).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if fits {
        Ok(())
    } else {
        Err(Error::BadName {
            name: name.to_owned(),
        })
    }
}

/// A lab's folder, locked for as long as this lives.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) folder: PathBuf,
    _lock: File,
}

/// Makes the folder of a new lab and locks it; what a dead lab of the same name left is cleared
/// away first.
pub(crate) fn claim(name: &str) -> Result<Claim> {
    check_name(name)?;
    private_folder(Path::new(LABS))?;
    let _guard = guard()?;
    let folder = folder(name);
    if folder.exists() && !clear_if_dead(name)? {
        return Err(Error::AlreadyRunning {
            name: name.to_owned(),
        });
    }
    private_folder(&folder)?;
    let lock = open_lock(&folder.join("lock"))?;
    lock_within(&lock, &folder.join("lock"))?;
    Ok(Claim {
        folder,
        _lock: lock,
    })
}

/// Clears away every lab whose supervisor was killed before it could do so itself.
pub(crate) fn clear_dead_labs() -> Result<()> {
    if !Path::new(LABS).exists() {
        return Ok(());
    }
    let _guard = guard()?;
    for name in lab_folders()? {
        clear_if_dead(&name)?;
    }
    Ok(())
}

/// Names of the labs that are running.
///
/// # Errors
/// If `/run/haulier-lab` cannot be read.
pub fn running_labs() -> Result<Vec<String>> {
    if !Path::new(LABS).exists() {
        return Ok(Vec::new());
    }
    let mut names = lab_folders()?;
    names.retain(|name| is_locked(&folder(name).join("lock")));
    names.sort();
    Ok(names)
}

/// Reads what a running lab wrote about itself.
pub(crate) fn read(name: &str) -> Result<LabState> {
    check_name(name)?;
    let folder = folder(name);
    if !is_locked(&folder.join("lock")) {
        return Err(Error::NotRunning {
            name: name.to_owned(),
        });
    }
    let path = folder.join("lab.json");
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Writes it, whole or not at all.
pub(crate) fn write(state: &LabState) -> Result<()> {
    let path = folder(&state.name).join("lab.json");
    let draft = path.with_extension("draft");
    fs::write(&draft, serde_json::to_vec_pretty(state)?).map_err(Error::file("write", &draft))?;
    fs::rename(&draft, &path).map_err(Error::file("rename", &draft))
}

fn lab_folders() -> Result<Vec<String>> {
    let entries = fs::read_dir(LABS).map_err(Error::file("list", LABS))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| check_name(name).is_ok())
        .collect())
}

fn private_folder(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(Error::file("create", path))
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("open", path))
}

fn guard() -> Result<File> {
    let path = Path::new(LABS).join(".lock");
    let lock = open_lock(&path)?;
    lock_within(&lock, &path)?;
    Ok(lock)
}

/// Others hold these locks only for moments, or while they clear away a dead lab.
fn lock_within(lock: &File, path: &Path) -> Result<()> {
    let deadline = 2 * TEARDOWN;
    let until = Instant::now() + deadline;
    loop {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::Deadline {
                    what: format!("lock {}", path.display()),
                    deadline,
                });
            }
            Err(other) => return Err(Error::file_errno("lock", path)(other)),
        }
    }
}

fn is_locked(path: &Path) -> bool {
    let Ok(lock) = File::open(path) else {
        return false;
    };
    flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
}

/// True if the lab was dead and is gone now. The caller holds the guard.
fn clear_if_dead(name: &str) -> Result<bool> {
    let folder = folder(name);
    if is_locked(&folder.join("lock")) {
        return Ok(false);
    }
    cgroup::destroy(&lab_cgroup(name)?, TEARDOWN)?;
    fs::remove_dir_all(&folder).map_err(Error::file("remove", &folder))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_stay_within_a_path_component() {
        assert!(check_name("demo_2-b").is_ok());
        for bad in ["", "..", "a/b", ".lock", "a b", &"x".repeat(41)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
