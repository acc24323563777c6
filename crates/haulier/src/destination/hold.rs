//! The target on its way into this host: what is made for it, and how each of that is undone.

use std::error::Error;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use haulier_criu::restore::{self, Parked, RestoreOptions, Starting, Waiting};
use haulier_criu::skeleton::Skeleton;
use haulier_memory::lazy::guard::Guard;
use haulier_memory::lazy::{LazyMap, LazyPages, LazyPagesHandle};
use haulier_memory::post::FaultClient;
use haulier_memory::store::PageStore;
use haulier_proto::id::MigrationId;
use haulier_sys::wait::Wait;
use haulier_targets::cgroup::Cgroup;
use haulier_targets::network::{
    self, Announcement, Announcer, ArmedLock, Capture, EngagedLock, Injector, LockScope, MoveIp,
};
use haulier_transport::channel::Channel;
use tracing::{info, warn};

use crate::destination::Shared;
use crate::destination::moves::FastMoves;
use crate::directories::ImageDirectory;
use crate::guard;
use crate::packets::PacketReceiver;
use crate::recovery;
use crate::timeline::Stopwatch;

/// How long packets may follow; the source's own limit is shorter.
const PACKETS_TIME: Duration = Duration::from_secs(10);
/// How long the guard may take to get ready.
const GUARD_TIME: Duration = Duration::from_secs(10);
/// How long the way back may take, step by step.
const UNDO_TIME: Duration = Duration::from_secs(30);

type AnyError = Box<dyn Error + Send + Sync>;

/// Where the restored target's pages come from.
#[derive(Debug)]
pub(crate) struct Memory<'a> {
    /// What was received.
    pub(crate) store: &'a Arc<PageStore>,
    /// Asks the source for the rest.
    pub(crate) faults: &'a Arc<FaultClient>,
}

/// What this host has made for a target that does not run yet.
#[derive(Debug)]
pub(crate) struct Hold {
    id: MigrationId,
    directory: ImageDirectory,
    home: Cgroup,
    addresses: Vec<MoveIp>,
    armed: Option<ArmedLock>,
    /// What this host's own lock drops.
    capture: Option<Capture>,
    packets: Option<PacketReceiver>,
    engaged: Option<EngagedLock>,
    added: Vec<MoveIp>,
    announcements: Vec<Announcement>,
    /// Handed to the daemon that fills the target's memory.
    guard: Option<Guard>,
    lazy: Option<LazyPagesHandle>,
    criu: RestoreOptions,
    /// Ready, and in its cgroup, before there are any images.
    waiting: Option<Waiting>,
    moves: Option<FastMoves>,
    root: i32,
    over: bool,
}

impl Hold {
    /// Makes room: a directory, a cgroup, a lock and a CRIU that are ready. Nothing is seen of it
    /// from outside.
    pub(crate) fn prepare(
        shared: &Shared,
        id: MigrationId,
        addresses: Vec<MoveIp>,
        shell_job: bool,
        wait: &Wait,
    ) -> Result<Hold, AnyError> {
        let directory = ImageDirectory::create(id, "restore")?;
        let mut armed = match addresses.is_empty() {
            true => None,
            false => Some(ArmedLock::arm(&id.to_string())?),
        };
        let capture = armed.as_mut().and_then(|lock| capture_of(id, lock));
        let home = shared.cgroups.create_home(&id.to_string())?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("guard")
            .arg(home.path())
            .arg(guard::verdict_file(id));
        let guard = Guard::spawn(command, &Wait::uncancellable(GUARD_TIME))
            .inspect_err(|_| drop(home.remove()))?;
        let criu = RestoreOptions {
            directory: directory.path().to_owned(),
            shell_job,
        };
        let mut hold = Hold {
            id,
            directory,
            home,
            addresses,
            armed,
            capture,
            packets: None,
            engaged: None,
            added: Vec::new(),
            announcements: Vec::new(),
            guard: Some(guard),
            lazy: None,
            criu,
            waiting: None,
            moves: None,
            root: 0,
            over: false,
        };
        let starting = hold.start_criu(shared)?;
        hold.waiting = Some(starting.wait_for_images(&hold.criu, wait)?);
        Ok(hold)
    }

    /// Starts CRIU in the target's cgroup: before it forks the first task, so that all of them are
    /// born there and none can be missed.
    fn start_criu(&self, shared: &Shared) -> Result<Starting, AnyError> {
        let criu = shared.criu.as_ref().map_err(|reason| reason.clone())?;
        let starting = restore::start(criu, &self.criu)?;
        self.home.add(starting.criu_pid())?;
        Ok(starting)
    }

    fn run_criu(&mut self, shared: &Shared, wait: &Wait) -> Result<Parked, AnyError> {
        if let Some(mut waiting) = self.waiting.take() {
            if waiting.is_alive() {
                return Ok(waiting.restore(wait)?);
            }
            warn!("the CRIU that was held ready has ended; starting another");
        }
        Ok(self.start_criu(shared)?.restore(&self.criu, wait)?)
    }

    /// The directory of the images.
    pub(crate) fn directory(&self) -> &ImageDirectory {
        &self.directory
    }

    /// Root task of the restored tree.
    pub(crate) fn root(&self) -> i32 {
        self.root
    }

    /// Does what can be done without the images, but only once the target stands at its source and
    /// is silent there: the addresses are taken, behind a lock.
    pub(crate) fn approach(&mut self, shared: &Shared) -> Result<(), AnyError> {
        self.moves = FastMoves::keep(&shared.cgroups);
        self.take_addresses()
    }

    /// Restores the tree and leaves it, complete, in its frozen cgroup. [`Hold::approach`] comes
    /// before: restored sockets need the addresses.
    pub(crate) fn restore(
        &mut self,
        shared: &Shared,
        memory: &Memory<'_>,
        clock: &mut Stopwatch,
        wait: &Wait,
    ) -> Result<(), AnyError> {
        let skeleton = Skeleton::read(self.directory.path())?;
        let faults: Arc<FaultClient> = Arc::clone(memory.faults);
        let mut daemon = LazyPages::listen(self.directory.path())?.faults_to(faults);
        if let Some(guard) = self.guard.take() {
            daemon = daemon.guarded_by(guard);
        }
        self.lazy = Some(daemon.start(LazyMap::of(&skeleton), Arc::clone(memory.store))?);
        clock.lap("skeleton");

        let parked = self.run_criu(shared, wait)?;
        self.root = parked.root();
        clock.lap("restore");

        // From here on a CRIU that dies, or is let go of, lets the tasks run, which nobody has
        // decided yet: whatever fails before they are frozen kills them first.
        let kill = || {
            let _ = self.home.kill(&Wait::uncancellable(UNDO_TIME));
        };
        let at_resume = parked.proceed(wait).inspect_err(|_| kill())?;
        let freeze = || {
            self.home.parent().add(at_resume.criu_pid())?;
            self.home.freeze(wait)
        };
        freeze().inspect_err(|_| kill())?;
        self.moves = None;
        at_resume.detach(wait)?;
        clock.lap("sockets");
        // Not earlier: it would compete with CRIU for processors and for the tasks' memory maps.
        if let Some(lazy) = &mut self.lazy {
            lazy.fill()?;
        }

        Ok(())
    }

    /// Keeps packets that come over this connection until they can be delivered.
    pub(crate) fn receive_packets(&mut self, channel: Channel) {
        match PacketReceiver::start(channel, self.capture.take()) {
            Ok(receiver) => self.packets = Some(receiver),
            Err(error) => warn!(%error, "packets of the switchover are lost"),
        }
    }

    /// The restored target's memory, until it is complete.
    pub(crate) fn memory(&self) -> Option<&LazyPagesHandle> {
        self.lazy.as_ref()
    }

    /// Pages that have neither been placed nor received.
    pub(crate) fn missing_pages(&self) -> u64 {
        let missing = |lazy: &LazyPagesHandle| {
            let tasks = lazy.missing();
            tasks.iter().map(|(_, pages)| pages.pages()).sum()
        };
        self.lazy.as_ref().map_or(0, missing)
    }

    /// Lets the target run: packets may pass, its neighbours learn where it is, and only then is
    /// it thawed, since its first packet makes clients send at once.
    pub(crate) fn thaw(&mut self) -> Result<(), AnyError> {
        if let Some(lock) = &mut self.engaged {
            lock.lift()?;
        }
        let mut packets = self.packets.take();
        if let Some(receiver) = &mut packets {
            let addresses: Vec<IpAddr> = self.addresses.iter().map(MoveIp::ip).collect();
            if let Err(error) = receiver.release(Injector::open(&addresses)) {
                warn!(%error, "packets of the switchover are lost");
            }
        }
        for announcement in &self.announcements {
            // Neighbours find out by themselves in the end; the target must run.
            if let Err(error) = announcement.send() {
                warn!(%error, "announcing");
            }
        }
        self.home.thaw()?;
        self.over = true;
        let lock = self.engaged.take();
        let announcer = Announcer::start(std::mem::take(&mut self.announcements));
        std::thread::spawn(move || {
            // The kernel takes some milliseconds to free what the lock consisted of.
            drop(lock);
            match announcer {
                Ok(announcer) => announcer.finish(),
                Err(error) => warn!(%error, "repeating the announcement"),
            }
            if let Some(receiver) = packets {
                let stats = receiver.finish(PACKETS_TIME);
                info!(?stats, "packets delivered");
            }
        });
        Ok(())
    }

    /// Removes everything again. Goes on after a failure; returns what is left.
    pub(crate) fn undo(&mut self) -> Vec<String> {
        self.over = true;
        let wait = Wait::uncancellable(UNDO_TIME);
        let mut left = Vec::new();
        let mut note = |what: &str, error: &dyn Error| left.push(format!("{what}: {error}"));
        // It has made nothing yet, and ends when nobody is there to let it go on.
        self.moves = None;
        self.waiting = None;
        // After the thaw it has been lifted.
        let lifted = self.engaged.is_none() && !self.added.is_empty();
        if lifted {
            if let Err(error) = network::silence(&self.id.to_string(), &self.added) {
                note("peers, which will see the end of their connections", &error);
            }
        }
        recovery::hush(self.home.pids().unwrap_or_default());
        // The tasks first: without the daemon, what is missing of their memory reads as zero.
        if let Err(error) = self.home.kill(&wait) {
            note("restored tasks", &error);
        }
        if let Some(lazy) = self.lazy.take() {
            lazy.stop();
        }
        let mut silent = true;
        for address in self.added.drain(..) {
            if let Err(error) = network::remove(&address) {
                note("address, which stays locked", &error);
                silent = false;
            }
        }
        // Only an address that is gone may be talked to again: it is the source's.
        match self.engaged.take() {
            Some(lock) if !silent => lock.keep(),
            Some(mut lock) => {
                if let Err(error) = lock.lift() {
                    note("network lock", &error);
                }
            }
            None if lifted && silent => {
                if let Err(error) = network::lift_by_id(&self.id.to_string()) {
                    note("network lock", &error);
                }
            }
            None => {}
        }
        self.armed = None;
        if let Err(error) = self.home.remove() {
            note("cgroup", &error);
        }
        let _ = std::fs::remove_dir(self.home.parent().path());
        let complaints = guard::complaints(self.id).into_iter();
        left.extend(complaints.map(|line| format!("as its guard says: {line}")));
        left
    }

    /// Keeps CRIU's log of a restore that failed, and says where.
    pub(crate) fn keep_log(&self) -> Option<PathBuf> {
        self.directory.keep_log(self.id, restore::LOG)
    }

    /// Takes the addresses in silence: restored sockets need them, and nobody else may notice yet.
    fn take_addresses(&mut self) -> Result<(), AnyError> {
        let Some(armed) = self.armed.take() else {
            return Ok(());
        };
        if self.addresses.is_empty() {
            return Ok(());
        }
        self.engaged = Some(armed.engage(&LockScope::new(&self.addresses, &[]))?);
        for address in &self.addresses {
            if network::add(address)? {
                self.added.push(address.clone());
            }
            self.announcements.push(Announcement::prepare(address)?);
        }
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.over {
            for left in self.undo() {
                warn!("{left}");
            }
        }
    }
}

fn capture_of(id: MigrationId, lock: &mut ArmedLock) -> Option<Capture> {
    match Capture::open(&id.to_string()) {
        Ok(capture) => {
            lock.capture_to(&capture);
            Some(capture)
        }
        Err(error) => {
            warn!(%error, "packets that come here too early will be lost");
            None
        }
    }
}
