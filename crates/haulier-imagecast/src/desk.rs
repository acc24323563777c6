//! What the proxy knows: the outbox, the connection to the cache, and how every dump stands. Dumps,
//! the connection and those who wait meet here.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use haulier_criu::skeleton;
use haulier_images::name::ImageName;
use haulier_memory::page::PageRange;
use haulier_sys::wait::Cancel;
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::control::Delivered;
use crate::left::LeftBehind;
use crate::link::{self, SessionId};
use crate::message::session::Body;
use crate::message::{self, Fault, GaveUp, Left, Over, Placed, Restored, Wanted};
use crate::outbox::{Item, Outbox};
use crate::shelf::Shelf;

mod connection;
mod fetching;

/// How often those who wait look whether they still should.
const LOOK: Duration = Duration::from_millis(100);
/// Least bytes of either kind: some frames, so that neither side waits for the other after each.
const LEAST: usize = 4 << 20;
/// A connection that was up for that long was one, even if nothing came through.
const LASTING: Duration = Duration::from_secs(1);
/// Dumps that are remembered after they are settled.
const REMEMBERED: usize = 256;

/// A dump cannot go on, for this reason.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error("{0}")]
pub(crate) struct DumpFailed(pub(crate) String);

/// How a dump stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// CRIU has connected.
    Connected,
    /// Its images come.
    Capturing,
    /// The proxy has all of them.
    Taken,
    /// So does the cache.
    Held,
    /// The cache may let it be restored.
    Released,
    /// It was given up.
    Failed(DumpFailed),
}

/// Who says that a dump is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// CRIU, by closing its connection, or someone who waits for no delivery: what is held is
    /// released.
    Itself,
    /// Someone who waits for the delivery, and releases it once told.
    Vote,
}

#[derive(Debug)]
struct Dump {
    target: ImageName,
    stage: Stage,
    finish: Option<Finish>,
    delivered: Delivered,
    wake: Arc<OwnedFd>,
    /// What is not in its images.
    left: Option<LeftBehind>,
}

impl Dump {
    /// Whether nothing will change for it any more.
    fn is_settled(&self) -> bool {
        match &self.stage {
            Stage::Failed(_) => true,
            Stage::Released => self.left.as_ref().is_none_or(LeftBehind::is_over),
            _ => false,
        }
    }
}

/// The desk. Shared by reference between threads.
#[derive(Debug)]
pub(crate) struct Desk {
    stop: Cancel,
    patience: Duration,
    memory: usize,
    shelf: Arc<Shelf>,
    state: Mutex<DeskState>,
    changed: Condvar,
}

#[derive(Debug)]
struct DeskState {
    outbox: Outbox,
    session: SessionId,
    /// Whether the cache has heard of the session.
    opened: bool,
    /// Counts connections; none if it is down.
    up: Option<u64>,
    connections: u64,
    up_since: Instant,
    down_since: Instant,
    /// What the cache had acknowledged when the connection went down last.
    acknowledged: u64,
    dumps: BTreeMap<u64, Dump>,
    next: u64,
}

/// A dump's place at the desk.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    pub(crate) dump: u64,
    wake: Arc<OwnedFd>,
}

impl Ticket {
    /// Readable when the dump should look at the desk.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Desk {
    /// A desk that holds `memory` bytes of images, and waits `patience` for a lost connection.
    pub(crate) fn new(memory: usize, patience: Duration, stop: Cancel) -> Desk {
        let state = DeskState {
            outbox: outbox(memory),
            session: link::random(),
            opened: false,
            up: None,
            connections: 0,
            up_since: Instant::now(),
            down_since: Instant::now(),
            acknowledged: 0,
            dumps: BTreeMap::new(),
            next: 1,
        };
        Desk {
            stop,
            patience,
            memory,
            shelf: Arc::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    // What dumps do.

    /// Where parts of images come into.
    pub(crate) fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// CRIU has connected.
    pub(crate) fn register(&self, target: &ImageName) -> std::io::Result<Ticket> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let wake = Arc::new(wake);
        let mut state = self.state();
        let dump = state.next;
        state.next += 1;
        let entry = Dump {
            target: target.clone(),
            stage: Stage::Connected,
            finish: None,
            delivered: Delivered::default(),
            wake: Arc::clone(&wake),
            left: None,
        };
        state.dumps.insert(dump, entry);
        state.forget_old();
        Ok(Ticket { dump, wake })
    }

    /// Waits for the connection and for earlier dumps of the same target, then begins.
    pub(crate) fn begin(&self, dump: u64) -> Result<(), DumpFailed> {
        let since = Instant::now();
        let mut state = self.state();
        loop {
            state.check(dump, &self.stop)?;
            let Some(target) = state.dumps.get(&dump).map(|d| d.target.clone()) else {
                return Err(gone());
            };
            let busy = state.dumps.range(..dump).any(|(_, earlier)| {
                earlier.target == target
                    && matches!(
                        earlier.stage,
                        Stage::Connected | Stage::Capturing | Stage::Taken
                    )
            });
            if !busy && state.up.is_some() {
                state.outbox.begin(dump, &target);
                state.stage(dump, Stage::Capturing);
                break;
            }
            if state.up.is_none() && since.elapsed() >= self.patience {
                return Err(DumpFailed(
                    "there is no connection to the image-cache".into(),
                ));
            }
            state = self.look_again(state);
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// An image begins.
    pub(crate) fn open(&self, dump: u64, name: &ImageName) -> Result<u32, DumpFailed> {
        let mut state = self.state();
        state.check(dump, &self.stop)?;
        let number = state.outbox.open(dump, name).ok_or_else(gone);
        drop(state);
        self.changed.notify_all();
        number
    }

    /// A part of an image; waits for room.
    pub(crate) fn push(&self, dump: u64, image: u32, item: Item) -> Result<(), DumpFailed> {
        let mut state = self.state();
        loop {
            state.check(dump, &self.stop)?;
            if state.outbox.has_room() {
                break;
            }
            state = self.look_again(state);
        }
        state.outbox.push(image, item);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether the dump is to end although CRIU is still connected, or why it cannot go on.
    pub(crate) fn is_asked_to_finish(&self, dump: u64) -> Result<bool, DumpFailed> {
        let state = self.state();
        state.check(dump, &self.stop)?;
        let finish = state.dumps.get(&dump).and_then(|dump| dump.finish);
        Ok(finish.is_some())
    }

    /// Every image of the dump is here: `images` of `bytes` in all.
    pub(crate) fn taken(&self, dump: u64, images: u64, bytes: u64) -> Result<(), DumpFailed> {
        let mut state = self.state();
        state.check(dump, &self.stop)?;
        state.outbox.finish(dump);
        if let Some(entry) = state.dumps.get_mut(&dump) {
            entry.stage = Stage::Taken;
            entry.delivered.images = images;
            entry.delivered.bytes = bytes;
            entry.finish.get_or_insert(Finish::Itself);
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Pages of a task stay with the dump: these ranges. Whether they are its first.
    pub(crate) fn left_behind(
        &self,
        dump: u64,
        task: u32,
        pages: &skeleton::LeftBehind,
    ) -> Result<bool, DumpFailed> {
        let mut state = self.state();
        state.check(dump, &self.stop)?;
        let Some(entry) = state.dumps.get_mut(&dump) else {
            return Err(gone());
        };
        let first = entry.left.is_none();
        let left = entry
            .left
            .get_or_insert_with(|| LeftBehind::new(pages.wide));
        for range in &pages.ranges {
            let range = PageRange {
                start: range.start,
                pages: range.pages,
            };
            if !left.add(task, range) {
                return Err(DumpFailed(format!("no pages of task {task}: {range}")));
            }
        }
        if first {
            state.outbox.say(Body::Left(Left { snapshot: dump }));
        }
        drop(state);
        self.changed.notify_all();
        Ok(first)
    }

    /// Whether the dump can give out the pages that it left behind, and so is beyond its scripts.
    pub(crate) fn is_serving(&self, dump: u64) -> bool {
        self.with_left(dump, |left| left.serving).unwrap_or(false)
    }

    /// What the cache says of pages that were left behind.
    pub(crate) fn hear(&self, word: Body) -> Result<(), Body> {
        let mut state = self.state();
        let snapshot = match &word {
            Body::Wanted(Wanted { snapshot })
            | Body::Restored(Restored { snapshot })
            | Body::Placed(Placed { snapshot })
            | Body::Fault(Fault { snapshot, .. })
            | Body::GaveUp(GaveUp { snapshot, .. }) => *snapshot,
            _ => return Err(word),
        };
        // It may be over by now.
        let Some(left) = state.left(snapshot) else {
            return Ok(());
        };
        match word {
            Body::Wanted(_) => left.want(),
            Body::Restored(_) => left.restored(),
            Body::Placed(_) => left.placed(),
            Body::Fault(fault) => left.fault(fault.task, &fault.pages),
            Body::GaveUp(gave_up) => {
                let why = format!("the restore failed: {}", gave_up.reason);
                left.gave_up(&why, gave_up.ran);
            }
            _ => {}
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    // What all do.

    /// A dump cannot go on. The first reason counts.
    pub(crate) fn fail(&self, dump: u64, why: &str) {
        self.state().fail(dump, why);
        self.changed.notify_all();
    }

    // What those who wait do.

    /// The newest dump of a target.
    pub(crate) fn newest(&self, target: &ImageName) -> Option<u64> {
        let state = self.state();
        let mut dumps = state.dumps.iter().rev();
        let found = dumps.find(|(_, dump)| &dump.target == target);
        found.map(|(number, _)| *number)
    }

    /// Asks a dump to finish if it has not, and waits until it is taken, or held. With `vote` it is
    /// released only by [`Desk::release`].
    pub(crate) fn wait_for(
        &self,
        dump: u64,
        vote: bool,
        wanted: impl Fn() -> bool,
    ) -> Result<Delivered, DumpFailed> {
        let mut state = self.state();
        if let Some(entry) = state.dumps.get_mut(&dump) {
            let finish = if vote { Finish::Vote } else { Finish::Itself };
            if matches!(entry.stage, Stage::Connected | Stage::Capturing) && entry.finish.is_none()
            {
                entry.finish = Some(finish);
            }
            wake(&entry.wake);
        }
        loop {
            let Some(entry) = state.dumps.get(&dump) else {
                return Err(gone());
            };
            match &entry.stage {
                Stage::Failed(why) => return Err(why.clone()),
                Stage::Taken if !vote => return Ok(entry.delivered.clone()),
                Stage::Held | Stage::Released => return Ok(entry.delivered.clone()),
                Stage::Connected | Stage::Capturing | Stage::Taken => {}
            }
            if self.stop.is_cancelled() {
                return Err(DumpFailed("the image-proxy ends".to_owned()));
            }
            if !wanted() {
                return Err(DumpFailed("nobody waits for it any more".to_owned()));
            }
            state = self.look_again(state);
        }
    }

    /// Whoever waited was told: a held dump may be restored.
    pub(crate) fn release(&self, dump: u64) {
        self.state().release(dump);
        self.changed.notify_all();
    }

    fn look_again<'a>(&self, state: MutexGuard<'a, DeskState>) -> MutexGuard<'a, DeskState> {
        self.changed
            .wait_timeout(state, LOOK)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn state(&self) -> MutexGuard<'_, DeskState> {
        // Whoever panicked left it as it was before or after a step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeskState {
    fn check(&self, dump: u64, stop: &Cancel) -> Result<(), DumpFailed> {
        if stop.is_cancelled() {
            return Err(DumpFailed("the image-proxy ends".to_owned()));
        }
        match self.dumps.get(&dump).map(|dump| &dump.stage) {
            Some(Stage::Failed(why)) => Err(why.clone()),
            Some(_) => Ok(()),
            None => Err(gone()),
        }
    }

    fn left(&mut self, dump: u64) -> Option<&mut LeftBehind> {
        self.dumps.get_mut(&dump)?.left.as_mut()
    }

    fn stage(&mut self, dump: u64, stage: Stage) {
        if let Some(dump) = self.dumps.get_mut(&dump) {
            dump.stage = stage;
        }
    }

    fn release(&mut self, dump: u64) {
        if self
            .dumps
            .get(&dump)
            .is_some_and(|d| d.stage == Stage::Held)
        {
            self.stage(dump, Stage::Released);
            self.outbox.release(dump);
        }
    }

    fn fail(&mut self, dump: u64, why: &str) {
        let Some(entry) = self.dumps.get_mut(&dump) else {
            return;
        };
        if entry.is_settled() {
            return;
        }
        if let (Stage::Released, Some(left)) = (&entry.stage, &mut entry.left) {
            tracing::warn!("the memory of {} cannot follow: {why}", entry.target);
            left.fail(why);
            let over = Over {
                snapshot: dump,
                reason: message::reason(why),
            };
            self.outbox.say(Body::Over(over));
            return;
        }
        if entry.stage == Stage::Released {
            return;
        }
        tracing::warn!("a dump of {} failed: {why}", entry.target);
        entry.stage = Stage::Failed(DumpFailed(why.to_owned()));
        wake(&entry.wake);
        self.outbox.abort(dump, why);
    }

    /// Old dumps of which nobody can ask any more.
    fn forget_old(&mut self) {
        while self.dumps.len() > REMEMBERED {
            let oldest = self.dumps.iter().find(|(_, dump)| dump.is_settled());
            let Some(number) = oldest.map(|(number, _)| *number) else {
                return;
            };
            self.dumps.remove(&number);
        }
    }
}

/// Half of the memory for what waits, half for what the cache may not have yet.
fn outbox(memory: usize) -> Outbox {
    let half = (memory / 2).max(LEAST);
    Outbox::new(half, half)
}

fn gone() -> DumpFailed {
    DumpFailed("the dump is over".to_owned())
}

fn wake(fd: &OwnedFd) {
    // Its count is taken down by the dump; a failed write means that it has to look anyway.
    let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

#[cfg(test)]
mod tests;
