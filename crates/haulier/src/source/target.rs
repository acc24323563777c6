//! The target while it is being moved: what is done to it, and how each of that is undone.

use std::error::Error;
use std::path::Path;
use std::thread;

use haulier_criu::dump::{self, Captured, DumpOptions, Frozen, Ready, Starting};
use haulier_criu::skeleton::Skeleton;
use haulier_proto::id::MigrationId;
use haulier_sys::wait::Wait;
use haulier_targets::cgroup::{Cgroup, CgroupError, Throttle};
use haulier_targets::network::{self, ArmedLock, EngagedLock, LockScope, MoveIp};
use haulier_targets::process::ProcessTree;
use haulier_transport::channel::Channel;
use thiserror::Error;
use tracing::{debug, warn};

use crate::claim::{self, Claim};
use crate::directories::ImageDirectory;
use crate::journal::{Holding, Journal};
use crate::recovery;
use crate::source::forwarding::Forwarding;
use crate::source::plan::Plan;
use crate::source::veil::{self, Veiled};

/// Most rounds of looking for tasks that were forked while their parents were confined.
const CONFINE_ROUNDS: usize = 100;

/// The target could not be brought into a state.
#[derive(Debug, Error)]
pub(crate) enum TargetError {
    #[error("it forks faster than its tasks can be put into a cgroup")]
    ForksTooFast,
    #[error("task {0} left the cgroup it was put into; is a service manager moving it?")]
    Escaped(u32),
    #[error("CRIU ended while it held the tasks")]
    CriuLost,
    #[error("process {pid} is another migration's: {claim:?}")]
    Claimed { pid: i32, claim: Claim },
    #[error("the look at its pages panicked")]
    LookPanicked,
    #[error("the image directory cannot be had")]
    Directory(#[source] std::io::Error),
}

type AnyError = Box<dyn Error + Send + Sync>;

/// A process tree, its confinement, its lock and its dump.
#[derive(Debug)]
pub(crate) struct Target {
    id: MigrationId,
    directory: ImageDirectory,
    groups: Vec<Cgroup>,
    armed: Option<ArmedLock>,
    engaged: Option<EngagedLock>,
    forwarding: Forwarding,
    forwarded: u64,
    throttle: Option<Throttle>,
    dump: Dump,
    veiled: bool,
    over: bool,
}

#[derive(Debug)]
enum Dump {
    None,
    /// Made while the target runs, so that the freeze does not wait for it.
    Starting(Starting),
    Ready(Ready),
    Frozen(Frozen),
    Captured(Captured),
}

impl Target {
    /// Confines the tree to cgroups of its own and readies everything for the freeze. The target
    /// runs on. [`Target::get_ready`] waits for what is slow of that.
    pub(crate) fn prepare(
        plan: &Plan,
        moved: &[MoveIp],
        journal: &mut Journal,
        wait: &Wait,
    ) -> Result<Target, AnyError> {
        let id = journal.id();
        let directory = ImageDirectory::create(id, "dump").map_err(TargetError::Directory)?;
        let starting = dump::start(&plan.criu, &dump_options(plan, &directory, wait))?;
        let mut armed = ArmedLock::arm(&id.to_string())?;
        let forwarding = Forwarding::arm(id, moved, &mut armed);
        let mut target = Target {
            id,
            directory,
            groups: Vec::new(),
            armed: Some(armed),
            engaged: None,
            forwarding,
            forwarded: 0,
            throttle: None,
            dump: Dump::Starting(starting),
            veiled: false,
            over: false,
        };
        target.confine(plan, journal)?;
        Ok(target)
    }

    /// Waits until CRIU has done all that it can do before it stops the tasks. It then waits, for as
    /// long as the rounds take, to be told.
    pub(crate) fn get_ready(&mut self, plan: &Plan, wait: &Wait) -> Result<(), AnyError> {
        let ready = self.take_ready(plan, wait)?;
        self.veiled = ready.can_hide();
        self.dump = Dump::Ready(ready);
        Ok(())
    }

    /// Whether its memory will be hidden from CRIU.
    pub(crate) fn is_veiled(&self) -> bool {
        self.veiled
    }

    fn take_ready(&mut self, plan: &Plan, wait: &Wait) -> Result<Ready, AnyError> {
        match std::mem::replace(&mut self.dump, Dump::None) {
            Dump::Starting(starting) => return Ok(starting.ready(wait)?),
            Dump::Ready(mut ready) => {
                if ready.is_alive() {
                    return Ok(ready);
                }
                warn!("the CRIU that was held ready has ended; starting another");
            }
            Dump::None => {}
            Dump::Frozen(_) | Dump::Captured(_) => unreachable!("frozen twice"),
        }
        let options = dump_options(plan, &self.directory, wait);
        Ok(dump::start(&plan.criu, &options)?.ready(wait)?)
    }

    /// The directory of the images.
    pub(crate) fn directory(&self) -> &ImageDirectory {
        &self.directory
    }

    /// The cgroups that the tasks are confined to.
    pub(crate) fn groups(&self) -> &[Cgroup] {
        &self.groups
    }

    /// Whether packets that come too late can be forwarded.
    pub(crate) fn captures_packets(&self) -> bool {
        self.forwarding.is_armed()
    }

    /// Forwards packets that come too late, with the tasks frozen and the network locked.
    pub(crate) fn forward(&mut self, plan: &Plan, channel: Channel) {
        let tree = ProcessTree::read(plan.tree.root());
        let pids = tree.map_or_else(|_| plan.tree.pids(), |tree| tree.pids());
        self.forwarding.start(&pids, channel);
    }

    /// Packets that were forwarded.
    pub(crate) fn forwarded(&self) -> u64 {
        self.forwarded
    }

    /// Takes so many per cent of the CPU time that it uses from the target.
    pub(crate) fn throttle(&mut self, percent: u8, journal: &mut Journal) -> Result<(), AnyError> {
        let throttle = match &mut self.throttle {
            Some(throttle) => throttle,
            none => none.insert(Throttle::prepare(
                &self.groups,
                &claim::cgroup_name(self.id),
            )?),
        };
        let mut record = |path: &Path| journal.hold(&Holding::Throttle(path.to_owned()));
        Ok(throttle.set(percent, &mut record)?)
    }

    /// Gives the target its CPU time back.
    pub(crate) fn end_throttle(&mut self) {
        if let Some(mut throttle) = self.throttle.take() {
            if let Err(error) = throttle.lift() {
                warn!(%error, "giving CPU time back");
            }
        }
    }

    /// Removes the target's addresses from this host, whose tasks stay locked in.
    pub(crate) fn depart(&mut self, moved: &[MoveIp]) -> Vec<String> {
        if let Some(stats) = self.forwarding.finish() {
            self.forwarded = stats.sent;
        }
        let mut left = Vec::new();
        for address in moved {
            if let Err(error) = network::remove(address) {
                left.push(format!(
                    "the address {address} is still on this host: {error}"
                ));
            }
        }
        left
    }

    /// Stops the tasks and, as soon as they stand, locks the network: what arrives before that the
    /// kernel still queues, and the dump takes it along.
    pub(crate) fn freeze(
        &mut self,
        plan: &Plan,
        scope: &LockScope,
        wait: &Wait,
    ) -> Result<(), AnyError> {
        let ready = self.take_ready(plan, wait)?;
        self.dump = Dump::Frozen(ready.freeze(wait)?);
        if let Some(armed) = self.armed.take() {
            self.engaged = Some(armed.engage(scope)?);
        }
        Ok(())
    }

    /// Has CRIU write the skeleton, and takes the freeze over from it.
    pub(crate) fn capture(&mut self, plan: &Plan, wait: &Wait) -> Result<Skeleton, AnyError> {
        let Dump::Frozen(frozen) = std::mem::replace(&mut self.dump, Dump::None) else {
            unreachable!("captured before it was frozen");
        };
        let veiled = Veiled::draw(&frozen, plan.tree.root())?;
        let (captured, found) = thread::scope(|scope| {
            let found = scope.spawn(|| veiled.look());
            (frozen.capture(wait), found.join())
        });
        let mut captured = captured?;
        let frozen = self.groups.iter().try_for_each(|group| group.freeze(wait));
        let held = captured.is_held();
        self.dump = Dump::Captured(captured);
        frozen?;
        // Had CRIU ended before the cgroups were frozen, the tasks would have run on, and their
        // memory would not be that of the skeleton any more.
        if !held {
            return Err(TargetError::CriuLost.into());
        }
        let found = found.map_err(|_| TargetError::LookPanicked)??;
        found.enter(self.directory.path())?;
        let skeleton = Skeleton::read(self.directory.path())?;
        for task in &skeleton.tasks {
            let group = plan.cgroups.of(task.pid as i32)?;
            if !self.groups.contains(&group) {
                return Err(TargetError::Escaped(task.pid).into());
            }
        }
        Ok(skeleton)
    }

    /// Lets the target run on, as if nothing had happened. Goes on after a failure; returns what
    /// could not be undone.
    pub(crate) fn let_go(&mut self, wait: &Wait) -> Vec<String> {
        self.over = true;
        self.end_throttle();
        let mut left = Vec::new();
        match std::mem::replace(&mut self.dump, Dump::None) {
            Dump::None => {}
            Dump::Starting(starting) => drop(starting),
            Dump::Ready(ready) => drop(ready),
            Dump::Frozen(frozen) => drop(frozen),
            Dump::Captured(captured) => {
                if let Err(error) = captured.abandon(wait) {
                    debug!(%error, "abandoning the dump");
                }
            }
        }
        // A CRIU that was killed, or that crashed, leaves sockets in repair mode.
        for pid in self
            .groups
            .iter()
            .flat_map(|group| group.pids().unwrap_or_default())
        {
            if let Err(error) = network::end_repair_of(pid) {
                debug!(pid, %error, "looking for sockets in repair mode");
            }
        }
        self.lift(&mut left);
        for group in &self.groups {
            if let Err(error) = group.dissolve() {
                left.push(describe(&error));
            }
        }
        self.forwarding.give_back();
        left
    }

    /// Kills the frozen tasks and removes what the target had on this host. Goes on after a
    /// failure; returns what is left.
    pub(crate) fn kill(&mut self, plan: &Plan, moved: &[MoveIp], wait: &Wait) -> Vec<String> {
        self.over = true;
        let mut left = Vec::new();
        if let Dump::Captured(captured) = std::mem::replace(&mut self.dump, Dump::None) {
            if let Err(error) = captured.release(wait) {
                debug!(%error, "releasing the dump");
            }
        }
        // A CRIU that has failed has left sockets that would say goodbye.
        for group in &self.groups {
            recovery::hush(group.pids().unwrap_or_default());
            if let Err(error) = group.kill(wait) {
                left.push(describe(&error));
            }
        }
        let stuck = self.depart(moved);
        let silent = stuck.is_empty();
        left.extend(stuck);
        // Only an address that is gone may be talked to again: two hosts must not answer for it.
        match self.engaged.take() {
            Some(lock) if !silent => lock.keep(),
            lock => {
                self.engaged = lock;
                self.lift(&mut left);
            }
        }
        for group in &self.groups {
            if let Err(error) = group.remove() {
                left.push(describe(&error));
            }
        }
        recovery::sweep_homes(&plan.cgroups);
        left
    }

    /// Leaves everything as it is, frozen and locked, beyond the end of this process.
    pub(crate) fn keep(mut self) {
        self.over = true;
        if let Dump::Captured(captured) = std::mem::replace(&mut self.dump, Dump::None) {
            // CRIU would end with this process anyhow; the cgroups hold the tasks.
            captured.kill_criu();
        }
        if let Some(lock) = self.engaged.take() {
            lock.keep();
        }
    }

    fn confine(&mut self, plan: &Plan, journal: &mut Journal) -> Result<(), AnyError> {
        let name = claim::cgroup_name(self.id);
        let _turn = claim::turn()?;
        // All of it first: what another migration has is not touched.
        for pid in ProcessTree::read(plan.tree.root())?.pids() {
            if let Some(claim) = claim::of(pid, &plan.cgroups, Some(self.id)) {
                return Err(TargetError::Claimed { pid, claim }.into());
            }
        }
        for _ in 0..CONFINE_ROUNDS {
            let mut moved = false;
            for pid in ProcessTree::read(plan.tree.root())?.pids() {
                let Ok(group) = plan.cgroups.of(pid) else {
                    continue;
                };
                if self.groups.contains(&group) {
                    continue;
                }
                let own = plan.cgroups.at(group.path().join(&name));
                if !self.groups.contains(&own) {
                    journal.hold(&Holding::Cgroup(own.path().to_owned()))?;
                    self.groups.push(group.create_child(&name)?);
                }
                match own.add(pid) {
                    Ok(()) => moved = true,
                    Err(error) if is_gone(&error) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if !moved {
                return Ok(());
            }
        }
        Err(TargetError::ForksTooFast.into())
    }

    fn lift(&mut self, left: &mut Vec<String>) {
        if let Some(mut lock) = self.engaged.take() {
            if let Err(error) = lock.lift() {
                left.push(describe(&error));
            }
        }
        self.armed = None;
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.over {
            for left in self.let_go(&Wait::uncancellable(std::time::Duration::from_secs(30))) {
                warn!("{left}");
            }
        }
    }
}

fn dump_options(plan: &Plan, directory: &ImageDirectory, wait: &Wait) -> DumpOptions {
    DumpOptions {
        pid: plan.tree.root(),
        directory: directory.path().to_owned(),
        shell_job: plan.tree.session_is_outside(),
        freeze_seconds: wait.remaining().as_secs().clamp(1, 60) as u32,
        veil: veil::is_worth_it(&plan.tree, plan.memory_bytes),
    }
}

fn is_gone(error: &CgroupError) -> bool {
    let no_such_process = rustix::io::Errno::SRCH.raw_os_error();
    matches!(error, CgroupError::Io { source, .. } if source.raw_os_error() == Some(no_such_process))
}

fn describe(error: &(dyn Error + 'static)) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
