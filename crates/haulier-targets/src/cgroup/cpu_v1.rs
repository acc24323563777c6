//! The cpu controller of cgroup version 1: per thread, and in a hierarchy of its own.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::throttle::{Record, is_gone, shares};
use super::{Cgroup, CgroupError, failed};

/// Most rounds of looking for threads that were born while others were moved.
const ROUNDS: usize = 100;

/// Where the hierarchy with the cpu controller is mounted.
#[derive(Debug)]
pub(super) struct CpuHierarchy {
    mount: PathBuf,
    /// The cgroup that is mounted there; `/` unless this host is a container.
    root: PathBuf,
}

/// A cgroup of ours in it.
#[derive(Debug)]
pub(super) struct Group {
    path: PathBuf,
}

impl CpuHierarchy {
    /// `None` if the controller is not one of version 1 on this host.
    pub(super) fn find() -> Result<Option<CpuHierarchy>, CgroupError> {
        let table = "/proc/self/mountinfo";
        let mounts = fs::read_to_string(table).map_err(|e| failed("read", table, e))?;
        Ok(mounts.lines().find_map(parse_mount))
    }

    /// Moves every thread of the processes in `groups` into a child, named `name`, of the cgroup
    /// it is in, and adds the children to `made`. Each is recorded before it is made.
    pub(super) fn confine(
        &self,
        groups: &[Cgroup],
        name: &str,
        made: &mut Vec<Group>,
        record: Record<'_>,
    ) -> Result<(), CgroupError> {
        for _ in 0..ROUNDS {
            let mut moved = false;
            for thread in threads_of(groups)? {
                let Some(at) = self.of(thread) else {
                    continue;
                };
                if made.iter().any(|group| group.path == at) {
                    continue;
                }
                let own = at.join(name);
                if !made.iter().any(|group| group.path == own) {
                    record(&own).map_err(|e| failed("record", &own, e))?;
                    made.push(Group { path: own.clone() });
                    create(&own)?;
                }
                moved |= move_thread(thread, &own)?;
            }
            if !moved {
                return Ok(());
            }
        }
        Err(CgroupError::Slow {
            path: self.mount.clone(),
            state: "the home of every thread",
        })
    }

    /// The cgroup a thread is in; `None` if the thread is gone, or in one outside of the mount.
    fn of(&self, thread: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{thread}/cgroup")).ok()?;
        let inner = text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            let path = fields.next()?;
            controllers
                .split(',')
                .any(|one| one == "cpu")
                .then_some(path)
        })?;
        let inner = Path::new(inner).strip_prefix(&self.root).ok()?;
        // "/../x": above the root of this cgroup namespace.
        (!inner.starts_with("..")).then(|| self.mount.join(inner))
    }
}

impl Group {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets quota and period in microseconds, or lifts the limit.
    pub(super) fn limit(&self, limit: Option<(u64, u64)>) -> Result<(), CgroupError> {
        let Some((quota, period)) = limit else {
            return self.write("cpu.cfs_quota_us", "-1");
        };
        // A quota for a period that is still the old one may exceed what the parent has.
        self.write("cpu.cfs_quota_us", "-1")?;
        self.write("cpu.cfs_period_us", &period.to_string())?;
        self.write("cpu.cfs_quota_us", &quota.to_string())
    }

    fn write(&self, file: &str, text: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, text).map_err(|e| failed("write", &path, e))
    }

    /// CPU time that the threads in it have used since they were born.
    fn used(&self) -> Duration {
        let threads = threads_in(&self.path).unwrap_or_default();
        let ticks = threads.iter().filter_map(|thread| {
            let text = fs::read_to_string(format!("/proc/{thread}/stat")).ok()?;
            ticks_in(&text)
        });
        // Only what they are to each other counts.
        Duration::from_millis(ticks.sum())
    }
}

/// Ticks in user mode and in the kernel, of a line of `/proc/<thread>/stat`. A name may have blanks
/// and brackets in it.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let kernel: u64 = fields.next()?.parse().ok()?;
    Some(user.saturating_add(kernel))
}

/// What part of the whole use each group has had so far.
pub(super) fn shares_of(groups: &[Group]) -> Vec<f64> {
    match groups {
        [_] => vec![1.0],
        _ => shares(&groups.iter().map(Group::used).collect::<Vec<_>>()),
    }
}

/// Moves the threads of a cgroup of ours to its parent and removes it.
pub(super) fn dissolve(path: &Path) -> Result<(), CgroupError> {
    // First of all let them run: what follows may take a while.
    let _ = fs::write(path.join("cpu.cfs_quota_us"), "-1");
    let parent = path.parent().unwrap_or(path);
    for _ in 0..ROUNDS {
        for thread in threads_in(path)? {
            move_thread(thread, parent)?;
        }
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            // A thread was born, or one that ended is not quite gone.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(failed("remove", path, error)),
        }
        std::thread::sleep(super::ASK);
    }
    Err(CgroupError::Slow {
        path: path.to_owned(),
        state: "empty",
    })
}

fn parse_mount(line: &str) -> Option<CpuHierarchy> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    if right.next() != Some("cgroup") {
        return None;
    }
    let options = right.nth(1)?;
    if !options.split(',').any(|option| option == "cpu") {
        return None;
    }
    let mut left = left.split(' ').skip(3);
    let root = PathBuf::from(left.next()?);
    let mount = PathBuf::from(left.next()?);
    Some(CpuHierarchy { mount, root })
}

fn create(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("create", path, error))
        }
        _ => Ok(()),
    }
}

/// Whether the thread was moved; not if it is gone.
fn move_thread(thread: i32, to: &Path) -> Result<bool, CgroupError> {
    let file = to.join("tasks");
    match fs::write(&file, thread.to_string()) {
        Ok(()) => Ok(true),
        Err(error) if is_no_such_thread(&error) => Ok(false),
        Err(error) => Err(failed("write", &file, error)),
    }
}

fn is_no_such_thread(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

fn threads_in(path: &Path) -> Result<Vec<i32>, CgroupError> {
    let file = path.join("tasks");
    match fs::read_to_string(&file) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(error) => Err(failed("read", &file, error)),
    }
}

fn threads_of(groups: &[Cgroup]) -> Result<BTreeSet<i32>, CgroupError> {
    let mut threads = BTreeSet::new();
    for group in groups {
        for pid in group.pids()? {
            // It may have ended since.
            let Ok(list) = fs::read_dir(format!("/proc/{pid}/task")) else {
                continue;
            };
            threads.extend(
                list.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok()),
            );
        }
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_by_its_controller_and_not_by_its_name() {
        let line = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct";
        let found = parse_mount(line).unwrap();
        assert_eq!(found.mount, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.root, Path::new("/"));
        for other in [
            "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpuacct",
            "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
            "41 31 0:38 / /sys/fs/cgroup/cpu rw - cgroup2 cgroup2 rw,cpu",
            "nonsense",
        ] {
            assert!(parse_mount(other).is_none(), "{other}");
        }
    }

    #[test]
    fn the_ticks_of_a_thread_are_found_behind_any_name() {
        let line = "7 (a) (b c) S 1 7 7 0 -1 4194560 900 0 0 0 30 12 5 6 20 0 1 0 99";
        assert_eq!(ticks_in(line), Some(42));
        assert_eq!(ticks_in("7 (a"), None);
    }

    #[test]
    fn a_mount_inside_of_a_container_shows_a_part_of_the_hierarchy() {
        let line = "32 31 0:29 /box /cg rw - cgroup cgroup rw,cpu";
        let hierarchy = parse_mount(line).unwrap();
        // This thread is not below /box.
        assert_eq!(hierarchy.of(std::process::id() as i32), None);
    }
}
