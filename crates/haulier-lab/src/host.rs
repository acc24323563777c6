//! A host of a lab: its files, processes and network.

use crate::state::{self, HostState};
use crate::wire::{Received, Reply, Request, connect_to, readable_within, receive, send};
use crate::{Error, HostCommand, Output, Result, network};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long PID 1 may take to answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);

/// How long after its socket has closed PID 1 may be about to die.
const DYING: Duration = Duration::from_secs(2);

/// A simulated host. Cheap to clone; clones are the same host.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    lab: String,
    state: HostState,
    /// Of the host's PID 1.
    pidfd: OwnedFd,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("lab", &self.inner.lab)
            .field("name", &self.name())
            .finish()
    }
}

/// A process of a host, as its /proc shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessInfo {
    /// PID inside the host.
    pub pid: i32,
    /// Parent's PID inside the host.
    pub parent: i32,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, as in proc_pid_stat(5).
    pub state: char,
    /// The command name, at most 15 bytes.
    pub comm: String,
    /// Arguments, the program first; empty for a zombie.
    pub argv: Vec<String>,
}

impl ProcessInfo {
    /// Whether it is called that: its command name, or the file name of its first argument.
    pub fn is_named(&self, name: &str) -> bool {
        let program = self.argv.first().map(Path::new).and_then(Path::file_name);
        self.comm == name || program == Some(OsStr::new(name))
    }
}

impl Host {
    pub(crate) fn new(lab: &str, state: &HostState) -> Result<Host> {
        let down = || Error::HostDown {
            host: state.name.clone(),
        };
        let init = Pid::from_raw(state.init).ok_or_else(down)?;
        let pidfd = pidfd_open(init, PidfdFlags::empty()).map_err(|_| down())?;
        let inner = Inner {
            lab: lab.to_owned(),
            state: state.clone(),
            pidfd,
        };
        Ok(Host {
            inner: Arc::new(inner),
        })
    }

    /// Its number in the lab, from 1.
    pub fn number(&self) -> usize {
        self.inner.state.number
    }

    /// Its host name: `host1`, `host2`, ... The other hosts know it by that name too.
    pub fn name(&self) -> &str {
        &self.inner.state.name
    }

    /// Its own address, 10.77.0.N.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.inner.state.ipv4
    }

    /// Its own address, fd77::N.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.inner.state.ipv6
    }

    /// PID of the host's PID 1 as the machine sees it, for `nsenter -t`.
    pub fn init_pid(&self) -> i32 {
        self.inner.state.init
    }

    pub(crate) fn initial_mounts(&self) -> &[String] {
        &self.inner.state.mounts
    }

    /// A program to run here; see [`HostCommand`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> HostCommand {
        HostCommand::new(self.clone(), program.as_ref())
    }

    /// Runs a program to its end and captures what it wrote. It has 60 seconds;
    /// [`HostCommand::output`] takes another deadline.
    ///
    /// # Errors
    /// If it cannot be started or takes too long (it is killed then). A program that fails is not
    /// an error: look at [`Output::status`], or use [`Output::success`].
    pub fn run<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut argv = argv.into_iter();
        let program = argv.next();
        let program = program.as_ref().map_or(OsStr::new(""), AsRef::as_ref);
        self.command(program)
            .args(argv)
            .output(Duration::from_secs(60))
    }

    /// Runs a shell command line to its end, as [`Host::run`].
    ///
    /// # Errors
    /// As [`Host::run`].
    pub fn shell(&self, line: &str) -> Result<Output> {
        self.run(["sh", "-c", line])
    }

    /// Runs `work` in a thread that has entered the host's network namespace, and returns its
    /// value. Sockets it opens stay on the host, and may be used from any thread afterwards.
    ///
    /// # Errors
    /// If the host is down.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        network::inside(self.inner.pidfd.as_fd(), work)
    }

    /// Reads a file as the host sees it.
    ///
    /// # Errors
    /// As for any file.
    pub fn read_file(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let mut file = self.open(path, OFlags::RDONLY, "open")?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(Error::file("read", path))?;
        Ok(bytes)
    }

    /// Writes a file as the host sees it, replacing what it held. `/srv`, `/run`, `/dev/shm`,
    /// `/var/lib/haulier` and `/var/log/haulier` are the host's own; the rest of the file system
    /// is shared with the machine and the other hosts.
    ///
    /// # Errors
    /// As for any file.
    pub fn write_file(&self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<()> {
        let path = path.as_ref();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let mut file = self.open(path, flags, "create")?;
        file.write_all(bytes.as_ref())
            .map_err(Error::file("write", path))
    }

    /// Whether a path exists on the host.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.open(path.as_ref(), OFlags::PATH, "open").is_ok()
    }

    /// RESOLVE_IN_ROOT makes the host's root the root for symbolic links too.
    fn open(&self, path: &Path, flags: OFlags, verb: &'static str) -> Result<File> {
        let root = self.root();
        let root = File::open(&root).map_err(Error::file("open", root))?;
        let opened = openat2(
            &root,
            path,
            flags | OFlags::CLOEXEC,
            if flags.contains(OFlags::CREATE) {
                Mode::from_raw_mode(0o644)
            } else {
                Mode::empty()
            },
            ResolveFlags::IN_ROOT,
        );
        Ok(opened.map_err(Error::file_errno(verb, path))?.into())
    }

    /// The host's root folder as the machine can reach it. Mind that absolute symbolic links below
    /// it lead into the machine's file system, not the host's.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init_pid()))
    }

    /// PIDs of everything on the host but PID 1, in order.
    ///
    /// # Errors
    /// If the host is down.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let folder = self.root().join("proc");
        let entries = fs::read_dir(&folder).map_err(|_| self.down())?;
        let mut pids: Vec<i32> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != 1)
            .collect();
        pids.sort_unstable();
        Ok(pids)
    }

    /// Everything on the host but PID 1.
    ///
    /// # Errors
    /// If the host is down.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>> {
        Ok(self
            .pids()?
            .into_iter()
            .filter_map(|pid| self.process(pid))
            .collect())
    }

    /// One process, if it exists; zombies do.
    pub fn process(&self, pid: i32) -> Option<ProcessInfo> {
        let folder = self.root().join("proc").join(pid.to_string());
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        // "pid (comm) state ppid ...", and comm may hold anything, parentheses included.
        let (before, after) = stat.rsplit_once(") ")?;
        let (_, comm) = before.split_once(" (")?;
        let mut fields = after.split(' ');
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let cmdline = fs::read(folder.join("cmdline")).unwrap_or_default();
        let argv = cmdline
            .split(|byte| *byte == 0)
            .filter(|argument| !argument.is_empty())
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        Some(ProcessInfo {
            pid,
            parent,
            state,
            comm: comm.to_owned(),
            argv,
        })
    }

    /// Whether a process runs: it exists and is no zombie. A frozen or stopped one is alive.
    pub fn process_alive(&self, pid: i32) -> bool {
        self.process(pid)
            .is_some_and(|process| !matches!(process.state, 'Z' | 'X'))
    }

    /// Sends a signal to a process of the host.
    ///
    /// # Errors
    /// [`Error::Refused`] if there is no such process.
    pub fn signal(&self, pid: i32, signal: Signal) -> Result<()> {
        self.send_signal(pid, false, signal)
    }

    /// Sends a signal to a process group of the host.
    ///
    /// # Errors
    /// [`Error::Refused`] if there is no such group.
    pub fn signal_group(&self, group: i32, signal: Signal) -> Result<()> {
        self.send_signal(group, true, signal)
    }

    fn send_signal(&self, pid: i32, group: bool, signal: Signal) -> Result<()> {
        let signal = signal.as_raw();
        match self.ask(&Request::Signal { pid, group, signal })? {
            Reply::Signalled => Ok(()),
            other => Err(self.unexpected(other)),
        }
    }

    /// Sends a signal to every process of that name ([`ProcessInfo::is_named`]) and returns their
    /// PIDs.
    ///
    /// # Errors
    /// If the host is down.
    pub fn kill_all_named(&self, name: &str, signal: Signal) -> Result<Vec<i32>> {
        self.kill_where(|process| process.is_named(name), signal)
    }

    /// Sends a signal to every process that `chosen` picks and returns their PIDs. Processes that
    /// end meanwhile are left out.
    ///
    /// # Errors
    /// If the host is down.
    pub fn kill_where(
        &self,
        chosen: impl Fn(&ProcessInfo) -> bool,
        signal: Signal,
    ) -> Result<Vec<i32>> {
        let mut hit = Vec::new();
        for process in self.processes()?.iter().filter(|process| chosen(process)) {
            match self.signal(process.pid, signal) {
                Ok(()) => hit.push(process.pid),
                Err(Error::Refused { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(hit)
    }

    /// Waits until a process is gone or a zombie.
    ///
    /// # Errors
    /// [`Error::Deadline`].
    pub fn wait_gone(&self, pid: i32, deadline: Duration) -> Result<()> {
        let what = || format!("end of process {pid} on {}", self.name());
        wait_until(deadline, what, || !self.process_alive(pid))
    }

    /// How a process ended that PID 1 has reaped, whoever started it: one spawned here, or an
    /// orphan, which a restored process becomes. `None` if PID 1 has not seen it end.
    ///
    /// # Errors
    /// If the host is down.
    pub fn reaped(&self, pid: i32) -> Result<Option<ExitStatus>> {
        match self.ask(&Request::Reaped { pid })? {
            Reply::Reaped { status } => Ok(status.map(ExitStatus::from_raw)),
            other => Err(self.unexpected(other)),
        }
    }

    /// Kills the host: PID 1 and with it everything, at once, as when the power fails. Its network
    /// port is gone too. There is no way to start it again.
    ///
    /// # Errors
    /// [`Error::Deadline`] if it does not die.
    pub fn power_off(&self) -> Result<()> {
        // ESRCH: it is dead already.
        let _ = pidfd_send_signal(&self.inner.pidfd, Signal::KILL);
        if readable_within(self.inner.pidfd.as_fd(), ANSWER)? {
            return Ok(());
        }
        let what = format!("end of {}", self.name());
        Err(Error::Deadline {
            what,
            deadline: ANSWER,
        })
    }

    /// Sends a request to PID 1, over a connection of its own.
    pub(crate) fn request(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<OwnedFd> {
        let socket = connect_to(&state::host_socket(&self.inner.lab, self.number()));
        let sent = socket.and_then(|socket| {
            send(&socket, request, descriptors)?;
            Ok(socket)
        });
        sent.map_err(|error| {
            // A PID 1 on its way out has closed its socket and may not be dead yet.
            let dead = readable_within(self.inner.pidfd.as_fd(), DYING).unwrap_or(false);
            if dead { self.down() } else { error }
        })
    }

    fn down(&self) -> Error {
        Error::HostDown {
            host: self.name().to_owned(),
        }
    }

    fn ask(&self, request: &Request) -> Result<Reply> {
        let socket = self.request(request, &[])?;
        self.reply(&socket, ANSWER)
    }

    pub(crate) fn reply(&self, socket: &OwnedFd, deadline: Duration) -> Result<Reply> {
        match receive(socket, deadline)? {
            Received::Message(reply, _) => Ok(reply),
            Received::Closed => Err(self.down()),
            Received::Nothing => Err(Error::Deadline {
                what: format!("answer of {}", self.name()),
                deadline,
            }),
        }
    }

    pub(crate) fn unexpected(&self, reply: Reply) -> Error {
        let host = self.name().to_owned();
        match reply {
            Reply::Failed { message } => Error::Refused { host, message },
            other => Error::Protocol {
                host,
                answer: format!("{other:?}"),
            },
        }
    }
}

/// Looks every 5 ms until `met` or the deadline.
pub(crate) fn wait_until(
    deadline: Duration,
    what: impl Fn() -> String,
    mut met: impl FnMut() -> bool,
) -> Result<()> {
    let until = Instant::now() + deadline;
    while !met() {
        if Instant::now() >= until {
            return Err(Error::Deadline {
                what: what(),
                deadline,
            });
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
