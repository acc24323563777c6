//! Leaving namespaces, and keeping descriptors out of the programs we start.

use std::io;

pub use rustix::thread::UnshareFlags;

/// Moves the calling thread into new namespaces, as `unshare(2)` does. With `NEWPID` it is the
/// children started afterwards that live in the new namespace, the first of them as its PID 1.
///
/// # Errors
/// `InvalidInput` for `FILES`, which would let threads disagree on what a descriptor is; otherwise
/// the kernel's answer, commonly `EPERM` without `CAP_SYS_ADMIN`.
pub fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    if namespaces.contains(UnshareFlags::FILES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the call is unsafe only for CLONE_FILES, refused above.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }?;
    Ok(())
}

/// Marks every descriptor from `first` on as close-on-exec (`close_range(2)`, Linux 5.11), so that
/// the program executed next inherits none of them, whoever opened them.
///
/// # Errors
/// The kernel's answer; `EINVAL` on kernels before 5.11.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC the call changes a flag of descriptors and closes nothing;
    // it takes no pointers.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn refuses_to_split_the_descriptor_table() {
        let refused = unshare(UnshareFlags::FILES).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_marked_descriptor_is_not_inherited() {
        let file = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        let seen_by_child = || {
            Command::new("test")
                .arg("-e")
                .arg(format!("/proc/self/fd/{number}"))
                .status()
                .unwrap()
        };
        assert!(seen_by_child().success());
        close_on_exec_from(u32::try_from(number).unwrap()).unwrap();
        assert!(!seen_by_child().success());
    }
}
