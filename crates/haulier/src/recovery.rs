//! Undoing, or finishing, what a killed haulier left on this host.
//!
//! Only what the journal alone decides: a target frozen here before its commit runs on; one held
//! here that was not committed is removed; one that was committed runs, or is recorded as lost, as its
//! guard saw it. A source in doubt asks the other host ([`ask`]), or a person knows, who says so with
//! [`resolve`].

use anyhow::Context;
use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_proto::id::MigrationId;
use haulier_sys::wait::{Cancel, Wait};
use haulier_targets::cgroup::{Cgroup, CgroupFs, Throttle};
use haulier_targets::network::{self, Announcement, MoveIp};
use std::fs;
use std::io;
use std::time::{Duration, SystemTime};
use tracing::{info, warn};

use crate::directories::{remove_image_directories, state_directory};
use crate::guard::{self, Fate};
use crate::journal::{self, Contents, Decision, Holding, Journal, Side};
use crate::source::again::{Asking, Settled, Unsettled};

/// How long tasks may take to die.
const KILL_TIME: Duration = Duration::from_secs(30);
/// How long a settled journal is kept, for a source that asks late.
const KEEP_SETTLED: Duration = Duration::from_secs(7 * 24 * 3600);

/// A person's word on a target that stands frozen on its source, in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The destination does not run it and never will: it runs on here.
    Here,
    /// The destination runs it: what stands here is removed.
    There,
}

/// Settles a migration of which this host is the source, and whose destination fell silent after
/// the commit.
///
/// # Errors
/// If this host is not in doubt about that migration, or its journal fails.
pub fn resolve(id: MigrationId, verdict: Verdict, cgroups: &CgroupFs) -> anyhow::Result<()> {
    let name = state_directory(id).join("journal");
    let taken = Journal::take_over(id, Side::Source)
        .with_context(|| format!("reading {}", name.display()))?;
    let Some((mut journal, contents)) = taken else {
        anyhow::bail!(
            "there is no {}, or a haulier works on that migration at this moment",
            name.display()
        );
    };
    let settled = contents.has_source(SourceRecord::Released)
        || contents.has_source(SourceRecord::RolledBack);
    if settled || !contents.has_source(SourceRecord::InDoubt) {
        anyhow::bail!("this host is not in doubt about migration {id}; nothing was changed");
    }
    match verdict {
        Verdict::Here => run_on(journal, &contents, cgroups)?,
        Verdict::There => {
            journal.source(SourceRecord::Released)?;
            remove_moved(journal, &contents, cgroups)?;
        }
    }
    Ok(())
}

/// Finishes or undoes what a destination of a migration left here, if nobody works on it.
pub(crate) fn settle_destination(id: MigrationId, cgroups: &CgroupFs) {
    if let Err(error) = recover(id, Side::Destination, cgroups) {
        warn!(%id, %error, "recovering");
    }
}

/// Recovers every migration on this host that nobody works on, as far as the journals alone tell how.
/// Goes on after a failure. Returns those that only their destinations can settle.
pub fn recover_all(cgroups: &CgroupFs) -> Vec<Unsettled> {
    let mut unsettled = Vec::new();
    for id in journal::all() {
        for side in [Side::Source, Side::Destination] {
            match recover(id, side, cgroups) {
                Ok(left) => unsettled.extend(left),
                Err(error) => warn!(%id, %error, "recovering"),
            }
        }
    }
    sweep_homes(cgroups);
    unsettled
}

/// Asks the destination of a migration, and tells the log what came of it.
pub fn ask(unsettled: Unsettled, cgroups: &CgroupFs, how: &Asking, stop: &Cancel) {
    let id = unsettled.id();
    info!(%id, "asking the destination what became of the target");
    match unsettled.ask(cgroups, how, stop) {
        Ok(Settled::Released) => info!(%id, "the target runs there, and is removed here"),
        Ok(Settled::RunsHere) => info!(%id, "the target never ran there, and runs on here"),
        Ok(Settled::Stranded(failure)) => {
            warn!(%id, "{failure}");
            warn!("{}", stranded(id));
        }
        Ok(Settled::Unanswered(reason)) => warn!(
            "a target stands frozen here, in doubt ({reason}), until its destination answers or \
             somebody settles it: haulier resolve {id} here, or there"
        ),
        Err(error) => warn!(%id, %error, "recovering"),
    }
}

/// Removes the cgroups of restored trees that have ended or moved away. One that a migration under
/// way has just made is empty as well, and stays.
pub fn sweep_homes(cgroups: &CgroupFs) {
    let folder = cgroups.home_path("");
    let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
    for entry in entries {
        let id = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if !id.is_some_and(journal::is_under_way) {
            // The kernel refuses to remove a cgroup that has tasks or children.
            let _ = fs::remove_dir(entry.path());
        }
    }
    let _ = fs::remove_dir(&folder);
}

fn recover(id: MigrationId, side: Side, cgroups: &CgroupFs) -> io::Result<Option<Unsettled>> {
    let Some((journal, contents)) = Journal::take_over(id, side)? else {
        return Ok(None);
    };
    if !contents.is_of(side) {
        return Ok(None);
    }
    match side {
        Side::Source => recover_source(journal, contents, cgroups),
        Side::Destination => recover_destination(journal, &contents, cgroups).map(|()| None),
    }
}

fn recover_source(
    journal: Journal,
    contents: Contents,
    cgroups: &CgroupFs,
) -> io::Result<Option<Unsettled>> {
    let id = journal.id();
    end_throttle(&contents);
    if contents.has_source(SourceRecord::RolledBack) {
        journal.remove();
    } else if contents.has_source(SourceRecord::Released) {
        info!(%id, "removing what moved away");
        remove_moved(journal, &contents, cgroups)?;
    } else if contents.has_source(SourceRecord::Stranded) {
        warn!("{}", stranded(id));
    } else if contents.has_source(SourceRecord::InDoubt) {
        return Ok(Some(Unsettled::new(journal, contents)));
    } else {
        info!(%id, "letting the target run on here");
        run_on(journal, &contents, cgroups)?;
    }
    Ok(None)
}

fn stranded(id: MigrationId) -> String {
    format!(
        "a target that the other host has lost stands here as it was frozen, the last copy: to let \
         it run on from there, haulier resolve {id} here; to give it up, haulier resolve {id} there"
    )
}

/// Lets a frozen target of this host run on here.
pub(crate) fn run_on(
    mut journal: Journal,
    contents: &Contents,
    cgroups: &CgroupFs,
) -> io::Result<()> {
    let id = journal.id();
    let groups = groups(contents, Side::Source, cgroups);
    // While it is frozen: a program that finds its sockets in repair mode gets errors.
    for pid in groups
        .iter()
        .flat_map(|group| group.pids().unwrap_or_default())
    {
        let _ = network::end_repair_of(pid);
    }
    // A target that ran on the other host took its addresses along.
    if contents.has_source(SourceRecord::Serving) {
        for address in addresses(contents, Side::Source) {
            network::add(&address).map_err(io::Error::other)?;
        }
    }
    lift(id);
    for address in addresses(contents, Side::Source) {
        if let Err(error) = Announcement::prepare(&address).and_then(|a| a.send()) {
            warn!(%id, %error, "announcing");
        }
    }
    for group in groups {
        if let Err(error) = group.dissolve() {
            warn!(%id, %error, "cgroup");
        }
    }
    journal.source(SourceRecord::RolledBack)?;
    remove_image_directories(id);
    journal.remove();
    Ok(())
}

/// Removes a frozen target that runs on the other host.
pub(crate) fn remove_moved(
    journal: Journal,
    contents: &Contents,
    cgroups: &CgroupFs,
) -> io::Result<()> {
    let id = journal.id();
    for group in groups(contents, Side::Source, cgroups) {
        remove_with_tasks(&group);
    }
    // Only an address that is gone may be talked to again: two hosts must not answer for it. Until
    // then lock and journal stay, and the next recovery tries again.
    for address in addresses(contents, Side::Source) {
        network::remove(&address).map_err(io::Error::other)?;
    }
    lift(id);
    remove_image_directories(id);
    journal.remove();
    Ok(())
}

fn recover_destination(
    mut journal: Journal,
    contents: &Contents,
    cgroups: &CgroupFs,
) -> io::Result<()> {
    let id = journal.id();
    let decision = contents.decision();
    // An address that was removed may have come back since, with another migration.
    if decision == Decision::Done || contents.has_destination(DestinationRecord::Removed) {
        if age_of(id) > KEEP_SETTLED {
            journal.remove();
        }
        return Ok(());
    }
    let addresses = addresses(contents, Side::Destination);
    let groups = groups(contents, Side::Destination, cgroups);
    let record = match decision {
        Decision::Done => return Ok(()),
        Decision::Committed => match guard::fate(id)? {
            Fate::Complete => {
                info!(%id, "the target is this host's: letting it run");
                let_run(id, &groups, &addresses)?;
                DestinationRecord::Done
            }
            Fate::NeverRan => DestinationRecord::Withdrawn,
            Fate::Lost => DestinationRecord::Lost,
        },
        Decision::Open => DestinationRecord::Refused,
        // Recorded, but perhaps not carried out to its end.
        Decision::Refused => DestinationRecord::Refused,
        Decision::Lost => DestinationRecord::Lost,
    };
    // Whoever asks from here on is told so. Before the removal: whenever this is killed, the tasks
    // never run again.
    if decision == Decision::Committed || decision == Decision::Open {
        journal.destination(record)?;
    }
    if record != DestinationRecord::Done {
        info!(%id, ?record, "removing what will not run here");
        remove(id, &groups, &addresses);
        journal.destination(DestinationRecord::Removed)?;
    }
    remove_image_directories(id);
    Ok(())
}

/// Lets a target run that is this host's, and whole.
fn let_run(id: MigrationId, groups: &[Cgroup], addresses: &[MoveIp]) -> io::Result<()> {
    lift(id);
    for address in addresses {
        if let Err(error) = Announcement::prepare(address).and_then(|a| a.send()) {
            warn!(%id, %error, "announcing");
        }
    }
    for group in groups {
        group.thaw().map_err(io::Error::other)?;
    }
    Ok(())
}

/// Removes what a target that will not run here has on this host.
fn remove(id: MigrationId, groups: &[Cgroup], addresses: &[MoveIp]) {
    for group in groups {
        remove_with_tasks(group);
    }
    for address in addresses {
        if let Err(error) = network::remove(address) {
            warn!(%id, %error, "address");
        }
    }
    lift(id);
}

fn groups(contents: &Contents, side: Side, cgroups: &CgroupFs) -> Vec<Cgroup> {
    let paths = contents
        .holdings(side)
        .into_iter()
        .filter_map(|holding| match holding {
            Holding::Cgroup(path) => Some(path),
            Holding::Address(_) | Holding::Throttle(_) | Holding::Peer { .. } => None,
        });
    paths
        .filter(|path| path.exists())
        .map(|path| cgroups.at(path))
        .collect()
}

/// Gives the target its CPU time back, whatever becomes of it.
fn end_throttle(contents: &Contents) {
    for holding in contents.holdings(Side::Source).into_iter().rev() {
        if let Holding::Throttle(path) = holding {
            if let Err(error) = Throttle::undo(&path) {
                warn!(%error, "giving CPU time back");
            }
        }
    }
}

pub(crate) fn addresses(contents: &Contents, side: Side) -> Vec<MoveIp> {
    let texts = contents
        .holdings(side)
        .into_iter()
        .filter_map(|holding| match holding {
            Holding::Address(text) => Some(text),
            Holding::Cgroup(_) | Holding::Throttle(_) | Holding::Peer { .. } => None,
        });
    texts.filter_map(|text| text.parse().ok()).collect()
}

fn remove_with_tasks(group: &Cgroup) {
    let killed = group.kill(&Wait::uncancellable(KILL_TIME));
    if let Err(error) = killed.and_then(|()| group.remove()) {
        warn!(%error, "cgroup");
    }
}

fn lift(id: MigrationId) {
    if let Err(error) = network::lift_by_id(&id.to_string()) {
        warn!(%id, %error, "network lock");
    }
}

fn age_of(id: MigrationId) -> Duration {
    let modified = fs::metadata(state_directory(id).join("journal")).and_then(|m| m.modified());
    let now = SystemTime::now();
    modified.map_or(Duration::ZERO, |then| {
        now.duration_since(then).unwrap_or_default()
    })
}
