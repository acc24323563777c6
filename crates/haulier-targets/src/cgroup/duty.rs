//! CPU time taken by freezing a target for a part of each tenth of a second.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::debug;

use super::{Cgroup, CgroupError, failed};

/// One turn. Freezing takes a millisecond or so; a much shorter one would be all freezing.
const TURN: Duration = Duration::from_millis(100);

/// A thread that freezes and thaws cgroups in turn. They are thawed when it ends.
#[derive(Debug)]
pub(super) struct DutyCycle {
    percent: Option<Sender<u8>>,
    turns: Option<JoinHandle<Result<(), CgroupError>>>,
}

impl DutyCycle {
    /// Begins with nothing being taken.
    pub(super) fn start(groups: &[Cgroup]) -> Result<DutyCycle, CgroupError> {
        let files: Vec<PathBuf> = groups
            .iter()
            .map(|group| group.path().join("cgroup.freeze"))
            .collect();
        let (percent, changes) = mpsc::channel();
        let turns = thread::Builder::new()
            .name("throttle".to_owned())
            .spawn(move || turn(&files, &changes))
            .map_err(|e| failed("start the thread that freezes in turn", "throttle", e))?;
        Ok(DutyCycle {
            percent: Some(percent),
            turns: Some(turns),
        })
    }

    /// The part of each turn that the target stands.
    pub(super) fn set(&self, percent: u8) {
        if let Some(channel) = &self.percent {
            // It ends only when this end is gone, or when the cgroups are.
            let _ = channel.send(percent);
        }
    }

    /// Ends it and waits until the target is thawed.
    pub(super) fn stop(mut self) -> Result<(), CgroupError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), CgroupError> {
        self.percent = None;
        match self.turns.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Ok(()),
        }
    }
}

impl Drop for DutyCycle {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            debug!(%error, "the end of freezing in turn");
        }
    }
}

/// Freezes only what runs, and thaws only what it froze itself.
fn turn(files: &[PathBuf], changes: &mpsc::Receiver<u8>) -> Result<(), CgroupError> {
    let mut percent = 0;
    loop {
        let stands = TURN * u32::from(percent) / 100;
        if !stands.is_zero() {
            write_all(files, "1")?;
            let change = changes.recv_timeout(stands);
            write_all(files, "0")?;
            match change {
                Ok(new) => percent = new,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
        let runs = TURN.saturating_sub(stands);
        match changes.recv_timeout(runs) {
            Ok(new) => percent = new,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// All of them, whatever happens to one: a thaw must not stop at a cgroup that is gone.
fn write_all(files: &[PathBuf], text: &str) -> Result<(), CgroupError> {
    let mut result = Ok(());
    for file in files {
        let written = fs::write(file, text).map_err(|e| failed("write", file, e));
        if result.is_ok() {
            result = written;
        }
    }
    result
}
