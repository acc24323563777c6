//! A real CRIU dumps a real process, which then goes on or not.

mod machine;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use haulier_criu::dump::{self, DumpOptions, Frozen, Ready};
use haulier_criu::skeleton::{LazyRange, PAGE, Skeleton};
use haulier_criu::{Criu, CriuFailure, find, pagemap};
use haulier_sys::namespaces::close_on_exec_from;
use haulier_sys::pagemap::category::{PFNZERO, PRESENT, SWAPPED};
use haulier_sys::pagemap::{Pagemap, Query};
use haulier_sys::session::in_new_session;
use machine::{criu, soon};
use rustix::process::{Pid, Signal, kill_process};

/// A process that CRIU can dump: its own session, no descriptors but /dev/null. One in 256 sleeps with
/// its stack pointer at the beginning of a page, and CRIU 4.2.1 leaves no page of such a one behind.
fn sleeper() -> Child {
    // Whoever runs the tests may have left some that were opened outside of this mount namespace.
    close_on_exec_from(3).unwrap();
    loop {
        let mut child = in_new_session(Command::new("sleep").arg("1000"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        if stack_pointer(child.id()) % PAGE != 0 {
            return child;
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// Of a process that sleeps, or is about to.
fn stack_pointer(pid: u32) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
        // The number and six arguments are before it.
        let pointer = call.split_whitespace().nth(7);
        // clock_nanosleep(2) here; exec and what comes before it is something else.
        let asleep = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "sleep\n";
        if let (Some(pointer), true) = (pointer, asleep && call.starts_with(NANOSLEEP)) {
            return u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap();
        }
        assert!(Instant::now() < deadline, "{call}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// clock_nanosleep(2), as `/proc/PID/syscall` says it.
const NANOSLEEP: &str = if cfg!(target_arch = "x86_64") {
    "230 "
} else {
    "115 "
};

fn options(pid: i32, directory: &tempfile::TempDir) -> DumpOptions {
    DumpOptions {
        pid,
        directory: directory.path().to_owned(),
        shell_job: false,
        freeze_seconds: 10,
        veil: false,
    }
}

fn ready(criu: &Criu, pid: i32, directory: &tempfile::TempDir) -> Ready {
    let starting = dump::start(criu, &options(pid, directory)).unwrap();
    starting.ready(&soon()).unwrap()
}

fn freeze(criu: &Criu, pid: i32, directory: &tempfile::TempDir) -> Result<Frozen, CriuFailure> {
    ready(criu, pid, directory).freeze(&soon())
}

/// State letter of a process, from `/proc/PID/stat`.
fn state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}

/// It has been let go: it sleeps again, once it has had a moment to run.
#[track_caller]
fn assert_sleeps(pid: i32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while state(pid) != 'S' {
        assert!(Instant::now() < deadline, "it is in state {}", state(pid));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_dump_given_up_leaves_the_process_and_a_released_one_kills_it() {
    let Some(criu) = criu() else { return };
    assert!(criu.version() >= find::OLDEST);
    let mut child = sleeper();
    let pid = child.id() as i32;

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let frozen = freeze(&criu, pid, &directory).unwrap();
    assert_eq!(state(pid), 't');
    let captured = frozen.capture(&soon()).unwrap();
    let skeleton = Skeleton::read(directory.path()).unwrap();
    assert_eq!(
        skeleton
            .tasks
            .iter()
            .map(|task| task.pid)
            .collect::<Vec<_>>(),
        [pid as u32]
    );
    assert!(skeleton.lazy_pages() > 0, "{skeleton:?}");
    captured.abandon(&soon()).unwrap();
    assert_sleeps(pid);
    assert!(child.try_wait().unwrap().is_none());

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let frozen = freeze(&criu, pid, &directory).unwrap();
    frozen.capture(&soon()).unwrap().release(&soon()).unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

#[test]
fn dropping_a_hold_or_losing_criu_lets_the_process_go_on() {
    let Some(criu) = criu() else { return };
    let mut child = sleeper();
    let pid = child.id() as i32;

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    drop(freeze(&criu, pid, &directory).unwrap());
    assert_sleeps(pid);

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let frozen = freeze(&criu, pid, &directory).unwrap();
    frozen.capture(&soon()).unwrap().kill_criu();
    assert_sleeps(pid);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The private anonymous mappings of a process, the kernel's own aside.
fn private(pid: i32) -> Vec<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let is_private = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let name = fields.get(5).copied().unwrap_or_default();
        fields[1].ends_with('p') && fields[4] == "0" && !name.starts_with("[v")
    };
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    maps.lines()
        .filter(is_private)
        .map(|line| line.split_whitespace().next().unwrap())
        .map(|range| range.split_once('-').unwrap())
        .map(|(start, end)| (hex(start), hex(end)))
        .collect()
}

/// The pages of a process in these ranges that have contents.
fn populated(pid: i32, ranges: &[(u64, u64)]) -> Vec<LazyRange> {
    let mut pagemap = Pagemap::open(pid).unwrap();
    let query = Query {
        any: PRESENT | SWAPPED,
        none: PFNZERO,
        ..Query::default()
    };
    let mut found = Vec::new();
    for (start, end) in ranges {
        let add = |pages: std::ops::Range<u64>| {
            found.push(LazyRange {
                start: pages.start,
                pages: (pages.end - pages.start) / PAGE,
            });
        };
        pagemap.scan(*start..*end, query, add).unwrap();
    }
    found
}

/// Runs of pages, those side by side joined.
fn joined(runs: &[LazyRange]) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for run in runs {
        let end = run.start + run.pages * PAGE;
        match joined.last_mut() {
            Some(last) if last.1 == run.start => last.1 = end,
            _ => joined.push((run.start, end)),
        }
    }
    joined
}

#[test]
fn memory_that_is_hidden_is_not_dumped_and_can_be_listed_all_the_same() {
    let Some(criu) = criu() else { return };
    let mut child = sleeper();
    let pid = child.id() as i32;
    let veiled = |hide: bool| {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let options = DumpOptions {
            veil: true,
            ..options(pid, &directory)
        };
        let starting = dump::start(&criu, &options).unwrap();
        let ready = starting.ready(&soon()).unwrap();
        assert!(ready.can_hide(), "no user notification of seccomp here");
        let frozen = ready.freeze(&soon()).unwrap();
        let ranges = private(pid);
        if hide {
            frozen.hide(pid, ranges.clone());
        }
        let captured = frozen.capture(&soon()).unwrap();
        let before = Skeleton::read(directory.path()).unwrap();
        let found = populated(pid, &ranges);
        pagemap::add_lazy(directory.path(), pid as u32, &found).unwrap();
        let after = Skeleton::read(directory.path()).unwrap();
        captured.abandon(&soon()).unwrap();
        (before, after)
    };

    let (shown, also) = veiled(false);
    assert_eq!(also, shown, "what is listed is not listed twice");
    let (hidden, completed) = veiled(true);
    assert_eq!(hidden.lazy_pages(), 0, "{hidden:?}");
    assert_eq!(
        joined(&completed.tasks[0].lazy),
        joined(&shown.tasks[0].lazy)
    );
    assert_sleeps(pid);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// What a process did, as the kernel counts it: it changes if someone stops it.
fn switches(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
    lines.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_dump_that_is_ready_has_touched_nothing_and_dropped_it_leaves_nothing() {
    let Some(criu) = criu() else { return };
    let mut child = sleeper();
    let pid = child.id() as i32;
    assert_sleeps(pid);
    let before = switches(pid);

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut held = ready(&criu, pid, &directory);
    assert!(held.is_alive());
    let criu_pid = held.criu_pid();
    drop(held);
    assert!(!Path::new(&format!("/proc/{criu_pid}")).exists());
    drop(dump::start(&criu, &options(pid, &directory)).unwrap());
    assert_eq!((state(pid), switches(pid)), ('S', before));

    // The directory of the one that was given up serves the next.
    let frozen = freeze(&criu, pid, &directory).unwrap();
    let captured = frozen.capture(&soon()).unwrap();
    assert!(Skeleton::read(directory.path()).unwrap().lazy_pages() > 0);
    captured.abandon(&soon()).unwrap();
    assert_sleeps(pid);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_dump_that_died_while_it_was_ready_is_noticed_before_and_at_the_freeze() {
    let Some(criu) = criu() else { return };
    let mut child = sleeper();
    let pid = child.id() as i32;
    assert_sleeps(pid);

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut held = ready(&criu, pid, &directory);
    let criu_pid = Pid::from_raw(held.criu_pid()).unwrap();
    kill_process(criu_pid, Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while held.is_alive() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    let failure = held.freeze(&soon()).unwrap_err();
    assert!(failure.to_string().contains("ended"), "{failure}");
    assert_eq!(state(pid), 'S');
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_process_that_is_not_there_is_a_failure_with_a_reason() {
    let Some(criu) = criu() else { return };
    let mut child = sleeper();
    let pid = child.id() as i32;
    child.kill().unwrap();
    child.wait().unwrap();
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let failure = freeze(&criu, pid, &directory).unwrap_err();
    assert!(failure.reason().is_some(), "{failure:?}");
}
