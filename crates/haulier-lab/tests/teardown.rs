//! Nothing of a lab is left, however its owner ends.

use haulier_lab::{Error, Lab, LabConfig, Signal, running_labs};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set for the child processes that these tests start: the name of the lab to own.
const OWNER: &str = "HAULIER_LAB_TEST_OWNER";

fn unique(what: &str) -> String {
    format!("{what}-{}", std::process::id())
}

/// Every trace of a lab on the machine.
fn traces(lab: &str) -> Vec<String> {
    let mut found = Vec::new();
    let folder = Path::new("/run/haulier-lab").join(lab);
    if folder.exists() {
        found.push(folder.display().to_string());
    }
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let cgroup = Path::new(root).join(format!("haulier-lab-{lab}"));
        if cgroup.exists() {
            found.push(cgroup.display().to_string());
        }
    }
    let me = std::process::id().to_string();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        // PID 1s and the supervisor name the lab, and the tests' sleepers do.
        if cmdline.contains(lab) && entry.file_name().to_string_lossy() != me {
            found.push(cmdline);
        }
    }
    found
}

fn wait_until_gone(lab: &str) {
    let until = Instant::now() + Duration::from_secs(30);
    while !traces(lab).is_empty() {
        assert!(Instant::now() < until, "left: {:#?}", traces(lab));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Something on every host that does not go quietly.
fn populate(lab: &Lab) {
    for host in lab.hosts() {
        let stubborn = "trap '' TERM INT HUP; while :; do sleep 1; done";
        host.command("sh")
            .args(["-c", stubborn, lab.name()])
            .setsid()
            .cgroup("deep/er")
            .spawn()
            .unwrap();
        host.command("sleep")
            .arg("1000")
            .cgroup("frozen")
            .spawn()
            .unwrap();
        host.write_file("/sys/fs/cgroup/frozen/cgroup.freeze", "1")
            .unwrap();
    }
}

#[test]
fn a_dropped_lab_is_gone() {
    let lab = Lab::start(LabConfig::hosts(2)).unwrap();
    let name = lab.name().to_owned();
    populate(&lab);
    assert!(!traces(&name).is_empty());
    drop(lab);
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn a_panic_takes_the_lab_down() {
    let name = unique("panic");
    let owner = name.clone();
    let panicked = std::thread::spawn(move || {
        let lab = Lab::start(LabConfig::hosts(1).name(&owner)).unwrap();
        populate(&lab);
        panic!("as a failing test does");
    });
    assert!(panicked.join().is_err());
    assert_eq!(traces(&name), Vec::<String>::new());
}

/// No test of its own: the owner that the tests below end.
#[test]
fn owner() {
    let Ok(name) = std::env::var(OWNER) else {
        return;
    };
    let lab = Lab::start(LabConfig::hosts(2).name(&name)).unwrap();
    populate(&lab);
    println!("\nowner is up");
    std::thread::sleep(Duration::from_secs(600));
    drop(lab);
}

fn end_the_owner(name: &str, signal: &str) {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner", "--nocapture"])
        .env(OWNER, name)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(
        lines
            .map_while(Result::ok)
            .any(|line| line == "owner is up")
    );
    assert!(traces(name).len() > 4);
    let pid = owner.id().to_string();
    assert!(
        Command::new("kill")
            .args([signal, &pid])
            .status()
            .unwrap()
            .success()
    );
    owner.wait().unwrap();
    wait_until_gone(name);
}

#[test]
fn a_killed_owner_leaves_nothing() {
    end_the_owner(&unique("killed"), "-KILL");
}

#[test]
fn an_aborted_owner_leaves_nothing() {
    end_the_owner(&unique("aborted"), "-ABRT");
}

#[test]
fn an_interrupted_owner_leaves_nothing() {
    end_the_owner(&unique("interrupted"), "-INT");
}

#[test]
fn a_detached_lab_stays_until_it_is_stopped() {
    let name = unique("detached");
    drop(Lab::start_detached(LabConfig::hosts(1).name(&name)).unwrap());
    assert!(running_labs().unwrap().contains(&name));
    let again = Lab::start(LabConfig::hosts(1).name(&name))
        .unwrap_err()
        .to_string();
    assert!(again.contains("running already"), "{again}");
    let lab = Lab::attach(&name).unwrap();
    populate(&lab);
    lab.stop().unwrap();
    assert_eq!(traces(&name), Vec::<String>::new());
    assert!(matches!(Lab::attach(&name), Err(Error::NotRunning { .. })));
}

/// When the supervisor itself is killed the PID 1s go with it, and the next lab clears up.
#[test]
fn a_killed_supervisor_is_cleared_up_after() {
    let name = unique("orphaned");
    drop(Lab::start_detached(LabConfig::hosts(2).name(&name)).unwrap());
    let lab = Lab::attach(&name).unwrap();
    populate(&lab);
    let state = fs::read_to_string(format!("/run/haulier-lab/{name}/lab.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    let supervisor = state["supervisor"].to_string();
    assert!(
        Command::new("kill")
            .args(["-KILL", &supervisor])
            .status()
            .unwrap()
            .success()
    );
    // The hosts die with it; the folder and the cgroups wait for whoever comes next.
    for host in lab.hosts() {
        let until = Instant::now() + Duration::from_secs(20);
        while host.pids().is_ok() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(matches!(host.run(["true"]), Err(Error::HostDown { .. })));
    }
    drop(Lab::start(LabConfig::hosts(1)).unwrap());
    wait_until_gone(&name);
}

#[test]
fn a_host_without_power_takes_nothing_else_along() {
    let lab = Lab::start(LabConfig::hosts(2)).unwrap();
    populate(&lab);
    lab.host(1).power_off().unwrap();
    assert!(matches!(
        lab.host(1).run(["true"]),
        Err(Error::HostDown { .. })
    ));
    lab.host(2).run(["true"]).unwrap().success();
    lab.host(2).kill_all_named("sleep", Signal::KILL).unwrap();
}
