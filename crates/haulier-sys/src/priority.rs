//! How the kernel schedules one thread of ours beside the others.
//!
//! All of it is best effort: without the right to it a thread stays as it was, and is only slower
//! to get its turn.

use std::cell::Cell;
use std::io;
use std::mem::{size_of, zeroed};

/// Not for what this thread starts (`SCHED_RESET_ON_FORK`, include/uapi/linux/sched.h).
const RESET_ON_FORK: libc::c_int = 0x4000_0000;

/// Some ten times the usual share.
const BRISK: i32 = -10;

/// Some tenth of the usual share.
const BACKGROUND: i32 = 10;

/// How long a thread that works in bulk would like to run at a time, in nanoseconds: the longest that
/// the kernel takes. Since Linux 6.12 who wakes up with a shorter wish, as all have by themselves, runs
/// at once in its place; before that this says nothing.
const LONG_SLICE: u64 = 100_000_000;

/// Of those that run ahead of all others, who was lent it comes behind who has it.
const LENT: libc::c_int = 1;
const URGENT: libc::c_int = 2;

thread_local! {
    /// The class that the thread has by its own wish, and its priority there.
    static OWN: Cell<(libc::c_int, libc::c_int)> = const { Cell::new((libc::SCHED_OTHER, 0)) };
    static NUMBER: libc::pid_t = rustix::thread::gettid().as_raw_nonzero().get();
}

/// A thread of this process, to be lent priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thread(libc::pid_t);

impl Thread {
    /// The calling thread. `None` if it is an [`urgent`] one, which needs nothing.
    pub fn this() -> Option<Thread> {
        let urgent = OWN.get().0 == libc::SCHED_FIFO;
        (!urgent).then(|| NUMBER.with(|number| Thread(*number)))
    }

    /// Has the thread run ahead of all but [`urgent`] ones, until it calls [`hand_back`]: for whoever is
    /// urgent and waits for something that the thread has in hand. Otherwise a thread that others
    /// keep from running would keep him waiting too.
    ///
    /// # Errors
    /// What `sched_setscheduler(2)` says.
    pub fn lend(self) -> io::Result<()> {
        schedule(self.0, libc::SCHED_FIFO, LENT)
    }
}

/// Gives the calling thread the class back that it had before it was lent another.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn hand_back() -> io::Result<()> {
    let (policy, priority) = OWN.get();
    schedule(0, policy, priority)
}

/// Has the calling thread run as soon as it can, ahead of all threads of the usual kind: for work of
/// microseconds that others stand still for. It must never compute for long.
///
/// Needs `CAP_SYS_NICE`, and a real-time share of its cgroup where the kernel has such shares.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn urgent() -> io::Result<()> {
    set(libc::SCHED_FIFO, URGENT)
}

/// Has the first thread of another process run ahead of all but [`urgent`] ones until it ends, and nothing that
/// it starts: for work that others stand still for. Its processor time is not bounded by this, but by the
/// kernel's limit for all of this kind (95 % unless somebody has set another).
///
/// Needs what [`urgent`] needs.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn hurry(process: i32) -> io::Result<()> {
    schedule(process, libc::SCHED_FIFO, LENT)
}

/// Has the calling thread let those go first that wake up beside it: for work that only counts in
/// sum. Its share of the processor stays the same.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn bulk() -> io::Result<()> {
    set(libc::SCHED_BATCH, 0)?;
    slice(libc::SCHED_BATCH, LONG_SLICE)
}

/// As [`bulk`], with a tenth of the usual share where processors are short: for work that nobody waits
/// for while others do.
///
/// # Errors
/// What `sched_setscheduler(2)` and `setpriority(2)` say.
pub fn background() -> io::Result<()> {
    set(libc::SCHED_BATCH, 0)?;
    Ok(rustix::process::setpriority_process(None, BACKGROUND)?)
}

/// Gives the calling thread a larger share than others: for work that others wait for and that has to
/// go through in sum. Needs `CAP_SYS_NICE`.
///
/// # Errors
/// What `setpriority(2)` says.
pub fn brisk() -> io::Result<()> {
    // On Linux this is of the thread, not of the process.
    Ok(rustix::process::setpriority_process(None, BRISK)?)
}

/// Takes back what the others here did for the calling thread.
///
/// # Errors
/// What `sched_setscheduler(2)` and `setpriority(2)` say.
pub fn usual() -> io::Result<()> {
    set(libc::SCHED_OTHER, 0)?;
    rustix::process::setpriority_process(None, 0)?;
    slice(libc::SCHED_OTHER, 0)
}

fn set(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    schedule(0, policy, priority)?;
    OWN.set((policy, priority));
    Ok(())
}

/// How long the calling thread, which has this policy, would like to run at a time; 0 for the usual.
fn slice(policy: libc::c_int, nanos: u64) -> io::Result<()> {
    // SAFETY: a structure of plain integers, for which all bits zero are a value.
    let mut attributes: libc::sched_attr = unsafe { zeroed() };
    attributes.size = size_of::<libc::sched_attr>() as u32;
    attributes.sched_policy = policy as u32;
    attributes.sched_flags = libc::SCHED_FLAG_RESET_ON_FORK as u64;
    // It is set along, and stays what it is.
    attributes.sched_nice = rustix::process::getpriority_process(None)?;
    attributes.sched_runtime = nanos;
    // SAFETY: the structure is live for the call and says how large it is; thread 0 is the calling one.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Thread 0 is the calling one.
fn schedule(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    // SAFETY: a structure of plain integers, for which all bits zero are a value.
    let mut parameter: libc::sched_param = unsafe { zeroed() };
    parameter.sched_priority = priority;
    // SAFETY: the parameter is live for the call, which touches no other memory of ours.
    let result = unsafe { libc::sched_setscheduler(thread, policy | RESET_ON_FORK, &parameter) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: the call takes one integer and touches no memory of ours.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn it_holds_for_the_calling_thread_alone() {
        let before = policy();
        std::thread::spawn(|| {
            bulk().unwrap();
            assert_eq!(policy() & !RESET_ON_FORK, libc::SCHED_BATCH);
            let inherited = std::thread::spawn(policy).join().unwrap();
            assert_eq!(inherited & !RESET_ON_FORK, libc::SCHED_BATCH);
            // Not where the machine refuses it.
            if urgent().is_ok() {
                assert_eq!(policy() & !RESET_ON_FORK, libc::SCHED_FIFO);
                let started = std::thread::spawn(policy).join().unwrap();
                assert_eq!(started & !RESET_ON_FORK, libc::SCHED_OTHER);
            }
            let _ = brisk();
            usual().unwrap();
            assert_eq!(policy() & !RESET_ON_FORK, libc::SCHED_OTHER);
        })
        .join()
        .unwrap();
        assert_eq!(policy(), before);
    }

    #[test]
    fn another_process_hurries_and_its_children_do_not() {
        // Reads so that it starts its child only when it has been told to hurry.
        let script = "read line; sleep 60 & echo $!; wait";
        let mut process = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // SAFETY: the call takes one integer and touches no memory of ours.
        let policy_of = |pid: i32| unsafe { libc::sched_getscheduler(pid) & !RESET_ON_FORK };
        let pid = process.id() as i32;
        // Not where the machine refuses it.
        if hurry(pid).is_ok() {
            assert_eq!(policy_of(pid), libc::SCHED_FIFO);
            use std::io::{BufRead, BufReader, Write};
            writeln!(process.stdin.take().unwrap()).unwrap();
            let mut line = String::new();
            let mut output = BufReader::new(process.stdout.take().unwrap());
            output.read_line(&mut line).unwrap();
            let child: i32 = line.trim().parse().unwrap();
            assert_eq!(policy_of(child), libc::SCHED_OTHER);
            let child = rustix::process::Pid::from_raw(child).unwrap();
            rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
        }
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// In nanoseconds.
    fn wished_slice() -> u64 {
        // SAFETY: a structure of plain integers, for which all bits zero are a value.
        let mut attributes: libc::sched_attr = unsafe { zeroed() };
        let size = size_of::<libc::sched_attr>();
        // SAFETY: the structure is live for the call and as large as is said.
        let result =
            unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
        assert_eq!(result, 0);
        attributes.sched_runtime
    }

    #[test]
    fn bulk_lets_others_in_until_it_is_usual_again() {
        std::thread::spawn(|| {
            let usually = wished_slice();
            bulk().unwrap();
            // Not on kernels before 6.12.
            assert!([LONG_SLICE, usually].contains(&wished_slice()));
            usual().unwrap();
            assert_eq!(wished_slice(), usually);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_was_lent_is_handed_back() {
        std::thread::spawn(|| {
            bulk().unwrap();
            let this = Thread::this().unwrap();
            // Not where the machine refuses it.
            if std::thread::spawn(move || this.lend())
                .join()
                .unwrap()
                .is_ok()
            {
                assert_eq!(policy() & !RESET_ON_FORK, libc::SCHED_FIFO);
                assert_eq!(Thread::this(), Some(this), "is not urgent by itself");
            }
            hand_back().unwrap();
            assert_eq!(policy() & !RESET_ON_FORK, libc::SCHED_BATCH);
            if urgent().is_ok() {
                assert_eq!(Thread::this(), None);
            }
        })
        .join()
        .unwrap();
    }
}
