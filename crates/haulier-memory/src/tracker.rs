//! Which pages of running tasks were written since the last look.
//!
//! Two ways. *Write-protect* (Linux 6.7): a userfaultfd of each task's address space, with which the
//! kernel notes the first write to every page by itself; a look takes the notes and protects again in
//! one step, while the task runs. *Soft-dirty*: a bit of the page table; it is read and cleared in two
//! steps, so the tasks are stopped for that ([`Hold`]). Neither changes what the tasks do or see, and
//! both end without trace if we die, provided that userfaultfds are taken by a process of its own
//! ([`Tracker::taking_by`]).
//!
//! Only [lazy](crate::mappings::MappingKind::Lazy) mappings are tracked. A page that is not populated
//! is never part of [`TaskScan::written`], also if it was discarded since the last look: it has no
//! contents, CRIU's list of pages does not have it, and what the destination has in its place is
//! dropped because of that. Once it is populated again it is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use haulier_sys::remote::{Directly, TakeUserfaultfd};

use crate::ranges::RangeSet;

mod probe;
mod protect;
mod soft_dirty;
mod space;

pub use probe::choose;
use protect::Protected;
use soft_dirty::SoftDirty;

/// A task, by both its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId {
    /// Its pid in our PID namespace.
    pub pid: i32,
    /// Its pid in its own PID namespace, which names it on the wire.
    pub task: u32,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrackerChoice {
    /// The best that the kernel has.
    #[default]
    Auto,
    /// Only this one.
    WriteProtect,
    /// Only this one.
    SoftDirty,
    /// No tracking, and so no pre-copy.
    None,
}

/// A way of tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrackerKind {
    /// Asynchronous write protection by userfaultfd, read by `PAGEMAP_SCAN`.
    WriteProtect,
    /// The soft-dirty bit.
    SoftDirty,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrackerKind::WriteProtect => "write-protect",
            TrackerKind::SoftDirty => "soft-dirty",
        })
    }
}

impl fmt::Display for TrackerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrackerChoice::Auto => f.write_str("auto"),
            TrackerChoice::WriteProtect => TrackerKind::WriteProtect.fmt(f),
            TrackerChoice::SoftDirty => TrackerKind::SoftDirty.fmt(f),
            TrackerChoice::None => f.write_str("none"),
        }
    }
}

/// A word that names no tracker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no tracker is called {0:?}: auto, write-protect, soft-dirty or none")]
pub struct UnknownTracker(String);

impl FromStr for TrackerChoice {
    type Err = UnknownTracker;

    fn from_str(word: &str) -> Result<Self, UnknownTracker> {
        [Self::Auto, Self::WriteProtect, Self::SoftDirty, Self::None]
            .into_iter()
            .find(|choice| choice.to_string() == word)
            .ok_or_else(|| UnknownTracker(word.to_owned()))
    }
}

/// The kernel does not offer what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NoTracker {
    /// Not the one that was asked for.
    #[error("the tracker {kind} does not work here: {reason}")]
    One {
        /// Which one.
        kind: TrackerKind,
        /// Why, in words.
        reason: String,
    },
    /// None at all.
    #[error(
        "the kernel cannot tell which pages a process writes: \
         write-protect does not work ({write_protect}), nor does soft-dirty ({soft_dirty})"
    )]
    Any {
        /// Why not by write protection.
        write_protect: String,
        /// Why not by soft-dirty bits.
        soft_dirty: String,
    },
}

/// Stops all tasks and lets them go on; asked for by the soft-dirty tracker only. Freezing the cgroup
/// of the target is right: it stops what forks meanwhile too.
pub trait Hold {
    /// Returns once no task runs.
    ///
    /// # Errors
    /// They could not be stopped; nothing is stopped then.
    fn stop(&mut self) -> io::Result<()>;

    /// Lets all run again. Asked for after every stop that worked.
    ///
    /// # Errors
    /// They may stand still.
    fn resume(&mut self) -> io::Result<()>;
}

/// Nothing to stop: for tasks that stand still already, and for a tracker that does not ask.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHold;

impl Hold for NoHold {
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a look failed as a whole. What concerns one task only is [`TaskScan::untracked`] instead.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The tasks could not be stopped.
    #[error("cannot stop the tasks to read which pages they wrote")]
    Stop(#[source] io::Error),
    /// The tasks could not be let go on.
    #[error("cannot let the tasks go on after reading which pages they wrote")]
    Resume(#[source] io::Error),
    /// The kernel does not tell about the pages of a task that is there.
    #[error("cannot read which pages process {pid} wrote")]
    Read {
        /// Its pid in our PID namespace.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// One look at all tasks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// The tasks that are there, in the order in which they were named.
    pub tasks: Vec<TaskScan>,
    /// Tasks that an earlier look found and this one did not, by their own numbers.
    pub gone: Vec<u32>,
}

impl Scan {
    /// Pages written, of all tasks.
    pub fn written_pages(&self) -> u64 {
        self.tasks.iter().map(|task| task.written.pages()).sum()
    }
}

/// One look at a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskScan {
    /// Its pid in our PID namespace.
    pub pid: i32,
    /// Its pid in its own.
    pub task: u32,
    /// Populated pages that were written since the last look, or that were never looked at.
    pub written: RangeSet,
    /// The lazy mappings as they are now. Pages outside are no more, or are not lazy any more.
    pub mapped: RangeSet,
    /// Why the task's pages cannot be tracked, if so: all are `written` every time then.
    pub untracked: Option<String>,
    /// How long a thread of it did not run, for a userfaultfd to be taken.
    pub stopped: Duration,
}

/// Looks at tasks again and again.
#[derive(Debug)]
pub struct Tracker {
    backend: Backend,
    seen: BTreeSet<u32>,
}

#[derive(Debug)]
enum Backend {
    WriteProtect(BTreeMap<TaskId, Protected>, Box<dyn TakeUserfaultfd>),
    SoftDirty(SoftDirty),
}

impl Tracker {
    /// A tracker that has not looked yet, and takes userfaultfds itself.
    pub fn new(kind: TrackerKind) -> Tracker {
        Tracker::taking_by(kind, Box::new(Directly))
    }

    /// A tracker that has not looked yet, for which another takes userfaultfds: one that does no harm to
    /// a task when this process is killed meanwhile.
    pub fn taking_by(kind: TrackerKind, taker: Box<dyn TakeUserfaultfd>) -> Tracker {
        Tracker {
            backend: match kind {
                TrackerKind::WriteProtect => Backend::WriteProtect(BTreeMap::new(), taker),
                TrackerKind::SoftDirty => Backend::SoftDirty(SoftDirty::default()),
            },
            seen: BTreeSet::new(),
        }
    }

    /// Which way it goes.
    pub fn kind(&self) -> TrackerKind {
        match self.backend {
            Backend::WriteProtect(..) => TrackerKind::WriteProtect,
            Backend::SoftDirty(_) => TrackerKind::SoftDirty,
        }
    }

    /// A look at the tasks, which run: everything written since the last look, and everything there
    /// is of a task that is new. `tasks` are all processes of the tree right now; what ends before it
    /// is looked at counts as gone.
    ///
    /// Pages are to be read after this returns: what is written from then on is in the next look.
    ///
    /// # Errors
    /// [`TrackError`]. The tracker is of no further use then.
    pub fn scan(&mut self, tasks: &[TaskId], hold: &mut dyn Hold) -> Result<Scan, TrackError> {
        let found = match &mut self.backend {
            Backend::WriteProtect(spaces, taker) => protect::look(spaces, &mut **taker, tasks)?,
            Backend::SoftDirty(tracker) => tracker.look(tasks, hold)?,
        };
        Ok(self.account(found))
    }

    /// The last look, at tasks that stand still. Nothing is left of the tracker in the tasks
    /// afterwards, whatever the outcome. A later [`Self::scan`] begins anew.
    ///
    /// # Errors
    /// [`TrackError`].
    pub fn finish(&mut self, tasks: &[TaskId]) -> Result<Scan, TrackError> {
        let scan = self.last_look(tasks);
        self.end();
        scan
    }

    /// The last look alone: protection stays until [`Self::end`], or until the tracker is dropped.
    /// Lifting it from 1 GiB of small pages takes 30 ms here, in which nobody has to wait; CRIU
    /// dumps protected memory as any other, since only pages that exist are protected.
    ///
    /// # Errors
    /// [`TrackError`].
    pub fn last_look(&mut self, tasks: &[TaskId]) -> Result<Scan, TrackError> {
        let found = match &mut self.backend {
            Backend::WriteProtect(spaces, _) => protect::last(spaces, tasks)?,
            Backend::SoftDirty(tracker) => tracker.finish(tasks)?,
        };
        Ok(self.account(found))
    }

    /// Ends all tracking.
    pub fn end(&mut self) {
        if let Backend::WriteProtect(spaces, _) = &mut self.backend {
            spaces.clear();
        }
        self.seen.clear();
    }

    fn account(&mut self, tasks: Vec<TaskScan>) -> Scan {
        let now: BTreeSet<u32> = tasks.iter().map(|task| task.task).collect();
        let gone = self.seen.difference(&now).copied().collect();
        self.seen = now;
        Scan { tasks, gone }
    }
}

#[cfg(test)]
mod tests;
