//! Taking CPU time from a busy process, on the cgroups that this machine has. Needs root.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use haulier_sys::wait::Wait;
use haulier_targets::cgroup::{Cgroup, CgroupFs, Means, Throttle};

/// Three busy threads, and a child that is forked when a line comes; it tells its number.
const BUSY: &str = "
import os, sys, threading
def work():
    while True:
        sum(range(1000))
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
print('ready', flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        work()
    print(pid, flush=True)
";

/// A busy process in a cgroup of version 2 of its own.
struct Busy {
    group: Cgroup,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    name: String,
}

impl Busy {
    fn start(name: &str) -> Busy {
        let name = format!("haulier-test-{name}-{}", std::process::id());
        let cgroups = CgroupFs::find().unwrap();
        let own = cgroups.of(std::process::id() as i32).unwrap();
        let group = own.create_child(&name).unwrap();
        let mut child = Command::new("python3")
            .args(["-c", BUSY])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        group.add(child.id() as i32).unwrap();
        let to = child.stdin.take().unwrap();
        let from = BufReader::new(child.stdout.take().unwrap());
        let mut busy = Busy {
            group,
            child,
            to,
            from,
            name,
        };
        assert_eq!(busy.line(), "ready");
        busy
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn fork(&mut self) -> i32 {
        self.to.write_all(b"\n").unwrap();
        self.line().parse().unwrap()
    }

    /// Every thread of every process, with the cgroups it is in.
    fn places(&self) -> Vec<(i32, String)> {
        let mut places = Vec::new();
        for pid in self.group.pids().unwrap() {
            for entry in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
                let thread = entry
                    .unwrap()
                    .file_name()
                    .to_str()
                    .unwrap()
                    .parse()
                    .unwrap();
                places.push((thread, cgroups_of(thread)));
            }
        }
        places.sort();
        places
    }

    fn throttle(&self) -> Throttle {
        Throttle::prepare(std::slice::from_ref(&self.group), &self.name).unwrap()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self
            .group
            .kill(&Wait::uncancellable(Duration::from_secs(10)));
        let _ = self.child.wait();
        let _ = self.group.remove();
    }
}

fn cgroups_of(thread: i32) -> String {
    fs::read_to_string(format!("/proc/{thread}/cgroup")).unwrap()
}

fn recorder(paths: &mut Vec<PathBuf>) -> impl FnMut(&Path) -> io::Result<()> + '_ {
    |path| {
        // Before it is made.
        assert!(path.is_file() || !path.exists(), "{}", path.display());
        paths.push(path.to_owned());
        Ok(())
    }
}

/// CPUs that a limit allows, and the directory it is in.
fn allowed(means: Option<Means>, recorded: &Path) -> (f64, PathBuf) {
    let number = |text: &str| text.trim().parse::<f64>().unwrap();
    match means {
        Some(Means::CpuMax) => {
            let folder = recorded.parent().unwrap().to_owned();
            let text = fs::read_to_string(folder.join("cpu.max")).unwrap();
            let (quota, period) = text.trim().split_once(' ').unwrap();
            (number(quota) / number(period), folder)
        }
        Some(Means::Quota) => {
            let read = |file| number(&fs::read_to_string(recorded.join(file)).unwrap());
            let cpus = read("cpu.cfs_quota_us") / read("cpu.cfs_period_us");
            (cpus, recorded.to_owned())
        }
        other => panic!("no CPU bandwidth on this machine: {other:?}"),
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn was_throttled(folder: &Path) -> bool {
    let text = fs::read_to_string(folder.join("cpu.stat")).unwrap();
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("nr_throttled "));
    count.is_some_and(|count| count.parse::<u64>().unwrap() > 0)
}

#[test]
fn every_thread_and_every_new_child_is_limited_and_put_back_where_it_was() {
    let mut busy = Busy::start("whole");
    let before = busy.places();
    assert_eq!(before.len(), 4);
    let mut recorded = Vec::new();
    let mut throttle = busy.throttle();
    throttle.set(60, &mut recorder(&mut recorded)).unwrap();

    assert!(!recorded.is_empty());
    let (less, folder) = allowed(throttle.means(), recorded.last().unwrap());
    // One interpreter uses one CPU at most.
    assert!(less > 0.0 && less <= 0.45, "{less}");
    let child = busy.fork();
    assert!(cgroups_of(child).contains(&busy.name));
    let held = fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    for pid in busy.group.pids().unwrap() {
        assert!(
            held.lines().any(|line| line == pid.to_string()),
            "{pid}: {held}"
        );
    }
    for (thread, at) in busy.places() {
        assert!(at.contains(&busy.name), "{thread}: {at}");
    }
    until("it is throttled", || was_throttled(&folder));

    // A step further, and back: from the use when left alone, not from the throttled one.
    throttle.set(80, &mut recorder(&mut Vec::new())).unwrap();
    let (least, _) = allowed(throttle.means(), recorded.last().unwrap());
    assert!((least - less / 2.0).abs() < less * 0.02, "{least} {less}");

    throttle.lift().unwrap();
    assert_eq!(throttle.percent(), 0);
    let mut expected = before.clone();
    expected.push((child, cgroups_of(busy.child.id() as i32)));
    expected.sort();
    assert_eq!(busy.places(), expected);
    assert!(throttle.means() != Some(Means::Quota) || !folder.exists());
}

#[test]
fn threads_in_different_groups_go_back_to_different_groups() {
    let hierarchy = Path::new("/sys/fs/cgroup/cpu");
    if !hierarchy.join("tasks").exists() {
        // Only version 1 has threads of one process in different groups.
        return;
    }
    let busy = Busy::start("apart");
    let elsewhere = hierarchy.join(format!("{}-elsewhere", busy.name));
    fs::create_dir(&elsewhere).unwrap();
    let lonely = busy.places().last().unwrap().0;
    fs::write(elsewhere.join("tasks"), lonely.to_string()).unwrap();
    let before = busy.places();

    let mut recorded = Vec::new();
    let mut throttle = busy.throttle();
    throttle.set(50, &mut recorder(&mut recorded)).unwrap();
    assert_eq!(recorded.len(), 2);
    assert!(recorded.contains(&elsewhere.join(&busy.name)));
    drop(throttle);
    assert_eq!(busy.places(), before);
    assert!(recorded.iter().all(|path| !path.exists()));
    drop(busy);
    until("its group is empty", || fs::remove_dir(&elsewhere).is_ok());
}

#[test]
fn what_was_recorded_is_undone_after_a_kill_and_again_in_vain() {
    let busy = Busy::start("killed");
    let before = busy.places();
    let mut recorded = Vec::new();
    let mut throttle = busy.throttle();
    throttle.set(90, &mut recorder(&mut recorded)).unwrap();
    std::mem::forget(throttle);
    assert!(!recorded.is_empty());
    for _ in 0..2 {
        for path in recorded.iter().rev() {
            Throttle::undo(path).unwrap();
        }
        assert_eq!(busy.places(), before);
    }
}

#[test]
fn a_target_that_ended_meanwhile_is_no_error() {
    let busy = Busy::start("ended");
    let mut recorded = Vec::new();
    let mut throttle = busy.throttle();
    throttle.set(50, &mut recorder(&mut recorded)).unwrap();
    busy.group
        .kill(&Wait::uncancellable(Duration::from_secs(10)))
        .unwrap();
    throttle.set(60, &mut recorder(&mut recorded)).unwrap();
    throttle.lift().unwrap();
    let made = |path: &PathBuf| path.is_dir();
    assert!(!recorded.iter().any(made), "{recorded:?}");
}

#[test]
fn a_target_that_forks_all_the_time_is_caught_whole() {
    let mut busy = Busy::start("forks");
    let mut throttle = busy.throttle();
    let mut recorded = Vec::new();
    for percent in [20, 30, 40, 50] {
        for _ in 0..5 {
            busy.fork();
        }
        throttle.set(percent, &mut recorder(&mut recorded)).unwrap();
        for (thread, at) in busy.places() {
            assert!(at.contains(&busy.name), "{thread}: {at}");
        }
    }
    throttle.lift().unwrap();
    assert!(!recorded.iter().any(|path| path.is_dir()));
}
