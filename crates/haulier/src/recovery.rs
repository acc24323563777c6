//! Undoing, or finishing, what a killed haulier left on this host.
//!
//! Only what the journal alone decides: a target frozen here before its commit runs on; one held
//! here that was not committed is removed; one that was committed runs, or is recorded as lost, as its
//! guard saw it. A source in doubt asks the other host ([`ask`]), or a person knows, who says so with
//! [`resolve`].

use haulier_engine::destination::Action as DestinationAction;
use haulier_engine::journal::SourceRecord;
use haulier_engine::recovery::{self as rule, DestinationRecovery, SourceRecovery};
use haulier_engine::source::Action as SourceAction;
use haulier_proto::id::MigrationId;
use haulier_sys::wait::{Cancel, Wait};
use haulier_targets::cgroup::{Cgroup, CgroupFs, Throttle};
use haulier_targets::network::{self, Announcement, MoveIp};
use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;
use tracing::{debug, info, warn};

pub use haulier_engine::recovery::Verdict;

use crate::directories::remove_image_directories;
use crate::guard;
use crate::journal::{self, Contents, Holding, Journal, Side, Wanted};
use crate::source::again::{Asking, Settled, Unsettled};

/// How long tasks may take to die.
const KILL_TIME: Duration = Duration::from_secs(30);
/// How long whoever asks in the background may take to give way to a person.
const YIELD_TIME: Duration = Duration::from_secs(15);
/// How old a journal is that says nothing and is not about to.
const FORGET_EMPTY: Duration = Duration::from_secs(60);
/// How long a settled journal is kept, for a source that asks late.
const KEEP_SETTLED: Duration = Duration::from_secs(7 * 24 * 3600);

/// Settles a migration of which this host is the source by a person's word. Whoever still asks its
/// destination in the background gives way.
///
/// # Errors
/// If this host does not wait for a person's word on that migration, or its journal fails.
pub fn resolve(id: MigrationId, verdict: Verdict, cgroups: &CgroupFs) -> Result<(), ResolveError> {
    let mut journal = take_over_for_a_person(id)?;
    let actions = rule::resolve(&journal.contents().source_records(), verdict)
        .ok_or(ResolveError::NotInDoubt(id))?;
    if !journal.contents().is_of(Side::Source) {
        return Err(ResolveError::NotInDoubt(id));
    }
    // The word; what follows from it is what any recovery does that finds it.
    for action in actions {
        if let SourceAction::Record(record) = action {
            journal.source(record).map_err(ResolveError::Journal)?;
            break;
        }
    }
    finish(journal, cgroups).map_err(ResolveError::Journal)
}

/// Why a person's word did not settle a migration.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// There is nothing to settle.
    #[error("this host does not wait for a word on migration {0}; nothing was changed")]
    NotInDoubt(MigrationId),
    /// It has no journal.
    #[error("there is no migration {0} on this host; nothing was changed")]
    Unknown(MigrationId),
    /// Its lock is held.
    #[error("{0} works on that migration at this moment; nothing was changed")]
    UnderWay(String),
    /// Reading or writing the journal failed, or doing what follows from it.
    #[error("settling it")]
    Journal(#[source] io::Error),
}

fn take_over_for_a_person(id: MigrationId) -> Result<Journal, ResolveError> {
    if !journal::file_of(id).exists() {
        return Err(ResolveError::Unknown(id));
    }
    let deadline = Instant::now() + YIELD_TIME;
    let _wanted = Wanted::want(id).map_err(ResolveError::Journal)?;
    loop {
        let taken = Journal::take_over(id, Side::Source).map_err(ResolveError::Journal)?;
        if let Some((journal, _)) = taken {
            return Ok(journal);
        }
        if Instant::now() > deadline {
            let who = journal::worker(id);
            let who = who.map_or_else(
                || "another haulier".to_owned(),
                |pid| format!("the haulier with process number {pid}"),
            );
            return Err(ResolveError::UnderWay(who));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Finishes or undoes what a destination of a migration left here, if nobody works on it.
pub(crate) fn settle_destination(id: MigrationId, cgroups: &CgroupFs) {
    if let Err(error) = recover_side(id, Side::Destination, cgroups) {
        warn!(%id, %error, "recovering");
    }
}

/// Recovers every migration on this host that nobody works on, as far as the journals alone tell how.
/// Goes on after a failure. Returns those that only their destinations can settle.
pub fn recover_all(cgroups: &CgroupFs) -> Vec<Unsettled> {
    let mut unsettled = Vec::new();
    for id in journal::all() {
        match recover(id, cgroups) {
            Ok(Found::Unsettled(left)) => unsettled.push(left),
            Ok(Found::UnderWay | Found::Nothing) => {}
            Err(error) => warn!(%id, %error, "recovering"),
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
             somebody settles it: haulier resolve {id} --run-here, or --discard"
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

/// What a recovery found, and has not done itself.
#[derive(Debug)]
pub(crate) enum Found {
    /// Only the destination can settle it.
    Unsettled(Unsettled),
    /// Somebody works on it, or has just begun.
    UnderWay,
    /// Nothing that could be done now.
    Nothing,
}

/// Recovers a migration of this host, if nobody works on it.
pub(crate) fn recover(id: MigrationId, cgroups: &CgroupFs) -> io::Result<Found> {
    match recover_side(id, Side::Source, cgroups)? {
        Found::Nothing => recover_side(id, Side::Destination, cgroups),
        found => Ok(found),
    }
}

fn recover_side(id: MigrationId, side: Side, cgroups: &CgroupFs) -> io::Result<Found> {
    let Some((journal, contents)) = Journal::take_over(id, side)? else {
        return Ok(Found::UnderWay);
    };
    if contents.is_empty() {
        if age_of(id) < FORGET_EMPTY {
            return Ok(Found::UnderWay);
        }
        // Of a haulier that was killed as soon as it had begun.
        journal.remove();
        return Ok(Found::Nothing);
    }
    if !contents.is_of(side) {
        return Ok(Found::Nothing);
    }
    match side {
        Side::Source => recover_source(journal, cgroups),
        Side::Destination => {
            recover_destination(journal, &contents, cgroups)?;
            Ok(Found::Nothing)
        }
    }
}

fn recover_source(journal: Journal, cgroups: &CgroupFs) -> io::Result<Found> {
    end_throttle(journal.contents());
    match rule::source(&journal.contents().source_records()) {
        SourceRecovery::Finish(_) => {
            finish(journal, cgroups)?;
            Ok(Found::Nothing)
        }
        SourceRecovery::Ask(machine) => Ok(Found::Unsettled(Unsettled::new(journal, machine))),
        SourceRecovery::Person => {
            warn!("{}", stranded(journal.id()));
            Ok(Found::Nothing)
        }
    }
}

/// Does what the journal of a source says is left to be done, if it alone decides; then nothing is
/// left of the migration on this host.
pub(crate) fn finish(mut journal: Journal, cgroups: &CgroupFs) -> io::Result<()> {
    let id = journal.id();
    let actions = match rule::source(&journal.contents().source_records()) {
        SourceRecovery::Finish(actions) => actions,
        SourceRecovery::Ask(_) | SourceRecovery::Person => return Ok(()),
    };
    for action in actions {
        match action {
            SourceAction::Record(record) => journal.source(record)?,
            SourceAction::Thaw => {
                info!(%id, "letting the target run on here");
                run_on(id, journal.contents(), cgroups)?;
            }
            SourceAction::Kill => {
                info!(%id, "removing what moved away");
                remove_moved(id, journal.contents(), cgroups)?;
            }
            SourceAction::Freeze
            | SourceAction::SendOffer
            | SourceAction::SendCommit
            | SourceAction::SendAbort
            | SourceAction::Depart
            | SourceAction::Serve
            | SourceAction::Reconnect => unreachable!("no part of a recovery"),
        }
    }
    remove_image_directories(id);
    journal.remove();
    Ok(())
}

fn stranded(id: MigrationId) -> String {
    format!(
        "a target that the other host has lost stands here as it was frozen, the last copy: to let \
         it run on from there, haulier resolve {id} --run-here; to give it up, haulier resolve {id} \
         --discard"
    )
}

/// Lets a frozen target of this host run on here.
fn run_on(id: MigrationId, contents: &Contents, cgroups: &CgroupFs) -> io::Result<()> {
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
    Ok(())
}

/// Removes a frozen target that runs on the other host.
fn remove_moved(id: MigrationId, contents: &Contents, cgroups: &CgroupFs) -> io::Result<()> {
    for group in groups(contents, Side::Source, cgroups) {
        remove_with_tasks(&group);
    }
    // Only an address that is gone may be talked to again: two hosts must not answer for it. Until
    // then lock and journal stay, and the next recovery tries again.
    for address in addresses(contents, Side::Source) {
        network::remove(&address).map_err(io::Error::other)?;
    }
    lift(id);
    Ok(())
}

fn recover_destination(
    mut journal: Journal,
    contents: &Contents,
    cgroups: &CgroupFs,
) -> io::Result<()> {
    let id = journal.id();
    // Whoever used it is gone.
    remove_image_directories(id);
    let addresses = addresses(contents, Side::Destination);
    let groups = groups(contents, Side::Destination, cgroups);
    let records = contents.destination_records();
    let mut next = rule::destination(&records, None);
    if next == DestinationRecovery::AskGuard {
        let mut live = false;
        let seen = guard::fate(id)?;
        for group in &groups {
            live |= group.is_populated().map_err(io::Error::other)?;
        }
        next = rule::destination(&records, Some(seen.of_tasks(live)));
    }
    let actions = match next {
        DestinationRecovery::Settled => {
            if age_of(id) > KEEP_SETTLED {
                journal.remove();
            }
            return Ok(());
        }
        DestinationRecovery::AskGuard => return Ok(()),
        DestinationRecovery::Finish(actions) => actions,
    };
    for action in actions {
        match action {
            DestinationAction::Record(record) => journal.destination(record)?,
            DestinationAction::Thaw => {
                info!(%id, "the target is this host's: letting it run");
                let_run(id, &groups, &addresses)?;
            }
            DestinationAction::Kill => {
                info!(%id, "removing what will not run here");
                remove(id, &groups, &not_others(id, &addresses, cgroups));
            }
            DestinationAction::SendPrepared
            | DestinationAction::SendHeld
            | DestinationAction::SendResumed
            | DestinationAction::SendComplete
            | DestinationAction::SendLost
            | DestinationAction::SendRefused => unreachable!("no part of a recovery"),
        }
    }
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

/// Of the addresses that a migration was to bring here, those that no other one has brought since, with a
/// target that lives: the journal says from before it is added that it is to be removed.
fn not_others(id: MigrationId, addresses: &[MoveIp], cgroups: &CgroupFs) -> Vec<MoveIp> {
    let mut own = addresses.to_vec();
    for other in journal::all().into_iter().filter(|other| *other != id) {
        // What cannot be read is told where it is recovered.
        let Ok(Some(contents)) = journal::read(other) else {
            continue;
        };
        let mut groups = groups(&contents, Side::Destination, cgroups).into_iter();
        if groups.any(|group| group.is_populated().is_ok_and(|populated| populated)) {
            let theirs = self::addresses(&contents, Side::Destination);
            own.retain(|address| theirs.iter().all(|of| of.ip() != address.ip()));
        }
    }
    own
}

/// Removes what a target that will not run here has on this host.
fn remove(id: MigrationId, groups: &[Cgroup], addresses: &[MoveIp]) {
    if let Err(error) = network::silence(&id.to_string(), addresses) {
        warn!(%id, %error, "network lock");
    }
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

/// The tasks that a source's journal says are its target's.
pub(crate) fn tasks(journal: &Journal, cgroups: &CgroupFs) -> Vec<u32> {
    let groups = groups(journal.contents(), Side::Source, cgroups).into_iter();
    let pids = groups.flat_map(|group| group.pids().unwrap_or_default());
    pids.filter_map(|pid| u32::try_from(pid).ok()).collect()
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

/// Has processes that are about to be killed say nothing to their TCP peers.
pub(crate) fn hush(pids: impl IntoIterator<Item = i32>) {
    for pid in pids {
        if let Err(error) = network::begin_repair_of(pid) {
            debug!(pid, %error, "its peers may see the end of their connections");
        }
    }
}

fn remove_with_tasks(group: &Cgroup) {
    hush(group.pids().unwrap_or_default());
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
    let modified = fs::metadata(journal::file_of(id)).and_then(|m| m.modified());
    modified.map_or(Duration::ZERO, |then| age(then, SystemTime::now()))
}

/// How old something is by this host's clock, which may have been set meanwhile: what seems to come
/// from the future is new. It only says how long what is settled is kept, which nobody decides by.
fn age(then: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(then).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_before_the_clock_was_set_back_is_kept() {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        assert_eq!(age(now + hour, now), Duration::ZERO);
        assert_eq!(age(now + KEEP_SETTLED * 2, now), Duration::ZERO);
        assert_eq!(
            age(
                SystemTime::UNIX_EPOCH + KEEP_SETTLED,
                SystemTime::UNIX_EPOCH
            ),
            Duration::ZERO
        );
        assert_eq!(age(now - hour, now), hour);
    }
}
