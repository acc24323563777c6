//! A process of its own that keeps a dump from killing its tasks when the proxy dies.
//!
//! To a page server of CRIU the end of its connection is success. So a keeper holds a duplicate: while
//! it does there is no end. When the proxy goes without the word that all is over, the keeper has the
//! dump fail if no restore can have begun, so that the tasks run on; otherwise it stays, and with it
//! the tasks as they are, frozen, until a person ends CRIU (they run on) or the keeper (they are killed).
//! A page server that nobody has connected to yet it connects to itself.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use haulier_criu::page_server;
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

/// How long it may take to start.
const START: Duration = Duration::from_secs(10);
/// How long a dump is waited for of which it is not known whether it lives.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether it listens.
const RETRY: Duration = Duration::from_millis(20);
/// Longest word: an address.
const LONGEST: usize = 1024;

const READY: u8 = b'r';
/// Where the page server will listen; the address follows.
const SERVER: u8 = b's';
/// Comes with the dump, as a pidfd.
const DUMP: u8 = b'd';
/// Comes with the connection to the page server.
const HOLD: u8 = b'h';
/// A restore may have begun.
const BEGUN: u8 = b'b';
/// The dump's end is decided, and said to it.
const OVER: u8 = b'o';

/// What a keeper knows.
#[derive(Default)]
struct Known {
    server: Option<String>,
    dump: Option<OwnedFd>,
    connection: Option<OwnedFd>,
    begun: bool,
}

/// The work of the process that [`crate::proxy::LazyPages::keeper`] starts: standard input is the
/// proxy's.
///
/// # Errors
/// What the socket says.
pub(crate) fn run() -> io::Result<()> {
    let stdin = io::stdin();
    let proxy = stdin.as_fd();
    rustix::net::send(proxy, &[READY], SendFlags::NOSIGNAL)?;
    let mut known = Known::default();
    loop {
        match hear(proxy) {
            Ok((word, _)) if word.first() == Some(&OVER) => return Ok(()),
            Ok((word, fd)) => match word.split_first() {
                Some((&SERVER, address)) => {
                    known.server = String::from_utf8(address.to_vec()).ok();
                }
                Some((&DUMP, _)) => known.dump = fd,
                Some((&HOLD, _)) => known.connection = fd,
                Some((&BEGUN, _)) => known.begun = true,
                _ => break,
            },
            Err(_) => break,
        }
    }
    match (&known.connection, known.begun) {
        (Some(connection), true) => return await_end(connection),
        (Some(connection), false) => page_server::refuse(connection),
        (None, _) => {
            if let Some(connection) = known.server.and_then(|at| connect(&at, &known.dump)) {
                page_server::refuse(connection);
            }
        }
    }
    Ok(())
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

/// Waits until CRIU has ended.
fn await_end(criu: &OwnedFd) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::new(criu, PollFlags::RDHUP)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
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
    pub(crate) fn start(mut command: Command) -> io::Result<Keeper> {
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
            (_, 1) => Ok(keeper),
            _ => Err(silent()),
        }
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
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

    /// A restore may begin.
    pub(crate) fn begun(&self) -> io::Result<()> {
        self.say(&[BEGUN], None)
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
