//! What the daemon's threads share, and how they wait for one another.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::desk::Desk;
use super::hot::Hot;
use super::space::Space;
use super::stats::FillStats;
use super::todo::Todo;
use super::{LazyError, Options};
use crate::ranges::RangeSet;
use crate::store::Watcher;

pub(super) struct Shared {
    pub(super) desk: Desk,
    pub(super) options: Options,
    /// To be placed first.
    pub(super) hot: Hot,
    /// Wakes the serving thread from its poll.
    pub(super) wake: OwnedFd,
    /// Faults wait for pages to arrive: who brings pages looks whether they are the ones.
    pub(super) parked: AtomicBool,
    /// The serving thread fills too, and may be asleep: who brings pages wakes it.
    pub(super) idle: AtomicBool,
    /// CRIU's restore has connected.
    pub(super) connected: AtomicBool,
    stopping: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

pub(super) struct State {
    /// Tasks of the map that CRIU has not sent yet.
    pub(super) expected: HashMap<u32, Todo>,
    /// Address spaces with pages to be placed.
    pub(super) spaces: Vec<Arc<Space>>,
    /// Tasks that CRIU has sent.
    met: Vec<u32>,
    gone: Vec<u32>,
    filling: bool,
    finished: bool,
    complete: bool,
    /// The serving thread has let go of everything after completion.
    released: bool,
    /// Filling threads that hold address spaces.
    holders: usize,
    /// The serving thread may hold an address space that is in no list yet: one that CRIU is sending,
    /// or a forked child. Nothing is complete meanwhile.
    taking_in: bool,
    failed: bool,
    failure: Option<LazyError>,
    version: u64,
}

impl State {
    /// Everything is placed and every userfaultfd closed.
    fn is_released(&self) -> bool {
        self.released && self.holders == 0
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Watcher for Shared {
    fn arrived(&self) {
        self.bump(&mut self.state());
        if self.parked.load(Ordering::SeqCst) {
            self.answer_parked();
        }
        if self.options.fill_threads == 0 && self.idle.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }
}

impl Shared {
    pub(super) fn new(
        desk: Desk,
        expected: HashMap<u32, Todo>,
        options: Options,
    ) -> Result<Arc<Self>, LazyError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            LazyError::System {
                doing: "make an eventfd",
                source: errno.into(),
            }
        })?;
        let store = desk.store.clone();
        let shared = Arc::new(Self {
            desk,
            options,
            hot: Hot::default(),
            wake,
            parked: AtomicBool::new(false),
            idle: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            state: Mutex::new(State {
                expected,
                spaces: Vec::new(),
                met: Vec::new(),
                gone: Vec::new(),
                filling: false,
                finished: false,
                complete: false,
                released: false,
                holders: 0,
                taking_in: false,
                failed: false,
                failure: None,
                version: 0,
            }),
            changed: Condvar::new(),
        });
        let watcher: Weak<Self> = Arc::downgrade(&shared);
        store.watch(watcher);
        Ok(shared)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.bump(&mut self.state());
        self.wake();
    }

    /// Closes what is still open, once no thread uses it.
    pub(super) fn close_all(&self) {
        self.state().spaces.clear();
    }

    /// False if it had begun before.
    pub(super) fn begin_filling(&self) -> bool {
        let mut state = self.state();
        let first = !state.filling;
        state.filling = true;
        self.wake();
        first
    }

    /// Whether it has begun.
    pub(super) fn is_filling(&self) -> bool {
        self.state().filling
    }

    /// The first failure is the one that is reported.
    pub(super) fn fail(&self, error: LazyError) {
        tracing::warn!(%error, "lazy-pages daemon");
        let mut state = self.state();
        if !state.failed {
            state.failed = true;
            state.failure = Some(error);
        }
        self.bump(&mut state);
    }

    /// Runs the serving thread's work that may end in [`Self::add`].
    pub(super) fn take_in<T>(&self, work: impl FnOnce() -> T) -> T {
        self.state().taking_in = true;
        let result = work();
        let mut state = self.state();
        state.taking_in = false;
        self.bump(&mut state);
        result
    }

    /// Takes in an address space: one of the map, or a forked child. Once filling has begun one that
    /// lacks nothing is closed at once.
    pub(super) fn add(&self, space: Space) {
        let mut state = self.state();
        if state.filling && space.todo().is_done() {
            return;
        }
        state.spaces.push(Arc::new(space));
        self.bump(&mut state);
    }

    /// The pages of a task that CRIU has just sent.
    pub(super) fn meet(&self, vpid: u32) -> Result<Todo, LazyError> {
        let mut state = self.state();
        if state.met.contains(&vpid) {
            return Err(LazyError::Twice { task: vpid });
        }
        state.met.push(vpid);
        Ok(state.expected.remove(&vpid).unwrap_or_default())
    }

    /// CRIU has said its last word.
    pub(super) fn finish_restore(&self) -> Result<(), LazyError> {
        let mut state = self.state();
        state.finished = true;
        self.bump(&mut state);
        match state.expected.iter().find(|(_, todo)| !todo.is_done()) {
            Some((&task, todo)) => Err(LazyError::NoDescriptor {
                task,
                pages: todo.pages(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn restore_finished(&self) -> bool {
        self.state().finished
    }

    fn bump(&self, state: &mut State) {
        state.version += 1;
        self.changed.notify_all();
    }

    pub(super) fn wake(&self) {
        // Fails only if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// What a filling thread works on, or `None` if its work is over.
    pub(super) fn work(&self) -> Option<(u64, Vec<Arc<Space>>)> {
        let mut state = self.state();
        if state.complete || state.failed || self.is_stopping() {
            return None;
        }
        self.release_done(&mut state);
        let all_met = !state.taking_in && state.expected.values().all(Todo::is_done);
        if state.spaces.is_empty() && all_met {
            state.complete = true;
            // At once: from here on the tasks need nothing of this process.
            if let Some(guard) = &self.desk.guard {
                guard.complete();
            }
            self.bump(&mut state);
            self.wake();
            return None;
        }
        state.holders += 1;
        Some((state.version, state.spaces.clone()))
    }

    /// Told by a filling thread that it has let go of what [`Self::work`] gave it. `placed`: something
    /// has changed by its work.
    pub(super) fn worked(&self, placed: bool) {
        let mut state = self.state();
        state.holders -= 1;
        if placed || state.complete {
            self.bump(&mut state);
        }
    }

    /// Answers the faults that wait, in the thread that has brought pages: to wake the serving thread
    /// for it would make the task wait for one more turn on the processor.
    fn answer_parked(&self) {
        let spaces: Vec<_> = {
            let mut state = self.state();
            state.holders += 1;
            let parked = |space: &&Arc<Space>| !space.is_broken() && space.has_waiters();
            state.spaces.iter().filter(parked).cloned().collect()
        };
        let mut again = false;
        for space in &spaces {
            match space.answer(&self.desk, self.options.fault_pages) {
                Ok(more) => again |= more,
                Err(error) => {
                    space.set_broken();
                    self.fail(error);
                }
            }
        }
        let any = !spaces.is_empty();
        drop(spaces);
        self.worked(any);
        if again {
            self.wake();
        }
    }

    /// What neither was placed nor has arrived, by task. Meant for when nothing arrives.
    pub(super) fn missing(&self) -> Vec<(u32, RangeSet)> {
        let state = self.settled_state();
        let mut missing: BTreeMap<u32, RangeSet> = BTreeMap::new();
        let met = state.spaces.iter().map(|space| (space.vpid, space.todo()));
        for (vpid, todo) in met {
            self.add_missing(vpid, &todo, missing.entry(vpid).or_default());
        }
        for (vpid, todo) in &state.expected {
            self.add_missing(*vpid, todo, missing.entry(*vpid).or_default());
        }
        missing.retain(|_, set| !set.is_empty());
        missing.into_iter().collect()
    }

    /// Under the lock of `todo`, so that nothing of it is placed and dropped from the store
    /// meanwhile. What a thread has in hand has arrived.
    fn add_missing(&self, vpid: u32, todo: &Todo, missing: &mut RangeSet) {
        for part in todo.unclaimed() {
            for range in self.desk.store.absent(vpid, part.image_range()) {
                missing.insert(range);
            }
        }
    }

    /// Drops from the store what no task will need any more: pages that came after their memory was
    /// unmapped or its task had gone, and those that a task and its fork have both placed.
    pub(super) fn prune(&self) {
        // Held throughout: a forked child is taken in behind it, with what its parent lacked then.
        let state = self.settled_state();
        let mut needed: BTreeMap<u32, RangeSet> = BTreeMap::new();
        for space in &state.spaces {
            let images = needed.entry(space.vpid).or_default();
            images.extend(space.todo().images());
        }
        let store = &self.desk.store;
        store.retain_tasks(|task| needed.contains_key(&task) || state.expected.contains_key(&task));
        for (task, images) in needed {
            let ranges: Vec<_> = images.iter().collect();
            store.retain(task, &ranges);
        }
    }

    /// The state, with every address space in its list that anybody has.
    fn settled_state(&self) -> MutexGuard<'_, State> {
        let taking_in = |state: &mut State| state.taking_in;
        let settled = self.changed.wait_while(self.state(), taking_in);
        settled.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether everything is placed.
    pub(super) fn is_complete(&self) -> bool {
        self.state().complete
    }

    /// Lets go of address spaces that are full or gone.
    fn release_done(&self, state: &mut State) {
        let (open, done): (Vec<_>, Vec<_>) = std::mem::take(&mut state.spaces)
            .into_iter()
            .partition(|space| !space.is_gone() && !space.todo().is_done());
        state.spaces = open;
        for space in &done {
            if space.is_gone() {
                state.gone.push(space.vpid);
            }
            // While a fork and its parent both lack pages neither gives any back.
            if !state.spaces.iter().any(|other| other.vpid == space.vpid) {
                self.desk.store.retain(space.vpid, &[]);
            }
        }
        if !done.is_empty() {
            // The serving thread holds them too, for its poll.
            self.wake();
        }
    }

    /// Waits for anything to happen since `version`, at most so long.
    pub(super) fn wait(&self, version: u64, at_most: Duration) {
        let state = self.state();
        let unchanged = |state: &mut State| state.version == version && !self.is_stopping();
        drop(self.changed.wait_timeout_while(state, at_most, unchanged));
    }

    /// What the serving thread polls; with everything complete it holds nothing after this.
    pub(super) fn served_spaces(&self) -> Vec<Arc<Space>> {
        self.state()
            .spaces
            .iter()
            .filter(|space| !space.is_broken())
            .cloned()
            .collect()
    }

    /// Told by the serving thread when it holds no address space after completion.
    pub(super) fn release(&self) -> bool {
        let mut state = self.state();
        if state.complete && !state.released {
            state.released = true;
            self.bump(&mut state);
        }
        state.complete
    }

    pub(super) fn stats(&self) -> FillStats {
        self.desk.counters.snapshot(&self.state().gone)
    }

    pub(super) fn wait_filled(&self, deadline: Instant) -> Result<FillStats, LazyError> {
        let rest = deadline.saturating_duration_since(Instant::now());
        let pending = |state: &mut State| !state.failed && !state.is_released();
        let waited = self.changed.wait_timeout_while(self.state(), rest, pending);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        if state.failed {
            return Err(LazyError::Failed);
        }
        if state.is_released() {
            return Ok(self.desk.counters.snapshot(&state.gone));
        }
        let met = state
            .spaces
            .iter()
            .map(|space| (space.vpid, space.todo().pages()));
        let unmet = state
            .expected
            .iter()
            .map(|(vpid, todo)| (*vpid, todo.pages()));
        let (mut missing, mut task) = (0, 0);
        for (vpid, pages) in met.chain(unmet).filter(|(_, pages)| *pages > 0) {
            missing += pages;
            task = vpid;
        }
        Err(LazyError::Deadline { missing, task })
    }
}

/// Records the panic of a thread as a failure, so that nobody waits for it.
pub(super) struct PanicGuard<'a>(pub(super) &'a Shared);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(LazyError::Failed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::PageStore;

    #[test]
    fn nothing_is_complete_while_a_descriptor_is_taken_in() {
        let options = Options {
            fill_threads: 1,
            chunk_pages: 1,
            fault_pages: 1,
        };
        let desk = Desk::new(Arc::new(PageStore::new(1 << 20)));
        let shared = Shared::new(desk, HashMap::new(), options).unwrap();
        assert!(shared.take_in(|| shared.work()).is_some());
        assert!(shared.work().is_none());
    }
}
