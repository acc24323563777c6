//! Running programs on a host.

use crate::host::{ANSWER, wait_until};
use crate::wire::{Received, Reply, Request, SpawnRequest, Stream, receive};
use crate::{Error, Host, Result};
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
use rustix::process::Signal;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Environment that programs of a host get from the owner of the lab, if set there. Little, so that
/// tests mean the same everywhere.
const PASSED_ON: [&str; 8] = [
    "PATH",
    "HOME",
    "LANG",
    "TERM",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "LLVM_PROFILE_FILE",
    "HAULIER_LAB_BIN",
];

/// A program to run on a host, in the manner of [`std::process::Command`].
///
/// It starts in `/`, with `/dev/null` (the host's) for all three streams, with the caller's `PATH`,
/// `HOME`, `LANG`, `TERM` and `RUST_LOG` and nothing else of the caller's environment, and with no
/// descriptor but its streams. For a program that is to be migrated keep the streams at null or at
/// files ([`HostCommand::stdout_file`]): CRIU cannot dump a descriptor opened outside the host.
/// Such a program also wants [`HostCommand::setsid`].
#[derive(Debug)]
#[must_use = "it runs only when spawned"]
pub struct HostCommand {
    host: Host,
    request: SpawnRequest,
    descriptors: Vec<OwnedFd>,
}

impl HostCommand {
    pub(crate) fn new(host: Host, program: &OsStr) -> HostCommand {
        let env = PASSED_ON
            .iter()
            .filter_map(|name| Some((OsString::from(name), std::env::var_os(name)?)))
            .collect();
        let request = SpawnRequest {
            argv: vec![program.to_owned()],
            env,
            cwd: PathBuf::from("/"),
            stdio: [Stream::Null, Stream::Null, Stream::Null],
            setsid: false,
            pid: None,
            cgroup: None,
        };
        HostCommand {
            host,
            request,
            descriptors: Vec::new(),
        }
    }

    /// Adds one argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> HostCommand {
        self.request.argv.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> HostCommand {
        self.request
            .argv
            .extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> HostCommand {
        let name = name.as_ref();
        self.request.env.retain(|(other, _)| other != name);
        self.request
            .env
            .push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts in that folder of the host rather than in `/`.
    pub fn cwd(mut self, folder: impl AsRef<Path>) -> HostCommand {
        self.request.cwd = folder.as_ref().to_owned();
        self
    }

    /// Reads `/dev/null`, which is the default.
    pub fn stdin_null(self) -> HostCommand {
        self.stream(0, Stream::Null)
    }

    /// Reads a file, opened inside the host.
    pub fn stdin_file(self, path: impl AsRef<Path>) -> HostCommand {
        self.stream(0, Stream::File(path.as_ref().to_owned()))
    }

    /// Reads a descriptor of ours.
    pub fn stdin_descriptor(self, descriptor: impl Into<OwnedFd>) -> HostCommand {
        self.descriptor(0, descriptor.into())
    }

    /// Appends to a file, opened inside the host and created if need be.
    pub fn stdout_file(self, path: impl AsRef<Path>) -> HostCommand {
        self.stream(1, Stream::File(path.as_ref().to_owned()))
    }

    /// Writes to a descriptor of ours.
    pub fn stdout_descriptor(self, descriptor: impl Into<OwnedFd>) -> HostCommand {
        self.descriptor(1, descriptor.into())
    }

    /// As [`HostCommand::stdout_file`].
    pub fn stderr_file(self, path: impl AsRef<Path>) -> HostCommand {
        self.stream(2, Stream::File(path.as_ref().to_owned()))
    }

    /// As [`HostCommand::stdout_descriptor`].
    pub fn stderr_descriptor(self, descriptor: impl Into<OwnedFd>) -> HostCommand {
        self.descriptor(2, descriptor.into())
    }

    /// Makes it the leader of a session and process group of its own, as a daemon is.
    pub fn setsid(mut self) -> HostCommand {
        self.request.setsid = true;
        self
    }

    /// Gives it that PID; spawning fails if the PID is in use.
    pub fn pid(mut self, pid: i32) -> HostCommand {
        self.request.pid = Some(pid);
        self
    }

    /// Starts it in that cgroup below the host's root, created if need be: `app` is
    /// `/sys/fs/cgroup/app` on the host.
    pub fn cgroup(mut self, name: &str) -> HostCommand {
        self.request.cgroup = Some(name.to_owned());
        self
    }

    fn descriptor(mut self, stream: usize, descriptor: OwnedFd) -> HostCommand {
        let index = self.descriptors.len();
        self.descriptors.push(descriptor);
        self.stream(stream, Stream::Descriptor(index))
    }

    fn stream(mut self, stream: usize, to: Stream) -> HostCommand {
        if let Some(slot) = self.request.stdio.get_mut(stream) {
            *slot = to;
        }
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason if the program cannot be executed, if a file cannot be
    /// opened, or if the PID asked for is in use.
    pub fn spawn(self) -> Result<Process> {
        let borrowed: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let program = self.request.argv.first().cloned().unwrap_or_default();
        let connection = self
            .host
            .request(&Request::Spawn(self.request), &borrowed)?;
        match self.host.reply(&connection, ANSWER)? {
            Reply::Spawned { pid } => Ok(Process {
                host: self.host,
                pid,
                program,
                connection,
                status: None,
            }),
            other => Err(self.host.unexpected(other)),
        }
    }

    /// Starts it with stdout and stderr going where the caller can read them while it runs.
    /// Such a program cannot be migrated.
    ///
    /// # Errors
    /// As [`HostCommand::spawn`].
    pub fn spawn_captured(self) -> Result<Captured> {
        let (stdout, to_stdout) = capture()?;
        let (stderr, to_stderr) = capture()?;
        let command = self
            .stdout_descriptor(to_stdout)
            .stderr_descriptor(to_stderr);
        Ok(Captured {
            process: command.spawn()?,
            stdout,
            stderr,
        })
    }

    /// Runs it to its end, or kills it at the deadline.
    ///
    /// # Errors
    /// As [`HostCommand::spawn`], and [`Error::Deadline`] with what it had written by then.
    pub fn output(self, deadline: Duration) -> Result<Output> {
        self.spawn_captured()?.finish(deadline)
    }
}

/// A file in memory rather than a pipe: nobody has to drain it, and a daemon that the program
/// leaves behind does not keep us waiting for its end.
fn capture() -> Result<(File, OwnedFd)> {
    let file = memfd_create("output", MemfdFlags::CLOEXEC)
        .map_err(Error::system("create a file in memory"))?;
    fcntl_setfl(&file, OFlags::APPEND).map_err(Error::system("set a file to append"))?;
    let theirs = file
        .try_clone()
        .map_err(Error::system("duplicate a descriptor"))?;
    Ok((file.into(), theirs))
}

fn contents(file: &File) -> Result<String> {
    let length = file
        .metadata()
        .map_err(Error::system("look at captured output"))?
        .len();
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)
        .map_err(Error::system("read captured output"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A program that runs on a host. Dropping this neither kills nor stops it: programs migrate away
/// from their host. What is left goes with the lab.
#[derive(Debug)]
pub struct Process {
    host: Host,
    pid: i32,
    program: OsString,
    connection: OwnedFd,
    status: Option<ExitStatus>,
}

impl Process {
    /// Its PID inside the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::Deadline`] if it still runs; it goes on running.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.poll_exit(deadline)?.ok_or_else(|| Error::Deadline {
            what: format!(
                "end of {:?} (PID {} on {})",
                self.program,
                self.pid,
                self.host.name()
            ),
            deadline,
        })
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the host is down.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.poll_exit(Duration::ZERO)
    }

    fn poll_exit(&mut self, deadline: Duration) -> Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(self.status);
        }
        match receive(&self.connection, deadline)? {
            Received::Message(Reply::Exited { status }, _) => {
                self.status = Some(ExitStatus::from_raw(status));
                Ok(self.status)
            }
            Received::Message(other, _) => Err(self.host.unexpected(other)),
            Received::Closed => Err(Error::HostDown {
                host: self.host.name().to_owned(),
            }),
            Received::Nothing => Ok(None),
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`Error::Refused`] if it is gone.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        self.host.signal(self.pid, signal)
    }

    /// The host it was started on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Becomes readable when the program has ended; for `poll`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// A running program whose output can be read.
#[derive(Debug)]
pub struct Captured {
    /// The program.
    pub process: Process,
    stdout: File,
    stderr: File,
}

impl Captured {
    /// All it has written to stdout so far.
    ///
    /// # Errors
    /// If the capture cannot be read.
    pub fn stdout(&self) -> Result<String> {
        contents(&self.stdout)
    }

    /// All it has written to stderr so far.
    ///
    /// # Errors
    /// If the capture cannot be read.
    pub fn stderr(&self) -> Result<String> {
        contents(&self.stderr)
    }

    /// Waits for its end, or kills it at the deadline.
    ///
    /// # Errors
    /// [`Error::Deadline`] with what it had written by then; the host is down.
    pub fn finish(mut self, deadline: Duration) -> Result<Output> {
        match self.process.wait(deadline) {
            Ok(status) => Ok(Output {
                status,
                stdout: self.stdout()?,
                stderr: self.stderr()?,
            }),
            Err(Error::Deadline { what, deadline }) => {
                // It may have ended just now.
                let _ = self.process.kill(Signal::KILL);
                let said = self.stdout()? + &self.stderr()?;
                Err(Error::Deadline {
                    what: format!("{what}, which said: {said}"),
                    deadline,
                })
            }
            Err(other) => Err(other),
        }
    }

    /// Waits until stdout or stderr contains `text`.
    ///
    /// # Errors
    /// [`Error::Deadline`] with what it had written by then.
    pub fn wait_for_output(&self, text: &str, deadline: Duration) -> Result<()> {
        let written = || -> Result<String> { Ok(self.stdout()? + &self.stderr()?) };
        let what = || format!("`{text}`; there was: {}", written().unwrap_or_default());
        wait_until(deadline, what, || {
            written().is_ok_and(|all| all.contains(text))
        })
    }
}

/// What a program wrote and how it ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Output {
    /// What it wrote to stdout, if it succeeded.
    ///
    /// # Panics
    /// If it failed, with what it said: for tests.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(
            self.status.success(),
            "{}\nstdout: {}\nstderr: {}",
            self.status,
            self.stdout,
            self.stderr
        );
        self.stdout
    }
}
