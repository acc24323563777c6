//! The guard against zeros, with processes of its own: this program plays the guard and the agent
//! too, started again with a role.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulier_memory::lazy::guard::{self, Guard, GuardError};
use haulier_memory::lazy::{LazyMap, LazyPages, LazyTask};
use haulier_memory::page::{PAGE, PageRange, PageRun};
use haulier_memory::store::PageStore;
use haulier_sys::wait::Wait;

const ROLE: &str = "HAULIER_TEST_ROLE";
const CGROUP: &str = "HAULIER_TEST_CGROUP";
const GUARD: &str = "HAULIER_TEST_GUARD";
const PAGES: u64 = 64;
const VPID: u32 = 77;

fn soon() -> Wait {
    Wait::uncancellable(Duration::from_secs(30))
}

/// This program again, as something else.
fn role(role: &str, cgroup: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", role, "--nocapture"])
        .env(ROLE, role)
        .env(CGROUP, cgroup);
    command
}

fn plays(role: &str) -> Option<PathBuf> {
    let plays = std::env::var(ROLE).is_ok_and(|name| name == role);
    plays.then(|| std::env::var_os(CGROUP).unwrap().into())
}

/// Not a test but the guard's process.
#[test]
fn as_guard() {
    if let Some(cgroup) = plays("as_guard") {
        let code = i32::from(guard::run(&cgroup, || {}).is_err());
        std::process::exit(code);
    }
}

/// Not a test but the guard's process, where the tasks are in no cgroup of their own.
#[test]
fn as_guard_of_tasks() {
    if plays("as_guard_of_tasks").is_some() {
        std::process::exit(i32::from(guard::run_for_tasks().is_err()));
    }
}

/// Not a test but an agent, which has half of the task's memory and waits for the rest.
#[test]
fn as_agent() {
    let Some(cgroup) = plays("as_agent") else {
        return;
    };
    let mut lines = std::io::stdin().lines();
    let memory: u64 = lines.next().unwrap().unwrap().parse().unwrap();
    let dir = PathBuf::from(lines.next().unwrap().unwrap());
    let store = Arc::new(PageStore::new(1 << 30));
    let end = memory + PAGES * PAGE;
    let map = LazyMap {
        tasks: vec![LazyTask {
            vpid: VPID,
            ranges: vec![PageRange::between(memory, end)],
            vmas: vec![(memory, end)],
        }],
    };
    let guard = std::env::var(GUARD).unwrap();
    let guard = Guard::spawn(role(&guard, &cgroup), &soon()).unwrap();
    let mut daemon = LazyPages::listen(&dir)
        .unwrap()
        .guarded_by(guard)
        .start(map, store.clone())
        .unwrap();
    daemon.fill().unwrap();
    let zero = |start: u64, end: u64| {
        let range = PageRange::between(start, end);
        let runs = [PageRun { range, zero: true }];
        store.insert(VPID, 0, &runs, store.buffer(0).unwrap())
    };
    zero(memory, memory + PAGES / 2 * PAGE).unwrap();
    println!("agent ready");
    // Until the test says what comes next; or kills us.
    if lines.next().is_some_and(|line| line.unwrap() == "complete") {
        zero(memory + PAGES / 2 * PAGE, end).unwrap();
        store.seal();
        daemon
            .wait_filled(Instant::now() + Duration::from_secs(30))
            .unwrap();
        println!("agent complete");
    }
    std::process::exit(0);
}

/// A cgroup; whatever is in it is killed when dropped.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut fields = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let root = fields
            .find(|fields| fields[2] == "cgroup2")
            .map(|fields| fields[1].to_owned())
            .expect("cgroup v2 is mounted");
        let path = Path::new(&root).join(format!("haulier-guard-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a cgroup (needs root)");
        Self(path)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A task that says what it reads in a page of the second half, once told to.
struct Task {
    process: Child,
    memory: u64,
    uffd_to: std::process::ChildStdin,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Task {
    fn start(group: &Group) -> Self {
        Self::start_that(group, "")
    }

    /// One that does this between the first page and the second.
    fn start_that(group: &Group, more: &str) -> Self {
        let script = r#"
import array, ctypes, fcntl, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
size = ctypes.c_size_t(64 * 4096)
memory = libc.mmap(None, size, 3, 0x22, -1, ctypes.c_long(0))
libc.madvise(ctypes.c_void_p(memory), size, 15)
uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(uffd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0x4E, 0)))
fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("QQQQ", memory, 64 * 4096, 1, 0)))
print(memory, flush=True)
criu = socket.socket(socket.AF_UNIX)
criu.connect(sys.stdin.readline().strip())
criu.sendall(struct.pack("i", 77))
criu.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))])
os.close(uffd)
criu.sendall(struct.pack("I", 0x52535446))
print("first", ctypes.string_at(memory + 4096, 1)[0], flush=True)
exec(sys.argv[1])
print("second", ctypes.string_at(memory + 60 * 4096, 1)[0], flush=True)
sys.stdin.readline()
"#;
        let mut process = Command::new("python3")
            .args(["-c", script, more])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 for the task");
        fs::write(group.0.join("cgroup.procs"), process.id().to_string()).unwrap();
        let uffd_to = process.stdin.take().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let memory = lines.next().unwrap().unwrap().parse().unwrap();
        Self {
            process,
            memory,
            uffd_to,
            lines,
        }
    }

    fn line(&mut self) -> Option<String> {
        self.lines.next().map(Result::unwrap)
    }
}

fn agent(group: &Group, task: &mut Task, dir: &Path) -> Child {
    agent_with("as_guard", group, task, dir)
}

fn agent_with(guard: &str, group: &Group, task: &mut Task, dir: &Path) -> Child {
    let mut agent = role("as_agent", &group.0)
        .env(GUARD, guard)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input = agent.stdin.as_mut().unwrap();
    writeln!(input, "{}\n{}", task.memory, dir.display()).unwrap();
    wait_line(&mut agent, "agent ready");
    writeln!(task.uffd_to, "{}", dir.join("lazy-pages.socket").display()).unwrap();
    assert_eq!(task.line().as_deref(), Some("first 0"));
    agent
}

fn wait_line(agent: &mut Child, wanted: &str) {
    let mut byte = [0];
    let mut line = Vec::new();
    let out = agent.stdout.as_mut().unwrap();
    // Not through a buffer, which would be lost with what follows.
    while std::io::Read::read(out, &mut byte).unwrap() == 1 {
        if byte[0] == b'\n' {
            if String::from_utf8_lossy(&line).contains(wanted) {
                return;
            }
            line.clear();
        } else {
            line.push(byte[0]);
        }
    }
    panic!("the agent ended without {wanted:?}");
}

#[test]
fn a_task_dies_rather_than_see_zeros_when_the_agent_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let group = Group::new("killed");
    let mut task = Task::start(&group);
    let mut agent = agent(&group, &mut task, dir.path());
    agent.kill().unwrap();
    agent.wait().unwrap();
    // Not "second 0".
    assert_eq!(task.line(), None);
    let status = task.process.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
}

#[test]
fn a_task_lives_on_when_everything_was_placed() {
    let dir = tempfile::tempdir().unwrap();
    let group = Group::new("complete");
    let mut task = Task::start(&group);
    let mut agent = agent(&group, &mut task, dir.path());
    writeln!(agent.stdin.as_mut().unwrap(), "complete").unwrap();
    wait_line(&mut agent, "agent complete");
    assert_eq!(task.line().as_deref(), Some("second 0"));
    assert!(agent.wait().unwrap().success());
    writeln!(task.uffd_to).unwrap();
    let status = task.process.wait().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn a_guard_without_a_cgroup_is_refused() {
    let error = Guard::spawn(role("as_guard", Path::new("/nowhere")), &soon()).unwrap_err();
    let GuardError::NotReady(source) = error else {
        panic!("{error}")
    };
    assert_eq!(source.raw_os_error(), Some(2));
}

#[test]
fn a_guard_that_is_given_up_kills_and_one_that_is_complete_does_not() {
    for complete in [false, true] {
        let group = Group::new(if complete { "done" } else { "given-up" });
        let mut task = Command::new("sleep").arg("100").spawn().unwrap();
        fs::write(group.0.join("cgroup.procs"), task.id().to_string()).unwrap();
        let guard = Guard::spawn(role("as_guard", &group.0), &soon()).unwrap();
        if complete {
            guard.complete();
        }
        // Waits for the guard, and the guard for the tasks.
        drop(guard);
        let status = task.try_wait().unwrap();
        assert_eq!(status.is_some(), !complete, "{status:?}");
        let _ = task.kill();
        task.wait().unwrap();
    }
}

#[test]
fn a_task_that_has_left_its_family_dies_rather_than_see_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let group = Group::new("orphan");
    // A child that is nobody's goes on to the second page; the task itself waits for it in vain.
    let leave = "
if os.fork() == 0:
    if os.fork() != 0:
        os._exit(0)
    print('orphan', os.getpid(), flush=True)
else:
    os.wait()
";
    let mut other = Task::start(&group);
    let mut task = Task::start_that(&group, leave);
    let mut agent = agent_with("as_guard_of_tasks", &group, &mut task, dir.path());
    let said = task.line().unwrap();
    let orphan = said.strip_prefix("orphan ").unwrap().to_owned();
    let stands = || {
        let at = fs::read_to_string(format!("/proc/{orphan}/wchan"));
        at.is_ok_and(|at| at.contains("userfault"))
    };
    until("the orphan waits for a page", stands);
    agent.kill().unwrap();
    agent.wait().unwrap();
    let status = task.process.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    // Not "second 0".
    assert_eq!(task.line(), None);
    let gone = || {
        let status = fs::read_to_string(format!("/proc/{orphan}/status"));
        status.is_ok_and(|status| status.contains("State:\tZ"))
            || !Path::new(&format!("/proc/{orphan}")).exists()
    };
    until("the orphan is killed too", gone);
    until("the guard ends", || guards(&group) == 0);
    // Another's memory is not meant, though it is registered too.
    assert!(other.process.try_wait().unwrap().is_none());
    other.process.kill().unwrap();
    other.process.wait().unwrap();
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes that guard the tasks of a group.
fn guards(group: &Group) -> usize {
    let role = format!("{ROLE}=as_guard_of_tasks");
    let cgroup = format!("{CGROUP}={}", group.0.display());
    let is_one = |environment: &[u8]| {
        let has = |wanted: &str| {
            environment
                .split(|b| *b == 0)
                .any(|v| v == wanted.as_bytes())
        };
        has(&role) && has(&cgroup)
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| fs::read(entry.path().join("environ")).ok())
        .filter(|environment| is_one(environment))
        .count()
}
