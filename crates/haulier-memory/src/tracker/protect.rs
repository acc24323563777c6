//! Tracking by asynchronous write protection.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use haulier_sys::pagemap::category::{PRESENT, SWAPPED, WRITTEN};
use haulier_sys::pagemap::{Pagemap, Query};
use haulier_sys::remote::{RemoteError, TakeUserfaultfd};
use haulier_sys::userfaultfd::{Userfaultfd, features};
use rustix::io::Errno;

use super::space::{Identity, is_gone};
use super::{TaskId, TaskScan, TrackError};
use crate::mappings::{self, Mapping, MappingKind};
use crate::page::PageRange;
use crate::ranges::RangeSet;

/// Patience with a task whose threads all wait in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a task may change its address space while it is looked at.
const ATTEMPTS: usize = 3;

/// Everything populated. Never protects, and asks for no registration.
const POPULATED: Query = Query {
    all: 0,
    any: PRESENT | SWAPPED,
    none: 0,
    protect: false,
    registered: false,
};
/// Everything populated, protected in the same step.
const NEW: Query = Query {
    protect: true,
    registered: true,
    ..POPULATED
};
/// What was written since it was protected. Only pages that are populated: protecting others would
/// fill page tables with marks, which CRIU takes for pages.
const WRITTEN_SINCE: Query = Query {
    all: WRITTEN,
    ..NEW
};
/// The same, for the last time.
const WRITTEN_LAST: Query = Query {
    protect: false,
    ..WRITTEN_SINCE
};

/// An address space that is tracked. Dropping it ends that.
#[derive(Debug)]
pub(super) struct Protected {
    identity: Identity,
    /// All three are of the same address space, whatever the process does.
    uffd: Userfaultfd,
    pagemap: Pagemap,
    source: mappings::Source,
    /// Lazy mappings that were registered when last looked at.
    registered: RangeSet,
}

/// How a look at an address space failed.
enum Failure {
    /// It is no more the one of the process.
    Replaced,
    /// The process is gone.
    Gone,
    /// Another userfaultfd has a part of it.
    Shared,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        if is_gone(&error) {
            Failure::Gone
        } else {
            Failure::Io(error)
        }
    }
}

/// A look at running tasks.
pub(super) fn look(
    spaces: &mut BTreeMap<TaskId, Protected>,
    taker: &mut dyn TakeUserfaultfd,
    tasks: &[TaskId],
) -> Result<Vec<TaskScan>, TrackError> {
    spaces.retain(|task, _| tasks.contains(task));
    let mut scans = Vec::with_capacity(tasks.len());
    for task in tasks {
        scans.extend(look_at(spaces, taker, *task)?);
    }
    Ok(scans)
}

/// The last look, at tasks that stand still.
pub(super) fn last(
    spaces: &mut BTreeMap<TaskId, Protected>,
    tasks: &[TaskId],
) -> Result<Vec<TaskScan>, TrackError> {
    let mut scans = Vec::with_capacity(tasks.len());
    for task in tasks {
        let known = spaces.get_mut(task).filter(|space| {
            let now = Identity::of(task.pid);
            now.is_ok_and(|now| now == Some(space.identity))
        });
        let scan = match known.map(|space| space.last(*task)) {
            Some(Ok(scan)) => Some(scan),
            Some(Err(Failure::Io(source))) => {
                return Err(TrackError::Read {
                    pid: task.pid,
                    source,
                });
            }
            // Everything that is there.
            _ => untracked(*task, None)?,
        };
        scans.extend(scan);
    }
    Ok(scans)
}

fn look_at(
    spaces: &mut BTreeMap<TaskId, Protected>,
    taker: &mut dyn TakeUserfaultfd,
    task: TaskId,
) -> Result<Option<TaskScan>, TrackError> {
    let mut stopped = Duration::ZERO;
    for _ in 0..ATTEMPTS {
        let mut space = match spaces.remove(&task) {
            Some(space) => space,
            None => match begin(taker, task.pid) {
                Ok((space, pause)) => {
                    stopped += pause;
                    space
                }
                Err(RemoteError::Gone) if is_alive(task.pid) => continue,
                Err(RemoteError::Gone) => return Ok(None),
                Err(error) => return untracked(task, Some(reason(&error))),
            },
        };
        match space.look(task) {
            Ok(scan) => {
                spaces.insert(task, space);
                return Ok(Some(TaskScan { stopped, ..scan }));
            }
            Err(Failure::Replaced) => {}
            Err(Failure::Gone) => return Ok(None),
            Err(Failure::Shared) => return shared(spaces, task),
            Err(Failure::Io(source)) => {
                return Err(TrackError::Read {
                    pid: task.pid,
                    source,
                });
            }
        }
    }
    let always = "it replaces its address space all the time".to_owned();
    untracked(task, Some(always))
}

fn begin(taker: &mut dyn TakeUserfaultfd, pid: i32) -> Result<(Protected, Duration), RemoteError> {
    let taken = taker.take(pid, PATIENCE)?;
    let look = taken.beside;
    // What has no address space has ended.
    let identity = Identity::by_stat(&look.stat).ok_or(RemoteError::Gone)?;
    let uffd = Userfaultfd::begin(taken.userfaultfd, features::WP_ASYNC).map_err(|source| {
        let action = "ask its userfaultfd for asynchronous write protection".into();
        RemoteError::Io { action, source }
    })?;
    let space = Protected {
        identity,
        uffd,
        pagemap: Pagemap::from_file(look.pagemap.into()),
        source: mappings::Source::from_file(pid, look.maps.into()),
        registered: RangeSet::new(),
    };
    Ok((space, taken.stopped))
}

impl Protected {
    fn look(&mut self, task: TaskId) -> Result<TaskScan, Failure> {
        if Identity::of(task.pid)? != Some(self.identity) {
            return Err(Failure::Replaced);
        }
        let mappings = self.source.read()?;
        if mappings.is_empty() {
            return Err(Failure::Replaced);
        }
        let mut scan = TaskScan {
            pid: task.pid,
            task: task.task,
            mapped: mappings::lazy(&mappings),
            ..TaskScan::default()
        };
        let mut found = Vec::new();
        let mut tracked = RangeSet::new();
        for run in runs(&mappings, &self.registered) {
            let whole = run.range();
            let done = if run.known {
                self.scan(whole, WRITTEN_SINCE, &mut found)
            } else {
                self.register(whole, &mut found)
            };
            match done {
                Ok(()) => tracked.insert(whole),
                Err(Errno::BUSY) => return Err(Failure::Shared),
                // A mapping of the run is new, or is no more. One by one tells which.
                Err(Errno::PERM | Errno::INVAL) => {
                    for range in run.mappings {
                        self.one(range, run.known, &mut found, &mut tracked)?;
                    }
                }
                Err(error) => return Err(gone_or(error)),
            }
        }
        scan.written = found.into_iter().collect();
        self.registered = tracked;
        Ok(scan)
    }

    /// A look at a single mapping.
    fn one(
        &mut self,
        range: PageRange,
        known: bool,
        found: &mut Vec<PageRange>,
        tracked: &mut RangeSet,
    ) -> Result<(), Failure> {
        if known {
            match self.scan(range, WRITTEN_SINCE, found) {
                Ok(()) => {
                    tracked.insert(range);
                    return Ok(());
                }
                Err(Errno::PERM) => {}
                Err(error) => return Err(gone_or(error)),
            }
        }
        match self.register(range, found) {
            Ok(()) => tracked.insert(range),
            Err(Errno::BUSY) => return Err(Failure::Shared),
            // It has changed under our hands: what is there counts as written, until the next look
            // finds it at rest.
            Err(Errno::PERM | Errno::INVAL) => {
                self.scan(range, POPULATED, found).map_err(gone_or)?;
            }
            Err(error) => return Err(gone_or(error)),
        }
        Ok(())
    }

    /// Takes a range into the tracking; all that is in it counts as written.
    fn register(&mut self, range: PageRange, found: &mut Vec<PageRange>) -> Result<(), Errno> {
        self.uffd
            .register_write_protect(range.start, range.bytes())
            .map_err(errno)?;
        self.scan(range, NEW, found)
    }

    fn last(&mut self, task: TaskId) -> Result<TaskScan, Failure> {
        let mappings = self.source.read()?;
        if mappings.is_empty() {
            return Err(Failure::Replaced);
        }
        let mut found = Vec::new();
        for run in runs(&mappings, &self.registered) {
            let query = if run.known { WRITTEN_LAST } else { POPULATED };
            match self.scan(run.range(), query, &mut found) {
                Ok(()) => continue,
                Err(Errno::PERM) => {}
                Err(error) => return Err(gone_or(error)),
            }
            for range in run.mappings {
                match self.scan(range, WRITTEN_LAST, &mut found) {
                    Err(Errno::PERM) => self.scan(range, POPULATED, &mut found).map_err(gone_or)?,
                    other => other.map_err(gone_or)?,
                }
            }
        }
        Ok(TaskScan {
            pid: task.pid,
            task: task.task,
            written: found.into_iter().collect(),
            mapped: mappings::lazy(&mappings),
            ..TaskScan::default()
        })
    }

    fn scan(
        &mut self,
        range: PageRange,
        query: Query,
        found: &mut Vec<PageRange>,
    ) -> Result<(), Errno> {
        scan(&mut self.pagemap, range, query, found).map_err(errno)
    }
}

fn scan(
    pagemap: &mut Pagemap,
    range: PageRange,
    query: Query,
    found: &mut Vec<PageRange>,
) -> io::Result<()> {
    pagemap.scan(range.start..range.end(), query, |pages| {
        found.push(PageRange::between(pages.start, pages.end));
    })
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn gone_or(error: Errno) -> Failure {
    match error {
        // Of a userfaultfd whose address space is gone.
        Errno::NOMEM | Errno::SRCH => Failure::Replaced,
        error => Failure::Io(error.into()),
    }
}

/// Lazy mappings side by side, which can be looked at by one request.
struct Run {
    mappings: Vec<PageRange>,
    /// They were registered at the last look.
    known: bool,
}

impl Run {
    fn range(&self) -> PageRange {
        let first = self.mappings.first().map_or(0, |range| range.start);
        let last = self.mappings.last().map_or(0, PageRange::end);
        PageRange::between(first, last)
    }
}

fn runs(mappings: &[Mapping], registered: &RangeSet) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for mapping in mappings
        .iter()
        .filter(|mapping| mapping.kind == MappingKind::Lazy)
    {
        let range = mapping.range;
        // One that has grown, as a stack does, is registered as a whole.
        let known = registered.overlaps(range);
        match runs.last_mut() {
            Some(run) if run.known == known && run.range().end() == range.start => {
                run.mappings.push(range);
            }
            _ => runs.push(Run {
                mappings: vec![range],
                known,
            }),
        }
    }
    runs
}

/// A task that shares its address space with another one, or uses a userfaultfd of its own.
fn shared(
    spaces: &BTreeMap<TaskId, Protected>,
    task: TaskId,
) -> Result<Option<TaskScan>, TrackError> {
    let same = |other: &&TaskId| other.pid != task.pid && shares_memory(other.pid, task.pid);
    let Some(other) = spaces.keys().find(same) else {
        let own = "it uses a userfaultfd itself".to_owned();
        return untracked(task, Some(own));
    };
    // A child between vfork and exec. The pages are those of the other task, which is tracked; that
    // they are this one's too, CRIU refuses to dump.
    Ok(Some(TaskScan {
        pid: task.pid,
        task: task.task,
        untracked: Some(format!("it shares its memory with process {}", other.pid)),
        ..TaskScan::default()
    }))
}

fn shares_memory(one: i32, other: i32) -> bool {
    haulier_sys::remote::same_memory(one, other).unwrap_or(false)
}

/// All that is populated, of a task that is not tracked.
fn untracked(task: TaskId, reason: Option<String>) -> Result<Option<TaskScan>, TrackError> {
    let read = || {
        let mut pagemap = Pagemap::open(task.pid)?;
        let mappings = mappings::read(task.pid)?;
        let mapped = mappings::lazy(&mappings);
        let mut found = Vec::new();
        for range in mapped.iter() {
            scan(&mut pagemap, range, POPULATED, &mut found)?;
        }
        let empty = mappings.is_empty();
        Ok((found.into_iter().collect(), mapped, empty))
    };
    match read() {
        // A zombie.
        Ok((_, _, true)) => Ok(None),
        Ok((written, mapped, false)) => Ok(Some(TaskScan {
            pid: task.pid,
            task: task.task,
            written,
            mapped,
            untracked: reason,
            stopped: Duration::ZERO,
        })),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(TrackError::Read {
            pid: task.pid,
            source,
        }),
    }
}

fn is_alive(pid: i32) -> bool {
    Identity::of(pid).is_ok_and(|identity| identity.is_some())
}

/// An error with its causes, on one line.
fn reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
