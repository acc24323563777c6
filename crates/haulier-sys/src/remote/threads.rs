//! Which thread of a process is the one to be stopped.

use std::fs;
use std::time::{Duration, Instant};

use super::RemoteError;
use super::held::{Held, is_interruptible};

/// Threads looked at before one is chosen.
const LOOKED_AT: usize = 32;
/// Patience with one thread, if there are others to be tried.
const EACH: Duration = Duration::from_millis(250);

/// Stops one thread of the process, whichever minds least.
pub(super) fn stop_one(pid: i32, deadline: Instant) -> Result<Held, RemoteError> {
    let mut threads = list(pid)?;
    threads.sort_by_key(|(nuisance, _)| *nuisance);
    let mut outcome = Err(RemoteError::Gone);
    for (at, (_, thread)) in threads.iter().enumerate() {
        let last = at + 1 == threads.len();
        let until = if last {
            deadline
        } else {
            deadline.min(Instant::now() + EACH)
        };
        outcome = Held::stop(pid, *thread, until, deadline);
        match &outcome {
            // This thread may have ended alone, or wait where nothing reaches it.
            Err(RemoteError::Gone | RemoteError::Busy) if Instant::now() < deadline => {}
            _ => return outcome,
        }
    }
    outcome
}

/// How little a thread is suited, with its id.
fn list(pid: i32) -> Result<Vec<(u8, i32)>, RemoteError> {
    let tasks = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&tasks).map_err(|_| RemoteError::Gone)?;
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let suited = |id: i32| {
        let state = state(&fs::read_to_string(format!("{tasks}/{id}/stat")).ok()?)?;
        let nuisance = match state {
            // Ended; what is left of it cannot be stopped.
            'Z' | 'X' | 'x' => return None,
            // Cannot be stopped while it waits, for instance for a child by vfork.
            'D' => 3,
            'S' if waits_undisturbed(&tasks, id) => 0,
            'S' => 2,
            _ => 1,
        };
        Some((nuisance, id))
    };
    Ok(ids.take(LOOKED_AT).filter_map(suited).collect())
}

fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether the thread sleeps in a call that the kernel itself resumes with the time that is left.
fn waits_undisturbed(tasks: &str, id: i32) -> bool {
    let call = fs::read_to_string(format!("{tasks}/{id}/syscall")).unwrap_or_default();
    let number = call.split(' ').next().and_then(|word| word.parse().ok());
    number.is_some_and(|number: i64| !is_interruptible(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_stands_behind_any_name() {
        assert_eq!(state("12 (a) S (b) R 1 2"), Some('R'));
        assert_eq!(state("12 (sh) S 1"), Some('S'));
        assert_eq!(state("12"), None);
    }

    #[test]
    fn a_dead_process_is_gone() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let outcome = stop_one(child.id() as i32, Instant::now());
        assert!(matches!(outcome, Err(RemoteError::Gone)));
    }
}
