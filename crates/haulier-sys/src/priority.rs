//! How the kernel schedules one thread of ours beside the others.
//!
//! All of it is best effort: without the right to it a thread stays as it was, and is only slower
//! to get its turn.

use std::io;
use std::mem::zeroed;

/// Not for what this thread starts (`SCHED_RESET_ON_FORK`, include/uapi/linux/sched.h).
const RESET_ON_FORK: libc::c_int = 0x4000_0000;

/// Some ten times the usual share.
const BRISK: i32 = -10;

/// Some tenth of the usual share.
const BACKGROUND: i32 = 10;

/// Has the calling thread run as soon as it can, ahead of all threads of the usual kind: for work of
/// microseconds that others stand still for. It must never compute for long.
///
/// Needs `CAP_SYS_NICE`, and a real-time share of its cgroup where the kernel has such shares.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn urgent() -> io::Result<()> {
    set(libc::SCHED_FIFO, 1)
}

/// Has the calling thread let those go first that wake up beside it: for work that only counts in
/// sum. Its share of the processor stays the same.
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn bulk() -> io::Result<()> {
    set(libc::SCHED_BATCH, 0)
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
    Ok(rustix::process::setpriority_process(None, 0)?)
}

fn set(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    // SAFETY: a structure of plain integers, for which all bits zero are a value.
    let mut parameter: libc::sched_param = unsafe { zeroed() };
    parameter.sched_priority = priority;
    // SAFETY: thread 0 is the calling one, and the parameter is live for the call.
    let result = unsafe { libc::sched_setscheduler(0, policy | RESET_ON_FORK, &parameter) };
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
}
