//! An address space, named by what only it has.

use std::fs;
use std::io;

/// What distinguishes the address space that a process has now from the one it had, or from that of
/// another process that got its pid: when the process started, and where exec put code and stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    started: u64,
    code: u64,
    stack: u64,
}

impl Identity {
    /// Of the process now. `None` if it has no address space, as a zombie.
    ///
    /// # Errors
    /// The process is gone.
    pub(super) fn of(pid: i32) -> io::Result<Option<Identity>> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(parse(&stat))
    }

    /// By the text of a process's `stat`.
    pub(super) fn by_stat(stat: &str) -> Option<Identity> {
        parse(stat)
    }
}

/// Fields 22, 26 and 28; the second one is a name in parentheses that may have anything in it.
fn parse(stat: &str) -> Option<Identity> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // The rest begins with field 3.
    let started = fields.nth(22 - 3)?.parse().ok()?;
    let code = fields.nth(3)?.parse().ok()?;
    let stack = fields.nth(1)?.parse().ok()?;
    (code != 0 || stack != 0).then_some(Identity {
        started,
        code,
        stack,
    })
}

/// Whether the kernel's answer means that there is no such process any more.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
}

const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_space_is_what_it_is_until_an_exec() {
        let own = Identity::of(std::process::id() as i32).unwrap().unwrap();
        assert_eq!(Identity::of(std::process::id() as i32).unwrap(), Some(own));
        let stat = "5 (a) b) S 1 5 5 0 -1 4194560 1 0 0 0 7 8 0 0 20 0 1 0 2200 900 300 \
                    18446744073709551615 2600 2700 2800 0 0";
        let expected = Identity {
            started: 2200,
            code: 2600,
            stack: 2800,
        };
        assert_eq!(parse(stat), Some(expected));
    }

    #[test]
    fn a_dead_process_is_gone_and_a_zombie_has_no_address_space() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let options =
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        let which = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::waitid(rustix::process::WaitId::Pid(which), options).unwrap();
        assert_eq!(Identity::of(pid).unwrap(), None);
        child.wait().unwrap();
        assert!(is_gone(&Identity::of(pid).unwrap_err()));
    }
}
