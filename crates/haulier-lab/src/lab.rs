//! A lab as its owner sees it.

use crate::network::{self, Port, Rate};
use crate::state::{self, LabState};
use crate::supervisor::{LineReader, SupervisorConfig};
use crate::wire::readable_within;
use crate::{Error, Host, Result, program};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fmt;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a lab may take to come up.
const START: Duration = Duration::from_secs(60);

/// What a lab should be like.
#[derive(Debug, Clone)]
pub struct LabConfig {
    hosts: usize,
    name: Option<String>,
}

impl LabConfig {
    /// A lab of that many hosts (1 to [`crate::MAX_HOSTS`]), under a name nobody else uses.
    pub fn hosts(hosts: usize) -> LabConfig {
        LabConfig { hosts, name: None }
    }

    /// Gives it a name: 1 to 40 letters, digits, `-` or `_`. Names are unique on the machine.
    #[must_use]
    pub fn name(mut self, name: &str) -> LabConfig {
        self.name = Some(name.to_owned());
        self
    }
}

/// A running lab: some hosts on one network.
///
/// A lab that was [started](Lab::start) goes down, with everything that runs on its hosts, when
/// this is dropped or when the process that holds it ends, however it ends. One that was
/// [attached](Lab::attach) to stays.
pub struct Lab {
    state: LabState,
    hosts: Vec<Host>,
    fabric: OwnedFd,
    /// Closing it takes the lab down.
    lifeline: Option<ChildStdin>,
    supervisor: Option<Child>,
}

impl fmt::Debug for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lab")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Lab {
    /// Starts a lab that lives as long as the value returned.
    ///
    /// # Errors
    /// Without root, without cgroup v2, without the haulier-lab program ([`crate::program`]), and
    /// if the name is taken.
    pub fn start(config: LabConfig) -> Result<Lab> {
        let name = config.name.clone().unwrap_or_else(unused_name);
        let mut supervisor = start_supervisor(&config, &name, false)?;
        let lifeline = supervisor.stdin.take();
        let mut lab = Lab::attach(&name)?;
        lab.lifeline = lifeline;
        lab.supervisor = Some(supervisor);
        Ok(lab)
    }

    /// Starts a lab that lives until [`Lab::stop`], whatever becomes of the caller.
    ///
    /// # Errors
    /// As [`Lab::start`].
    pub fn start_detached(config: LabConfig) -> Result<Lab> {
        let name = config.name.clone().unwrap_or_else(unused_name);
        // What we started has started the supervisor, and ends.
        start_supervisor(&config, &name, true)?
            .wait()
            .map_err(Error::system("wait for the supervisor's starter"))?;
        Lab::attach(&name)
    }

    /// Takes hold of a running lab, without owning it.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if there is none of that name.
    pub fn attach(name: &str) -> Result<Lab> {
        let state = state::read(name)?;
        let supervisor = Pid::from_raw(state.supervisor).ok_or_else(|| Error::NotRunning {
            name: name.to_owned(),
        })?;
        let fabric = pidfd_open(supervisor, PidfdFlags::empty())
            .map_err(Error::system("open a pidfd of the supervisor"))?;
        let hosts = state
            .hosts
            .iter()
            .map(|host| Host::new(name, host))
            .collect::<Result<Vec<_>>>()?;
        Ok(Lab {
            state,
            hosts,
            fabric,
            lifeline: None,
            supervisor: None,
        })
    }

    /// The name of the lab.
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// All hosts, the first being number 1.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Host `number`, counted from 1.
    ///
    /// # Panics
    /// If there is no such host; [`Lab::find_host`] is for names that come from outside.
    #[track_caller]
    pub fn host(&self, number: usize) -> &Host {
        match self.hosts.iter().find(|host| host.number() == number) {
            Some(host) => host,
            None => panic!(
                "lab `{}` has hosts 1 to {}, not {number}",
                self.name(),
                self.hosts.len()
            ),
        }
    }

    /// The host called `host2`, or just `2`.
    ///
    /// # Errors
    /// [`Error::NoSuchHost`].
    pub fn find_host(&self, name: &str) -> Result<&Host> {
        let number = name.strip_prefix("host").unwrap_or(name);
        self.hosts
            .iter()
            .find(|host| host.number().to_string() == number)
            .ok_or_else(|| Error::NoSuchHost {
                lab: self.name().to_owned(),
                host: name.to_owned(),
            })
    }

    /// Limits every link, each way, to a rate such as `1gbit`; `None` lifts the limit.
    ///
    /// # Errors
    /// [`Error::BadRate`], or what `tc` says.
    pub fn shape(&self, rate: Option<&str>) -> Result<()> {
        let rate = rate.map(Rate::parse).transpose()?;
        for host in &self.hosts {
            host.in_network(|| network::limit("eth0", rate))??;
            let port = format!("host{}", host.number());
            network::inside(self.fabric.as_fd(), || network::limit(&port, rate))??;
        }
        Ok(())
    }

    /// Cuts a host off: frames from and to it vanish. It keeps its carrier and nobody is told, as
    /// when a switch fails: connections see neither reset nor link loss, only silence.
    ///
    /// # Errors
    /// What `bridge` says.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn cut(&self, number: usize) -> Result<()> {
        self.set_port(number, Port::BlackHole)
    }

    /// Undoes [`Lab::cut`].
    ///
    /// # Errors
    /// What `bridge` says.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn mend(&self, number: usize) -> Result<()> {
        self.set_port(number, Port::Open)
    }

    fn set_port(&self, number: usize, port: Port) -> Result<()> {
        let number = self.host(number).number();
        network::inside(self.fabric.as_fd(), || network::set_port(number, port))?
    }

    /// The fabric in words: ports with their state, and their rate limits.
    ///
    /// # Errors
    /// What `bridge` or `tc` says.
    pub fn describe_network(&self) -> Result<String> {
        let ports = network::output_inside(&self.fabric, "bridge", "link show")?;
        let limits = network::output_inside(&self.fabric, "tc", "qdisc show")?;
        Ok(ports + &limits)
    }

    /// Takes the lab down and waits until nothing is left of it. Dropping an owned lab does the
    /// same, without a way to report trouble.
    ///
    /// # Errors
    /// [`Error::Deadline`] if it takes too long.
    pub fn stop(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        self.lifeline = None;
        // An owned supervisor has seen its stdin close; a detached one needs telling. ESRCH means
        // that it has ended already.
        if self.supervisor.is_none() {
            let _ = pidfd_send_signal(&self.fabric, Signal::TERM);
        }
        let deadline = 2 * state::TEARDOWN;
        if !readable_within(self.fabric.as_fd(), deadline)? {
            return Err(Error::Deadline {
                what: format!("stop lab `{}`", self.name()),
                deadline,
            });
        }
        if let Some(mut supervisor) = self.supervisor.take() {
            supervisor
                .wait()
                .map_err(Error::system("wait for the supervisor"))?;
        }
        if state::folder(self.name()).exists() {
            // It was killed rather than told; then this is ours to do.
            state::clear_dead_labs()?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.lifeline.is_some() {
            if let Err(error) = self.take_down() {
                eprintln!("haulier-lab: {}", error.chain());
            }
        }
    }
}

fn unused_name() -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(1);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    // Time tells apart processes of the same PID in different PID namespaces.
    let now = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.subsec_nanos());
    format!("t{}-{count}-{now:x}", std::process::id())
}

fn start_supervisor(config: &LabConfig, name: &str, detached: bool) -> Result<Child> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    if !(1..=crate::MAX_HOSTS).contains(&config.hosts) {
        return Err(Error::HostCount {
            asked: config.hosts,
        });
    }
    let settings = SupervisorConfig {
        name: name.to_owned(),
        hosts: config.hosts,
        detached,
        clean: false,
    };
    let program = program()?;
    let mut supervisor = Command::new(&program)
        .args(["supervisor", &serde_json::to_string(&settings)?])
        .stdin(if detached {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::file("execute", &program))?;
    let began = Instant::now();
    let line = match supervisor.stdout.take() {
        Some(stdout) => LineReader::new(stdout.into()).line(START)?,
        None => String::new(),
    };
    if line == "ready" {
        return Ok(supervisor);
    }
    // Its stdout is closed, so it is ending; what it has to say is on stderr.
    drop(supervisor.stdin.take());
    let left = START.saturating_sub(began.elapsed());
    let mut log = String::new();
    if let Some(mut stderr) = supervisor.stderr.take() {
        if readable_within(stderr.as_fd(), left)? {
            stderr
                .read_to_string(&mut log)
                .map_err(Error::system("read the supervisor's log"))?;
        }
    }
    supervisor
        .wait()
        .map_err(Error::system("wait for the supervisor"))?;
    Err(Error::Start {
        log: log.trim().to_owned(),
    })
}
