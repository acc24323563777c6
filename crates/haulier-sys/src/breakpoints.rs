//! Hardware breakpoints without a wait.
//!
//! CRIU sets one in each task it lets go of (`ptrace(2)`, debug registers), and the kernel makes a perf event
//! of it. The first event of the whole machine that follows a task has the scheduler rewritten and waits for
//! an RCU grace period (kernel/events/core.c, `account_event`): some 10 ms in which a task stands still. With
//! another such event about there is neither.

use std::io;
use std::mem::size_of;
use std::os::fd::{FromRawFd, OwnedFd};

/// As long as it lives a breakpoint is set at once.
#[derive(Debug)]
pub struct Breakpoints {
    _event: OwnedFd,
}

impl Breakpoints {
    /// Waits in the stead of whoever will set one.
    ///
    /// # Errors
    /// What `perf_event_open(2)` says: a kernel may have no such events, or refuse them.
    pub fn prepare() -> io::Result<Breakpoints> {
        let attributes = Attributes {
            kind: SOFTWARE,
            size: size_of::<Attributes>() as u32,
            config: DUMMY,
            flags: DISABLED | EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR,
            ..Attributes::default()
        };
        let (this_thread, any_processor, no_group) = (0, -1, -1);
        // SAFETY: the attributes are live for the call and say how long they are.
        let result = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                this_thread,
                any_processor,
                no_group,
                CLOSE_ON_EXEC,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor just made, which nobody else has.
        let event = unsafe { OwnedFd::from_raw_fd(result as i32) };
        Ok(Breakpoints { _event: event })
    }
}

// From include/uapi/linux/perf_event.h.
const SOFTWARE: u32 = 1;
/// Counts nothing.
const DUMMY: u64 = 9;
const DISABLED: u64 = 1 << 0;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const EXCLUDE_HYPERVISOR: u64 = 1 << 6;
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;

/// `struct perf_event_attr` in its first version, of 64 bytes.
#[derive(Default)]
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    period: u64,
    samples: u64,
    format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

const _: () = assert!(size_of::<Attributes>() == 64);

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn there_is_an_event_for_as_long_as_it_lives() {
        let link = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}"));
        match Breakpoints::prepare() {
            Ok(breakpoints) => {
                let fd = breakpoints._event.as_raw_fd();
                assert_eq!(
                    link(fd).unwrap().to_string_lossy(),
                    "anon_inode:[perf_event]"
                );
            }
            // As kernels without perf events, and containers that may not use them, say.
            Err(error) => {
                let number = error.raw_os_error();
                let refused = [libc::ENOSYS, libc::EACCES, libc::EPERM, libc::ENOENT].map(Some);
                assert!(refused.contains(&number), "{error}");
            }
        }
    }
}
