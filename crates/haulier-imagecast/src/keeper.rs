//! A process of its own that keeps a dump from killing its tasks when the proxy dies.
//!
//! To a page server of CRIU the end of its connection is success. So a keeper holds a duplicate: while
//! it does there is no end. When the proxy goes without the word that all is over, the keeper has the
//! dump fail if no restore can have begun, so that the tasks run on; otherwise it stays, and with it
//! the tasks as they are, frozen, until a person ends CRIU (they run on) or the keeper (they are killed).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use haulier_criu::page_server;
use haulier_sys::seclusion::seclude;
use haulier_sys::wait::Wait;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// How long it may take to start.
const START: Duration = Duration::from_secs(10);

const READY: u8 = b'r';
/// A restore may have begun.
const BEGUN: u8 = b'b';
/// The dump's end is decided, and said to it.
const OVER: u8 = b'o';

/// The work of the process that [`crate::proxy::Options::keeper`] starts: standard input is the
/// proxy's, standard output the dump's page server.
///
/// # Errors
/// What the sockets say.
pub(crate) fn run() -> io::Result<()> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let (proxy, criu) = (stdin.as_fd(), stdout.as_fd());
    rustix::net::send(proxy, &[READY], SendFlags::NOSIGNAL)?;
    let mut begun = false;
    loop {
        let mut word = [0];
        match rustix::net::recv(proxy, &mut word, RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            Ok((_, 1)) if word[0] == OVER => return Ok(()),
            Ok((_, 1)) => begun |= word[0] == BEGUN,
            Ok(_) | Err(_) => break,
        }
    }
    if begun {
        await_end(criu)
    } else {
        page_server::refuse(criu);
        Ok(())
    }
}

/// Waits until CRIU has ended.
fn await_end(criu: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(criu, PollFlags::RDHUP)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A keeper at work. Dropped without a word it does its duty.
#[derive(Debug)]
pub(crate) struct Keeper {
    socket: OwnedFd,
    process: Child,
}

impl Keeper {
    pub(crate) fn start(mut command: Command, criu: BorrowedFd<'_>) -> io::Result<Keeper> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(criu.try_clone_to_owned()?))
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

    /// A restore may begin.
    pub(crate) fn begun(&self) -> io::Result<()> {
        rustix::net::send(&self.socket, &[BEGUN], SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The dump has been told how it ends.
    pub(crate) fn over(mut self) {
        let _ = rustix::net::send(&self.socket, &[OVER], SendFlags::NOSIGNAL);
        let _ = self.process.wait();
    }
}
