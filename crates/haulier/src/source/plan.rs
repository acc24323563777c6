//! What is going to be moved, found out without touching it.

use std::path::PathBuf;
use std::time::Duration;

use haulier_criu::Criu;
use haulier_engine::convergence::{Mode, Policy};
use haulier_engine::phase::Phase;
use haulier_memory::stream::Compression;
use haulier_memory::tracker::{self, TrackerChoice, TrackerKind};
use haulier_proto::message::Requirements;
use haulier_targets::cgroup::CgroupFs;
use haulier_targets::files;
use haulier_targets::host::{self, Host};
use haulier_targets::network::{self, Connection, MoveIp};
use haulier_targets::process::ProcessTree;
use haulier_transport::tcp::LinkTime;
use tracing::warn;

use crate::claim::{self, Claim};
use crate::failure::Failure;
use crate::tracer;

/// The architecture that haulier is made for: pages of 4 KiB are assumed throughout.
const ARCHITECTURE: &str = "x86_64";
/// Most reasons that are told why a tree cannot be moved; whoever has more has taken the wrong process.
const MOST_OBSTACLES: usize = 6;

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Root task of the tree to move.
    pub pid: i32,
    /// The destination, `host:port`.
    pub destination: String,
    /// Addresses that move along.
    pub move_addresses: Vec<MoveIp>,
    /// The CRIU to use, if it is to be a certain one.
    pub criu: Option<PathBuf>,
    /// When pages are sent.
    pub mode: Mode,
    /// When the rounds end.
    pub policy: Policy,
    /// How written pages are found.
    pub tracker: TrackerChoice,
    /// Number of memory connections; `None` lets the link decide.
    pub streams: Option<u32>,
    /// How pages are compressed.
    pub compression: Compression,
    /// Most bytes a second for memory, over all connections, before the freeze.
    pub bandwidth: Option<u64>,
    /// Percent of the line that memory takes once it finds it full, so that others have room beside it;
    /// `None` leaves more to the target's users than to nobody.
    pub line_share: Option<u8>,
    /// How long a single step may take: connecting, checking, the dump, the restore.
    pub step_time: Duration,
    /// How long to keep asking for an answer to the commit before giving up, frozen.
    pub doubt_time: Duration,
    /// How long a connection may be dead before it counts as broken.
    pub link_time: LinkTime,
    /// Whether processor features are compared.
    pub check_cpu: bool,
}

/// What is known of target and host before anything is touched.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) host: Host,
    pub(crate) criu: Criu,
    pub(crate) cgroups: CgroupFs,
    pub(crate) tree: ProcessTree,
    pub(crate) connections: Vec<Connection>,
    /// Others use it over the network, or may.
    pub(crate) has_users: bool,
    pub(crate) memory_bytes: u64,
    /// What the kernel has to find written pages.
    pub(crate) tracker: Option<TrackerKind>,
    /// What that allows of the mode that was asked for.
    pub(crate) mode: Mode,
}

impl Plan {
    /// Looks at the target and at this host.
    pub(crate) fn examine(options: &Options) -> Result<Plan, Failure> {
        let host = Host::this();
        let name = host.name.clone();
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::from_error(&name, Phase::Examine, error)
        };
        if !host::is_root() {
            let what = "haulier is not run by root";
            return Err(Failure::new(&name, Phase::Examine, what).remedy("run it with sudo"));
        }
        if host.architecture != ARCHITECTURE {
            let what = format!("this host is {}, not {ARCHITECTURE}", host.architecture);
            return Err(Failure::new(&name, Phase::Examine, what)
                .remedy("other architectures have not been tried with this version"));
        }
        let tree = ProcessTree::read(options.pid).map_err(|e| {
            failed(&e).remedy("give the number of a running process, e.g. from pgrep or ps")
        })?;
        let cgroups = CgroupFs::find().map_err(|e| failed(&e))?;
        refuse_claimed(&tree, &cgroups, &name)?;
        tracer::close_leftovers(&tree);
        let obstacles: Vec<(String, String)> = tree
            .obstacles()
            .into_iter()
            .chain(files::obstacles_of(&tree))
            .collect();
        if !obstacles.is_empty() {
            return Err(cannot_be_moved(&name, &obstacles));
        }
        let criu = Criu::find(options.criu.as_deref()).map_err(|e| failed(&e))?;
        if !criu.has_lazy_pages() {
            return Err(Failure::new(
                &name,
                Phase::Examine,
                format!("{criu} has no lazy pages here"),
            )
            .remedy("use a kernel with userfaultfd (CONFIG_USERFAULTFD, Linux 4.11 or later)"));
        }
        network::probe().map_err(|e| failed(&e))?;
        let connections = movable_connections(&tree, options, &name)?;
        check_addresses(options, &name)?;
        let listening = network::listeners_of(&tree.pids());
        let listening = listening.map_err(|e| Failure::from_error(&name, Phase::Examine, &e))?;
        let has_users = !(connections.is_empty() && listening.is_empty());
        let memory_bytes = tree.memory_bytes();
        let (tracker, mode) = tracker_and_mode(options, &name)?;
        Ok(Plan {
            host,
            criu,
            cgroups,
            tree,
            connections,
            has_users,
            memory_bytes,
            tracker,
            mode,
        })
    }

    /// What the destination has to have.
    pub(crate) fn requirements(&self, options: &Options) -> Result<Requirements, Failure> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::from_error(&self.host.name, Phase::Check, error)
        };
        let files = files::needed_by(&self.tree).map_err(|e| failed(&e))?;
        let listening = network::listeners_of(&self.tree.pids()).map_err(|e| failed(&e))?;
        let moved = |address: &std::net::SocketAddr| {
            options
                .move_addresses
                .iter()
                .any(|moved| moved.ip() == address.ip())
        };
        let stays = |address: &&std::net::SocketAddr| {
            !address.ip().is_unspecified() && !address.ip().is_loopback() && !moved(address)
        };
        let bound = listening
            .iter()
            .filter(stays)
            .map(|address| address.ip().to_string());
        let cpu_flags = if options.check_cpu {
            self.host.cpu_flags.iter().cloned().collect()
        } else {
            Vec::new()
        };
        Ok(Requirements {
            architecture: self.host.architecture.clone(),
            kernel: self.host.kernel.clone(),
            criu_version: self.criu.version().number(),
            pids: self.tree.numbers().into_iter().collect(),
            files,
            memory_bytes: self.memory_bytes,
            move_addresses: options
                .move_addresses
                .iter()
                .map(ToString::to_string)
                .collect(),
            cpu_flags,
            program: self.tree.name().to_owned(),
            root_pid: self.tree.root(),
            bound_addresses: bound.collect(),
            listening: listening.iter().map(ToString::to_string).collect(),
            shell_job: self.tree.session_is_outside(),
        })
    }
}

/// Rounds need a tracker: without one, pre-copy is stop-and-copy and hybrid is post-copy.
fn tracker_and_mode(options: &Options, host: &str) -> Result<(Option<TrackerKind>, Mode), Failure> {
    let without = match options.mode {
        Mode::PreCopy => Mode::StopAndCopy,
        Mode::Hybrid => Mode::PostCopy,
        mode => return Ok((None, mode)),
    };
    match tracker::choose(options.tracker) {
        Ok(Some(kind)) => Ok((Some(kind), options.mode)),
        Ok(None) => Ok((None, without)),
        Err(error) if options.tracker == TrackerChoice::Auto => {
            warn!(%error, "{without} instead of {}: no tracker", options.mode);
            Ok((None, without))
        }
        Err(error) => Err(Failure::from_error(host, Phase::Examine, &error)
            .remedy("choose --tracker auto, or a --mode without rounds")),
    }
}

/// A target of which another migration has a task cannot be moved. It is looked at again when this one
/// takes it.
fn refuse_claimed(tree: &ProcessTree, cgroups: &CgroupFs, host: &str) -> Result<(), Failure> {
    let pids = tree.pids();
    let mut claims = pids
        .iter()
        .map(|pid| (*pid, claim::of(*pid, cgroups, None)));
    match claims.find_map(|(pid, claim)| Some((pid, claim?))) {
        Some((pid, claim)) => Err(claimed(host, Phase::Examine, pid, claim)),
        None => Ok(()),
    }
}

/// The failure to take a task that another migration has.
pub(crate) fn claimed(host: &str, phase: Phase, pid: i32, claim: Claim) -> Failure {
    let (what, remedy) = match claim {
        Claim::Arriving(_) => (
            format!("pages of process {pid} are still arriving from another host"),
            "try again when that migration has come to its end".to_owned(),
        ),
        Claim::Leaving(id) => (
            format!("process {pid} is being moved already, by migration {id}"),
            format!(
                "await its end, which haulier status {id} tells, or cause it: haulier cancel {id}"
            ),
        ),
    };
    Failure::new(host, phase, what).remedy(remedy)
}

fn cannot_be_moved(host: &str, obstacles: &[(String, String)]) -> Failure {
    let list = |pick: fn(&(String, String)) -> &String| {
        let mut texts: Vec<&str> = Vec::new();
        for text in obstacles.iter().map(pick) {
            if !texts.contains(&text.as_str()) {
                texts.push(text);
            }
        }
        let more = texts.len().saturating_sub(MOST_OBSTACLES);
        texts.truncate(MOST_OBSTACLES);
        match more {
            0 => texts.join("; "),
            _ => format!("{}; and {more} more", texts.join("; ")),
        }
    };
    Failure::new(
        host,
        Phase::Examine,
        format!("it cannot be moved: {}", list(|o| &o.0)),
    )
    .remedy(list(|o| &o.1))
}

/// The tree's connections, all of which can live on at the destination.
fn movable_connections(
    tree: &ProcessTree,
    options: &Options,
    host: &str,
) -> Result<Vec<Connection>, Failure> {
    let open = network::connections_of(&tree.pids())
        .map_err(|e| Failure::from_error(host, Phase::Examine, &e))?;
    let stranded = network::stranded(&open, &options.move_addresses);
    if let Some(first) = stranded.first() {
        let Connection { local, remote } = first.connection;
        let what = format!(
            "{} of its {} TCP connections cannot move, e.g. from {local} to {remote}",
            stranded.len(),
            open.len()
        );
        let remedy = if local.ip().is_loopback() {
            "move the tree that holds both ends, or close the connection".to_owned()
        } else {
            format!(
                "move the address along with --move-ip {}/PREFIX@INTERFACE",
                local.ip()
            )
        };
        return Err(Failure::new(host, Phase::Examine, what).remedy(remedy));
    }
    Ok(open.iter().map(|open| open.connection).collect())
}

/// The addresses that are to move are there, as described.
fn check_addresses(options: &Options, host: &str) -> Result<(), Failure> {
    let present =
        network::addresses().map_err(|e| Failure::from_error(host, Phase::Examine, &e))?;
    for wanted in &options.move_addresses {
        if present.iter().any(|address| address.is(wanted)) {
            continue;
        }
        let found: Vec<String> = present
            .iter()
            .filter(|address| address.ip == wanted.ip())
            .map(|address| format!("{}/{}@{}", address.ip, address.prefix, address.interface))
            .collect();
        let remedy = match found.first() {
            Some(found) => format!("it is {found}: name it that way"),
            None => "see \"ip address\" for those that are there".to_owned(),
        };
        let what = format!("this host does not have the address {wanted}");
        return Err(Failure::new(host, Phase::Examine, what).remedy(remedy));
    }
    Ok(())
}
