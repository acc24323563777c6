//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use haulier::{destination, source};
use haulier_engine::convergence::{Mode, OnStall, Policy, PolicyKind};
use haulier_memory::stream::Compression;
use haulier_memory::tracker::TrackerChoice;
use haulier_targets::host;
use haulier_targets::network::MoveIp;
use haulier_transport::tcp::LinkTime;

use crate::images_cli::{ImageCache, ImageProxy};
use crate::inspect_cli::Inspect;
use crate::settling::{Cancel, Recover, Resolve, StatusArguments};

/// Live migration of running processes between Linux hosts
///
/// Moves a process and its children, with memory, open files and TCP connections, to another host.
/// "haulier serve" runs on the host they go to, "haulier migrate" on the one they come from.
#[derive(Debug, Parser)]
#[command(name = "haulier", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Say more about what goes on (-v, -vv); RUST_LOG overrides it
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Migrate(Migrate),
    Serve(Serve),
    Status(StatusArguments),
    Recover(Recover),
    Cancel(Cancel),
    Resolve(Resolve),
    ImageProxy(ImageProxy),
    ImageCache(ImageCache),
    Inspect(Inspect),
    #[command(hide = true)]
    Guard(Guard),
    /// Have the target make userfaultfds for a haulier that may be killed
    ///
    /// Started by "haulier migrate", with a socket as its standard input.
    #[command(hide = true)]
    Tracer,
}

/// Keep the missing pages of a restored process from becoming zeros when the server dies
///
/// Started by "haulier serve", with a socket as its standard input.
#[derive(Debug, Args)]
pub(crate) struct Guard {
    /// The cgroup of the process, to be killed then
    pub(crate) cgroup: PathBuf,
    /// Where to note what became of it
    pub(crate) verdict: PathBuf,
}

/// Move a process tree to a host where "haulier serve" runs
///
/// The process and all its descendants go on at the destination under the same process numbers. Their
/// memory is sent while they run, before or after (--mode); they are stopped for the rest and for
/// their state. Whatever fails before the destination has taken over, they go on here as if nothing
/// had happened; Ctrl-C has the same effect.
///
/// Programs, libraries and open files must be at the same paths on both hosts; that, free process
/// numbers, memory and versions are checked before anything is stopped.
#[derive(Debug, Args)]
#[command(after_help = MIGRATE_HELP)]
pub(crate) struct Migrate {
    /// Process to move, with all its descendants
    #[arg(value_parser = process)]
    pid: i32,
    /// Where to: the address that "haulier serve" listens on there
    #[arg(value_name = "HOST:PORT", value_parser = host_and_port)]
    destination: String,
    /// Address that moves along, with the connections bound to it, e.g. 10.0.0.5/24@eth0;
    /// repeatable
    #[arg(long, value_name = "ADDRESS/PREFIX@INTERFACE")]
    move_ip: Vec<MoveIp>,
    /// CRIU to use [default: $HAULIER_CRIU, or criu in PATH, or /opt/haulier/criu/sbin/criu]
    #[arg(long, value_name = "PATH")]
    criu: Option<PathBuf>,
    /// When memory is sent: stop-and-copy, pre-copy, post-copy or hybrid
    #[arg(long, value_name = "MODE", default_value_t, help_heading = MEMORY)]
    mode: Mode,
    /// Longest time the process may stand still, as a goal for the rounds of pre-copy
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = time, help_heading = MEMORY)]
    max_downtime: Duration,
    /// Most rounds of pre-copy
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = MEMORY)]
    max_rounds: u32,
    /// Longest time for the rounds, e.g. 90s or 5m [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = time, help_heading = MEMORY)]
    max_time: Option<Duration>,
    /// What to do when memory is written as fast as it is sent: post-copy, throttle, force or abort
    #[arg(long, value_name = "WHAT", default_value_t, help_heading = MEMORY)]
    on_stall: OnStall,
    /// What ends the rounds: downtime, or phaul for p.haul's constants
    #[arg(long, value_name = "POLICY", default_value_t, help_heading = MEMORY)]
    policy: PolicyKind,
    /// How written pages are found: auto, write-protect, soft-dirty or none
    #[arg(long, value_name = "HOW", default_value_t, help_heading = MEMORY)]
    tracker: TrackerChoice,
    /// Parallel connections for memory [default: by the link and the processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), help_heading = MEMORY)]
    streams: Option<u32>,
    /// How pages are compressed: auto, none, lz4 or zstd
    #[arg(long, value_name = "HOW", default_value_t, help_heading = MEMORY)]
    compress: Compression,
    /// Most bytes a second for memory while the process runs here, e.g. 100MiB [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = MEMORY)]
    bandwidth: Option<ByteSize>,
    /// Percent of the line for memory once it fills it: the rest is for others, who would wait in its
    /// queue [default: 90, or 98 if the process has no clients on that line]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100), help_heading = MEMORY)]
    line_share: Option<u8>,
    /// Longest time a single step may take, in seconds; then everything is undone
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = seconds::<1>)]
    step_time: u64,
    /// How long to ask a destination that fell silent after the commit whether it has taken over
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = seconds::<1>)]
    doubt_time: u64,
    /// How long a connection may be dead before it counts as broken; more for a WAN, on both hosts
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = seconds::<4>)]
    link_time: u64,
    /// Do not compare the processors' features
    #[arg(long)]
    skip_cpu_check: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

const MEMORY: &str = "Memory";

const MIGRATE_HELP: &str = "\
Exit codes:
  0  moved: it runs on the destination
  1  haulier itself failed to start
  2  bad usage
  3  nothing was touched: it was not stopped
  4  rolled back: it was stopped for a moment and runs here again
  5  needs you: it stands frozen here, and the destination does not answer, or has lost it

Example: a Redis, with its address and its clients' connections
  web2# haulier serve --listen 10.0.0.2:7000
  web1# haulier migrate $(pidof redis-server) 10.0.0.2:7000 --move-ip 10.0.0.5/24@eth0

The connection is neither encrypted nor authenticated: use it on a network you trust.";

/// Accept processes from other hosts
///
/// Runs until Ctrl-C, and finishes or undoes meanwhile what a killed haulier left on this host. Whoever can connect can have a process run here as root: listen on an address
/// of a network you trust.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = host_and_port)]
    listen: String,
    /// CRIU to use [default: $HAULIER_CRIU, or criu in PATH, or /opt/haulier/criu/sbin/criu]
    #[arg(long, value_name = "PATH")]
    criu: Option<PathBuf>,
    /// Longest time a single step may take, in seconds; then everything is undone
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = seconds::<1>)]
    step_time: u64,
    /// How long a connection may be dead before it counts as broken; more for a WAN, on both hosts
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = seconds::<4>)]
    link_time: u64,
    /// Most memory for the pages of one migration, e.g. 8GiB [default: what is free at the start]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_memory: Option<ByteSize>,
}

impl Migrate {
    /// What the library is asked for.
    pub(crate) fn options(&self) -> source::Options {
        source::Options {
            pid: self.pid,
            destination: self.destination.clone(),
            move_addresses: self.move_ip.clone(),
            criu: self.criu.clone(),
            mode: self.mode,
            policy: Policy {
                kind: self.policy,
                max_downtime: self.max_downtime,
                max_rounds: self.max_rounds,
                max_time: self.max_time,
                on_stall: self.on_stall,
                may_throttle: true,
            },
            tracker: self.tracker,
            streams: self.streams,
            compression: self.compress,
            bandwidth: self.bandwidth.map(|size| size.as_u64()),
            line_share: self.line_share,
            step_time: Duration::from_secs(self.step_time),
            doubt_time: Duration::from_secs(self.doubt_time),
            link_time: LinkTime::new(Duration::from_secs(self.link_time)),
            check_cpu: !self.skip_cpu_check,
        }
    }
}

impl Serve {
    /// What the library is asked for.
    pub(crate) fn options(&self) -> destination::Options {
        destination::Options {
            listen: self.listen.clone(),
            criu: self.criu.clone(),
            step_time: Duration::from_secs(self.step_time),
            link_time: LinkTime::new(Duration::from_secs(self.link_time)),
            max_memory: self
                .max_memory
                .map_or_else(host::available_memory, |size| size.as_u64()),
        }
    }
}

/// A process number.
fn process(text: &str) -> Result<i32, String> {
    match text.parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err("expected the number of one process, e.g. from pidof or pgrep".to_owned()),
    }
}

/// A number of seconds, at least so many and at most a day.
pub(crate) fn seconds<const LEAST: u64>(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(seconds @ ..=86_400) if seconds >= LEAST => Ok(seconds),
        _ => Err(format!(
            "expected a number of seconds from {LEAST} to 86400"
        )),
    }
}

/// `100MiB`, `8GiB`.
fn size(text: &str) -> Result<ByteSize, String> {
    let size = text.parse();
    size.map_err(|_| "expected a size such as 100MiB or 8GiB".to_owned())
}

/// `300ms`, `2s`, `1m`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("expected a time such as 300ms, 90s or 5m: {error}"))
}

/// `host:port`, `1.2.3.4:port` or `[v6]:port`; names are looked up later.
pub(crate) fn host_and_port(text: &str) -> Result<String, String> {
    let wrong = || "expected HOST:PORT, e.g. 10.0.0.2:7000 or [fd00::2]:7000".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || bare_v6 || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses_need_a_host_and_a_port() {
        for good in ["web2:7000", "10.0.0.2:0", "[fd00::2]:7000"] {
            assert!(host_and_port(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "web2",
            ":7000",
            "web2:",
            "web2:70000",
            "fd00::2:7000",
            "web2:ssh",
        ] {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bad_values_are_refused() {
        let migrate = |arguments: &[&str]| {
            let all = ["haulier", "migrate"].iter().chain(arguments);
            Cli::try_parse_from(all).map(drop)
        };
        assert!(migrate(&["7", "a:1", "--move-ip", "10.0.0.5/24@eth0"]).is_ok());
        assert!(migrate(&["0", "a:1"]).is_err());
        assert!(migrate(&["-5", "a:1"]).is_err());
        assert!(migrate(&["nginx", "a:1"]).is_err());
        assert!(migrate(&["7", "a:1", "--step-time", "0"]).is_err());
        assert!(migrate(&["7", "a:1", "--step-time", "2m"]).is_err());
        assert!(migrate(&["7", "a:1", "--step-time", "86401"]).is_err());
        assert!(migrate(&["7", "a:1", "--step-time", "86400", "--link-time", "4"]).is_ok());
        assert!(migrate(&["7", "a:1", "--link-time", "3"]).is_err());
        assert!(migrate(&["7", "a:1", "--bandwidth", "100MiB"]).is_ok());
        assert!(migrate(&["7", "a:1", "--bandwidth", "fast"]).is_err());
        assert!(migrate(&["7", "a:1", "--line-share", "100"]).is_ok());
        assert!(migrate(&["7", "a:1", "--line-share", "0"]).is_err());
        assert!(migrate(&["7", "a:1", "--line-share", "101"]).is_err());
        assert!(migrate(&["7", "a"]).is_err());
        assert!(migrate(&["7", "a:1", "--move-ip", "10.0.0.5"]).is_err());
        assert!(migrate(&["7", "a:1", "--streams", "0"]).is_err());
        assert!(migrate(&["7", "a:1", "--mode", "hybrid", "--max-time", "5m"]).is_ok());
        assert!(migrate(&["7", "a:1", "--mode", "hybird"]).is_err());
        assert!(migrate(&["7", "a:1", "--max-downtime", "300"]).is_err());
    }

    #[test]
    fn a_word_is_one_and_only_one() {
        let resolve = |arguments: &[&str]| {
            let all = ["haulier", "resolve", "0123456789abcdef"];
            Cli::try_parse_from(all.iter().chain(arguments)).map(drop)
        };
        assert!(resolve(&["--run-here"]).is_ok());
        assert!(resolve(&["--discard"]).is_ok());
        assert!(resolve(&[]).is_err());
        assert!(resolve(&["--run-here", "--discard"]).is_err());
        assert!(resolve(&["here"]).is_err());
    }
}
