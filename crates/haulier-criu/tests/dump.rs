//! A real CRIU dumps a real process, which then goes on or not.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use haulier_criu::dump::{self, DumpError, DumpOptions};
use haulier_criu::skeleton::Skeleton;
use haulier_criu::{Criu, find};
use haulier_sys::namespaces::close_on_exec_from;
use haulier_sys::session::in_new_session;
use haulier_sys::wait::Wait;

fn soon() -> Wait {
    Wait::uncancellable(Duration::from_secs(30))
}

/// The CRIU to test with, or `None`, loudly, where there is none and nobody promised one.
fn criu() -> Option<Criu> {
    match Criu::find(None) {
        Ok(criu) => Some(criu),
        Err(error) if std::env::var_os("CI").is_none() => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A process that CRIU can dump: its own session, no descriptors but /dev/null.
fn sleeper() -> Child {
    // Whoever runs the tests may have left some that were opened outside of this mount namespace.
    close_on_exec_from(3).unwrap();
    in_new_session(Command::new("sleep").arg("1000"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn options(pid: i32, directory: &tempfile::TempDir) -> DumpOptions {
    DumpOptions {
        pid,
        directory: directory.path().to_owned(),
        shell_job: false,
        freeze_seconds: 10,
    }
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
    let frozen = dump::freeze(&criu, &options(pid, &directory), &soon()).unwrap();
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
    let frozen = dump::freeze(&criu, &options(pid, &directory), &soon()).unwrap();
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
    drop(dump::freeze(&criu, &options(pid, &directory), &soon()).unwrap());
    assert_sleeps(pid);

    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let frozen = dump::freeze(&criu, &options(pid, &directory), &soon()).unwrap();
    frozen.capture(&soon()).unwrap().kill_criu();
    assert_sleeps(pid);
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
    let error = dump::freeze(&criu, &options(pid, &directory), &soon()).unwrap_err();
    let DumpError::Failed(failure) = error else {
        panic!("{error}")
    };
    assert!(failure.reason().is_some(), "{failure:?}");
}
