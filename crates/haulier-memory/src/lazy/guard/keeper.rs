//! The guard's own process.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use haulier_sys::pidfd::{PidfdFlags, pidfd_open};
use haulier_sys::userfaultfd::Userfaultfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use rustix::process::{Pid, Signal, pidfd_send_signal};

use super::strays::Strays;
use super::{GuardError, READY, WORD_BYTES, Word, kill_file};

/// How often to look whether the last task is dead.
const LOOK: Duration = Duration::from_millis(5);

/// How long killed tasks may take to end.
const DEATH: Duration = Duration::from_secs(10);

/// How long the memory of killed tasks may take to go.
const GONE: Duration = Duration::from_millis(100);

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
    let Some(held) = keep(socket, |_| {}) else {
        return Ok(Outcome::Complete);
    };
    // Nobody but the daemon thaws it, and that is gone.
    let had_run = !cgroup.is_frozen();
    if cgroup.is_populated() {
        before_kill();
    }
    cgroup.kill();
    // Only now: the last of them closes the memory for good.
    drop(held);
    Ok(Outcome::Killed { had_run })
}

/// The same for tasks that are in no cgroup of their own: what is killed is every task that has sent
/// a descriptor, and its descendants; then every other that has memory that a descriptor was made for: a
/// child that has left its family stands where it needs a page until it is found, and this goes on until
/// no such memory is left.
///
/// # Errors
/// [`GuardError::Socket`].
pub fn run_for_tasks() -> Result<(), GuardError> {
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    say(socket, &[READY])?;
    let mut tasks = Vec::new();
    let Some(held) = keep(socket, |task| tasks.push(task)) else {
        return Ok(());
    };
    kill(&tasks);
    hold_what_lives(held);
    Ok(())
}

/// Holds each for as long as there is memory that it was made for, and kills whoever has it.
fn hold_what_lives(held: HashMap<u64, OwnedFd>) {
    let held = held.into_values().map(Userfaultfd::from_fd);
    let mut held: Vec<Userfaultfd> = held.filter_map(Result::ok).collect();
    let mut strays = Strays::default();
    let since = Instant::now();
    let mut next = since + GONE;
    loop {
        held.retain(Userfaultfd::has_memory);
        if held.is_empty() {
            return;
        }
        // Who is not found in that time hardly ever will be, and each look reads all of smaps.
        let late = since.elapsed() >= DEATH;
        if Instant::now() >= next {
            strays.kill(&held);
            next = Instant::now() + if late { DEATH } else { AGAIN };
        }
        thread::sleep(if late { AGAIN } else { LOOK });
    }
}

/// Holds what it is given until all is placed; then nothing is left of it. Otherwise the daemon has
/// gone, and here is what is held.
fn keep(socket: BorrowedFd<'_>, mut task: impl FnMut(OwnedFd)) -> Option<HashMap<u64, OwnedFd>> {
    let mut held = HashMap::new();
    loop {
        match hear(socket) {
            Ok(Some((Word::Hold, id, Some(fd), of))) => {
                held.insert(id, fd);
                of.into_iter().for_each(&mut task);
            }
            Ok(Some((Word::Release, id, ..))) => {
                held.remove(&id);
            }
            Ok(Some((Word::Complete, ..))) => return None,
            // Without a descriptor there is nothing to hold: it does not come from a daemon.
            Ok(Some((Word::Hold, _, None, _)) | None) | Err(_) => return Some(held),
        }
    }
}

/// Kills tasks and their descendants, and waits for their end.
fn kill(tasks: &[OwnedFd]) {
    let mut family: Vec<OwnedFd> = tasks.iter().filter_map(|t| t.try_clone().ok()).collect();
    // Stopped they have no more children; those that they have are next, until there are none.
    loop {
        for task in &family {
            let _ = pidfd_send_signal(task, Signal::STOP);
        }
        let pids: Vec<i32> = family.iter().filter_map(pid_of).collect();
        let children: Vec<OwnedFd> = children_of(&pids)
            .into_iter()
            .filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .collect();
        for task in &family {
            // It has ended already, or ends.
            let _ = pidfd_send_signal(task, Signal::KILL);
        }
        if children.is_empty() {
            break;
        }
        family = children;
    }
    let deadline = Instant::now() + DEATH;
    while tasks.iter().any(|task| pid_of(task).is_some()) && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
}

/// The pid of a task that lives.
fn pid_of(task: &OwnedFd) -> Option<i32> {
    let mut fds = [PollFd::new(task, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Readable once it has ended.
    if poll(&mut fds, Some(&now)) != Ok(0) {
        return None;
    }
    let info = format!("/proc/self/fdinfo/{}", task.as_raw_fd());
    let info = std::fs::read_to_string(info).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}

fn children_of(parents: &[i32]) -> Vec<Pid> {
    let Ok(all) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let child = |name: &str| {
        let pid: i32 = name.parse().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in front may have anything in it.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
        let parent: i32 = parent.parse().ok()?;
        parents.contains(&parent).then(|| Pid::from_raw(pid))?
    };
    all.filter_map(|entry| child(entry.ok()?.file_name().to_str()?))
        .collect()
}

fn say(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), GuardError> {
    rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(|errno| GuardError::Socket(errno.into()))
}

/// A word, its number, and what came with it: a userfaultfd and its task.
type Heard = (Word, u64, Option<OwnedFd>, Option<OwnedFd>);

/// The next word, or `None` if there is nobody to say one.
fn hear(socket: BorrowedFd<'_>) -> Result<Option<Heard>, Errno> {
    let mut bytes = [0; WORD_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let (mut fd, mut task) = (None, None);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            (fd, task) = (fds.next(), fds.next());
        }
    }
    if received.bytes != WORD_BYTES {
        return Ok(None);
    }
    let [kind, id @ ..] = bytes;
    let known = [Word::Hold, Word::Release, Word::Complete];
    let word = known.into_iter().find(|word| *word as u8 == kind);
    Ok(word.map(|word| (word, u64::from_le_bytes(id), fd, task)))
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
