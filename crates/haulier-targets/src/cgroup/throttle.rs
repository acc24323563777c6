//! Taking CPU time from a target whose memory changes faster than it can be sent.
//!
//! What is taken is a part of what the target uses when it is left alone, as seen just before. Three
//! means are tried, in order:
//!
//! 1. `cpu.max` of the cgroups that it was confined to, where the cpu controller reaches them or
//!    can be had by `+cpu` in the parent (the kernel refuses that to a parent with tasks);
//! 2. `cpu.cfs_quota_us` of a child of the version 1 cpu cgroup that each thread is in. A thread
//!    goes back to its child's parent, so each is exactly where it was;
//! 3. a duty cycle of `cgroup.freeze`. It is coarse, and the one means that somebody has to keep
//!    going: killed in its frozen part, haulier leaves a target that stands until its recovery
//!    thaws it, as with any cgroup it froze.
//!
//! Nothing is made before it was recorded, and [`Throttle::undo`] is how a recovery undoes it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::cpu_v1::{self, CpuHierarchy};
use super::duty::DutyCycle;
use super::{Cgroup, CgroupError, failed};

/// The shortest time over which the use of CPU time is measured.
const WINDOW: Duration = Duration::from_millis(50);
/// The least use that is assumed, in CPUs: a target that only just woke up is not to be stopped.
const LEAST_USE: f64 = 0.01;
/// Periods and quotas of CPU bandwidth, in microseconds: the period that is used if the quota is
/// not below the kernel's least then, and the longest the kernel takes. Short, so that a request
/// does not wait long for the target's next turn.
const PERIOD: f64 = 20_000.0;
const LONGEST_PERIOD: f64 = 1_000_000.0;
const LEAST_QUOTA: f64 = 1_000.0;

/// Records a path before something is made there.
pub type Record<'a> = &'a mut dyn FnMut(&Path) -> io::Result<()>;

/// How CPU time is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Means {
    /// `cpu.max` of the target's own cgroups.
    CpuMax,
    /// `cpu.cfs_quota_us` of version 1 cgroups.
    Quota,
    /// Freezing and thawing the target's own cgroups in turn.
    DutyCycle,
}

/// CPU time taken from a target. Given back when dropped.
///
/// To be lifted before the cgroups are frozen for the switchover: the duty cycle would thaw them.
#[derive(Debug)]
pub struct Throttle {
    name: String,
    groups: Vec<Cgroup>,
    since: Instant,
    used: Duration,
    engaged: Option<Engaged>,
}

/// What was made, and what undoes it.
#[derive(Debug)]
struct Engaged {
    /// The target's use of CPU time when left alone, in CPUs.
    alone: f64,
    percent: u8,
    limit: Limit,
}

#[derive(Debug)]
enum Limit {
    CpuMax { undo: Vec<PathBuf> },
    Quota(Vec<cpu_v1::Group>),
    DutyCycle(DutyCycle),
}

/// A limit of CPU bandwidth, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Quota {
    quota: u64,
    period: u64,
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Means::CpuMax => "cpu.max",
            Means::Quota => "cpu.cfs_quota_us",
            Means::DutyCycle => "freezing in turn",
        })
    }
}

impl Throttle {
    /// Begins to look at what the target in `groups`, all of it, uses. Changes nothing. `name` is
    /// that of cgroups to be made: one of this migration's.
    ///
    /// # Errors
    /// If the cgroups cannot be read.
    pub fn prepare(groups: &[Cgroup], name: &str) -> Result<Throttle, CgroupError> {
        Ok(Throttle {
            name: name.to_owned(),
            groups: groups.to_vec(),
            since: Instant::now(),
            used: used_by(groups)?,
            engaged: None,
        })
    }

    /// Forgets what the target used until now, as long as nothing is taken from it. For the end of
    /// a round: the next [`Throttle::set`] goes by the use since.
    ///
    /// # Errors
    /// If the cgroups cannot be read.
    pub fn observe(&mut self) -> Result<(), CgroupError> {
        if self.engaged.is_none() && self.since.elapsed() >= WINDOW {
            self.used = used_by(&self.groups)?;
            self.since = Instant::now();
        }
        Ok(())
    }

    /// Takes so many per cent of the CPU time that the target used before anything was taken; 0
    /// gives everything back but leaves what was made. The first call measures, for 50 ms unless
    /// it has been longer since [`Throttle::prepare`]. Tasks born since the last call are in it.
    ///
    /// # Errors
    /// See [`CgroupError`]; also if `record` fails, and then nothing is made.
    pub fn set(&mut self, percent: u8, record: Record<'_>) -> Result<(), CgroupError> {
        let percent = percent.min(99);
        let mut engaged = match self.engaged.take() {
            Some(engaged) => engaged,
            None => {
                let alone = self.use_alone()?;
                let limit = self.engage(record)?;
                debug!(alone, ?limit, "taking CPU time");
                Engaged {
                    alone,
                    percent: 0,
                    limit,
                }
            }
        };
        let applied = self.apply(&mut engaged, percent, record);
        self.engaged = Some(engaged);
        applied
    }

    /// Per cent taken now.
    pub fn percent(&self) -> u8 {
        self.engaged.as_ref().map_or(0, |engaged| engaged.percent)
    }

    /// How it is taken; `None` before the first [`Throttle::set`].
    pub fn means(&self) -> Option<Means> {
        let engaged = self.engaged.as_ref()?;
        Some(match engaged.limit {
            Limit::CpuMax { .. } => Means::CpuMax,
            Limit::Quota(_) => Means::Quota,
            Limit::DutyCycle(_) => Means::DutyCycle,
        })
    }

    /// Gives everything back and removes what was made. Goes on after a failure and returns the
    /// first. Begins to look at the target's use again.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn lift(&mut self) -> Result<(), CgroupError> {
        let Some(engaged) = self.engaged.take() else {
            return Ok(());
        };
        self.since = Instant::now();
        let undone = match engaged.limit {
            Limit::CpuMax { undo } => undo_all(&undo),
            Limit::Quota(made) => undo_all(
                &made
                    .iter()
                    .map(|group| group.path().to_owned())
                    .collect::<Vec<_>>(),
            ),
            Limit::DutyCycle(cycle) => cycle.stop(),
        };
        self.used = used_by(&self.groups).unwrap_or(self.used);
        undone
    }

    /// Undoes what was recorded at a path; fine if it was not made, or is undone already.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn undo(path: &Path) -> Result<(), CgroupError> {
        let file = path.file_name().and_then(|name| name.to_str());
        let (text, is_file) = match file {
            Some("cpu.max") => ("max", true),
            Some("cgroup.subtree_control") => ("-cpu", true),
            _ => ("", false),
        };
        if !path.exists() {
            return Ok(());
        }
        if !is_file {
            return cpu_v1::dissolve(path);
        }
        match fs::write(path, text) {
            // It went together with its cgroup.
            Err(error) if is_gone(&error) => Ok(()),
            result => result.map_err(|e| failed("write", path, e)),
        }
    }

    /// The target's use in CPUs since the window began.
    fn use_alone(&mut self) -> Result<f64, CgroupError> {
        thread::sleep(WINDOW.saturating_sub(self.since.elapsed()));
        let used = used_by(&self.groups)?.saturating_sub(self.used);
        Ok((used.as_secs_f64() / self.since.elapsed().as_secs_f64()).max(LEAST_USE))
    }

    fn engage(&self, record: Record<'_>) -> Result<Limit, CgroupError> {
        if let Some(undo) = take_cpu_max(&self.groups, record)? {
            return Ok(Limit::CpuMax { undo });
        }
        if let Some(hierarchy) = CpuHierarchy::find()? {
            let mut made = Vec::new();
            match hierarchy.confine(&self.groups, &self.name, &mut made, record) {
                Ok(()) => return Ok(Limit::Quota(made)),
                Err(error) => {
                    // Such as a task of a real-time class, which a new group has no time for.
                    warn!(%error, "no CPU quota: freezing in turn instead");
                    for group in &made {
                        Throttle::undo(group.path())?;
                    }
                }
            }
        }
        Ok(Limit::DutyCycle(DutyCycle::start(&self.groups)?))
    }

    fn apply(
        &self,
        engaged: &mut Engaged,
        percent: u8,
        record: Record<'_>,
    ) -> Result<(), CgroupError> {
        let allowed = engaged.alone * f64::from(100 - percent) / 100.0;
        match &mut engaged.limit {
            Limit::CpuMax { .. } => {
                for (group, share) in self.groups.iter().zip(shares_of(&self.groups)) {
                    let text = match quota_of(allowed * share) {
                        _ if percent == 0 => "max".to_owned(),
                        Quota { quota, period } => format!("{quota} {period}"),
                    };
                    group.write("cpu.max", &text)?;
                }
            }
            Limit::Quota(made) => {
                if let Some(hierarchy) = CpuHierarchy::find()? {
                    hierarchy.confine(&self.groups, &self.name, made, record)?;
                }
                let shares = cpu_v1::shares_of(made);
                for (group, share) in made.iter().zip(shares) {
                    let limit = (percent > 0).then(|| quota_of(allowed * share));
                    group.limit(limit.map(|limit| (limit.quota, limit.period)))?;
                }
            }
            Limit::DutyCycle(cycle) => cycle.set(percent),
        }
        engaged.percent = percent;
        Ok(())
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Err(error) = self.lift() {
            warn!(%error, "giving CPU time back");
        }
    }
}

/// Makes sure that each group has a `cpu.max`, and returns what undoes everything; `None` if the
/// controller is not to be had. What was made until then, or until an error, is undone.
fn take_cpu_max(
    groups: &[Cgroup],
    record: Record<'_>,
) -> Result<Option<Vec<PathBuf>>, CgroupError> {
    let mut undo = Vec::new();
    let taken = groups.iter().try_fold(true, |taken, group| {
        Ok(taken && take_cpu_max_of(group, &mut undo, record)?)
    });
    match taken {
        Ok(true) => Ok(Some(undo)),
        Ok(false) => undo_all(&undo).map(|()| None),
        Err(error) => {
            // The first error is the one to tell.
            let _ = undo_all(&undo);
            Err(error)
        }
    }
}

fn take_cpu_max_of(
    group: &Cgroup,
    undo: &mut Vec<PathBuf>,
    record: Record<'_>,
) -> Result<bool, CgroupError> {
    let file = group.path().join("cpu.max");
    let exists = file.exists() || enable_controller(&group.parent(), undo, record)?;
    if !exists || !file.exists() {
        return Ok(false);
    }
    record(&file).map_err(|e| failed("record", &file, e))?;
    undo.push(file);
    Ok(true)
}

/// Whether the children of this group have the cpu controller now.
fn enable_controller(
    parent: &Cgroup,
    undo: &mut Vec<PathBuf>,
    record: Record<'_>,
) -> Result<bool, CgroupError> {
    let available = parent.path().join("cgroup.controllers");
    let text = fs::read_to_string(&available).map_err(|e| failed("read", &available, e))?;
    if !text
        .split_whitespace()
        .any(|controller| controller == "cpu")
    {
        return Ok(false);
    }
    let control = parent.path().join("cgroup.subtree_control");
    record(&control).map_err(|e| failed("record", &control, e))?;
    match fs::write(&control, "+cpu") {
        Ok(()) => {
            undo.push(control);
            Ok(true)
        }
        // Its own tasks are in the way, or it is not ours to change.
        Err(error) => {
            debug!(path = %control.display(), %error, "no cpu controller");
            Ok(false)
        }
    }
}

/// The last thing made is undone first.
fn undo_all(paths: &[PathBuf]) -> Result<(), CgroupError> {
    let mut result = Ok(());
    for path in paths.iter().rev() {
        let undone = Throttle::undo(path);
        if result.is_ok() {
            result = undone;
        }
    }
    result
}

/// CPU time that the tasks of these groups have used, those that have ended included. The kernel
/// counts it for each group of version 2, with or without the cpu controller.
fn used_by(groups: &[Cgroup]) -> Result<Duration, CgroupError> {
    let used = groups.iter().map(used_by_one);
    used.sum()
}

fn used_by_one(group: &Cgroup) -> Result<Duration, CgroupError> {
    let path = group.path().join("cpu.stat");
    let text = fs::read_to_string(&path).map_err(|e| failed("read", &path, e))?;
    let micros = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))
        .and_then(|number| number.trim().parse().ok());
    Ok(Duration::from_micros(micros.unwrap_or(0)))
}

/// What part of the whole use each group has had so far.
fn shares_of(groups: &[Cgroup]) -> Vec<f64> {
    let used = groups
        .iter()
        .map(|group| used_by_one(group).unwrap_or_default());
    shares(&used.collect::<Vec<_>>())
}

/// What part of the sum each is; equal parts if the sum is nothing.
pub(super) fn shares(used: &[Duration]) -> Vec<f64> {
    let sum: Duration = used.iter().sum();
    let equal = 1.0 / used.len().max(1) as f64;
    let part = |used: &Duration| used.as_secs_f64() / sum.as_secs_f64();
    used.iter()
        .map(|one| if sum.is_zero() { equal } else { part(one) })
        .collect()
}

/// The quota for so many CPUs.
fn quota_of(cpus: f64) -> Quota {
    let period = (LEAST_QUOTA / cpus.max(1e-9)).clamp(PERIOD, LONGEST_PERIOD);
    Quota {
        quota: (cpus * period).max(LEAST_QUOTA).round() as u64,
        period: period.round() as u64,
    }
}

pub(super) fn is_gone(error: &io::Error) -> bool {
    let gone = [rustix::io::Errno::NODEV, rustix::io::Errno::NOENT];
    gone.iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests;
