//! Simulated hosts on one machine, for haulier's tests, demo and benchmarks.
//!
//! ```no_run
//! use haulier_lab::{Lab, LabConfig, workloads};
//!
//! # fn main() -> haulier_lab::Result<()> {
//! let lab = Lab::start(LabConfig::hosts(2))?;
//! let (source, destination) = (lab.host(1), lab.host(2));
//! let redis = workloads::start_redis(source, 6379)?;
//! lab.shape(Some("1gbit"))?;
//! println!("{}", destination.run(["ping", "-c1", "host1"])?.success());
//! println!("redis is PID {}", redis.pid());
//! # Ok(())
//! # }
//! ```
//!
//! # What a host is
//!
//! A host has network, mount, PID, UTS, IPC and cgroup namespaces of its own. It shares the
//! machine's kernel, user IDs, clock, `/dev` and root file system, programs and `/tmp` included.
//! Its own are:
//!
//! | path | what |
//! |---|---|
//! | `/proc`, `/sys` | of its namespaces |
//! | `/sys/fs/cgroup` | cgroup v2, with the host's part of the machine's tree as root |
//! | `/run`, `/dev/shm`, `/srv`, `/var/lib/haulier`, `/var/log/haulier` | empty tmpfs |
//! | `/etc/hosts` | `host1`, `host2`, ... (bound from `/run/hosts`) |
//!
//! So a program found at a path on one host is found there on all, while files for tests that want
//! the hosts to differ go to `/srv`. A haulier journal ends with its lab.
//!
//! PIDs of host N start above 3000 N, so that a process finds its PID free where it migrates to,
//! as it mostly would between real hosts. [`HostCommand::pid`] provokes the other case.
//!
//! # The network
//!
//! ```text
//!   fabric's network namespace             host N's network namespace
//!   bridge `fabric` ── hostN ═══ veth ═══ eth0   10.77.0.N/24, fd77::N/64
//! ```
//!
//! Nothing of it is in the machine's own network namespace, so labs do not meet, and all use the
//! same addresses. There is no way out, to the machine or the Internet. A program adds and removes
//! addresses as on any host; duplicate address detection is off. [`Lab::shape`] limits rates with
//! `tbf` on both ends of each veth pair; [`Lab::cut`] disables a bridge port, which swallows frames
//! both ways and leaves the carrier on.
//!
//! # Processes, and how all of it ends
//!
//! ```text
//! owner (a test, the demo)
//!   └─ supervisor ── in the fabric's network namespace; stdin is a pipe from the owner
//!        ├─ host-init ── PID 1 of host1; stdin is a pipe from the supervisor
//!        │    └─ host-exec, which becomes a program of the host
//!        └─ host-init ── PID 1 of host2
//! ```
//!
//! All of these are the haulier-lab program under other names. Whatever ends the owner closes its
//! pipe: the supervisor then kills the lab's cgroup (`cgroup.kill`, which frozen and stopped
//! processes do not survive either), removes it and `/run/haulier-lab/<name>`, and ends; namespaces,
//! mounts and veth pairs go with their last process. If the supervisor itself is killed, PID 1s see
//! their pipe close and end, and what is left on disk is cleared away by the next lab that starts.
//! Three things stay: the folder `/run/haulier-lab` with its lock, empty folders `/var/lib/haulier`
//! and `/var/log/haulier` as mount points, and `fs.pipe-max-size`, which is machine-wide and raised
//! to 4 MiB.
//!
//! `haulier-lab up` starts the same supervisor without an owner.
//!
//! # How a program starts
//!
//! PID 1 listens on `/run/haulier-lab/<name>/hostN.sock` (outside the host's `/run`). A request is a
//! JSON packet, its streams come as descriptors. PID 1 sets `ns_last_pid`, starts `host-exec`, looks
//! at the PID it got, and hands the request on; `host-exec` opens files inside the host, joins
//! session and cgroup, marks every other descriptor close-on-exec and executes the program. The
//! connection stays and brings the exit status.
//!
//! # What it needs
//!
//! Root, Linux 5.14 (`cgroup.kill`), a cgroup2 mount, iproute2, and nftables for
//! [`Host::snapshot`]. The library looks for the haulier-lab program beside the running one
//! ([`program`]): `cargo build -p haulier-lab` comes before `cargo nextest run -p something-else`.

mod cgroup;
mod command;
mod error;
mod host;
mod init;
mod lab;
mod mounts;
mod network;
mod program;
mod snapshot;
mod starter;
mod state;
mod supervisor;
mod wire;

pub mod workloads;

pub use command::{Captured, HostCommand, Output, Process};
pub use error::{Error, Result};
pub use host::{Host, ProcessInfo};
pub use lab::{Lab, LabConfig};
pub use network::Rate;
pub use program::program;
pub use rustix::process::Signal;
pub use snapshot::Snapshot;
pub use state::running_labs;

/// Most hosts in a lab: each has 3000 PIDs of its own below the usual pid_max of 32768.
pub const MAX_HOSTS: usize = 10;

/// Plays one of the parts that the haulier-lab program has in a lab: `supervisor`, `host-launch`,
/// `host-init` and `host-exec`. For the program's own main function.
///
/// # Errors
/// What the part runs into.
#[doc(hidden)]
pub fn play_part(part: &str, config: &str) -> Result<()> {
    match part {
        "supervisor" => supervisor::run(serde_json::from_str(config)?),
        "host-launch" => supervisor::launch(&serde_json::from_str(config)?),
        "host-init" => init::run(&serde_json::from_str(config)?),
        _ => starter::run(),
    }
}
