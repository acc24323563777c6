//! The journal of a migration on this host: what was decided and what was taken, on disk before it
//! takes effect.
//!
//! A file `/var/lib/haulier/<id>/journal`, of which [`lines`] has the format. Whoever works on a
//! migration holds a lock on it, so that nobody recovers what is still alive.

mod lines;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_proto::id::MigrationId;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;
use thiserror::Error;

pub use haulier_engine::recovery::Decision;

pub use self::lines::{Contents, Damage, Entry, Holding, Side};
use crate::directories::{STATE, state_directory};
use crate::guard;

/// How long a recovery may hold the lock of a journal that has just been created.
const GLANCE: Duration = Duration::from_secs(5);

/// Bytes that a journal gets at its beginning, so that a disk that fills up later takes nothing from
/// it. Most journals have less than one kilobyte.
const RESERVE: u64 = 16 << 10;

/// A journal could not be written. The kind is that of its cause.
#[derive(Debug, Error)]
#[error("writing the journal {}", path.display())]
pub struct Unwritten {
    /// The journal.
    path: PathBuf,
    /// The kernel's answer.
    #[source]
    source: io::Error,
}

/// The journal of one migration, open for appending and locked.
#[derive(Debug)]
pub struct Journal {
    id: MigrationId,
    side: Side,
    folder: PathBuf,
    file: File,
    contents: Contents,
    /// Bytes of the file that are whole.
    length: u64,
    /// More than those may be in the file, of an entry that failed.
    is_torn: bool,
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
        let unwritten = |source| Unwritten::of(file_of(id), source);
        let created = fs::DirBuilder::new().mode(0o700).create(&folder);
        created.map_err(unwritten)?;
        Journal::create(id, side, folder).map_err(|error| {
            forget(id);
            unwritten(error)
        })
    }

    fn create(id: MigrationId, side: Side, folder: PathBuf) -> io::Result<Journal> {
        let mut options = OpenOptions::new();
        options.append(true).create_new(true).mode(0o600);
        let file = options.open(folder.join("journal"))?;
        let journal = Journal::empty(id, side, folder, file);
        journal.reserve()?;
        journal.lock_new()?;
        // A recovery whose clock is ahead may have taken it for one that was given up.
        if journal.file.metadata()?.nlink() == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        File::open(&journal.folder)?.sync_all()?;
        File::open(STATE)?.sync_all()?;
        Ok(journal)
    }

    fn empty(id: MigrationId, side: Side, folder: PathBuf, file: File) -> Journal {
        Journal {
            id,
            side,
            folder,
            file,
            contents: Contents::default(),
            length: 0,
            is_torn: false,
        }
    }

    /// Sees to it that what is appended finds room, where the file system can promise that.
    fn reserve(&self) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, RESERVE) {
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
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
        let mut journal = Journal::empty(id, side, folder, file);
        match journal.lock() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        // Whoever worked on it may have brought it to its end, and removed it, since it was opened.
        if journal.file.metadata()?.nlink() == 0 {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        journal.file.read_to_end(&mut bytes)?;
        let parsed = lines::parse(&bytes).map_err(damaged)?;
        journal.length = parsed.whole as u64;
        journal.is_torn = parsed.whole < bytes.len();
        journal.contents = parsed.contents.clone();
        Ok(Some((journal, parsed.contents)))
    }

    /// Appends a record of the source and waits until it is on disk.
    ///
    /// # Errors
    /// If it is not; then it must not take effect.
    pub fn source(&mut self, record: SourceRecord) -> io::Result<()> {
        self.append(Entry::Source(record))
    }

    /// Appends a record of the destination and waits until it is on disk.
    ///
    /// # Errors
    /// If it is not; then it must not take effect.
    pub fn destination(&mut self, record: DestinationRecord) -> io::Result<()> {
        self.append(Entry::Destination(record))
    }

    /// Notes what is about to be taken, and waits until that is on disk.
    ///
    /// # Errors
    /// If it is not; then it must not be taken.
    pub fn hold(&mut self, holding: &Holding) -> io::Result<()> {
        self.append(Entry::Holding(self.side, holding.clone()))
    }

    /// What it says by now.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Whether a person waits for the lock, to settle the migration. What only asks for the
    /// destination's answer gives way.
    pub fn is_wanted(&self) -> bool {
        wish_of(self.id).exists()
    }

    /// The migration.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// Removes the journal, once nobody can ask about the migration any more.
    pub fn remove(self) {
        forget(self.id);
    }

    fn append(&mut self, entry: Entry) -> io::Result<()> {
        let text = entry.text();
        if text.contains('\n') {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let lines = lines::lines(self.length, &text);
        if self.is_torn {
            let cut = self.file.set_len(self.length);
            cut.map_err(|source| Unwritten::of(file_of(self.id), source))?;
            self.is_torn = false;
        }
        let written = self.file.write_all(lines.as_bytes());
        match written.and_then(|()| self.file.sync_data()) {
            Ok(()) => {
                self.length += lines.len() as u64;
                self.contents.push(entry);
                Ok(())
            }
            Err(error) => {
                // Nobody is to read as done what was not done.
                self.is_torn = self.file.set_len(self.length).is_err();
                Err(Unwritten::of(file_of(self.id), error))
            }
        }
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

impl Unwritten {
    fn of(path: PathBuf, source: io::Error) -> io::Error {
        io::Error::new(source.kind(), Unwritten { path, source })
    }
}

/// Removes what there is of a journal.
fn forget(id: MigrationId) {
    let _ = fs::remove_file(file_of(id));
    let _ = fs::remove_file(guard::verdict_file(id));
    let _ = fs::remove_file(guard::log_file(id));
    let _ = fs::remove_file(wish_of(id));
    // Kept logs keep the folder.
    let _ = fs::remove_dir(state_directory(id));
}

/// A person's wish for the lock of a journal, as long as it exists.
#[derive(Debug)]
pub struct Wanted(PathBuf);

impl Wanted {
    /// Makes the wish known.
    ///
    /// # Errors
    /// If it cannot be written beside the journal.
    pub fn want(id: MigrationId) -> io::Result<Wanted> {
        let path = wish_of(id);
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Wanted(path))
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn wish_of(id: MigrationId) -> PathBuf {
    state_directory(id).join("wanted")
}

/// Reads what this host, as the destination, decided about a migration; `None` if it has no
/// journal of it.
///
/// # Errors
/// If there is one that cannot be read.
pub fn decision(id: MigrationId) -> io::Result<Option<Decision>> {
    Ok(read(id)?
        .filter(|contents| contents.is_of(Side::Destination))
        .map(|c| c.decision()))
}

/// What tells a journal from what it was before: its number and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u64, u64);

/// The mark of a journal as it is now.
pub(crate) fn mark(id: MigrationId) -> io::Result<Mark> {
    let file = fs::metadata(file_of(id))?;
    Ok(Mark(file.ino(), file.len()))
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

/// What the journal of a migration says at this moment; `None` if there is none.
///
/// # Errors
/// If there is one that cannot be read; [`Damage`] is the reason if it is damaged.
pub fn read(id: MigrationId) -> io::Result<Option<Contents>> {
    match fs::read(file_of(id)) {
        Ok(bytes) => parse(&bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the bytes of a journal say.
///
/// # Errors
/// [`Damage`], as the source of the error.
pub(crate) fn parse(bytes: &[u8]) -> io::Result<Contents> {
    Ok(lines::parse(bytes).map_err(damaged)?.contents)
}

/// The lines that a journal of so many bytes gets for one more entry: for tests and tools that have
/// to write one by hand.
pub fn lines_for(before: u64, entry: &Entry) -> String {
    lines::lines(before, &entry.text())
}

/// The process that works on a migration, as the kernel knows the holder of its lock; `None` if
/// nobody does, or the kernel does not tell.
pub fn worker(id: MigrationId) -> Option<i32> {
    let journal = fs::metadata(file_of(id)).ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let mut pids = locks
        .lines()
        .filter_map(|line| lock_holder(line, journal.ino()));
    // Of files on other file systems some have the same number.
    pids.find(|pid| has_open(*pid, &journal))
}

/// The file of a journal.
pub fn file_of(id: MigrationId) -> PathBuf {
    state_directory(id).join("journal")
}

/// `1: FLOCK  ADVISORY  WRITE 708 08:01:393217 0 EOF`: the process number, if it is of that file.
fn lock_holder(line: &str, inode: u64) -> Option<i32> {
    let mut words = line.split_ascii_whitespace().skip(1);
    if (words.next()?, words.next()?, words.next()?) != ("FLOCK", "ADVISORY", "WRITE") {
        return None;
    }
    let pid = words.next()?.parse().ok()?;
    let of = words.next()?.rsplit(':').next()?.parse::<u64>().ok()?;
    (of == inode).then_some(pid)
}

fn has_open(pid: i32, file: &fs::Metadata) -> bool {
    let open = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd"));
    open.into_iter().flatten().flatten().any(|entry| {
        fs::metadata(entry.path())
            .is_ok_and(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    })
}

fn damaged(damage: Damage) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, damage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_who_holds_a_lock() {
        let line = "3: FLOCK  ADVISORY  WRITE 708 08:01:393217 0 EOF";
        assert_eq!(lock_holder(line, 393_217), Some(708));
        assert_eq!(lock_holder(line, 393_218), None);
        for other in [
            "3: -> FLOCK  ADVISORY  WRITE 708 08:01:393217 0 EOF",
            "3: FLOCK  ADVISORY  READ 708 08:01:393217 0 EOF",
            "3: POSIX  ADVISORY  WRITE 708 08:01:393217 0 EOF",
            "",
        ] {
            assert_eq!(lock_holder(other, 393_217), None, "{other}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let about = file.as_file().metadata().unwrap();
        assert!(has_open(std::process::id() as i32, &about));
        drop(file);
        assert!(!has_open(std::process::id() as i32, &about));
    }
}
