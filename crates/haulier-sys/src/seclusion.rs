//! Starting a process that has to outlive the one that starts it.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::namespaces::close_on_exec_from;

/// Has the command start in a session of its own, deaf to SIGINT, SIGTERM, SIGHUP and SIGPIPE (an
/// ignored signal stays so over `exec`), and with no descriptors but its standard ones, whatever
/// somebody has left open here without close-on-exec.
pub fn seclude(command: &mut Command) -> &mut Command {
    let apart = || {
        rustix::process::setsid()?;
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
            ignore(signal)?;
        }
        close_on_exec_from(3)
    };
    // SAFETY: between fork and exec the closure makes a few system calls, which is safe after a
    // fork of a process with threads, and touches no memory but its own stack.
    unsafe { command.pre_exec(apart) }
}

fn ignore(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: to ignore a signal installs no code of ours.
    let before = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn it_leads_a_session_hears_no_signals_and_has_no_descriptors() {
        let left_open = File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&left_open, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new("sh");
        // The shell itself, not a program that it starts.
        let script = "kill -TERM $$; kill -HUP $$; kill -INT $$; \
            read -r stat < /proc/$$/stat; echo \"$$ $stat\"; \
            [ -e /proc/$$/fd/$1 ] && echo open; true";
        command.args(["-c", script, "sh", &left_open.as_raw_fd().to_string()]);
        let output = seclude(&mut command).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let (pid, stat) = text.split_once(' ').unwrap();
        // State, parent, group, session.
        let session = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3);
        assert_eq!(session, Some(pid), "{text}");
        assert!(!text.contains("open"), "{text}");
    }
}
