//! A real CRIU gets ready for a restore, whose images then come or do not.

mod machine;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use haulier_criu::Criu;
use haulier_criu::restore::{self, RestoreError, RestoreOptions, Waiting};
use haulier_sys::wait::Cancel;
use machine::{criu, soon};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

fn options(directory: &TempDir) -> RestoreOptions {
    RestoreOptions {
        directory: directory.path().to_owned(),
        shell_job: false,
    }
}

fn waiting(criu: &Criu, directory: &TempDir) -> Waiting {
    let options = options(directory);
    let starting = restore::start(criu, &options).unwrap();
    starting.wait_for_images(&options, &soon()).unwrap()
}

fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory.path()).unwrap();
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    entries.map(|entry| name(entry.unwrap())).collect()
}

fn is_there(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn a_restore_whose_images_never_come_ends_and_leaves_nothing() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut held = waiting(&criu, &directory);
    assert!(held.is_alive());
    assert_eq!(names(&directory), [restore::LOG]);
    let pid = held.criu_pid();
    drop(held);
    assert!(!is_there(pid));
    assert_eq!(names(&directory), [restore::LOG]);
}

#[test]
fn a_restore_that_died_while_it_waited_is_noticed() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut held = waiting(&criu, &directory);
    kill_process(Pid::from_raw(held.criu_pid()).unwrap(), Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while held.is_alive() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    fs::write(directory.path().join("inventory.img"), "anything").unwrap();
    let error = held.restore(&soon()).unwrap_err();
    let RestoreError::Failed(failure) = error else {
        panic!("{error}")
    };
    assert!(failure.to_string().contains("ended"), "{failure}");
}

#[test]
fn an_inventory_that_is_none_is_a_failure_of_criu_s_and_a_missing_one_of_ours() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let held = waiting(&criu, &directory);
    let pid = held.criu_pid();
    let error = held.restore(&soon()).unwrap_err();
    assert!(matches!(error, RestoreError::Inventory { .. }), "{error}");
    assert!(!is_there(pid));

    let held = waiting(&criu, &directory);
    // More than fits into a pipe at once, so that it is seen to be poured as CRIU reads.
    let long = vec![0x5a; 1 << 20];
    fs::write(directory.path().join("inventory.img"), long).unwrap();
    let error = held.restore(&soon()).unwrap_err();
    let RestoreError::Failed(failure) = error else {
        panic!("{error}")
    };
    assert!(failure.reason().is_some(), "{failure:?}");
}

#[test]
fn getting_ready_for_a_restore_can_be_cancelled() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let options = options(&directory);
    let starting = restore::start(&criu, &options).unwrap();
    let pid = starting.criu_pid();
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    let wait = cancel.wait(Duration::from_secs(30));
    let error = starting.wait_for_images(&options, &wait).unwrap_err();
    let RestoreError::Failed(failure) = error else {
        panic!("{error}")
    };
    assert!(failure.is_cancelled(), "{failure}");
    assert!(!is_there(pid));
    assert!(!names(&directory).contains(&"inventory.img".to_owned()));
}
