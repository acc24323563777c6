//! The process that holds a lab together: it owns the fabric, starts the hosts' PID 1s, and takes
//! everything down when told to or when its owner is gone.

use crate::init::InitConfig;
use crate::state::{self, Claim, HostState, LabState};
use crate::{Error, MAX_HOSTS, Result, cgroup, network, snapshot};
use haulier_sys::namespaces::{UnshareFlags, close_on_exec_from, unshare};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, WaitOptions, pidfd_open, set_child_subreaper, setsid, wait,
};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long PID 1 of a host may take to be ready.
const HOST_READY: Duration = Duration::from_secs(20);

/// What CRIU and haulier want for a pipe that carries pages.
const PIPE_MAX: u64 = 4 * 1024 * 1024;

/// What the owner tells the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SupervisorConfig {
    pub(crate) name: String,
    pub(crate) hosts: usize,
    /// Live until told to stop, rather than until stdin reaches its end.
    pub(crate) detached: bool,
    /// The descriptors of the owner have been left behind.
    pub(crate) clean: bool,
}

/// Runs a lab until its owner closes stdin (unless detached), or until SIGTERM or SIGINT. Writes
/// one line to stdout when the lab is ready.
pub(crate) fn run(config: SupervisorConfig) -> Result<()> {
    if !config.clean {
        return start_clean(config);
    }
    if !(1..=MAX_HOSTS).contains(&config.hosts) {
        return Err(Error::HostCount {
            asked: config.hosts,
        });
    }
    // Out of reach of the terminal's Ctrl-C and of a test runner's kill of the process group: we
    // are the one who clears up.
    let _ = setsid();
    set_child_subreaper(Some(own_pid())).map_err(Error::system("become a subreaper"))?;
    let (stop, alarm) = UnixStream::pair().map_err(Error::system("create a socket pair"))?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        let alarm = alarm
            .try_clone()
            .map_err(Error::system("duplicate a socket"))?;
        signal_hook::low_level::pipe::register(signal, alarm)
            .map_err(Error::system("handle a signal"))?;
    }
    if let Err(error) = state::clear_dead_labs() {
        // Somebody else's rubbish is no reason not to start.
        eprintln!("supervisor: {}", error.chain());
    }
    let mut lab = RunningLab::claim(&config.name)?;
    lab.build(config.hosts)?;
    report_ready(&lab.claim)?;
    wait_for_the_end(&config, &stop)?;
    lab.take_down()
}

/// The owner may have leaked descriptors to us (a job server's, say). Executing ourselves again is
/// the way to be rid of them all without closing what we do not own.
fn start_clean(mut config: SupervisorConfig) -> Result<()> {
    config.clean = true;
    close_on_exec_from(3).map_err(Error::system("mark descriptors close-on-exec"))?;
    let mut again = Command::new("/proc/self/exe");
    again
        .arg0("haulier-lab")
        .args(["supervisor", &serde_json::to_string(&config)?]);
    if config.detached {
        // A child of nobody in particular: who started it may not live to wait for it.
        again
            .spawn()
            .map_err(Error::file("execute", "/proc/self/exe"))?;
        return Ok(());
    }
    Err(Error::file("execute", "/proc/self/exe")(again.exec()))
}

fn own_pid() -> Pid {
    rustix::process::getpid()
}

fn wait_for_the_end(config: &SupervisorConfig, stop: &UnixStream) -> Result<()> {
    let stdin = std::io::stdin();
    loop {
        let mut watched = vec![PollFd::new(stop, PollFlags::IN)];
        if !config.detached {
            watched.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut watched, None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(other) => return Err(Error::system("poll")(other)),
        }
    }
}

/// Tells the owner, and from now on writes to the lab's own log: the owner's pipes would keep a
/// test runner waiting for us.
fn report_ready(claim: &Claim) -> Result<()> {
    let path = claim.folder.join("log");
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(Error::file("open", path))?;
    let null = File::create("/dev/null").map_err(Error::file("open", "/dev/null"))?;
    let mut stdout = std::io::stdout();
    stdout
        .write_all(b"ready\n")
        .and_then(|()| stdout.flush())
        .map_err(Error::system("report to the owner"))?;
    rustix::stdio::dup2_stdout(&null).map_err(Error::system("replace stdout"))?;
    rustix::stdio::dup2_stderr(&log).map_err(Error::system("replace stderr"))
}

/// The lab as far as it has been built; dropping it takes it down.
struct RunningLab {
    name: String,
    claim: Claim,
    cgroup: PathBuf,
    /// Kept open: each PID 1 ends when the other end closes, that is when we do.
    lifeline: Option<OwnedFd>,
    down: bool,
}

impl RunningLab {
    fn claim(name: &str) -> Result<RunningLab> {
        Ok(RunningLab {
            name: name.to_owned(),
            claim: state::claim(name)?,
            cgroup: state::lab_cgroup(name)?,
            lifeline: None,
            down: false,
        })
    }

    fn build(&mut self, hosts: usize) -> Result<()> {
        raise_pipe_limit()?;
        unshare(UnshareFlags::NEWNET).map_err(Error::system("create the fabric's namespace"))?;
        network::build_bridge()?;
        let (read_end, write_end) =
            pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("create a pipe"))?;
        self.lifeline = Some(write_end);
        let log = self.open_log()?;
        let mut started = Vec::new();
        for number in 1..=hosts {
            let lifeline = read_end
                .try_clone()
                .map_err(Error::system("duplicate a pipe"))?;
            let log = log
                .try_clone()
                .map_err(Error::system("duplicate the log"))?;
            started.push(self.launch(number, hosts, lifeline, log)?);
        }
        let mut states = Vec::new();
        for host in started {
            states.push(host.finish(|what| self.start_error(what))?);
        }
        state::write(&LabState {
            name: self.name.clone(),
            supervisor: own_pid().as_raw_nonzero().get(),
            hosts: states,
        })
    }

    fn open_log(&self) -> Result<File> {
        let path = self.claim.folder.join("log");
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("open", path))
    }

    /// Starts PID 1 of a host and gives it a cable; it builds its mounts meanwhile.
    fn launch(
        &self,
        number: usize,
        hosts: usize,
        lifeline: OwnedFd,
        log: File,
    ) -> Result<LaunchedHost> {
        let cgroup = self.cgroup.join(format!("host{number}"));
        cgroup::create(&cgroup)?;
        let socket = state::host_socket(&self.name, number);
        let config = LaunchConfig {
            cgroup,
            init: InitConfig {
                number,
                hosts,
                socket,
            },
        };
        let (reports, out) =
            pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("create a pipe"))?;
        let mut launcher = Command::new("/proc/self/exe")
            .arg0("haulier-lab")
            .args(["host-launch", &serde_json::to_string(&config)?])
            .stdin(Stdio::from(lifeline))
            .stdout(Stdio::from(out))
            .stderr(log)
            .spawn()
            .map_err(Error::file("execute", "/proc/self/exe"))?;
        let status = launcher
            .wait()
            .map_err(Error::system("wait for a launcher"))?;
        let mut reports = LineReader::new(reports);
        let mut ready = false;
        let init = loop {
            let line = reports.line(HOST_READY)?;
            match line.strip_prefix("pid ").and_then(|pid| pid.parse().ok()) {
                Some(init) => break init,
                // A quick PID 1 may be heard before its launcher.
                None if line == "ready" && !ready => ready = true,
                None => {
                    return Err(self.start_error(&format!("launcher of host{number}: {status}")));
                }
            }
        };
        network::plug(number, init)?;
        Ok(LaunchedHost {
            number,
            init,
            reports,
            ready,
        })
    }

    fn start_error(&self, what: &str) -> Error {
        let log = fs::read_to_string(self.claim.folder.join("log")).unwrap_or_default();
        Error::Start {
            log: format!("{what}; log: {}", log.trim()),
        }
    }

    fn take_down(&mut self) -> Result<()> {
        if self.down {
            return Ok(());
        }
        self.down = true;
        cgroup::destroy(&self.cgroup, state::TEARDOWN)?;
        self.lifeline = None;
        let until = Instant::now() + state::TEARDOWN;
        // Until there is no child left, so that no PID 1 outlives the lab's folder.
        while let Ok(ended) = wait(WaitOptions::NOHANG) {
            match ended {
                Some(_) => {}
                None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                None => break,
            }
        }
        fs::remove_dir_all(&self.claim.folder).map_err(Error::file("remove", &self.claim.folder))
    }
}

impl Drop for RunningLab {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("haulier-lab: {}", error.chain());
        }
    }
}

struct LaunchedHost {
    number: usize,
    init: i32,
    reports: LineReader,
    ready: bool,
}

impl LaunchedHost {
    fn finish(mut self, failure: impl Fn(&str) -> Error) -> Result<HostState> {
        let pid = Pid::from_raw(self.init).ok_or(Error::HostDown { host: self.name() })?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(Error::system("open a pidfd"))?;
        network::inside(pidfd.as_fd(), || network::configure(self.number))??;
        if !self.ready && self.reports.line(HOST_READY)? != "ready" {
            return Err(failure(&format!(
                "{} ended before it was ready",
                self.name()
            )));
        }
        Ok(HostState {
            number: self.number,
            name: self.name(),
            init: self.init,
            ipv4: network::ipv4_of(self.number),
            ipv6: network::ipv6_of(self.number),
            mounts: snapshot::mounts_of(self.init)?,
        })
    }

    fn name(&self) -> String {
        format!("host{}", self.number)
    }
}

/// What the supervisor tells the launcher of a host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LaunchConfig {
    cgroup: PathBuf,
    init: InitConfig,
}

/// The launcher: a process that enters the host's cgroup and new namespaces, starts PID 1 in them,
/// says its PID and ends. PID 1 then becomes the supervisor's child.
pub(crate) fn launch(config: &LaunchConfig) -> Result<()> {
    // First, so that the cgroup namespace has this cgroup as its root.
    cgroup::enter(&config.cgroup)?;
    unshare(
        UnshareFlags::NEWCGROUP
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWNS
            | UnshareFlags::NEWPID
            | UnshareFlags::NEWUTS,
    )
    .map_err(Error::system("create the host's namespaces"))?;
    let init = Command::new("/proc/self/exe")
        .arg0("haulier-lab")
        .args(["host-init", &serde_json::to_string(&config.init)?])
        .spawn()
        .map_err(Error::file("execute", "/proc/self/exe"))?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "pid {}", init.id())
        .and_then(|()| stdout.flush())
        .map_err(Error::system("report to the supervisor"))
}

/// The limit is the machine's, not a namespace's; it stays raised.
fn raise_pipe_limit() -> Result<()> {
    let path = "/proc/sys/fs/pipe-max-size";
    let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
    if text
        .trim()
        .parse::<u64>()
        .is_ok_and(|bytes| bytes >= PIPE_MAX)
    {
        return Ok(());
    }
    fs::write(path, PIPE_MAX.to_string()).map_err(Error::file("write", path))
}

/// Reads lines from a pipe, each within a deadline.
pub(crate) struct LineReader {
    pipe: OwnedFd,
    pending: Vec<u8>,
}

impl LineReader {
    pub(crate) fn new(pipe: OwnedFd) -> LineReader {
        LineReader {
            pipe,
            pending: Vec::new(),
        }
    }

    /// The next line, or what there is of it when the other end closes.
    pub(crate) fn line(&mut self, deadline: Duration) -> Result<String> {
        let until = Instant::now() + deadline;
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let left = until.saturating_duration_since(Instant::now());
            if !crate::wire::readable_within(self.pipe.as_fd(), left)? {
                return Err(Error::Deadline {
                    what: "a report from a lab process".into(),
                    deadline,
                });
            }
            let mut bytes = [0; 512];
            match rustix::io::read(&self.pipe, &mut bytes) {
                Ok(0) => {
                    let rest = std::mem::take(&mut self.pending);
                    return Ok(String::from_utf8_lossy(&rest).into_owned());
                }
                Ok(count) => self.pending.extend(bytes.iter().take(count)),
                Err(Errno::INTR) => {}
                Err(other) => return Err(Error::system("read a report")(other)),
            }
        }
    }
}
