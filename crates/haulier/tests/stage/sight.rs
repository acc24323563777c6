//! What a test sees of a target on host 1, and of what haulier has there.

use std::thread;
use std::time::Duration;

use super::{Stage, eventually};

/// Processor time that a process has used, in ticks.
fn progress(stage: &Stage, pid: i32) -> u64 {
    let path = format!("/proc/{pid}/stat");
    let stat = String::from_utf8(stage.host(1).read_file(path).unwrap()).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    // Fields 14 and 15 of proc_pid_stat(5), of which `fields` begins with the third.
    let times = fields.split(' ').skip(11).take(2);
    times.map(|time| time.parse::<u64>().unwrap()).sum()
}

#[track_caller]
pub fn goes_on(stage: &Stage, pid: i32) {
    assert!(stage.host(1).process_alive(pid), "{pid} is gone");
    let before = progress(stage, pid);
    eventually("it makes progress", || progress(stage, pid) > before + 2);
}

/// It is there, its cgroup is frozen, and it does not run.
#[track_caller]
pub fn stands_still(stage: &Stage, pid: i32) {
    assert!(stage.host(1).process_alive(pid), "{pid} is gone");
    let line = format!(
        "g=/sys/fs/cgroup$(sed -n s/^0:://p /proc/{pid}/cgroup); cat $g/cgroup.freeze; \
         grep frozen $g/cgroup.events"
    );
    let state = stage.host(1).shell(&line).unwrap().success();
    assert_eq!(state, "1\nfrozen 1\n");
    let before = progress(stage, pid);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(progress(stage, pid), before);
}

pub fn locks(stage: &Stage) -> Vec<String> {
    let tables = ["nft", "list", "tables"];
    let tables = stage.host(1).run(tables).unwrap().success();
    let ours = tables.lines().filter(|line| line.contains("haulier_"));
    ours.map(|line| line.trim_start_matches("table ").to_owned())
        .collect()
}

pub fn journals(stage: &Stage, host: usize) -> String {
    let host = stage.host(host);
    let list = "find /var/lib/haulier -name journal";
    host.shell(list).unwrap().success()
}
