//! What there is of migrations on this host, in words: `haulier status`.

use std::fs;
use std::io::{self, Write};

use haulier_engine::journal::SourceRecord;
use haulier_engine::recovery::{self as rule, Decision, DestinationRecovery};
use haulier_proto::id::MigrationId;
use serde::Serialize;

use crate::guard;
use crate::journal::{self, Contents, Holding, Side};

/// One side of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The migration.
    pub id: String,
    /// `source` or `destination`; `None` if the journal cannot be read, or says nothing yet.
    pub side: Option<&'static str>,
    /// How it stands.
    pub state: String,
    /// Whether it waits for somebody on this host.
    pub needs_you: bool,
    /// What to do about it.
    pub remedy: Option<String>,
    /// The process that works on it.
    pub worker: Option<i32>,
    /// The steps of the hand-over that were recorded, in order.
    pub records: Vec<&'static str>,
    /// What it has on this host.
    pub holdings: Vec<String>,
    /// What the guard of its missing pages could not do.
    pub guard: Vec<String>,
}

/// Every migration that has a journal on this host.
pub fn all() -> Vec<Status> {
    let mut ids = journal::all();
    ids.sort();
    ids.into_iter().flat_map(of).collect()
}

/// One migration; nothing if it has no journal here.
pub fn of(id: MigrationId) -> Vec<Status> {
    let worker = journal::worker(id);
    // Not everywhere does the kernel tell who.
    let is_under_way = worker.is_some() || journal::is_under_way(id);
    let contents = match journal::read(id) {
        Ok(None) => return Vec::new(),
        Ok(Some(contents)) => contents,
        Err(error) => return vec![unreadable(id, &error)],
    };
    let sides = [Side::Source, Side::Destination].into_iter();
    let sides: Vec<Side> = sides.filter(|side| contents.is_of(*side)).collect();
    if sides.is_empty() {
        let state = "it has just begun, or was killed when it had";
        return vec![Status::new(id, None, state, worker)];
    }
    let status = |side| {
        let mut status = match side {
            Side::Source => of_source(id, &contents, is_under_way),
            Side::Destination => of_destination(id, &contents, is_under_way),
        };
        status.worker = worker;
        if let Some(pid) = worker.filter(|pid| is_stopped(*pid)) {
            status.state = format!(
                "{}; process {pid}, which works on it, is stopped",
                status.state
            );
            status = status.remedy(format!(
                "kill -CONT {pid}; or end it, kill -KILL {pid}, and then {RECOVER}"
            ));
        }
        if side == Side::Destination {
            status.guard = guard::complaints(id);
        }
        status.holdings = contents.holdings(side).iter().map(describe).collect();
        status
    };
    sides.into_iter().map(status).collect()
}

impl Status {
    fn new(id: MigrationId, side: Option<Side>, state: &str, worker: Option<i32>) -> Status {
        Status {
            id: id.to_string(),
            side: side.map(Side::word),
            state: state.to_owned(),
            needs_you: false,
            remedy: None,
            worker,
            records: Vec::new(),
            holdings: Vec::new(),
            guard: Vec::new(),
        }
    }

    fn remedy(mut self, remedy: String) -> Status {
        self.needs_you = true;
        self.remedy = Some(remedy);
        self
    }

    /// Some lines for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let side = self.side.unwrap_or("side unknown");
        writeln!(out, "migration {}, {side}", self.id)?;
        writeln!(out, "  {}", self.state)?;
        if let Some(remedy) = &self.remedy {
            writeln!(out, "  what to do: {remedy}")?;
        }
        if !self.records.is_empty() {
            writeln!(out, "  recorded: {}", self.records.join(", "))?;
        }
        for holding in &self.holdings {
            writeln!(out, "  has {holding}")?;
        }
        for line in &self.guard {
            writeln!(out, "  its guard says: {line}")?;
        }
        if let Some(pid) = self.worker {
            writeln!(out, "  process {pid} works on it")?;
        }
        Ok(())
    }
}

fn unreadable(id: MigrationId, error: &io::Error) -> Status {
    let file = journal::file_of(id);
    let state = format!("its journal cannot be read, and nothing is done by it: {error}");
    Status::new(id, None, &state, journal::worker(id)).remedy(format!(
        "find out where its process runs, settle it by hand (its cgroup is named after the \
         migration, its nftables tables haulier_{id}), and then remove {}",
        file.display()
    ))
}

const RECOVER: &str = "haulier recover";

fn of_source(id: MigrationId, contents: &Contents, is_under_way: bool) -> Status {
    let records = contents.source_records();
    let has = |record| records.contains(&record);
    let new = |state: &str| Status::new(id, Some(Side::Source), state, None);
    let peer = peer(contents);
    let by_hand = format!(
        "if it surely does not run there and never will, haulier resolve {id} --run-here; if it \
         does, or is to be given up, haulier resolve {id} --discard"
    );
    let ending = |state: &str| match is_under_way {
        true => new(state),
        false => {
            new(&format!("{state}, and the haulier that did it is gone")).remedy(RECOVER.to_owned())
        }
    };
    let mut status = if has(SourceRecord::RolledBack) {
        ending("it runs here; what is left of the attempt is being removed")
    } else if has(SourceRecord::Released) {
        ending("it has moved, or was given up; what is left here is being removed")
    } else if has(SourceRecord::Returning) {
        ending("it is to run on here")
    } else if has(SourceRecord::Stranded) {
        new(&format!(
            "{peer} has lost it; as it was frozen it stands here, the last copy"
        ))
        .remedy(format!(
            "to let it run on from there, haulier resolve {id} --run-here (what it did at the \
             destination is lost); to give it up, haulier resolve {id} --discard"
        ))
    } else if has(SourceRecord::Serving) && is_under_way {
        new(&format!(
            "it runs at {peer}, and its memory is brought there from here"
        ))
    } else if has(SourceRecord::Serving) {
        new(&format!(
            "it runs at {peer}, but lacks memory that is here, and nobody brings it"
        ))
        .remedy(format!(
            "{RECOVER}, or start haulier serve here; if {peer} is gone for good: {by_hand}"
        ))
    } else if has(SourceRecord::InDoubt) && is_under_way {
        new(&format!(
            "in doubt: it stands frozen here, and may be running at {peer}, which is being asked"
        ))
        .remedy(format!(
            "see to it that {peer} can be reached; or: {by_hand}"
        ))
    } else if has(SourceRecord::InDoubt) {
        new(&format!(
            "in doubt: it stands frozen here, and may be running at {peer}, which nobody asks"
        ))
        .remedy(format!(
            "{RECOVER}, or start haulier serve here, which goes on asking; or: {by_hand}"
        ))
    } else if has(SourceRecord::Freezing) {
        ending("it stands still here for the switchover")
    } else {
        ending("it runs here while it is got ready and its memory is sent")
    };
    status.records = records.iter().map(|record| record.word()).collect();
    status
}

fn of_destination(id: MigrationId, contents: &Contents, is_under_way: bool) -> Status {
    let records = contents.destination_records();
    let state = match (rule::decision(&records), is_under_way) {
        (Decision::Done, _) => "it has arrived here, with all of its memory",
        (Decision::Committed, true) => "it runs here; its memory is still arriving",
        (Decision::Committed, false) => {
            "it was to run here; its haulier was killed before all of its memory had arrived"
        }
        (Decision::Lost, _) => {
            "it was lost here before all of its memory had arrived; its source has the last copy"
        }
        (Decision::Refused, _) => "it does not run here, and will not",
        (Decision::Open, true) => "it is being received; it runs on its source",
        (Decision::Open, false) => "it was being received when its haulier was killed",
    };
    let mut status = Status::new(id, Some(Side::Destination), state, None);
    if rule::destination(&records, None) != DestinationRecovery::Settled && !is_under_way {
        status = status.remedy(RECOVER.to_owned());
    }
    status.records = records.iter().map(|record| record.word()).collect();
    status
}

fn peer(contents: &Contents) -> String {
    let holdings = contents.holdings(Side::Source).into_iter();
    let mut peers = holdings.filter_map(|holding| match holding {
        Holding::Peer { address, .. } => Some(address),
        Holding::Cgroup(_) | Holding::Address(_) | Holding::Throttle(_) => None,
    });
    peers
        .next_back()
        .unwrap_or_else(|| "the destination".to_owned())
}

/// Whether a signal has stopped a process. Nobody else works on its migration for as long as it lives.
fn is_stopped(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tT"))
}

/// Without what is secret.
fn describe(holding: &Holding) -> String {
    match holding {
        Holding::Cgroup(path) => format!("cgroup {}", path.display()),
        Holding::Address(address) => format!("address {address}"),
        Holding::Throttle(path) => format!("throttle {}", path.display()),
        Holding::Peer { address, .. } => format!("destination {address}"),
    }
}

#[cfg(test)]
mod tests {
    use haulier_engine::journal::DestinationRecord;

    use super::*;
    use crate::journal::Entry;

    fn id() -> MigrationId {
        MigrationId::from_random([0xee; 8])
    }

    fn contents(entries: Vec<Entry>) -> Contents {
        let mut contents = Contents::default();
        for entry in entries {
            contents.push(entry);
        }
        contents
    }

    #[test]
    fn a_source_says_what_it_waits_for() {
        use SourceRecord::{Freezing, InDoubt, Released, Returning, RolledBack, Serving, Stranded};
        for (records, under_way, needs_you, words) in [
            (&[][..], true, false, "it runs here while"),
            (&[][..], false, true, "the haulier that did it is gone"),
            (&[Freezing][..], true, false, "stands still here"),
            (&[Freezing][..], false, true, "stands still here"),
            (&[Freezing, InDoubt][..], true, true, "in doubt"),
            (&[Freezing, InDoubt][..], false, true, "which nobody asks"),
            (&[InDoubt, Serving][..], true, false, "is brought there"),
            (&[InDoubt, Serving][..], false, true, "nobody brings it"),
            (&[InDoubt, Stranded][..], false, true, "the last copy"),
            (
                &[InDoubt, Stranded, Returning][..],
                false,
                true,
                "to run on here",
            ),
            (&[InDoubt, Released][..], true, false, "has moved"),
            (&[Freezing, RolledBack][..], false, true, "it runs here"),
        ] {
            let entries = records.iter().copied().map(Entry::Source).collect();
            let status = of_source(id(), &contents(entries), under_way);
            assert!(status.state.contains(words), "{status:?}");
            assert_eq!(status.needs_you, needs_you, "{status:?}");
            assert_eq!(status.remedy.is_some(), needs_you, "{status:?}");
            assert_eq!(status.records.len(), records.len());
        }
    }

    #[test]
    fn a_destination_says_what_is_left_to_be_done() {
        use DestinationRecord::{Committed, Done, Receiving, Refused, Removed};
        for (records, under_way, needs_you) in [
            (&[Receiving][..], true, false),
            (&[Receiving][..], false, true),
            (&[Receiving, Committed][..], true, false),
            (&[Receiving, Committed][..], false, true),
            (&[Receiving, Committed, Done][..], false, false),
            (&[Receiving, Refused][..], false, true),
            (&[Receiving, Refused, Removed][..], false, false),
        ] {
            let entries = records.iter().copied().map(Entry::Destination).collect();
            let status = of_destination(id(), &contents(entries), under_way);
            assert_eq!(status.needs_you, needs_you, "{status:?}");
        }
    }

    #[test]
    fn a_secret_is_not_told() {
        let secret = haulier_proto::id::Secret::from_random([0xa7; 32]);
        let hex = secret.to_hex();
        let address = "10.0.0.2:7000".to_owned();
        let told = describe(&Holding::Peer { address, secret });
        assert_eq!(told, "destination 10.0.0.2:7000");
        assert!(!told.contains(&hex));
    }
}
