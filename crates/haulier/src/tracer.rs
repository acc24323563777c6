//! The process of this program that has the target make userfaultfds, for an agent that may be killed at
//! any moment, and what one that was killed itself has left.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use haulier_sys::remote::apart::{self, Apart, ApartError};
use haulier_sys::remote::leftover::{self, Leftover};
use haulier_sys::remote::{Directly, Look, RemoteError, TakeUserfaultfd, Taken};
use haulier_targets::process::{self, ProcessTree};
use tracing::warn;

use crate::checkpoint;
use crate::directories::STATE;

/// Of a point of [`checkpoint`] that is not the agent's: there such a process holds a thread of the
/// target.
pub const SIDE: &str = "tracer";
/// The point.
pub const HOLDING: &str = "userfaultfd";
/// How long a userfaultfd has to have been of no use to be a leftover. A program that makes one begins
/// with it in the next moment.
const USELESS: Duration = Duration::from_millis(500);
/// How names of the records of processes begin that may have one, in [`STATE`].
const MARK: &str = ".tracing-";
/// Patience with a target that is to close one.
const CLOSE: Duration = Duration::from_secs(2);

/// The whole life of such a process.
///
/// # Errors
/// If it cannot hear its client.
pub fn run() -> anyhow::Result<()> {
    Ok(apart::serve(|| checkpoint::reach(SIDE, HOLDING))?)
}

/// Has a process of this program do what is asked for; it is started when it is first needed, and again
/// if it died. Where none can be started, this process does it.
#[derive(Debug, Default)]
pub(crate) struct Tracer {
    helper: Option<Apart>,
    alone: bool,
}

impl Tracer {
    /// What came out, or nothing if there is no helper.
    fn by_helper<T>(
        &mut self,
        mut work: impl FnMut(&mut Apart) -> Result<T, ApartError>,
    ) -> Option<Result<T, RemoteError>> {
        let mut result = self.once(&mut work)?;
        if let Err(ApartError::Lost(error)) = &result {
            warn!(%error, "the process that takes userfaultfds was lost; there will be another");
            result = self.once(&mut work)?;
        }
        Some(result.map_err(|error| match error {
            ApartError::Remote(error) => error,
            ApartError::Start(source) | ApartError::Lost(source) => RemoteError::Io {
                action: "hear from the process that takes userfaultfds".into(),
                source,
            },
        }))
    }

    fn once<T>(
        &mut self,
        work: impl FnOnce(&mut Apart) -> Result<T, ApartError>,
    ) -> Option<Result<T, ApartError>> {
        if self.alone {
            return None;
        }
        let mut helper = match self.helper.take().map_or_else(start, Ok) {
            Ok(helper) => helper,
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "if haulier is killed in the moment in which it begins to track a process, \
                     that may die"
                );
                self.alone = true;
                return None;
            }
        };
        let result = work(&mut helper);
        if !matches!(result, Err(ApartError::Lost(_))) {
            self.helper = Some(helper);
        }
        Some(result)
    }
}

fn start() -> Result<Apart, ApartError> {
    let mut command = Command::new(std::env::current_exe().map_err(ApartError::Start)?);
    command.arg("tracer");
    Apart::start(command)
}

impl TakeUserfaultfd for Tracer {
    fn take(&mut self, pid: i32, timeout: Duration) -> Result<Taken<Look>, RemoteError> {
        let mark = mark(pid);
        if let Some(mark) = &mark {
            // Where nothing can be written nothing of the kind is closed later, and CRIU says why.
            let _ = fs::write(mark, "");
        }
        let taken = match self.by_helper(|helper| helper.take(pid, timeout)) {
            Some(result) => result,
            None => Directly.take(pid, timeout),
        };
        if let (Some(mark), Ok(_)) = (&mark, &taken) {
            let _ = fs::remove_file(mark);
        }
        taken
    }

    fn close(&mut self, pid: i32, timeout: Duration, what: Leftover) -> Result<(), RemoteError> {
        match self.by_helper(|helper| helper.close(pid, timeout, what)) {
            Some(result) => result,
            None => Directly.close(pid, timeout, what),
        }
    }
}

/// Has a tree close userfaultfds that a tracer of ours has left in it: CRIU could not dump it with them.
/// Only a process of which it is recorded that one was at work is looked at.
pub(crate) fn close_leftovers(tree: &ProcessTree) {
    let marked: Vec<i32> = marked()
        .into_iter()
        .filter(|pid| tree.pids().contains(pid))
        .collect();
    let before = leftovers(&marked);
    if !before.is_empty() {
        thread::sleep(USELESS);
        close(&before, &leftovers(&marked));
    }
    let left = leftovers(&marked);
    for pid in marked {
        let clean = left.iter().all(|(other, _)| *other != pid);
        if let Some(mark) = mark(pid).filter(|_| clean) {
            let _ = fs::remove_file(mark);
        }
    }
}

/// Those that were there before and are now.
fn close(before: &BTreeSet<(i32, Leftover)>, now: &BTreeSet<(i32, Leftover)>) {
    let mut tracer = Tracer::default();
    for (pid, what) in now.intersection(before) {
        match tracer.close(*pid, CLOSE, *what) {
            Ok(()) => warn!(
                pid,
                descriptor = what.fd,
                "closed a userfaultfd that an earlier haulier, which was killed, had left"
            ),
            Err(error) => warn!(
                pid,
                descriptor = what.fd,
                error = &error as &dyn std::error::Error,
                "cannot close a userfaultfd that an earlier haulier, which was killed, had left"
            ),
        }
    }
}

/// The record that a process may have a userfaultfd of ours; `None` if there is no such process. It is
/// there from before one is made until it is known to be gone.
fn mark(pid: i32) -> Option<PathBuf> {
    // Numbers come again.
    let began = process::began(pid)?;
    Some(Path::new(STATE).join(format!("{MARK}{pid}-{began}")))
}

/// The processes with a record. Those of processes that have ended are removed.
fn marked() -> Vec<i32> {
    let mut pids = Vec::new();
    for entry in fs::read_dir(STATE).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let text = name.to_str().and_then(|name| name.strip_prefix(MARK));
        let Some((pid, _)) = text.and_then(|text| text.split_once('-')) else {
            continue;
        };
        let pid = pid.parse().unwrap_or(0);
        if mark(pid).is_some_and(|mark| mark == entry.path()) {
            pids.push(pid);
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    pids
}

fn leftovers(pids: &[i32]) -> BTreeSet<(i32, Leftover)> {
    let of = |pid: i32| {
        // One that has ended has none.
        let found: io::Result<Vec<Leftover>> = leftover::of(pid);
        found
            .unwrap_or_default()
            .into_iter()
            .map(move |what| (pid, what))
    };
    pids.iter().copied().flat_map(of).collect()
}
