//! Tasks that come, go, become others, or cannot be tracked.

use super::*;

pub(crate) fn a_forked_child_is_wholly_written(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 16);
    task.write(0, 16, 1);
    destination.written(&task);
    let child = id(task.order("fork") as i32);
    task.write(3, 1, 2);
    task.order(&format!("child write {:x} 2 9", at(8)));
    let scan = destination.round(&[task.id(), child]);
    // The fork itself counts as a write to what both share on some kernels.
    assert!(within(&scan.tasks[0].written).covers(pages(3, 1)));
    stage.expect(&within(&scan.tasks[1].written), &[(0, 16)]);
    task.order(&format!("child write {:x} 1 10", at(1)));
    task.write(5, 1, 11);
    let scan = destination.round(&[task.id(), child]);
    stage.expect(&within(&scan.tasks[0].written), &[(5, 1)]);
    stage.expect(&within(&scan.tasks[1].written), &[(1, 1)]);
    task.order(&format!("child write {:x} 1 12", at(2)));
    destination.settle(&[task.id(), child]);
}

pub(crate) fn an_exec_begins_anew(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 16);
    task.write(0, 16, 1);
    destination.written(&task);
    task.send("exec");
    task.map(0, 16);
    task.write(2, 3, 7);
    let found = destination.look(&task);
    assert_eq!(found.untracked, None);
    stage.expect(&within(&found.written), &[(2, 3)]);
    let elsewhere = found.written.pages() - 3;
    assert!(elsewhere > 2, "heap and stack of the new program");
    task.write(9, 1, 8);
    stage.expect(&destination.written(&task), &[(9, 1)]);
    task.send("exec");
    task.map(4, 4);
    task.write(4, 2, 1);
    destination.settle(&[task.id()]);
}

pub(crate) fn a_task_that_ends_is_gone(stage: &Stage) {
    let mut task = stage.task();
    let other = stage.task();
    let mut destination = stage.under_tracker();
    destination.round(&[task.id(), other.id()]);
    task.send("exit");
    task.wait_for_state("Z");
    let scan = destination.round(&[task.id(), other.id()]);
    assert_eq!(scan.gone, [task.id().task]);
    assert_eq!(scan.tasks.len(), 1);
    assert_eq!(scan.tasks[0].task, other.id().task);
    assert!(destination.round(&[other.id()]).gone.is_empty());
}

pub(crate) fn tasks_that_end_while_they_are_looked_at_are_no_error(stage: &Stage) {
    for _ in 0..20 {
        let mut tasks: Vec<Task> = (0..3).map(|_| stage.task()).collect();
        let ids: Vec<TaskId> = tasks.iter().map(Task::id).collect();
        let mut tracker = Tracker::new(stage.kind);
        for task in &mut tasks {
            task.send("exit");
        }
        // No hold: the dead cannot be stopped.
        let scan = tracker
            .scan(&ids, &mut haulier_memory::tracker::NoHold)
            .unwrap();
        assert!(scan.tasks.len() <= 3);
    }
}

pub(crate) fn a_task_with_a_userfaultfd_of_its_own_is_sent_whole(stage: &Stage) {
    let mut task = stage.task();
    task.map(0, 8);
    task.map(100, 8);
    task.write(0, 8, 1);
    task.on("uffd", 100, 8, 0);
    let mut destination = stage.under_tracker();
    for _ in 0..2 {
        let found = destination.look(&task);
        if stage.injects() {
            let reason = found.untracked.expect("it cannot be tracked");
            assert!(reason.contains("userfaultfd"), "{reason}");
            stage.expect(&within(&found.written), &[(0, 8)]);
        }
    }
    destination.settle(&[task.id()]);
}

pub(crate) fn a_task_of_another_user_is_tracked(stage: &Stage) {
    let mut task = stage.task();
    task.order("user");
    task.map(0, 8);
    task.write(0, 8, 1);
    let mut destination = stage.under_tracker();
    stage.expect(&destination.written(&task), &[(0, 8)]);
    task.on("read", 2, 1, 0);
    stage.expect(&destination.written(&task), &[(2, 1)]);
    destination.settle(&[task.id()]);
}

pub(crate) fn a_task_under_seccomp_survives_and_is_tracked(stage: &Stage) {
    let mut task = stage.task();
    task.order("seccomp");
    task.map(0, 8);
    task.write(0, 8, 1);
    let mut destination = stage.under_tracker();
    let found = destination.look(&task);
    println!("under seccomp: {:?}", found.untracked);
    stage.expect(&within(&found.written), &[(0, 8)]);
    task.write(1, 1, 1);
    if found.untracked.is_none() {
        stage.expect(&destination.written(&task), &[(1, 1)]);
    }
    // The filter holds again: the call is fatal.
    task.send(&format!("uffd {:x} 1", at(0)));
    assert_eq!(task.answer(), "");
}

pub(crate) fn a_task_that_is_traced_by_another_is_sent_whole(stage: &Stage) {
    if !stage.injects() {
        return;
    }
    let mut task = stage.task();
    task.map(0, 8);
    task.write(0, 8, 1);
    let pid = task.pid();
    // Whoever calls this has a thread of its own that traces.
    let found = haulier_sys::remote::take_userfaultfd(pid, LONG, || {
        let mut destination = stage.under_tracker();
        Ok(destination
            .tracker
            .scan(&[id(pid)], &mut haulier_memory::tracker::NoHold))
    });
    let scan = found.unwrap().beside.unwrap();
    let reason = scan.tasks[0].untracked.as_deref().expect("it is traced");
    assert!(reason.contains("debugger"), "{reason}");
    stage.expect(&within(&scan.tasks[0].written), &[(0, 8)]);
    stage.expect(&stage.under_tracker().written(&task), &[(0, 8)]);
}

pub(crate) fn nothing_of_the_tracker_is_left(stage: &Stage) {
    let mut task = stage.task();
    task.map(0, 8);
    task.write(0, 8, 1);
    let flags = |task: &Task| {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", task.pid())).unwrap();
        let header = smaps
            .lines()
            .position(|line| line.starts_with("2000000"))
            .unwrap();
        let flags = smaps
            .lines()
            .skip(header)
            .find(|line| line.starts_with("VmFlags"));
        flags.unwrap().replace(" sd", "")
    };
    let before = (task.order("descriptors"), flags(&task));
    let mut destination = stage.under_tracker();
    destination.look(&task);
    assert_eq!(task.order("descriptors"), before.0);
    destination.look(&task);
    destination.settle(&[task.id()]);
    Stopped(&[task.id()]).resume().unwrap();
    assert_eq!((task.order("descriptors"), flags(&task)), before);
}
