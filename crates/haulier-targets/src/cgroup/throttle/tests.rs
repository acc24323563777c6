use std::cell::RefCell;

use haulier_sys::wait::Wait;

use super::super::CgroupFs;
use super::*;

/// A directory that looks like a cgroup with the cpu controller in it: this kernel may have the
/// controller in version 1 only.
struct Pretended {
    parent: tempfile::TempDir,
    group: Cgroup,
}

impl Pretended {
    fn new() -> Pretended {
        let parent = tempfile::tempdir().unwrap();
        let group = Cgroup {
            path: parent.path().join("group"),
        };
        fs::create_dir(group.path()).unwrap();
        fs::write(
            group.path().join("cpu.stat"),
            "usage_usec 1000\nuser_usec 1",
        )
        .unwrap();
        fs::write(group.path().join("cgroup.procs"), "").unwrap();
        fs::write(parent.path().join("cgroup.controllers"), "").unwrap();
        Pretended { parent, group }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.group.path().join(file)).unwrap()
    }
}

#[test]
fn a_quota_is_a_part_of_a_period_and_never_below_what_the_kernel_takes() {
    let table = [
        (2.0, 40_000, 20_000),
        (0.5, 10_000, 20_000),
        (0.05, 1000, 20_000),
        (0.01, 1000, 100_000),
        (0.0001, 1000, 1_000_000),
        (0.0, 1000, 1_000_000),
    ];
    for (cpus, quota, period) in table {
        assert_eq!(quota_of(cpus), Quota { quota, period }, "{cpus}");
    }
}

#[test]
fn shares_add_up() {
    let second = Duration::from_secs(1);
    assert_eq!(shares(&[second * 3, second]), [0.75, 0.25]);
    assert_eq!(shares(&[Duration::ZERO; 2]), [0.5, 0.5]);
    assert!(shares(&[]).is_empty());
}

#[test]
fn a_group_with_the_controller_is_limited_by_its_own_file() {
    let pretended = Pretended::new();
    fs::write(pretended.group.path().join("cpu.max"), "max 100000").unwrap();
    let mut throttle = Throttle::prepare(std::slice::from_ref(&pretended.group), "x").unwrap();
    let mut recorded = Vec::new();
    let mut record = |path: &Path| {
        recorded.push(path.to_owned());
        Ok(())
    };
    throttle.set(20, &mut record).unwrap();
    assert_eq!(throttle.means(), Some(Means::CpuMax));
    // It used nothing: 80 % of the least use there is.
    assert_eq!(pretended.read("cpu.max"), "1000 125000");
    throttle.set(0, &mut record).unwrap();
    assert_eq!(pretended.read("cpu.max"), "max");
    throttle.set(99, &mut record).unwrap();
    assert_eq!(throttle.percent(), 99);
    throttle.lift().unwrap();
    assert_eq!(throttle.percent(), 0);
    assert_eq!(pretended.read("cpu.max"), "max");
    assert_eq!(recorded, [pretended.group.path().join("cpu.max")]);
}

#[test]
fn a_controller_that_was_enabled_in_vain_is_disabled_again() {
    let pretended = Pretended::new();
    let control = pretended.parent.path().join("cgroup.subtree_control");
    fs::write(
        pretended.parent.path().join("cgroup.controllers"),
        "memory cpu\n",
    )
    .unwrap();
    let recorded = RefCell::new(Vec::new());
    let mut record = |path: &Path| {
        recorded.borrow_mut().push(path.to_owned());
        Ok(())
    };
    // No cpu.max appears: this is no kernel.
    let taken = take_cpu_max(std::slice::from_ref(&pretended.group), &mut record).unwrap();
    assert_eq!(taken, None);
    assert_eq!(fs::read_to_string(&control).unwrap(), "-cpu");
    assert_eq!(*recorded.borrow(), [control]);
}

#[test]
fn what_cannot_be_recorded_is_not_made() {
    let pretended = Pretended::new();
    fs::write(pretended.group.path().join("cpu.max"), "untouched").unwrap();
    let mut throttle = Throttle::prepare(std::slice::from_ref(&pretended.group), "x").unwrap();
    let mut record = |_: &Path| Err(io::Error::other("the disk is full"));
    let error = throttle.set(50, &mut record).unwrap_err();
    assert!(
        matches!(
            error,
            CgroupError::Io {
                doing: "record",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(throttle.means(), None);
    drop(throttle);
    assert_eq!(pretended.read("cpu.max"), "untouched");
}

#[test]
fn a_duty_cycle_freezes_and_thaws_and_ends_thawed() {
    let cgroups = CgroupFs::find().unwrap();
    let own = cgroups.of(std::process::id() as i32).unwrap();
    let group = own
        .create_child(&format!("haulier-duty-{}", std::process::id()))
        .unwrap();
    let mut child = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    group.add(child.id() as i32).unwrap();

    let cycle = DutyCycle::start(std::slice::from_ref(&group)).unwrap();
    cycle.set(50);
    let wait = Wait::uncancellable(Duration::from_secs(20));
    for line in ["frozen 1", "frozen 0", "frozen 1"] {
        group.until(line, "frozen, thawed, frozen", &wait).unwrap();
    }
    cycle.stop().unwrap();
    group.until("frozen 0", "thawed", &wait).unwrap();
    assert_eq!(
        fs::read_to_string(group.path().join("cgroup.freeze"))
            .unwrap()
            .trim(),
        "0"
    );

    group.kill(&wait).unwrap();
    child.wait().unwrap();
    group.remove().unwrap();
}
