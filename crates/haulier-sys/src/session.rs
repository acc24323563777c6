//! Starting a program in a session of its own.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the command start in a session of its own, without a terminal: signals that a terminal sends
/// to this process's group or session do not reach it.
pub fn in_new_session(command: &mut Command) -> &mut Command {
    let become_leader = || Ok(rustix::process::setsid().map(drop)?);
    // SAFETY: between fork and exec the closure makes one system call, which is safe after a fork
    // of a process with threads, and touches no memory but its own stack.
    unsafe { command.pre_exec(become_leader) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_leads_a_session() {
        let mut command = Command::new("sh");
        command.args(["-c", "read -r line < /proc/$$/stat; echo \"$$ $line\""]);
        let output = in_new_session(&mut command).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (pid, stat) = text.split_once(' ').unwrap();
        // State, parent, group, session.
        let session = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3);
        assert_eq!(session, Some(pid), "{text}");
    }
}
