//! Whose a process is: at most one migration at a time has it.
//!
//! The cgroup that a process is in tells: one that leaves is confined to a cgroup named after its
//! migration, one that has arrived lives in such a cgroup. The lock on that migration's journal tells
//! whether it is still under way.

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use haulier_proto::id::MigrationId;
use haulier_targets::cgroup::CgroupFs;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::directories::STATE;
use crate::journal;

/// How long others may take to confine their targets.
const TURN_TIME: Duration = Duration::from_secs(30);
/// How often it is looked whose turn it is.
const LOOK: Duration = Duration::from_millis(5);

/// A migration under way that has a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It is being moved away from this host.
    Leaving(MigrationId),
    /// Its pages are still arriving from another host.
    Arriving(MigrationId),
}

/// The right to confine a target, as long as this exists: nobody else on this host has it, so that what
/// [`of`] says stays true.
#[derive(Debug)]
pub(crate) struct Turn(#[allow(dead_code, reason = "its lock is what counts")] File);

/// Name of the cgroups that a migration makes at its source.
pub(crate) fn cgroup_name(id: MigrationId) -> String {
    format!("{PREFIX}{id}")
}

const PREFIX: &str = "haulier-";

/// The migration under way that has a process; `own` does not count.
pub(crate) fn of(pid: i32, cgroups: &CgroupFs, own: Option<MigrationId>) -> Option<Claim> {
    // A process that has ended is nobody's.
    let group = cgroups.of(pid).ok()?;
    let mut names = group.path().iter().filter_map(|name| name.to_str());
    names.find_map(|name| {
        let (text, claim): (_, fn(MigrationId) -> Claim) = match name.strip_prefix(PREFIX) {
            Some(id) => (id, Claim::Leaving),
            None => (name, Claim::Arriving),
        };
        let id = text.parse().ok()?;
        (Some(id) != own && journal::is_under_way(id)).then(|| claim(id))
    })
}

/// Waits for the turn to confine a target.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`], or if there is no state directory.
pub(crate) fn turn() -> io::Result<Turn> {
    let folder = File::open(STATE)?;
    let deadline = Instant::now() + TURN_TIME;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Turn(folder)),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                thread::sleep(LOOK);
            }
            Err(Errno::WOULDBLOCK | Errno::INTR) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}
