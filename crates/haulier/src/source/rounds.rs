//! Pre-copy: memory is sent in rounds while the target runs, each of what was written since the one
//! before.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use haulier_engine::convergence::{Measurements, Round};
use haulier_images::sender::AheadStats;
use haulier_memory::ledger::Ledger;
use haulier_memory::page::PageRange;
use haulier_memory::ranges::RangeSet;
use haulier_memory::shared::EagerPages;
use haulier_memory::stream::{RoundStats, TaskPages};
use haulier_memory::tracker::{Hold, Scan, TaskId, TaskScan, Tracker, TrackerKind};
use haulier_sys::wait::Wait;
use haulier_targets::cgroup::Cgroup;
use haulier_targets::process::ProcessTree;
use tracing::{debug, warn};

use super::pages::{AnyError, Streams, task_pages};
use crate::report::RoundReport;
use crate::tracer::Tracer;

/// How long freezing and thawing for a look may take, for trackers that need it.
const HOLD_TIME: Duration = Duration::from_secs(5);
/// Shared memory is read again at most this part of the time.
const AHEAD_SHARE: u32 = 4;

/// The rounds of a migration.
#[derive(Debug)]
pub(super) struct Rounds {
    root: i32,
    tracker: Option<Tracker>,
    ledger: Ledger,
    /// What the next round sends, and what it says is gone.
    due: Option<(Scan, Vec<(u32, RangeSet)>)>,
    /// What the destination has dropped before the freeze.
    dropped: Vec<(u32, RangeSet)>,
    looked: Instant,
    begun: Instant,
    measured: Measurements,
    throttle: u8,
    ahead: AheadStats,
    /// When shared memory was read last, and how long that took.
    read_ahead: Option<(Instant, Duration)>,
    /// Tasks of which it was told that they cannot be tracked.
    told: BTreeSet<u32>,
}

impl Rounds {
    /// Of a tree whose switchover takes so long, beside the sending of pages; without a tracker
    /// there will be none.
    pub(super) fn new(root: i32, kind: Option<TrackerKind>, fixed: Duration) -> Rounds {
        Rounds {
            root,
            tracker: kind.map(|kind| Tracker::taking_by(kind, Box::new(Tracer::default()))),
            ledger: Ledger::new(),
            due: None,
            dropped: Vec::new(),
            looked: Instant::now(),
            begun: Instant::now(),
            measured: Measurements {
                fixed,
                ..Measurements::default()
            },
            throttle: 0,
            ahead: AheadStats::default(),
            read_ahead: None,
            told: BTreeSet::new(),
        }
    }

    /// What the stop rule looks at.
    pub(super) fn measured(&mut self) -> &Measurements {
        self.measured.elapsed = self.begun.elapsed();
        &self.measured
    }

    /// From now on so much of the CPU is taken from the target.
    pub(super) fn throttled(&mut self, percent: u8) {
        self.throttle = percent;
    }

    /// Sends a round, and looks at what was written meanwhile.
    pub(super) fn round(
        &mut self,
        streams: &mut Streams,
        groups: &[Cgroup],
        wait: &Wait,
    ) -> Result<(RoundReport, RoundStats), AnyError> {
        let (scan, gone) = match self.due.take() {
            Some(due) => due,
            None => self.look(groups)?,
        };
        let discard = ranges_by_task(gone);
        let (tasks, pages) = written(&scan);
        let looked = self.looked;

        let sending = Instant::now();
        let stats = streams.send_round(tasks, &discard, true, wait)?;
        let send_time = sending.elapsed();
        for task in &scan.tasks {
            if task.untracked.is_none() {
                self.ledger.sent(task.task, &task.written);
            }
        }
        self.send_ahead(streams, wait)?;

        let next = self.look(groups)?;
        let found = next.0.tasks.iter().map(|task| task.written.pages()).sum();
        let round = Round {
            pages,
            zero: stats.zero_pages,
            send_time,
            length: self.looked.duration_since(looked),
            found,
            throttle: self.throttle,
            shared: streams.is_paced(),
        };
        debug!(?round, "round {}", self.measured.rounds.len());
        self.measured.rounds.push(round);
        self.due = Some(next);
        Ok((RoundReport::new(&round, &stats), stats))
    }

    /// The last look, with the tasks frozen. Tracking ends with the migration. Returns what was written since the last
    /// round, as far as that is known.
    pub(super) fn finish(&mut self) -> Result<Vec<TaskPages>, AnyError> {
        let Some(tracker) = &mut self.tracker else {
            return Ok(Vec::new());
        };
        let scan = tracker.last_look(&tasks(self.root)?)?;
        // What the last look of the rounds found was written, and may not have been since.
        let mut dirty: Vec<(u32, RangeSet)> = Vec::new();
        let earlier = self.due.take().map(|(scan, _)| scan);
        self.ledger.apply(&scan);
        for task in &scan.tasks {
            let mut set = task.written.clone();
            if let Some(before) = earlier.as_ref().and_then(|scan| of_task(scan, task.task)) {
                set.union(&before.intersect(&task.mapped));
            }
            dirty.push((task.task, set));
        }
        let pages = |(task, set): (u32, RangeSet)| task_pages(task, set.iter().collect());
        Ok(dirty.into_iter().map(pages).collect())
    }

    /// What was read from the frozen tasks has been sent.
    pub(super) fn sent(&mut self, tasks: &[TaskPages]) {
        for task in tasks {
            let set: RangeSet = task.ranges.iter().copied().collect();
            self.ledger.sent(task.task, &set);
        }
    }

    /// What of a task's pages the destination lacks, or has in an old version.
    pub(super) fn missing(&self, task: u32, lazy: &RangeSet) -> RangeSet {
        self.ledger.missing(task, lazy)
    }

    /// Pages in the order in which they are likely to be needed.
    pub(super) fn by_heat(&self, task: u32, pages: &RangeSet) -> Vec<PageRange> {
        self.ledger.by_heat(task, pages)
    }

    /// What was sent of memory that CRIU dumps itself.
    pub(super) fn ahead(&self) -> AheadStats {
        self.ahead
    }

    /// A look, and what is gone since the one before.
    fn look(&mut self, groups: &[Cgroup]) -> Result<(Scan, Vec<(u32, RangeSet)>), AnyError> {
        let Some(tracker) = &mut self.tracker else {
            return Ok((Scan::default(), Vec::new()));
        };
        let tasks = tasks(self.root)?;
        self.looked = Instant::now();
        let scan = tracker.scan(&tasks, &mut Groups(groups))?;
        for task in &scan.tasks {
            if let Some(reason) = &task.untracked {
                if self.told.insert(task.task) {
                    let pid = task.pid;
                    warn!(pid, "its memory is sent again in every round: {reason}");
                }
            }
        }
        // Now, and not when its round begins, which may be in the freeze.
        let gone = self.ledger.apply(&scan);
        Ok((scan, gone))
    }

    /// What the last round left, for pages that are to be left behind: the destination drops its
    /// old versions before the freeze.
    pub(super) fn drop_left(&mut self, streams: &mut Streams, wait: &Wait) -> Result<(), AnyError> {
        let Some((scan, gone)) = &self.due else {
            return Ok(());
        };
        let mut discard = ranges_by_task(gone.clone());
        let written = |task: &TaskScan| (task.task, task.written.iter().collect());
        discard.extend(scan.tasks.iter().map(written));
        let dropped = scan
            .tasks
            .iter()
            .map(|task| (task.task, task.written.clone()));
        self.dropped = dropped.collect();
        streams.send_round(Vec::new(), &discard, true, wait)?;
        Ok(())
    }

    /// What of a task's pages the destination may have in an old version since then.
    pub(super) fn stale(&self, task: u32, missing: &RangeSet) -> RangeSet {
        let mut stale = missing.clone();
        for (dropped, pages) in &self.dropped {
            if *dropped == task {
                stale.subtract(pages);
            }
        }
        stale
    }

    /// Memory that CRIU dumps into its images is sent by content: in the first round, and later
    /// only so often that it does not delay the rest.
    fn send_ahead(&mut self, streams: &mut Streams, wait: &Wait) -> Result<(), AnyError> {
        if let Some((read, took)) = self.read_ahead {
            if read.elapsed() < took * AHEAD_SHARE {
                return Ok(());
            }
        }
        let begun = Instant::now();
        let tasks = tasks(self.root)?;
        let eager = EagerPages::scan(tasks.iter().map(|task| task.pid))?;
        if eager.worth_it() {
            let images = &mut streams.images;
            let mut sum = AheadStats::default();
            eager.read(|pages| -> Result<ControlFlow<()>, AnyError> {
                sum += images.send_ahead(pages, wait)?;
                Ok(match images.is_full() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                })
            })?;
            debug!(?sum, "sent ahead");
            self.ahead += sum;
        }
        self.read_ahead = Some((Instant::now(), begun.elapsed()));
        Ok(())
    }
}

/// The tasks of the tree, now. It is in this host's PID namespace: numbers are the same everywhere.
fn tasks(root: i32) -> Result<Vec<TaskId>, AnyError> {
    let tree = ProcessTree::read(root)?;
    let task = |pid: i32| TaskId {
        pid,
        task: pid as u32,
    };
    Ok(tree.pids().into_iter().map(task).collect())
}

fn of_task(scan: &Scan, task: u32) -> Option<&RangeSet> {
    let found = scan.tasks.iter().find(|scanned| scanned.task == task);
    found.map(|scanned| &scanned.written)
}

fn written(scan: &Scan) -> (Vec<TaskPages>, u64) {
    let mut pages = 0;
    let tasks = scan.tasks.iter().map(|task| {
        pages += task.written.pages();
        task_pages(task.task, task.written.iter().collect())
    });
    (tasks.collect(), pages)
}

/// By task, as they go over the wire.
pub(super) fn ranges_by_task(sets: Vec<(u32, RangeSet)>) -> Vec<(u32, Vec<PageRange>)> {
    let ranges = |(task, set): (u32, RangeSet)| (task, set.iter().collect());
    sets.into_iter().map(ranges).collect()
}

/// The target's cgroups, for a tracker that cannot look while tasks run.
struct Groups<'a>(&'a [Cgroup]);

impl Hold for Groups<'_> {
    fn stop(&mut self) -> std::io::Result<()> {
        let wait = Wait::uncancellable(HOLD_TIME);
        let frozen = self.0.iter().try_for_each(|group| group.freeze(&wait));
        frozen.map_err(std::io::Error::other)
    }

    fn resume(&mut self) -> std::io::Result<()> {
        let mut result = Ok(());
        for group in self.0 {
            result = result.and(group.thaw());
        }
        result.map_err(std::io::Error::other)
    }
}
