//! A task does not notice that it was made to call.

use super::*;

/// Ends by itself; how.
const TIMED: [(&str, &str); 10] = [
    ("nanosleep", "0 0 0"),
    ("clock_nanosleep", "0 0 0"),
    ("futex", "-1 110 0"),
    ("poll", "0 0 0"),
    ("ppoll", "0 0 0"),
    ("select", "0 0 0"),
    ("wait", "1 0 0"),
    ("semtimedop", "-1 11 0"),
    ("receive", "-1 11 0"),
    ("epoll", "0 0 0"),
];
/// Ends by a byte on stdin.
const READING: [(&str, &str); 3] = [
    ("read", "1 0 0"),
    ("poll_read", "1 0 0"),
    ("epoll_read", "1 0 0"),
];
/// Ends by SIGUSR1, which has a handler.
const SIGNALLED: [(&str, &str); 5] = [
    ("epoll_signal", "-1 4 1"),
    ("read_signal", "-1 4 1"),
    ("pause_signal", "-1 4 1"),
    ("suspend_signal", "-1 4 1"),
    ("take_signal", "10 0 0"),
];

fn blocked(stage: &Stage, kind: &str) -> Task {
    let task = stage.start(&["block", kind]);
    // It sleeps for other reasons too while it starts.
    let deadline = Instant::now() + LONG;
    let waits = || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", task.pid()));
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", task.pid()));
        comm.is_ok_and(|comm| comm == "tracked\n")
            && call.is_ok_and(|call| !call.starts_with("running"))
    };
    let mut seen = 0;
    while seen < 5 {
        seen = if waits() { seen + 1 } else { 0 };
        assert!(Instant::now() < deadline, "{kind} does not block");
        std::thread::sleep(Duration::from_millis(2));
    }
    task
}

fn inject(task: &Task, times: usize) {
    for _ in 0..times {
        let taken = haulier_sys::remote::take_userfaultfd(task.pid(), LONG, || Ok(()));
        taken.unwrap();
    }
}

pub(crate) fn blocking_calls_go_on(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    for times in [1, 4] {
        let start = |list: &[(&'static str, &'static str)]| -> Vec<_> {
            list.iter()
                .map(|&(kind, end)| (kind, end, blocked(stage, kind)))
                .collect()
        };
        // Not all at once: those that end by themselves have to be caught before that.
        for (kind, end) in TIMED {
            let mut task = blocked(stage, kind);
            inject(&task, times);
            assert_eq!(task.answer(), end, "{kind}, interrupted {times} times");
        }
        for (kind, end, mut task) in start(&READING) {
            inject(&task, times);
            task.send("x");
            assert_eq!(task.answer(), end, "{kind}, interrupted {times} times");
        }
        for (kind, end, mut task) in start(&SIGNALLED) {
            inject(&task, times);
            task.signal(Signal::USR1);
            assert_eq!(task.answer(), end, "{kind}, interrupted {times} times");
        }
    }
}

pub(crate) fn signals_that_come_meanwhile_are_delivered(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    // The signal comes somewhere before, within or after the injection.
    for (kind, end) in SIGNALLED.iter().cycle().take(60) {
        let mut task = blocked(stage, kind);
        let pid = task.pid();
        let tracer = std::thread::spawn(move || {
            haulier_sys::remote::take_userfaultfd(pid, LONG, || Ok(())).map(drop)
        });
        std::thread::sleep(Duration::from_micros(u64::from(task.process.id()) % 97));
        task.signal(Signal::USR1);
        assert_eq!(task.answer(), *end, "{kind}");
        // It may have ended before.
        let _ = tracer.join().unwrap();
    }
}

pub(crate) fn a_timer_of_a_thousand_signals_a_second_goes_on(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    let mut task = stage.task();
    task.map(0, 64);
    task.write(0, 64, 1);
    task.order("timer");
    let mut stops = Vec::new();
    for round in 0..300 {
        let taken = haulier_sys::remote::take_userfaultfd(task.pid(), LONG, || Ok(())).unwrap();
        stops.push(taken.stopped);
        if round % 50 == 0 {
            let before = task.order("handled");
            let deadline = Instant::now() + LONG;
            while task.order("handled") <= before {
                assert!(Instant::now() < deadline, "the timer stands still");
            }
        }
    }
    stops.sort();
    let (middle, worst) = (stops[stops.len() / 2], stops[stops.len() - 1]);
    println!("stopped by an injection, with a timer: median {middle:?}, longest {worst:?}");
}

pub(crate) fn running_threads_are_not_disturbed(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    let mut task = stage.task();
    task.map(0, 256);
    task.on("threads", 0, 256, 2);
    let mut stops: Vec<Duration> = (0..200)
        .map(|_| {
            let taken = haulier_sys::remote::take_userfaultfd(task.pid(), LONG, || Ok(()));
            taken.unwrap().stopped
        })
        .collect();
    stops.sort();
    let (middle, worst) = (stops[stops.len() / 2], stops[stops.len() - 1]);
    println!("stopped by an injection: median {middle:?}, longest {worst:?}");
    task.on("touch", 0, 1, 0);
}

/// Descriptors of a process that are userfaultfds.
pub(crate) fn userfaultfds(pid: i32) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    links
        .filter(|link| link.to_string_lossy().contains("userfaultfd"))
        .count()
}

pub(crate) fn nothing_is_left_however_short_the_time(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    let mut task = stage.task();
    task.map(0, 256);
    task.on("threads", 0, 256, 2);
    let mut ended = [0; 3];
    for round in 0..600 {
        let patience = Duration::from_micros(round % 200);
        let taken = haulier_sys::remote::take_userfaultfd(task.pid(), patience, || Ok(()));
        match taken {
            Ok(_) => ended[0] += 1,
            Err(haulier_sys::remote::RemoteError::Busy) => ended[1] += 1,
            Err(error) => panic!("{error:?}"),
        }
        if userfaultfds(task.pid()) > 0 {
            ended[2] += 1;
        }
    }
    println!("taken, not taken, and left: {ended:?}");
    assert_eq!(ended[2], 0, "{ended:?}");
    task.on("touch", 0, 1, 0);
}

pub(crate) fn a_stopped_task_stays_stopped(stage: &Stage) {
    let mut task = stage.task();
    task.map(0, 8);
    task.write(0, 8, 1);
    task.signal(Signal::STOP);
    task.wait_for_state("T");
    let mut tracker = Tracker::new(stage.kind);
    let scan = tracker
        .scan(&[task.id()], &mut haulier_memory::tracker::NoHold)
        .unwrap();
    stage.expect(&within(&scan.tasks[0].written), &[(0, 8)]);
    task.wait_for_state("T");
    task.send(&format!("write {:x} 1 2", at(3)));
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(1));
        task.wait_for_state("T");
    }
    task.signal(Signal::CONT);
    assert_eq!(task.answer(), "ok 0");
    let scan = tracker
        .scan(&[task.id()], &mut Stopped(&[task.id()]))
        .unwrap();
    stage.expect(&within(&scan.tasks[0].written), &[(3, 1)]);
}

/// The cgroup of a task, frozen; removed when dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn freeze(pid: i32) -> Option<Frozen> {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|root| {
                root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists()
            })?;
        let group = Frozen(root.join(format!("tracked-{pid}")));
        std::fs::create_dir(&group.0).unwrap();
        std::fs::write(group.0.join("cgroup.procs"), pid.to_string()).unwrap();
        std::fs::write(group.0.join("cgroup.freeze"), "1").unwrap();
        let deadline = Instant::now() + LONG;
        let events = || std::fs::read_to_string(group.0.join("cgroup.events")).unwrap();
        while !events().contains("frozen 1") {
            assert!(Instant::now() < deadline, "the task does not freeze");
        }
        Some(group)
    }

    fn thaw(&self) {
        std::fs::write(self.0.join("cgroup.freeze"), "0").unwrap();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let deadline = Instant::now() + LONG;
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) fn a_frozen_task_is_not_harmed(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    let mut task = stage.task();
    task.map(0, 8);
    task.write(0, 8, 1);
    let Some(group) = Frozen::freeze(task.pid()) else {
        assert!(std::env::var_os("CI").is_none(), "no cgroup v2");
        return;
    };
    let patience = Duration::from_millis(300);
    let taken = haulier_sys::remote::take_userfaultfd(task.pid(), patience, || Ok(()));
    println!(
        "of a frozen task: {:?}",
        taken.as_ref().map(|taken| taken.stopped)
    );
    let mut scan = Tracker::new(stage.kind)
        .scan(&[task.id()], &mut haulier_memory::tracker::NoHold)
        .unwrap();
    let found = scan.tasks.remove(0);
    println!("a frozen task: {:?}", found.untracked);
    stage.expect(&within(&found.written), &[(0, 8)]);
    group.thaw();
    // It goes on where it was, and can be tracked.
    task.write(3, 1, 1);
    let mut destination = stage.under_tracker();
    stage.expect(&destination.written(&task), &[(0, 8)]);
    destination.settle(&[task.id()]);
    drop(task);
}
