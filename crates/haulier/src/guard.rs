//! The guard of missing pages, as a process of this program, and the verdict that it leaves.
//!
//! The verdict stands beside the journal: whoever recovers a target that was committed, and that its
//! haulier has not reported whole, learns from it what became of it. The guard holds a lock on it for
//! as long as it lives, so that nobody decides while it is still killing.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use haulier_engine::recovery::Fate;
use haulier_memory::lazy::guard::{self, Outcome};
use haulier_proto::id::MigrationId;
use haulier_targets::network;
use rustix::fs::{FlockOperation, flock};
use tracing::{error, warn};

use crate::directories::state_directory;
use crate::journal::{self, Side};
use crate::recovery;

/// How long a guard that has lost its daemon may take to kill the tasks.
const END_TIME: Duration = Duration::from_secs(20);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(5);
/// Most bytes of its log that are told. It has a line or two.
const LONGEST_LOG: u64 = 16 << 10;

/// Where the guard of a migration leaves its verdict. It goes with the journal's folder.
pub fn verdict_file(id: MigrationId) -> PathBuf {
    state_directory(id).join("guard")
}

/// Where a guard logs: beside its verdict, since nobody reads its standard error. The file is there
/// once there is something to tell.
#[derive(Debug, Clone)]
pub struct Log(PathBuf);

impl Log {
    /// That of the guard with this verdict.
    pub fn beside(verdict: &Path) -> Log {
        Log(verdict.with_extension("log"))
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600);
        options.open(&self.0)?.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the guard of a migration has logged, a line each.
pub fn complaints(id: MigrationId) -> Vec<String> {
    let mut text = Vec::new();
    if let Ok(file) = File::open(log_file(id)) {
        // What could be read is told.
        let _ = file.take(LONGEST_LOG).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::to_owned).collect()
}

/// Where [`complaints`] stand. It goes with the journal's folder.
pub(crate) fn log_file(id: MigrationId) -> PathBuf {
    Log::beside(&verdict_file(id)).0
}

/// The whole life of a guard of the tasks in `cgroup`, of the migration in whose folder the verdict goes.
///
/// # Errors
/// If it cannot do its work. The process that started it is told as long as it waits for that; the log
/// has it in any case.
pub fn run(cgroup: &Path, verdict: &Path) -> anyhow::Result<()> {
    let done = work(cgroup, verdict);
    done.inspect_err(|error| error!("{error:#}"))
}

fn work(cgroup: &Path, verdict: &Path) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(verdict)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // The room for the verdict is taken now: a disk that is full by then must not cost the target.
    file.write_all(line(OPEN).as_bytes())?;
    let word = match guard::run(cgroup, || silence(cgroup, verdict))? {
        Outcome::Complete => COMPLETE,
        Outcome::Killed { had_run: false } => NEVER_RAN,
        Outcome::Killed { had_run: true } => LOST,
    };
    file.write_all_at(line(word).as_bytes(), 0)?;
    // The word must not come after the loss of power that undoes what follows from it.
    file.sync_all()?;
    Ok(())
}

/// Has the target say nothing to its peers when it is killed: the source's copy may go on with them.
fn silence(cgroup: &Path, verdict: &Path) {
    let pids = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    recovery::hush(pids.lines().filter_map(|pid| pid.parse().ok()));
    let folder = verdict.parent().and_then(Path::file_name);
    let id = folder.and_then(|name| name.to_str()?.parse::<MigrationId>().ok());
    // Without a journal that can be read there is no address to be silent about.
    let Some((id, Ok(Some(contents)))) = id.map(|id| (id, journal::read(id))) else {
        return;
    };
    let addresses = recovery::addresses(&contents, Side::Destination);
    if let Err(error) = network::silence(&id.to_string(), &addresses) {
        warn!(%id, %error, "its peers will see the end of their connections");
    }
}

/// What became of a target, once its guard has ended, as the guard saw it.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if it does not end; else if its verdict cannot be read.
pub fn fate(id: MigrationId) -> io::Result<Fate> {
    let path = verdict_file(id);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Fate::Lost),
        Err(error) => return Err(error),
    };
    let deadline = Instant::now() + END_TIME;
    while flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
        if Instant::now() > deadline {
            let what = format!("the guard that holds {} does not end", path.display());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        thread::sleep(LOOK);
    }
    let mut word = String::new();
    file.read_to_string(&mut word)?;
    Ok(match word.trim_end() {
        COMPLETE => Fate::Complete,
        NEVER_RAN => Fate::NeverRan,
        _ => Fate::Lost,
    })
}

const OPEN: &str = "open";
const COMPLETE: &str = "complete";
const NEVER_RAN: &str = "killed before it ran";
const LOST: &str = "killed with pages missing";

/// A verdict as it stands in its file. All are of one length: each takes the place of the one before.
fn line(word: &str) -> String {
    format!("{word:<31}\n")
}
