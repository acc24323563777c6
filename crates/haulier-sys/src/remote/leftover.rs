//! What a tracer that was killed has left in a process.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::{RemoteError, as_tracer, with_thread};

/// A descriptor of a process that looks as if a tracer had left it: a userfaultfd with the flags of
/// ours on which `UFFDIO_API` was never done, so that it is of no use to anybody yet.
///
/// One that a program has just made itself looks the same for as long as it has done no more with it:
/// only one that is still there after a while has been left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Leftover {
    /// Its number in the process.
    pub fd: i32,
    /// Of the file, which no other has while it lives.
    pub inode: u64,
}

/// The leftovers in a process.
///
/// # Errors
/// It is gone, or may not be looked at.
pub fn of(pid: i32) -> io::Result<Vec<Leftover>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        found.extend(number.and_then(|fd| look(&format!("/proc/{pid}"), fd)));
    }
    found.sort_by_key(|leftover: &Leftover| leftover.fd);
    Ok(found)
}

/// Has a process close a leftover, if it still is one.
///
/// # Errors
/// [`RemoteError`].
pub fn close(pid: i32, timeout: Duration, what: Leftover) -> Result<(), RemoteError> {
    let deadline = Instant::now() + timeout;
    let closed = as_tracer(|| {
        with_thread(pid, deadline, |thread| {
            // Another thread may have put something else there; a thread may have a table of its own.
            let table = format!("/proc/{pid}/task/{}", thread.thread());
            if look(&table, what.fd) != Some(what) {
                return Ok(());
            }
            thread
                .call(libc::SYS_close, [what.fd as u64, 0, 0])?
                .map_err(RemoteError::refused("close"))?;
            Ok(())
        })
    });
    closed.map(|((), _)| ())
}

/// The descriptor of a process or thread, if it is a leftover.
fn look(process: &str, fd: i32) -> Option<Leftover> {
    let path = format!("{process}/fd/{fd}");
    let link = fs::read_link(&path).ok()?;
    if link.to_str() != Some("anon_inode:[userfaultfd]") {
        return None;
    }
    let info = fs::read_to_string(format!("{process}/fdinfo/{fd}")).ok()?;
    let inode = fs::metadata(&path).ok()?.ino();
    is_leftover(&info).then_some(Leftover { fd, inode })
}

/// By the text of `fdinfo`: flags, and features behind the number of the interface.
fn is_leftover(info: &str) -> bool {
    const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name));
    let flags = field("flags:").and_then(|text| i32::from_str_radix(text.trim(), 8).ok());
    let features = field("API:").and_then(|text| text.trim().split(':').nth(1));
    flags.is_some_and(|flags| flags & !libc::O_ACCMODE == FLAGS) && features == Some("0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_never_begun_with_our_flags_is_a_leftover() {
        let info = "pos:\t0\nflags:\t02004002\nmnt_id:\t17\npending:\t0\ntotal:\t0\n\
            API:\taa:0:80000000000001ff\n";
        assert!(is_leftover(info));
        assert!(is_leftover(&info.replace("4002", "4000")));
        // Begun; blocking; inherited over exec; nothing known.
        assert!(!is_leftover(&info.replace("aa:0:", "aa:80000000:")));
        assert!(!is_leftover(&info.replace("4002", "0002")));
        assert!(!is_leftover(&info.replace("02004002", "04002")));
        assert!(!is_leftover(""));
    }
}
