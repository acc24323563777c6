//! One `criu swrk` process and the RPC connection to it.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use haulier_sys::breakpoints::Breakpoints;
use haulier_sys::seccomp::{Listener, hold_scans};
use haulier_sys::session::in_new_session;
use haulier_sys::wait::{Wait, WaitError};
use prost::Message;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;
use tracing::debug;

use crate::messages::{Kind, Request, Response};

/// Descriptor of the RPC socket in the CRIU process.
const RPC_FD: i32 = 3;
/// First descriptor of those handed to the CRIU process.
pub(crate) const FIRST_INHERITED_FD: i32 = 4;
/// Largest packet that is read. CRIU's own are some hundred bytes.
const LONGEST_PACKET: usize = 64 << 10;
/// How long a CRIU process whose connection is closed may take to end before it is killed.
const EXIT_TIME: Duration = Duration::from_secs(10);

/// A failure to talk to CRIU. What CRIU itself failed at is in its log, see [`crate::log`].
#[derive(Debug, Error)]
pub enum RpcError {
    /// The program could not be started.
    #[error("cannot start {path}")]
    Start {
        /// The program.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The socket failed.
    #[error("the RPC connection to CRIU failed")]
    Socket(#[source] io::Error),
    /// CRIU ended without an answer: it crashed or was killed.
    #[error("CRIU ended without an answer ({status})")]
    Gone {
        /// How it ended.
        status: String,
    },
    /// CRIU took longer than it was allowed.
    #[error("CRIU did not answer in time")]
    Deadline,
    /// The wait was cancelled.
    #[error("cancelled while waiting for CRIU")]
    Cancelled,
    /// The answer is not a message of its protocol.
    #[error("CRIU's answer does not decode")]
    Decode(#[source] prost::DecodeError),
    /// The answer is not one that is due.
    #[error("CRIU answered {got} where {expected} was due")]
    Unexpected {
        /// What came.
        got: String,
        /// What was due.
        expected: &'static str,
    },
}

/// A CRIU process that serves requests over a socket. Dropping it closes the connection, which
/// CRIU takes as a "no" at any hook, and reaps it.
#[derive(Debug)]
pub(crate) struct Swrk {
    child: Child,
    socket: Option<OwnedFd>,
    /// For what it does to tasks that stand still; it starts meanwhile.
    _breakpoints: Option<Breakpoints>,
}

impl Swrk {
    /// Starts the CRIU `program` with `inherited` as its descriptors from [`FIRST_INHERITED_FD`] on.
    pub(crate) fn start(program: &Path, inherited: Vec<OwnedFd>) -> Result<Swrk, RpcError> {
        Ok(Swrk::launch(program, inherited, false)?.0)
    }

    /// As [`Swrk::start`], with its requests for lists of pages held for an answer, where the
    /// kernel permits that.
    pub(crate) fn start_held(
        program: &Path,
        inherited: Vec<OwnedFd>,
    ) -> Result<(Swrk, Option<Listener>), RpcError> {
        Swrk::launch(program, inherited, true)
    }

    fn launch(
        program: &Path,
        inherited: Vec<OwnedFd>,
        hold: bool,
    ) -> Result<(Swrk, Option<Listener>), RpcError> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .map_err(|errno| RpcError::Socket(errno.into()))?;
        let failed = |source| RpcError::Start {
            path: program.to_owned(),
            source,
        };
        let mut mappings = vec![FdMapping {
            parent_fd: theirs,
            child_fd: RPC_FD,
        }];
        for (parent_fd, child_fd) in inherited.into_iter().zip(FIRST_INHERITED_FD..) {
            mappings.push(FdMapping {
                parent_fd,
                child_fd,
            });
        }
        let arguments: [OsString; 2] = ["swrk".into(), RPC_FD.to_string().into()];
        let mut command = Command::new(program);
        // Ctrl-C at the terminal is for haulier, which then tells CRIU; and a restored tree whose
        // session stayed behind gets CRIU's, which must not be the terminal's.
        in_new_session(command.args(arguments));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
            .fd_mappings(mappings)
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let arming = match hold {
            true => Some(hold_scans(&mut command).map_err(failed)?),
            false => None,
        };
        let child = command.spawn().map_err(failed)?;
        // The command holds this process's copies of CRIU's descriptors: with them open, the end
        // of CRIU would not be seen.
        drop(command);
        let breakpoints = Breakpoints::prepare();
        let swrk = Swrk {
            child,
            socket: Some(ours),
            _breakpoints: breakpoints
                .inspect_err(|error| debug!(%error, "breakpoints take their time"))
                .ok(),
        };
        Ok((swrk, arming.and_then(|arming| arming.listener())))
    }

    /// The CRIU process.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Sends a request.
    pub(crate) fn send(&mut self, request: &Request) -> Result<(), RpcError> {
        let Some(socket) = &self.socket else {
            return Err(self.gone());
        };
        let bytes = request.encode_to_vec();
        match rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(self.gone()),
            Err(errno) => Err(RpcError::Socket(errno.into())),
        }
    }

    /// Receives the next response or notification.
    pub(crate) fn receive(&mut self, wait: &Wait) -> Result<Response, RpcError> {
        let Some(socket) = &self.socket else {
            return Err(self.gone());
        };
        wait.readable(socket).map_err(|error| match error {
            WaitError::Deadline => RpcError::Deadline,
            WaitError::Cancelled => RpcError::Cancelled,
            WaitError::Io(source) => RpcError::Socket(source),
        })?;
        let mut packet = vec![0; LONGEST_PACKET];
        let count = match rustix::net::recv(socket, &mut packet, RecvFlags::empty()) {
            Ok((count, _)) => count,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(errno) => return Err(RpcError::Socket(errno.into())),
        };
        if count == 0 {
            return Err(self.gone());
        }
        let response = Response::decode(&packet[..count]).map_err(RpcError::Decode)?;
        debug!(?response, "criu");
        Ok(response)
    }

    /// Answers the notification that was received last.
    pub(crate) fn answer(&mut self, success: bool) -> Result<(), RpcError> {
        self.send(&Request {
            kind: Kind::Notify as i32,
            notify_success: Some(success),
            ..Request::default()
        })
    }

    /// Receives notifications and answers them with "yes" until the one called `hook` comes,
    /// which is left unanswered. Returns the task it is about, if it names one.
    pub(crate) fn run_to(
        &mut self,
        hook: &'static str,
        wait: &Wait,
    ) -> Result<Option<i32>, RunError> {
        loop {
            let response = self.receive(wait)?;
            if response.kind != Kind::Notify as i32 {
                return Err(RunError::Ended(Box::new(response)));
            }
            let notification = response.notify.unwrap_or_default();
            if notification.script.as_deref() == Some(hook) {
                return Ok(notification.pid);
            }
            self.answer(true)?;
        }
    }

    /// Answers notifications with "yes" until the final response comes.
    pub(crate) fn run_to_end(&mut self, wait: &Wait) -> Result<Response, RpcError> {
        match self.run_to("", wait) {
            Ok(_) => Err(RpcError::Unexpected {
                got: "a hook without a name".into(),
                expected: "a result",
            }),
            Err(RunError::Ended(response)) => Ok(*response),
            Err(RunError::Rpc(error)) => Err(error),
        }
    }

    /// Whether the CRIU process has not ended.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills CRIU at once. Tasks it holds in ptrace-stop go on (or stay frozen by their cgroup).
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Kills CRIU's children: in a restore, the tasks made so far. Whatever CRIU waits for, it
    /// notices that, removes the names it gave to unlinked files, and ends. Killed itself it would
    /// leave those names on the disk.
    pub(crate) fn kill_children(&self) {
        let pid = self.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        for child in children.unwrap_or_default().split_whitespace() {
            if let Some(child) = child.parse().ok().and_then(Pid::from_raw) {
                // It may have ended by itself.
                let _ = kill_process(child, Signal::KILL);
            }
        }
    }

    fn gone(&mut self) -> RpcError {
        self.socket = None;
        RpcError::Gone {
            status: self.reap(),
        }
    }

    /// Waits for CRIU to end; kills it if it does not within [`EXIT_TIME`].
    fn reap(&mut self) -> String {
        let deadline = Instant::now() + EXIT_TIME;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(None) => {
                    let _ = self.child.kill();
                    let status = self.child.wait();
                    return status.map_or_else(|e| e.to_string(), |s| format!("{s}, killed by us"));
                }
                Err(error) => return error.to_string(),
            }
        }
    }
}

impl Drop for Swrk {
    fn drop(&mut self) {
        self.socket = None;
        self.reap();
    }
}

/// Why a hook was not reached.
#[derive(Debug)]
pub(crate) enum RunError {
    /// CRIU gave its final response first.
    Ended(Box<Response>),
    /// The connection failed.
    Rpc(RpcError),
}

impl From<RpcError> for RunError {
    fn from(error: RpcError) -> RunError {
        RunError::Rpc(error)
    }
}
