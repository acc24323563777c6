//! Cgroups of haulier's own: the freeze that counts.
//!
//! CRIU stops tasks by ptrace, which ends with CRIU. A frozen cgroup v2 stays frozen whatever
//! dies. On the source each task moves into a child of the cgroup it is in, so that its limits go
//! on to apply and the way back is "to the parent". On the destination the tree is born in a
//! cgroup below `haulier/`, where it stays.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use haulier_sys::wait::Wait;
use thiserror::Error;

pub use throttle::{Means, Throttle};

mod cpu_v1;
mod duty;
pub mod throttle;

/// Folder below the cgroup file system's root in which restored trees live.
const HOME: &str = "haulier";
/// How often the kernel is asked whether a cgroup is frozen or empty by now.
const ASK: Duration = Duration::from_micros(200);

/// A cgroup operation failed.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The host has no cgroup v2.
    #[error(
        "no cgroup v2 file system is mounted on this host; mount one, e.g. mount -t cgroup2 none /sys/fs/cgroup"
    )]
    NotMounted,
    /// The kernel has no freezer for cgroup v2 (Linux before 5.2) or no kill file (before 5.14).
    #[error("{path} does not exist: the kernel is too old (Linux 5.14 or later is needed)")]
    TooOld {
        /// The missing file.
        path: PathBuf,
    },
    /// A file of the cgroup file system refused.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It took too long, or the wait was cancelled.
    #[error("{path} did not become {state} in time")]
    Slow {
        /// The cgroup.
        path: PathBuf,
        /// What it should have become.
        state: &'static str,
    },
}

/// The cgroup v2 file system of this host, as this process sees it.
#[derive(Debug, Clone)]
pub struct CgroupFs {
    root: PathBuf,
}

/// A cgroup v2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl CgroupFs {
    /// Finds where cgroup v2 is mounted.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`], or the reading of the mount table failed.
    pub fn find() -> Result<CgroupFs, CgroupError> {
        let table = "/proc/self/mountinfo";
        let mounts = fs::read_to_string(table).map_err(|e| failed("read", table, e))?;
        mounts
            .lines()
            .find_map(|line| {
                let (left, right) = line.split_once(" - ")?;
                let mut right = right.split(' ');
                (right.next() == Some("cgroup2"))
                    .then(|| left.split(' ').nth(4))
                    .flatten()
            })
            .map(|root| CgroupFs {
                root: PathBuf::from(root),
            })
            .ok_or(CgroupError::NotMounted)
    }

    /// The cgroup a process is in.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn of(&self, pid: i32) -> Result<Cgroup, CgroupError> {
        let file = format!("/proc/{pid}/cgroup");
        let text = fs::read_to_string(&file).map_err(|e| failed("read", &file, e))?;
        let inner = text
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        let inner = inner.strip_suffix(" (deleted)").unwrap_or(inner);
        Ok(Cgroup {
            path: self.root.join(inner),
        })
    }

    /// Where [`CgroupFs::create_home`] creates a cgroup.
    pub fn home_path(&self, id: &str) -> PathBuf {
        self.root.join(HOME).join(id)
    }

    /// Creates the cgroup in which a tree is restored and will live.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn create_home(&self, id: &str) -> Result<Cgroup, CgroupError> {
        let _ = fs::create_dir(self.root.join(HOME));
        Cgroup::create(self.home_path(id))
    }

    /// The cgroup at a path that a journal recorded.
    pub fn at(&self, path: PathBuf) -> Cgroup {
        Cgroup { path }
    }
}

impl Cgroup {
    fn create(path: PathBuf) -> Result<Cgroup, CgroupError> {
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed("create", &path, e)),
        }
        let group = Cgroup { path };
        for file in ["cgroup.freeze", "cgroup.kill"] {
            if !group.path.join(file).exists() {
                let missing = group.path.join(file);
                let _ = fs::remove_dir(&group.path);
                return Err(CgroupError::TooOld { path: missing });
            }
        }
        Ok(group)
    }

    /// Creates a child.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn create_child(&self, name: &str) -> Result<Cgroup, CgroupError> {
        Cgroup::create(self.path.join(name))
    }

    /// Its place in the file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its parent.
    pub fn parent(&self) -> Cgroup {
        Cgroup {
            path: self.path.parent().unwrap_or(&self.path).to_owned(),
        }
    }

    /// Moves a process, with all its threads, into it.
    ///
    /// # Errors
    /// See [`CgroupError`]; `ESRCH` as the source if the process is gone.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// The processes in it.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(|e| failed("read", &path, e))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Whether any process is in it, or in a cgroup below it.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn is_populated(&self) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        let text = fs::read_to_string(&path).map_err(|e| failed("read", &path, e))?;
        Ok(text.lines().any(|line| line == "populated 1"))
    }

    /// Freezes it and waits until no task in it runs.
    ///
    /// # Errors
    /// See [`CgroupError`]; it may be left freezing.
    pub fn freeze(&self, wait: &Wait) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "1")?;
        self.until("frozen 1", "frozen", wait)
    }

    /// Thaws it: its tasks run.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "0")
    }

    /// Kills every task in it, frozen or not, and waits until they are gone.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn kill(&self, wait: &Wait) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")?;
        self.until("populated 0", "empty", wait)
    }

    /// Removes it. It must be empty; one that is gone already is fine.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn remove(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed("remove", &self.path, e)),
        }
    }

    /// Moves its tasks back to the parent and removes it: the way back from a migration. Thaws it.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn dissolve(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        // Thawed first: one write, and the target's users no longer wait.
        self.thaw()?;
        let parent = self.parent();
        // A task may fork while it is moved, so until none is left.
        loop {
            let moved = self
                .pids()?
                .iter()
                .filter(|pid| parent.add(**pid).is_ok())
                .count();
            if moved == 0 {
                break;
            }
        }
        self.remove()
    }

    fn until(&self, line: &str, state: &'static str, wait: &Wait) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        loop {
            let text = fs::read_to_string(&path).map_err(|e| failed("read", &path, e))?;
            if text.lines().any(|found| found == line) {
                return Ok(());
            }
            if wait.remaining().is_zero() || wait.is_cancelled() {
                return Err(CgroupError::Slow {
                    path: self.path.clone(),
                    state,
                });
            }
            thread::sleep(ASK);
        }
    }

    fn write(&self, file: &str, text: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, text).map_err(|e| failed("write", &path, e))
    }
}

fn failed(doing: &'static str, path: impl AsRef<Path>, source: io::Error) -> CgroupError {
    CgroupError::Io {
        doing,
        path: path.as_ref().to_owned(),
        source,
    }
}
