//! The journal of a migration on this host: what was decided and what was taken, on disk before it
//! takes effect.
//!
//! Lines of text in `/var/lib/haulier/<id>/journal`: `<side> is <record>` for a step of the
//! hand-over, `<side> has <kind> <value>` for something that is to be given back. Whoever works on
//! a migration holds a lock on its journal, so that nobody recovers what is still alive.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_proto::id::{MigrationId, Secret};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::directories::{STATE, state_directory};
use crate::guard;

/// How long a recovery may hold the lock of a journal that has just been created.
const GLANCE: Duration = Duration::from_secs(5);

/// Which of the two hosts of a migration this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the target comes from.
    Source,
    /// Where it goes to.
    Destination,
}

/// Something that a migration has on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holding {
    /// A cgroup, by its path.
    Cgroup(PathBuf),
    /// An address that moves, as `10.0.0.5/24@eth0`: added here by the destination, removed here by
    /// the source once the target is gone.
    Address(String),
    /// Where CPU time may be taken from the target.
    Throttle(PathBuf),
    /// The destination: whoever takes the migration over asks it, with the secret that the
    /// migration's connections share.
    Peer {
        /// `host:port`.
        address: String,
        /// Shown in every greeting.
        secret: Secret,
    },
}

/// The journal of one migration, open for appending and locked.
#[derive(Debug)]
pub struct Journal {
    id: MigrationId,
    side: Side,
    folder: PathBuf,
    file: File,
}

/// What a journal says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Contents {
    lines: Vec<String>,
}

/// What the destination decided about a migration, as far as its journal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The target is to run on this host.
    Committed,
    /// It does, with all of its memory.
    Done,
    /// It was to, and was lost.
    Lost,
    /// It is not, or was killed before it did.
    Refused,
    /// Nothing was decided yet.
    Open,
}

impl Journal {
    /// Begins the journal of a migration. That one exists already means that the id was used
    /// before.
    ///
    /// # Errors
    /// If it cannot be created and synced.
    pub fn begin(id: MigrationId, side: Side) -> io::Result<Journal> {
        let folder = state_directory(id);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(STATE)?;
        fs::DirBuilder::new().mode(0o700).create(&folder)?;
        let options = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .clone();
        let file = options.open(folder.join("journal"))?;
        let journal = Journal {
            id,
            side,
            folder,
            file,
        };
        journal.lock_new()?;
        File::open(&journal.folder)?.sync_all()?;
        File::open(STATE)?.sync_all()?;
        Ok(journal)
    }

    /// Takes over the journal of a migration that nobody works on any more; `None` if somebody
    /// does, or if there is none.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn take_over(id: MigrationId, side: Side) -> io::Result<Option<(Journal, Contents)>> {
        let folder = state_directory(id);
        let open = OpenOptions::new()
            .append(true)
            .read(true)
            .open(folder.join("journal"));
        let file = match open {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut journal = Journal {
            id,
            side,
            folder,
            file,
        };
        match journal.lock() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut text = String::new();
        journal.file.read_to_string(&mut text)?;
        Ok(Some((journal, Contents::parse(&text))))
    }

    /// Appends a record of the source and waits until it is on disk.
    ///
    /// # Errors
    /// If it is not; then it must not take effect.
    pub fn source(&mut self, record: SourceRecord) -> io::Result<()> {
        self.append(&format!("is {record:?}"))
    }

    /// Appends a record of the destination and waits until it is on disk.
    ///
    /// # Errors
    /// If it is not; then it must not take effect.
    pub fn destination(&mut self, record: DestinationRecord) -> io::Result<()> {
        self.append(&format!("is {record:?}"))
    }

    /// Notes what is about to be taken, and waits until that is on disk.
    ///
    /// # Errors
    /// If it is not; then it must not be taken.
    pub fn hold(&mut self, holding: &Holding) -> io::Result<()> {
        match holding {
            Holding::Cgroup(path) => self.append(&format!("has cgroup {}", path.display())),
            Holding::Address(address) => self.append(&format!("has address {address}")),
            Holding::Throttle(path) => self.append(&format!("has throttle {}", path.display())),
            Holding::Peer { address, secret } => {
                self.append(&format!("has peer {} {address}", secret.to_hex()))
            }
        }
    }

    /// The migration.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// Removes the journal, once nobody can ask about the migration any more.
    pub fn remove(self) {
        let _ = fs::remove_file(self.folder.join("journal"));
        let _ = fs::remove_file(guard::verdict_file(self.id));
        // Kept logs keep the folder.
        let _ = fs::remove_dir(&self.folder);
    }

    fn append(&mut self, text: &str) -> io::Result<()> {
        let side = self.side.word();
        self.file.write_all(format!("{side} {text}\n").as_bytes())?;
        self.file.sync_data()
    }

    /// A recovery that looks between the creation and the lock finds it empty and lets go of it.
    fn lock_new(&self) -> io::Result<()> {
        let deadline = Instant::now() + GLANCE;
        loop {
            match self.lock() {
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
                {
                    thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }

    fn lock(&self) -> io::Result<()> {
        Ok(flock(&self.file, FlockOperation::NonBlockingLockExclusive)?)
    }
}

impl Side {
    fn word(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

impl Contents {
    fn parse(text: &str) -> Contents {
        // A line without its end was cut by a crash: what it records has not taken effect.
        let whole = text
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        Contents {
            lines: whole.map(str::to_owned).collect(),
        }
    }

    /// Whether this host was the given side of the migration.
    pub fn is_of(&self, side: Side) -> bool {
        let word = side.word();
        self.lines
            .iter()
            .any(|line| line.split(' ').next() == Some(word))
    }

    /// Whether the source recorded a step.
    pub fn has_source(&self, record: SourceRecord) -> bool {
        self.has(Side::Source, &format!("is {record:?}"))
    }

    /// Whether the destination recorded a step.
    pub fn has_destination(&self, record: DestinationRecord) -> bool {
        self.has(Side::Destination, &format!("is {record:?}"))
    }

    /// What was taken on this host as the given side, in order.
    pub fn holdings(&self, side: Side) -> Vec<Holding> {
        let prefix = format!("{} has ", side.word());
        let texts = self
            .lines
            .iter()
            .filter_map(|line| line.strip_prefix(&prefix));
        texts
            .filter_map(|text| match text.split_once(' ')? {
                ("cgroup", path) => Some(Holding::Cgroup(PathBuf::from(path))),
                ("address", address) => Some(Holding::Address(address.to_owned())),
                ("throttle", path) => Some(Holding::Throttle(PathBuf::from(path))),
                ("peer", peer) => {
                    let (secret, address) = peer.split_once(' ')?;
                    Some(Holding::Peer {
                        address: address.to_owned(),
                        secret: Secret::from_hex(secret)?,
                    })
                }
                _ => None,
            })
            .collect()
    }

    /// What the destination decided.
    pub fn decision(&self) -> Decision {
        // The latest word first: after the decision to run it come its end, or its loss.
        if self.has_destination(DestinationRecord::Lost) {
            Decision::Lost
        } else if self.has_destination(DestinationRecord::Withdrawn) {
            Decision::Refused
        } else if self.has_destination(DestinationRecord::Done) {
            Decision::Done
        } else if self.has_destination(DestinationRecord::Committed) {
            Decision::Committed
        } else if self.has_destination(DestinationRecord::Refused) {
            Decision::Refused
        } else {
            Decision::Open
        }
    }

    fn has(&self, side: Side, text: &str) -> bool {
        let line = format!("{} {text}", side.word());
        self.lines.contains(&line)
    }
}

/// Reads what this host, as the destination, decided about a migration; `None` if it has no
/// journal of it.
///
/// # Errors
/// If there is one that cannot be read.
pub fn decision(id: MigrationId) -> io::Result<Option<Decision>> {
    let contents = read(&state_directory(id))?;
    Ok(contents
        .filter(|contents| contents.is_of(Side::Destination))
        .map(|c| c.decision()))
}

/// Whether somebody works on a migration at this moment.
pub fn is_under_way(id: MigrationId) -> bool {
    let file = File::open(state_directory(id).join("journal"));
    file.is_ok_and(|file| {
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    })
}

/// The migrations that have a journal on this host.
pub fn all() -> Vec<MigrationId> {
    let entries = fs::read_dir(STATE).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn read(folder: &Path) -> io::Result<Option<Contents>> {
    match fs::read_to_string(folder.join("journal")) {
        Ok(text) => Ok(Some(Contents::parse(&text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_records_of_the_destination_decide() {
        for (text, expected) in [
            ("", Decision::Open),
            ("destination is Receiving\n", Decision::Open),
            (
                "source is Released\ndestination is Receiving\n",
                Decision::Open,
            ),
            (
                "destination is Receiving\ndestination is Committed\n",
                Decision::Committed,
            ),
            (
                "destination is Receiving\ndestination is Refused\n",
                Decision::Refused,
            ),
            (
                "destination is Receiving\ndestination is Committed",
                Decision::Open,
            ),
            (
                "destination is Committed\ndestination is Done\n",
                Decision::Done,
            ),
            (
                "destination is Committed\ndestination is Lost\n",
                Decision::Lost,
            ),
            (
                "destination is Committed\ndestination is Withdrawn\n",
                Decision::Refused,
            ),
        ] {
            assert_eq!(Contents::parse(text).decision(), expected, "{text}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
    }

    #[test]
    fn holdings_are_told_by_side() {
        let text =
            "source has cgroup /sys/fs/cgroup/a b\ndestination has address 10.0.0.5/24@eth0\n";
        let contents = Contents::parse(text);
        assert_eq!(
            contents.holdings(Side::Source),
            [Holding::Cgroup(PathBuf::from("/sys/fs/cgroup/a b"))]
        );
        assert_eq!(
            contents.holdings(Side::Destination),
            [Holding::Address("10.0.0.5/24@eth0".to_owned())]
        );
        let secret = Secret::from_random([0xa7; 32]);
        let text = format!("source has peer {} [::1]:7000\n", secret.to_hex());
        let address = "[::1]:7000".to_owned();
        assert_eq!(
            Contents::parse(&text).holdings(Side::Source),
            [Holding::Peer { address, secret }]
        );
        assert!(contents.is_of(Side::Source) && contents.is_of(Side::Destination));
    }
}
