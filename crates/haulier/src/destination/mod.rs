//! The destination of migrations: `haulier serve`.

mod actions;
mod arrival;
mod check;
mod dialogue;
mod hold;
mod link;
mod moves;
mod orphans;
mod receivers;
mod registry;
mod session;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use haulier_criu::Criu;
use haulier_proto::message::Role;
use haulier_targets::cgroup::CgroupFs;
use haulier_targets::host::{self, Host};
use haulier_transport::channel::Channel;
use haulier_transport::greeting::{self, Identity, Purpose};
use haulier_transport::tcp::{LinkTime, Listener};
use haulier_transport::wait::{Cancel, Wait, WaitError};
use tracing::{info, warn};

use self::registry::Registry;
use crate::SOFTWARE;
use crate::source::again::Asking;

/// How long a new connection may take to say who it is.
const GREETING_TIME: Duration = Duration::from_secs(10);
/// How long migrations under way may take to come to an end when the server is stopped.
const FAREWELL_TIME: Duration = Duration::from_secs(60);

/// What the operator asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen, `address:port`.
    pub listen: String,
    /// The CRIU to use, if it is to be a certain one.
    pub criu: Option<PathBuf>,
    /// How long a single step may take: receiving, restoring, waiting for the commit.
    pub step_time: Duration,
    /// How long a connection may be dead before it counts as broken.
    pub link_time: LinkTime,
    /// Most bytes that pages and images of one migration may take here before they are placed.
    pub max_memory: u64,
}

/// What every migration to this host shares.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) host: Host,
    pub(crate) me: Identity,
    /// `None`, with the reason, if there is none: sources are told before they touch anything.
    pub(crate) criu: Result<Criu, String>,
    pub(crate) cgroups: CgroupFs,
    pub(crate) registry: Registry,
    pub(crate) stop: Cancel,
}

/// Accepts migrations until `stop` is cancelled. `ready` is told the address it listens on.
///
/// # Errors
/// If it cannot listen or this host cannot take any migration.
pub fn serve(options: Options, stop: &Cancel, ready: impl FnOnce(&str)) -> anyhow::Result<()> {
    anyhow::ensure!(
        host::is_root(),
        "restoring processes needs root: run it with sudo"
    );
    let listener = Listener::bind_until(&options.listen, stop)?;
    let address = listener
        .local_address()
        .context("no address to listen on")?
        .to_string();
    let host = Host::this();
    let cgroups = CgroupFs::find()?;
    let asking = Asking {
        patience: Duration::MAX,
        bring: true,
        link_time: options.link_time,
    };
    let orphans = orphans::look_after(&cgroups, &asking, stop)?;
    let criu = Criu::find(options.criu.as_deref()).map_err(|error| error.to_string());
    match &criu {
        Ok(criu) => info!("with {criu}"),
        Err(reason) => warn!("{reason}; sources will be refused"),
    }
    let me = Identity {
        software: SOFTWARE.to_owned(),
        host: host.name.clone(),
    };
    let registry = Registry::default();
    let shared = Arc::new(Shared {
        options,
        host,
        me,
        criu,
        cgroups,
        registry,
        stop: stop.clone(),
    });
    ready(&address);
    loop {
        match listener.accept(&stop.wait(Duration::from_secs(3600))) {
            Ok(channel) => {
                let shared = Arc::clone(&shared);
                thread::spawn(move || greet(&shared, channel));
            }
            Err(WaitError::Deadline) => {}
            Err(WaitError::Cancelled) => break,
            Err(WaitError::Io(error)) => {
                // Out of descriptors, most likely: the migrations under way free some.
                warn!(%error, "accepting a connection");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
    info!("stopping: waiting for migrations under way");
    if !shared.registry.wait_until_idle(FAREWELL_TIME) {
        warn!("some migrations did not come to an end");
    }
    // What it has begun to recover it brings to an end; after a panic the next server does.
    let _ = orphans.join();
    Ok(())
}

fn greet(shared: &Arc<Shared>, mut channel: Channel) {
    if let Err(error) = shared.options.link_time.apply(&channel) {
        info!(%error, peer = channel.peer(), "turned away");
        return;
    }
    let wait = shared.stop.wait(GREETING_TIME);
    let (hello, purpose, version) = match greeting::receive_hello(&mut channel, &shared.me, &wait) {
        Ok(greeted) => greeted,
        Err(error) => {
            info!(%error, peer = channel.peer(), "turned away");
            return;
        }
    };
    let result = match purpose.role {
        Role::Command => return command(shared, channel, &hello.host, &purpose, version),
        Role::Images | Role::Memory | Role::Faults | Role::Packets => {
            shared.registry.check_stream(&purpose)
        }
        Role::Unset => Err("a connection needs a role".to_owned()),
    };
    match result {
        Ok(()) => {
            if greeting::accept(&mut channel, &shared.me, version, &wait).is_ok() {
                shared.registry.deliver(&purpose, channel);
            }
        }
        Err(reason) => {
            let _ = greeting::refuse(&mut channel, &shared.me, &reason, &wait);
        }
    }
}

fn command(
    shared: &Arc<Shared>,
    mut channel: Channel,
    from: &str,
    purpose: &Purpose,
    version: haulier_proto::version::Version,
) {
    let wait = shared.stop.wait(GREETING_TIME);
    match shared.registry.begin(purpose) {
        registry::Entry::New(streams) => {
            if greeting::accept(&mut channel, &shared.me, version, &wait).is_ok() {
                session::run(shared, channel, from, purpose.migration, streams);
            }
            shared.registry.end(purpose.migration);
        }
        registry::Entry::Again => {
            if greeting::accept(&mut channel, &shared.me, version, &wait).is_ok() {
                arrival::answer_again(shared, channel, purpose.migration);
            }
        }
        registry::Entry::Refused(reason) => {
            let _ = greeting::refuse(&mut channel, &shared.me, &reason, &wait);
        }
    }
}

impl Shared {
    /// A wait for one step, ended by the server's stop.
    pub(crate) fn step(&self, stop: &Cancel) -> Wait {
        stop.wait(self.options.step_time)
    }
}
