//! The guard's own process.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};

use super::{GuardError, READY, WORD_BYTES, Word, kill_file};

/// How often to look whether the last task is dead.
const LOOK: Duration = Duration::from_millis(5);

/// How often to try again what must not fail.
const AGAIN: Duration = Duration::from_secs(1);

/// How a guard's work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was placed.
    Complete,
    /// The daemon went away before, and every task of the cgroup was killed.
    Killed {
        /// Whether they may have run: the cgroup was not frozen at that moment.
        had_run: bool,
    },
}

/// The work of the process that [`super::Guard::spawn`] starts: holds what the daemon sends over
/// standard input until it says that all is placed, or kills `cgroup` (a directory of cgroup v2);
/// right before that, if there is anybody, it calls `before_kill`.
///
/// # Errors
/// [`GuardError::Cgroup`], [`GuardError::Socket`]; the daemon hears of it and has nothing held.
pub fn run(cgroup: &Path, before_kill: impl FnOnce()) -> Result<Outcome, GuardError> {
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    let mut cgroup = match Cgroup::open(cgroup) {
        Ok(cgroup) => cgroup,
        Err(error) => {
            let number = match &error {
                GuardError::Cgroup { source, .. } => source.raw_os_error(),
                _ => None,
            };
            let mut answer = vec![1];
            answer.extend(number.unwrap_or(0).to_le_bytes());
            say(socket, &answer)?;
            return Err(error);
        }
    };
    // Right only with the right of the system's administrator; without it as likely to be killed
    // for want of memory as anybody.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    say(socket, &[READY])?;
    let mut held = HashMap::new();
    loop {
        match hear(socket) {
            Ok(Some((Word::Hold, id, Some(fd)))) => {
                held.insert(id, fd);
            }
            Ok(Some((Word::Release, id, _))) => {
                held.remove(&id);
            }
            Ok(Some((Word::Complete, ..))) => return Ok(Outcome::Complete),
            // Without a descriptor there is nothing to hold: it does not come from a daemon.
            Ok(Some((Word::Hold, _, None)) | None) | Err(_) => {
                // Nobody but the daemon thaws it, and that is gone.
                let had_run = !cgroup.is_frozen();
                if cgroup.is_populated() {
                    before_kill();
                }
                cgroup.kill();
                // Only now: the last of them closes the memory for good.
                drop(held);
                return Ok(Outcome::Killed { had_run });
            }
        }
    }
}

fn say(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), GuardError> {
    rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(|errno| GuardError::Socket(errno.into()))
}

/// The next word, or `None` if there is nobody to say one.
fn hear(socket: BorrowedFd<'_>) -> Result<Option<(Word, u64, Option<OwnedFd>)>, Errno> {
    let mut bytes = [0; WORD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    if received.bytes != WORD_BYTES {
        return Ok(None);
    }
    let [kind, id @ ..] = bytes;
    let known = [Word::Hold, Word::Release, Word::Complete];
    let word = known.into_iter().find(|word| *word as u8 == kind);
    Ok(word.map(|word| (word, u64::from_le_bytes(id), fd)))
}

/// The files of the cgroup, open from the start: a cgroup of the same name that somebody makes
/// later is another.
struct Cgroup {
    kill: File,
    events: File,
    freeze: File,
}

impl Cgroup {
    fn open(directory: &Path) -> Result<Self, GuardError> {
        let open = |path: std::path::PathBuf, options: &OpenOptions| {
            let opened = options.open(&path);
            opened.map_err(|source| GuardError::Cgroup { path, source })
        };
        let kill = open(kill_file(directory), OpenOptions::new().write(true))?;
        let events = directory.join("cgroup.events");
        let freeze = directory.join("cgroup.freeze");
        Ok(Self {
            kill,
            events: open(events, OpenOptions::new().read(true))?,
            freeze: open(freeze, OpenOptions::new().read(true))?,
        })
    }

    /// Kills everything in it, and goes on until nothing lives: as long as this process holds the
    /// descriptors, a task that cannot be killed stands still at least.
    fn kill(&mut self) {
        loop {
            if let Err(error) = self.kill.write_all(b"1") {
                // It was removed, and can only have been so with nobody in it.
                if is_removed(&error) {
                    return;
                }
                thread::sleep(AGAIN);
                continue;
            }
            let looks = AGAIN.as_millis() / LOOK.as_millis();
            for _ in 0..looks {
                if !self.is_populated() {
                    return;
                }
                thread::sleep(LOOK);
            }
        }
    }

    /// Whether its tasks stand, and have stood until now. The thaw is one write to this file; while
    /// it says "1" nobody has let them run.
    fn is_frozen(&mut self) -> bool {
        let mut events = String::new();
        let mut wanted = String::new();
        let read = self
            .freeze
            .read_to_string(&mut wanted)
            .and_then(|_| self.events.seek(SeekFrom::Start(0)))
            .and_then(|_| self.events.read_to_string(&mut events));
        read.is_ok() && wanted.trim() == "1" && events.lines().any(|line| line == "frozen 1")
    }

    fn is_populated(&mut self) -> bool {
        let mut text = String::new();
        let read = self
            .events
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.events.read_to_string(&mut text));
        match read {
            Ok(_) => !text.lines().any(|line| line == "populated 0"),
            Err(error) => !is_removed(&error),
        }
    }
}

fn is_removed(error: &io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw_os_error) == Some(Errno::NODEV)
}
