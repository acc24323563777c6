//! Real tasks under a tracker, and a destination that has of them what it was sent.

#![allow(dead_code, reason = "not all of its users use everything")]

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use haulier_memory::ledger::Ledger;
use haulier_memory::mappings;
use haulier_memory::page::{PAGE, PAGE_BYTES, PageRange};
use haulier_memory::ranges::RangeSet;
use haulier_memory::tracker::{Hold, Scan, TaskId, TaskScan, Tracker, TrackerKind};
use haulier_sys::pagemap::category::{PFNZERO, PRESENT, SWAPPED};
use haulier_sys::pagemap::{Pagemap, Query};
use haulier_sys::process_memory::ProcessMemory;
use rustix::process::{Pid, Signal, kill_process};

/// Gives the list of all checks to a macro.
macro_rules! all_checks {
    ($callback:ident) => {
        $callback! {
            changes::writes_are_seen_once
            changes::writes_of_the_kernel_are_seen
            changes::discarded_pages_are_written_when_they_come_back
            changes::pages_discarded_before_the_end_are_not_kept
            changes::a_moved_mapping_is_written_and_its_old_place_is_gone
            changes::a_new_mapping_at_an_old_place_is_written
            changes::mappings_without_access_and_reservations_cost_nothing
            changes::locked_memory_is_not_tracked
            changes::huge_pages_are_tracked_as_small_ones
            changes::ten_thousand_mappings_are_tracked
            changes::a_task_that_does_anything_is_the_same_at_the_end
            changes::threads_that_write_all_the_time_lose_nothing
            tasks::a_forked_child_is_wholly_written
            tasks::an_exec_begins_anew
            tasks::a_task_that_ends_is_gone
            tasks::tasks_that_end_while_they_are_looked_at_are_no_error
            tasks::a_task_with_a_userfaultfd_of_its_own_is_sent_whole
            tasks::a_task_of_another_user_is_tracked
            tasks::a_task_under_seccomp_survives_and_is_tracked
            tasks::a_task_that_is_traced_by_another_is_sent_whole
            tasks::nothing_of_the_tracker_is_left
            calls::blocking_calls_go_on
            calls::signals_that_come_meanwhile_are_delivered
            calls::a_timer_of_a_thousand_signals_a_second_goes_on
            calls::running_threads_are_not_disturbed
            calls::nothing_is_left_however_short_the_time
            calls::a_stopped_task_stays_stopped
            calls::a_frozen_task_is_not_harmed
        }
    };
}

pub(crate) mod calls;
pub(crate) mod changes;
pub(crate) mod tasks;

/// Where the checks map memory: nobody else is there.
pub(crate) const BASE: u64 = 0x2000_0000_0000;
/// Read and write.
pub(crate) const RW: u64 = 3;
const LONG: Duration = Duration::from_secs(20);

/// What all checks need.
pub(crate) struct Stage {
    pub(crate) program: PathBuf,
    pub(crate) kind: TrackerKind,
}

/// Address of a page of [`BASE`].
pub(crate) fn at(page: u64) -> u64 {
    BASE + page * PAGE
}

pub(crate) fn pages(first: u64, pages: u64) -> PageRange {
    PageRange {
        start: at(first),
        pages,
    }
}

pub(crate) fn set(ranges: &[(u64, u64)]) -> RangeSet {
    ranges
        .iter()
        .map(|&(first, count)| pages(first, count))
        .collect()
}

/// A task that obeys; killed when dropped.
pub(crate) struct Task {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Stage {
    pub(crate) fn start(&self, arguments: &[&str]) -> Task {
        let mut process = Command::new(&self.program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program to be tracked");
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Task {
            process,
            input,
            output,
        }
    }

    pub(crate) fn task(&self) -> Task {
        self.start(&[])
    }

    pub(crate) fn under_tracker(&self) -> Destination {
        Destination::new(self.kind)
    }

    /// Checks what was found written. Soft-dirty bits also tell of neighbours, where the kernel joins
    /// a new mapping with an old one.
    pub(crate) fn expect(&self, found: &RangeSet, wanted: &[(u64, u64)]) {
        let wanted = set(wanted);
        let all = found.intersect(&wanted) == wanted;
        assert!(
            all && (found == &wanted || !self.injects()),
            "{found:?}, not {wanted:?}"
        );
    }

    /// For what only write protection does.
    pub(crate) fn injects(&self) -> bool {
        self.kind == TrackerKind::WriteProtect
    }
}

impl Task {
    pub(crate) fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    pub(crate) fn id(&self) -> TaskId {
        id(self.pid())
    }

    /// Sends a command without waiting for the answer.
    pub(crate) fn send(&mut self, command: &str) {
        // In one piece: who reads one byte may not be there for a second.
        let line = format!("{command}\n");
        self.input.write_all(line.as_bytes()).unwrap();
    }

    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Has the task do something; returns the number it answers.
    pub(crate) fn order(&mut self, command: &str) -> i64 {
        self.send(command);
        let answer = self.answer();
        match answer.split_once(' ') {
            Some(("ok", number)) => number.parse().unwrap(),
            _ => panic!("{command:?}: {answer:?}"),
        }
    }

    /// An order about pages of [`BASE`].
    pub(crate) fn on(&mut self, verb: &str, first: u64, count: u64, argument: u64) -> i64 {
        self.order(&format!("{verb} {:x} {count:x} {argument:x}", at(first)))
    }

    pub(crate) fn map(&mut self, first: u64, count: u64) {
        self.on("map", first, count, RW);
    }

    pub(crate) fn write(&mut self, first: u64, count: u64, seed: u64) {
        self.on("write", first, count, seed);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }

    pub(crate) fn wait_for_state(&self, wanted: &str) {
        wait_for_state(self.pid(), wanted);
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn id(pid: i32) -> TaskId {
    TaskId {
        pid,
        task: pid as u32 + 1000,
    }
}

/// Waits until the first thread of a process is in one of these states.
pub(crate) fn wait_for_state(pid: i32, wanted: &str) {
    let deadline = Instant::now() + LONG;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let state = stat.rsplit_once(") ").unwrap().1.chars().next().unwrap();
        if wanted.contains(state) {
            return;
        }
        assert!(Instant::now() < deadline, "{pid} is {state}, not {wanted}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Stops by SIGSTOP: good enough for tasks whose parent does not look.
pub(crate) struct Stopped<'a>(pub(crate) &'a [TaskId]);

impl Stopped<'_> {
    fn all(&self, signal: Signal) -> io::Result<()> {
        for task in self.0 {
            kill_process(Pid::from_raw(task.pid).unwrap(), signal)?;
        }
        Ok(())
    }
}

impl Hold for Stopped<'_> {
    fn stop(&mut self) -> io::Result<()> {
        self.all(Signal::STOP)?;
        for task in self.0 {
            for thread in std::fs::read_dir(format!("/proc/{}/task", task.pid))? {
                let thread = thread?.file_name().to_str().unwrap().parse().unwrap();
                wait_for_state(thread, "TZ");
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.all(Signal::CONT)
    }
}

/// Pages as they were sent.
pub(crate) struct Destination {
    pub(crate) tracker: Tracker,
    pub(crate) ledger: Ledger,
    pages: HashMap<(u32, u64), Vec<u8>>,
}

impl Destination {
    fn new(kind: TrackerKind) -> Destination {
        Destination {
            tracker: Tracker::new(kind),
            ledger: Ledger::new(),
            pages: HashMap::new(),
        }
    }

    /// A look, and all that it found written is sent.
    pub(crate) fn round(&mut self, tasks: &[TaskId]) -> Scan {
        let scan = self.tracker.scan(tasks, &mut Stopped(tasks)).unwrap();
        self.ledger.apply(&scan);
        for found in &scan.tasks {
            self.send(found.pid, found.task, &found.written);
        }
        scan
    }

    /// A look at one task.
    pub(crate) fn look(&mut self, task: &Task) -> TaskScan {
        let mut scan = self.round(&[task.id()]);
        assert_eq!(scan.tasks.len(), 1, "the task is there");
        scan.tasks.remove(0)
    }

    /// Pages of [`BASE`] that a look finds written.
    pub(crate) fn written(&mut self, task: &Task) -> RangeSet {
        let found = self.look(task);
        assert_eq!(found.untracked, None);
        within(&found.written)
    }

    fn send(&mut self, pid: i32, task: u32, pages: &RangeSet) {
        let memory = ProcessMemory::new(pid);
        let mut sent = Vec::new();
        let mut bytes = Vec::new();
        for range in pages.iter() {
            let mut start = range.start;
            while start < range.end() {
                let pages = ((range.end() - start) / PAGE).min(256);
                bytes.resize(pages as usize * PAGE_BYTES, 0);
                let pieces = [(start, bytes.len())];
                let Ok(read) = memory.read(&pieces, &mut bytes) else {
                    return;
                };
                for page in bytes[..read].chunks_exact(PAGE_BYTES) {
                    self.pages.insert((task, start), page.to_owned());
                    sent.push(PageRange { start, pages: 1 });
                    start += PAGE;
                }
                // One that is not mapped any more.
                if read < bytes.len() {
                    start += PAGE;
                }
            }
        }
        self.ledger.sent(task, &sent.into_iter().collect());
    }

    /// Stops the tasks, looks for the last time, sends what is missing of what is populated, and
    /// compares. Returns the last look.
    pub(crate) fn settle(&mut self, tasks: &[TaskId]) -> Scan {
        Stopped(tasks).stop().unwrap();
        let scan = self.tracker.finish(tasks).unwrap();
        self.ledger.apply(&scan);
        for task in tasks {
            let lazy = populated(task.pid);
            let missing = self.ledger.missing(task.task, &lazy);
            self.send(task.pid, task.task, &missing);
            self.compare(*task, &lazy);
        }
        scan
    }

    fn compare(&self, task: TaskId, lazy: &RangeSet) {
        let memory = ProcessMemory::new(task.pid);
        for range in lazy.iter() {
            for start in (range.start..range.end()).step_by(PAGE_BYTES) {
                let mut page = vec![0; PAGE_BYTES];
                assert_eq!(
                    memory.read(&[(start, PAGE_BYTES)], &mut page).unwrap(),
                    PAGE_BYTES
                );
                let sent = self.pages.get(&(task.task, start));
                let sent = sent.unwrap_or_else(|| panic!("page {start:#x} was never sent"));
                assert!(*sent == page, "page {start:#x} is not what the task has");
            }
        }
    }
}

/// The part of a set that the checks made.
pub(crate) fn within(found: &RangeSet) -> RangeSet {
    found.within(BASE, BASE + (1 << 44)).collect()
}

/// What CRIU's list of lazy pages would have.
pub(crate) fn populated(pid: i32) -> RangeSet {
    let mut pagemap = Pagemap::open(pid).unwrap();
    let mut found = Vec::new();
    let query = Query {
        any: PRESENT | SWAPPED,
        none: PFNZERO,
        ..Query::default()
    };
    for range in mappings::lazy(&mappings::read(pid).unwrap()).iter() {
        let outcome = pagemap.scan(range.start..range.end(), query, |pages| {
            found.push(PageRange::between(pages.start, pages.end));
        });
        if outcome.is_err() {
            return by_entry(pid);
        }
    }
    found.into_iter().collect()
}

/// For kernels without the request.
fn by_entry(pid: i32) -> RangeSet {
    use haulier_sys::pagemap::entry::{PRESENT, SWAPPED};
    const FRAME: u64 = (1 << 55) - 1;
    // A page of ours that was only read is the page of zeros.
    let own = haulier_sys::userfaultfd::Region::map(PAGE_BYTES).unwrap();
    own.read(0);
    let mut zero = [0];
    let our_pid = std::process::id() as i32;
    Pagemap::open(our_pid)
        .unwrap()
        .entries(own.address(), &mut zero)
        .unwrap();
    let is_populated = |value: u64| {
        let is_zero = value & PRESENT != 0 && value & FRAME == zero[0] & FRAME;
        value & (PRESENT | SWAPPED) != 0 && !is_zero
    };
    let pagemap = Pagemap::open(pid).unwrap();
    let mut set = RangeSet::new();
    for range in mappings::lazy(&mappings::read(pid).unwrap()).iter() {
        for part in (range.start..range.end()).step_by(PAGE_BYTES << 15) {
            let pages = ((range.end() - part) / PAGE).min(1 << 15);
            let mut entries = vec![0; pages as usize];
            let read = pagemap.entries(part, &mut entries).unwrap();
            for (start, value) in (part..).step_by(PAGE_BYTES).zip(&entries[..read]) {
                if is_populated(*value) {
                    set.insert(PageRange { start, pages: 1 });
                }
            }
        }
    }
    set
}

/// Compiles the program that is tracked.
pub(crate) fn compile(directory: &Path) -> PathBuf {
    let binary = directory.join("tracked");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tracked/tracked.c");
    let mut compile = Command::new("cc");
    compile
        .args(["-O1", "-pthread", "-o"])
        .arg(&binary)
        .arg(source);
    assert!(compile.status().expect("a C compiler").success());
    binary
}
