//! A process of its own that keeps a dump from killing its tasks when the proxy dies.
//!
//! To a page server of CRIU the end of its connection is success. So a keeper holds a duplicate: while
//! it does there is no end. When the proxy goes without the word that all is over, the keeper has the
//! dump fail if no restore can have begun, so that the tasks run on; otherwise it stays, and with it
//! the tasks as they are, frozen, until a person decides: it can be asked by [`crate::settle`].
//! A page server that nobody has connected to yet it connects to itself.

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use haulier_criu::page_server;
use haulier_images::name::ImageName;
use haulier_sys::pidfd::{PidfdFlags, pidfd_open};
use haulier_sys::seclusion::seclude;
use haulier_sys::wait::Wait;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::Pid;

use crate::control;
use crate::local::LocalListener;
use crate::message;
use crate::settle::{self, Answer, MOVING, Question, Standing, Verdict};

/// How long it may take to start.
const START: Duration = Duration::from_secs(10);
/// How long a dump is waited for of which it is not known whether it lives.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether it listens.
const RETRY: Duration = Duration::from_millis(20);
/// How long CRIU may take to end once it is told how.
const END: Duration = Duration::from_secs(60);
/// How long who asks may take.
const ASKING: Duration = Duration::from_secs(2);
/// Longest word: a directory.
const LONGEST: usize = 8192;

const READY: u8 = b'r';
/// Whose dump it is; the target's name and its directory follow.
const PLACE: u8 = b'p';
/// Where the page server will listen; the address follows.
const SERVER: u8 = b's';
/// Comes with the dump, as a pidfd.
const DUMP: u8 = b'd';
/// Comes with the connection to the page server.
const HOLD: u8 = b'h';
/// A restore may have begun; the number of the snapshot follows.
const BEGUN: u8 = b'b';
/// A person has to decide; the reason follows.
const DOUBT: u8 = b'?';
/// The dump's end is decided, and said to it.
const OVER: u8 = b'o';

/// What a keeper knows.
#[derive(Default)]
struct Known {
    target: String,
    directory: PathBuf,
    server: Option<String>,
    dump: Option<OwnedFd>,
    connection: Option<OwnedFd>,
    /// The snapshot whose restore has begun, and when.
    begun: Option<(u64, Option<Instant>)>,
    doubt: Option<String>,
    /// Where people ask.
    front: Option<LocalListener>,
}

/// The work of the process that [`crate::proxy::LazyPages::keeper`] starts: standard input is the
/// proxy's.
///
/// # Errors
/// What the socket says.
pub(crate) fn run() -> io::Result<()> {
    let stdin = io::stdin();
    rustix::net::send(stdin.as_fd(), &[READY], SendFlags::NOSIGNAL)?;
    let mut proxy = Some(stdin.as_fd());
    let mut known = Known::default();
    loop {
        let [said, asked, ended] = known.wait(proxy)?;
        if let (Some(from), true) = (proxy, said) {
            let (word, fd) = hear(from).unwrap_or_default();
            if word.first() == Some(&OVER) {
                return Ok(());
            }
            if known.learn(&word, fd) {
                continue;
            }
            // It is gone.
            if known.begun.is_none() {
                known.refuse();
                return Ok(());
            }
            proxy = None;
            let gone = "the image-proxy was ended";
            known.doubt.get_or_insert_with(|| gone.to_owned());
            known.listen();
        }
        if ended || (asked && known.answer()) {
            return Ok(());
        }
    }
}

impl Known {
    /// Waits for the proxy, for one who asks, or for the end of CRIU where that is not the proxy's to see:
    /// which of them it is.
    fn wait(&self, proxy: Option<BorrowedFd<'_>>) -> io::Result<[bool; 3]> {
        let connection = self.connection.as_ref().filter(|_| self.doubt.is_some());
        let watched = [
            (proxy, PollFlags::IN),
            (self.front.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (connection.map(AsFd::as_fd), PollFlags::RDHUP),
        ];
        let mut fds: Vec<_> = watched
            .iter()
            .filter_map(|(fd, events)| Some(PollFd::from_borrowed_fd((*fd)?, *events)))
            .collect();
        loop {
            match poll(&mut fds, None) {
                Err(Errno::INTR) => {}
                Ok(_) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut happened = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(watched.map(|(fd, _)| fd.is_some() && happened.next() == Some(true)))
    }

    /// Takes a word in. False if it is none.
    fn learn(&mut self, word: &[u8], fd: Option<OwnedFd>) -> bool {
        let Some((kind, rest)) = word.split_first() else {
            return false;
        };
        match *kind {
            PLACE => {
                // No target's name has a slash, and the directory begins with one.
                let slash = rest.iter().position(|byte| *byte == b'/');
                let (target, directory) = rest.split_at(slash.unwrap_or(rest.len()));
                self.target = String::from_utf8_lossy(target).into_owned();
                self.directory = OsStr::from_bytes(directory).into();
            }
            SERVER => self.server = String::from_utf8(rest.to_vec()).ok(),
            DUMP => self.dump = fd,
            HOLD => self.connection = fd,
            BEGUN => {
                let snapshot = rest.try_into().map_or(0, u64::from_le_bytes);
                self.begun = Some((snapshot, Some(Instant::now())));
                self.listen();
            }
            DOUBT => {
                self.doubt = Some(String::from_utf8_lossy(rest).into_owned());
                self.listen();
            }
            _ => return false,
        }
        true
    }

    /// Lets people ask. Where that cannot be had, they can still kill.
    fn listen(&mut self) {
        if self.front.is_none() {
            let name = settle::socket_of(&self.name());
            self.front = LocalListener::bind(&self.directory, &name).ok();
        }
    }

    fn name(&self) -> String {
        process::id().to_string()
    }

    /// Has the dump fail: no restore can have begun.
    fn refuse(self) {
        match self.connection {
            Some(connection) => page_server::refuse(connection),
            None => {
                if let Some(connection) = self.server.and_then(|at| connect(&at, &self.dump)) {
                    page_server::refuse(connection);
                }
            }
        }
    }

    /// Answers one who asks. Whether the dump has ended.
    fn answer(&self) -> bool {
        let Some(Ok(Some(socket))) = self.front.as_ref().map(LocalListener::accept) else {
            return false;
        };
        let question = control::receive(&socket, &Wait::uncancellable(ASKING));
        let answer = match question {
            Ok(Question::Standing) => Answer::Standing(self.standing()),
            Ok(Question::Settle(verdict)) => match self.settle(verdict) {
                Ok(()) => Answer::Settled(self.standing()),
                Err(why) => Answer::No(why),
            },
            Err(error) => Answer::No(format!("the question makes no sense: {error}")),
        };
        // Who does not wait for the answer does not want it.
        let _ = control::send(&socket, &answer, &Wait::uncancellable(ASKING));
        matches!(answer, Answer::Settled(_))
    }

    fn standing(&self) -> Standing {
        let (snapshot, since) = self.begun.unwrap_or_default();
        Standing {
            name: self.name(),
            target: self.target.clone(),
            snapshot,
            seconds: since.map_or(0, |since| since.elapsed().as_secs()),
            doubt: self.doubt.clone(),
        }
    }

    /// Has the dump end as a person says.
    fn settle(&self, verdict: Verdict) -> Result<(), String> {
        let (Some(connection), Some(_)) = (&self.connection, &self.doubt) else {
            return Err(MOVING.to_owned());
        };
        match verdict {
            Verdict::RunHere => page_server::refuse(connection),
            Verdict::Discard => page_server::end(connection),
        }
        let wait = Wait::uncancellable(END);
        let late = || "CRIU was told how to end, and has not ended; its log says why".to_owned();
        page_server::await_end(connection, &wait).map_err(|_| late())?;
        match &self.dump {
            Some(dump) => wait.readable(dump).map_err(|_| late()),
            None => Ok(()),
        }
    }
}

/// A word, and what came with it; an empty one if the proxy is gone.
fn hear(proxy: BorrowedFd<'_>) -> Result<(Vec<u8>, Option<OwnedFd>), Errno> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(proxy, slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    bytes.truncate(received.bytes);
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok((bytes, fd))
}

/// Connects to a dump's page server when it listens; nothing if the dump ends before.
fn connect(address: &str, dump: &Option<OwnedFd>) -> Option<OwnedFd> {
    let since = Instant::now();
    loop {
        if let Ok(Some(connection)) = page_server::connect(address) {
            return Some(connection);
        }
        let over = match dump {
            Some(dump) => has_ended(dump),
            None => since.elapsed() >= PATIENCE,
        };
        if over {
            return None;
        }
        thread::sleep(RETRY);
    }
}

/// Whether the process of a pidfd has ended.
pub(crate) fn has_ended(process: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}

/// A process by its pid, if it can be seen from here.
pub(crate) fn process(pid: i32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}

/// A keeper at work. Dropped without a word it does its duty.
#[derive(Debug)]
pub(crate) struct Keeper {
    socket: OwnedFd,
    process: Child,
}

impl Keeper {
    /// For a dump of this target, whose directory it is.
    pub(crate) fn start(
        mut command: Command,
        target: &ImageName,
        directory: &Path,
    ) -> io::Result<Keeper> {
        let directory = std::path::absolute(directory)?;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = seclude(&mut command).spawn()?;
        drop(command);
        let keeper = Keeper {
            socket: ours,
            process,
        };
        let wait = Wait::uncancellable(START);
        let silent = || io::Error::new(io::ErrorKind::TimedOut, "it does not get ready");
        wait.readable(&keeper.socket).map_err(|_| silent())?;
        match rustix::net::recv(&keeper.socket, &mut [0], RecvFlags::empty())? {
            (_, 1) => {}
            _ => return Err(silent()),
        }
        let mut word = vec![PLACE];
        word.extend(target.as_str().bytes());
        word.extend(directory.as_os_str().as_encoded_bytes());
        keeper.say(&word, None)?;
        Ok(keeper)
    }

    /// The dump that it keeps will listen there.
    pub(crate) fn watch(&self, server: &str, dump: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if let Some(dump) = dump {
            self.say(&[DUMP], Some(dump))?;
        }
        let mut word = vec![SERVER];
        word.extend(server.bytes());
        self.say(&word, None)
    }

    /// This is the connection to it.
    pub(crate) fn hold(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.say(&[HOLD], Some(connection))
    }

    /// A restore of this snapshot may begin.
    pub(crate) fn begun(&self, snapshot: u64) -> io::Result<()> {
        let mut word = vec![BEGUN];
        word.extend(snapshot.to_le_bytes());
        self.say(&word, None)
    }

    /// A person has to decide: people may ask now.
    pub(crate) fn doubt(&self, why: &str) -> io::Result<()> {
        let mut word = vec![DOUBT];
        word.extend(message::reason(why).bytes());
        self.say(&word, None)
    }

    /// The dump has been told how it ends.
    pub(crate) fn over(mut self) {
        let _ = self.say(&[OVER], None);
        let _ = self.process.wait();
    }

    fn say(&self, word: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            // There is room for exactly this.
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let slices = [IoSlice::new(word)];
        rustix::net::sendmsg(&self.socket, &slices, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}
