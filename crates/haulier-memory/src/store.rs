//! The destination's memory of received pages, by task and address.

mod batch;
mod extents;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use batch::Account;
pub(crate) use batch::FilledPages;
pub use batch::{BatchBuffer, PageBuffer, PageData};
pub(crate) use extents::Content;
use extents::{Extents, Found};

use crate::page::{PAGE, PageRange, PageRun};

/// What an extent counts for against the limit beside its contents: a peer that sends single zero
/// pages makes the store grow too.
const EXTENT_BYTES: u64 = 128;

/// Why the store does not take pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The limit would be passed.
    #[error(
        "the page store is full: {used} of {limit} bytes are in use and {wanted} more are needed; \
         raise its limit"
    )]
    Full {
        /// The store's limit in bytes.
        limit: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// The kernel gives no memory, though the limit is not reached.
    #[error("no memory for pages: {}", std::io::Error::from_raw_os_error(*number))]
    Memory {
        /// The error number.
        number: i32,
    },
    /// Pages came after [`PageStore::seal`].
    #[error("pages of task {task} arrived after the last round was complete")]
    Sealed {
        /// The task.
        task: u32,
    },
    /// A range is empty, not aligned, or beyond the address space.
    #[error("no valid range of pages for task {task}: {range}")]
    Range {
        /// The task.
        task: u32,
        /// The range.
        range: PageRange,
    },
    /// The contents are not as long as the runs say.
    #[error("contents of {bytes} bytes for {pages} pages of task {task}")]
    Length {
        /// The task.
        task: u32,
        /// Bytes of contents.
        bytes: usize,
        /// Pages of the runs that are not zero.
        pages: u64,
    },
}

/// What the store knows of a page and its successors.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// Contents of the page and of those that follow it in the same buffer.
    Data(PageData),
    /// The page and its successors, so many in all, are zero.
    Zero(u64),
    /// The page is not here.
    Absent {
        /// Address of the next page of the task that is.
        next: Option<u64>,
        /// No page will come any more: an absent page is zero.
        sealed: bool,
    },
}

impl Lookup {
    /// Pages found.
    pub fn pages(&self) -> u64 {
        match self {
            Lookup::Data(data) => data.len() as u64 / PAGE,
            Lookup::Zero(pages) => *pages,
            Lookup::Absent { .. } => 0,
        }
    }
}

/// Told when pages arrive or the store is sealed. Called by the thread that brings them, outside of
/// the store's lock; must not block.
pub trait Watcher: Send + Sync {
    /// Something changed.
    fn arrived(&self);
}

/// Pages received and not yet placed, bounded in bytes. Shared by the receivers and the consumers.
pub struct PageStore {
    account: Arc<Account>,
    state: Mutex<State>,
    changed: Condvar,
    received: AtomicU64,
}

#[derive(Default)]
struct State {
    tasks: HashMap<u32, Extents>,
    sealed: bool,
    version: u64,
    watchers: Vec<Weak<dyn Watcher>>,
}

impl std::fmt::Debug for PageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageStore({} bytes)", self.used())
    }
}

impl PageStore {
    /// An empty store that holds at most `limit` bytes, bookkeeping included.
    pub fn new(limit: u64) -> Self {
        Self {
            account: Account::new(limit),
            state: Mutex::default(),
            changed: Condvar::new(),
            received: AtomicU64::new(0),
        }
    }

    /// Bytes in use, including buffers handed out and not yet inserted.
    pub fn used(&self) -> u64 {
        self.account.used()
    }

    /// Whether so many bytes more are within the limit now.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.account.has_room(bytes)
    }

    /// Pages that have come so far, those that were replaced or placed since included: how far a
    /// transfer is.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Pages to receive contents into, counted from now on until each is placed, replaced or
    /// dropped. Nothing is allocated over the limit.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Memory`].
    pub fn pages(&self, count: usize) -> Result<PageBuffer, StoreError> {
        self.account.pages(count)
    }

    /// A buffer in one piece to put contents into, counted from now on. Nothing is allocated over the limit.
    ///
    /// # Errors
    /// [`StoreError::Full`].
    pub fn buffer(&self, bytes: usize) -> Result<BatchBuffer, StoreError> {
        BatchBuffer::new(&self.account, bytes)
    }

    /// Puts pages in: the contents of the runs that are not zero lie one behind the other in `data`,
    /// in the order of the runs. They replace what the store has of the same or an earlier round.
    ///
    /// # Errors
    /// [`StoreError`]; nothing was changed then.
    pub fn insert(
        &self,
        task: u32,
        round: u32,
        runs: &[PageRun],
        data: BatchBuffer,
    ) -> Result<(), StoreError> {
        let mut pages = 0_u64;
        for run in runs {
            if !run.range.is_valid() {
                return Err(StoreError::Range {
                    task,
                    range: run.range,
                });
            }
            pages += if run.zero { 0 } else { run.range.pages };
        }
        if pages * PAGE != data.len() as u64 {
            return Err(StoreError::Length {
                task,
                bytes: data.len(),
                pages,
            });
        }
        let mut filled = data.into_pages()?;
        let mut parts = Vec::with_capacity(runs.len());
        for run in runs {
            if run.zero {
                parts.push((run.range, Content::Zero));
                continue;
            }
            let mut range = run.range;
            while range.pages > 0 {
                let Some(pages) = filled.take(range.pages) else {
                    unreachable!("the length was checked")
                };
                let (part, rest) = range.split(pages.count() as u64);
                parts.push((part, Content::Data(pages)));
                range = rest;
            }
        }
        self.insert_parts(task, round, parts)
    }

    /// Puts pages in: valid ranges, and for each either zero or as many pages.
    pub(crate) fn insert_parts(
        &self,
        task: u32,
        round: u32,
        parts: Vec<(PageRange, Content)>,
    ) -> Result<(), StoreError> {
        // A part adds one extent, and splits at most one in two more places.
        let bookkeeping = parts.len() as u64 * 3 * EXTENT_BYTES;
        let watchers = {
            let mut state = self.lock();
            if state.sealed {
                return Err(StoreError::Sealed { task });
            }
            self.account.charge(bookkeeping)?;
            let extents = state.tasks.entry(task).or_default();
            let before = extents.len() as u64;
            for (range, content) in parts {
                self.received.fetch_add(range.pages, Ordering::Relaxed);
                extents.insert(range, round, content);
            }
            let after = extents.len() as u64;
            self.account
                .adjust(bookkeeping + before * EXTENT_BYTES, after * EXTENT_BYTES);
            state.change()
        };
        self.tell(watchers);
        Ok(())
    }

    /// Puts zero pages in.
    ///
    /// # Errors
    /// As [`Self::insert`].
    pub fn insert_zero(&self, task: u32, round: u32, range: PageRange) -> Result<(), StoreError> {
        self.insert(
            task,
            round,
            &[PageRun { range, zero: true }],
            self.buffer(0)?,
        )
    }

    /// What the store has of the page at `address` and its successors, at most `max_pages`.
    pub fn lookup(&self, task: u32, address: u64, max_pages: u64) -> Lookup {
        self.lock().lookup(task, address, max_pages)
    }

    /// The contents of a page, if the store has those that came in this very round.
    pub(crate) fn of_round(&self, task: u32, address: u64, round: u32) -> Option<PageData> {
        self.lock().tasks.get(&task)?.of_round(address, round)
    }

    /// As [`Self::lookup`], of all pages from there on up to the first that is absent; at least of one.
    pub fn lookup_all(&self, task: u32, address: u64, max_pages: u64) -> Vec<Lookup> {
        let state = self.lock();
        let (mut at, mut left) = (address, max_pages);
        let mut all = Vec::new();
        loop {
            let found = state.lookup(task, at, left);
            let pages = found.pages();
            if pages > 0 || all.is_empty() {
                all.push(found);
            }
            at += pages * PAGE;
            left -= pages;
            if pages == 0 || left == 0 {
                return all;
            }
        }
    }

    /// Which pages of a range the store does not have. Much cheaper than looking each up.
    pub fn absent(&self, task: u32, range: PageRange) -> Vec<PageRange> {
        match self.lock().tasks.get(&task) {
            Some(extents) => extents.gaps(range),
            None => vec![range],
        }
    }

    /// The pages of a task whose contents came at least so many times, each with that number.
    pub(crate) fn renewed(&self, task: u32, least: u8) -> Vec<(u8, PageRange)> {
        let state = self.lock();
        let extents = state.tasks.get(&task);
        extents.map_or_else(Vec::new, |extents| extents.renewed(least).collect())
    }

    /// As [`Self::lookup`], and removes what it returns.
    pub fn take_run(&self, task: u32, address: u64, max_pages: u64) -> Lookup {
        let mut state = self.lock();
        let found = state.lookup(task, address, max_pages);
        let pages = found.pages();
        if pages > 0 {
            self.edit(&mut state, task, |extents| {
                extents.remove(PageRange {
                    start: address,
                    pages,
                });
            });
        }
        found
    }

    /// Drops the pages of a range: placed, gone, or outdated by what is still to come.
    pub fn discard(&self, task: u32, range: PageRange) {
        self.edit(&mut self.lock(), task, |extents| extents.remove(range));
    }

    /// Drops the pages of a range that came in a round before `round`: they are gone, and what came
    /// since is newer.
    ///
    /// # Errors
    /// [`StoreError::Full`], as what is left may need more bookkeeping; [`StoreError::Range`].
    pub fn discard_before(
        &self,
        task: u32,
        round: u32,
        range: PageRange,
    ) -> Result<(), StoreError> {
        if !range.is_valid() {
            return Err(StoreError::Range { task, range });
        }
        let mut state = self.lock();
        // Both ends of the range may split an extent.
        self.account.charge(2 * EXTENT_BYTES)?;
        self.edit(&mut state, task, |extents| {
            extents.remove_before(range, round);
        });
        self.account.adjust(2 * EXTENT_BYTES, 0);
        Ok(())
    }

    /// Drops all pages of a task outside of `ranges`, which are ascending and disjoint.
    pub fn retain(&self, task: u32, ranges: &[PageRange]) {
        self.edit(&mut self.lock(), task, |extents| extents.retain(ranges));
    }

    /// Drops all pages of the tasks that are not to be kept.
    pub fn retain_tasks(&self, keep: impl Fn(u32) -> bool) {
        let mut state = self.lock();
        let drop: Vec<u32> = state
            .tasks
            .keys()
            .copied()
            .filter(|task| !keep(*task))
            .collect();
        for task in drop {
            self.edit(&mut state, task, |extents| extents.retain(&[]));
            state.tasks.remove(&task);
        }
    }

    /// Declares that everything has arrived: what is absent from now on is zero, and further pages
    /// are refused.
    pub fn seal(&self) {
        let watchers = {
            let mut state = self.lock();
            state.sealed = true;
            state.change()
        };
        self.tell(watchers);
    }

    /// Whether [`Self::seal`] was called.
    pub fn is_sealed(&self) -> bool {
        self.lock().sealed
    }

    /// Has `watcher` told of every arrival for as long as it lives.
    pub fn watch(&self, watcher: Weak<dyn Watcher>) {
        self.lock().watchers.push(watcher);
    }

    /// A number that grows with every arrival, for [`Self::wait_change`].
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// Waits until the version is not `seen` any more, at most until `deadline`. Returns the version.
    pub fn wait_change(&self, seen: u64, deadline: Instant) -> u64 {
        let mut state = self.lock();
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            if state.version != seen || rest.is_zero() {
                return state.version;
            }
            let waited = self.changed.wait_timeout(state, rest);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn edit(&self, state: &mut State, task: u32, change: impl FnOnce(&mut Extents)) {
        let Some(extents) = state.tasks.get_mut(&task) else {
            return;
        };
        let before = extents.len() as u64;
        change(extents);
        self.account
            .adjust(before * EXTENT_BYTES, extents.len() as u64 * EXTENT_BYTES);
    }

    fn tell(&self, watchers: Vec<Arc<dyn Watcher>>) {
        self.changed.notify_all();
        for watcher in watchers {
            watcher.arrived();
        }
    }

    /// A panic elsewhere cannot leave the extents half changed in a way that matters more than the
    /// pages of a migration that has failed by then.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn lookup(&self, task: u32, address: u64, max_pages: u64) -> Lookup {
        let sealed = self.sealed;
        match self
            .tasks
            .get(&task)
            .map(|extents| extents.find(address, max_pages))
        {
            Some(Found::Data(data)) => Lookup::Data(data),
            Some(Found::Zero(pages)) => Lookup::Zero(pages),
            Some(Found::Absent(next)) => Lookup::Absent { next, sealed },
            None => Lookup::Absent { next: None, sealed },
        }
    }

    fn change(&mut self) -> Vec<Arc<dyn Watcher>> {
        self.version += 1;
        self.watchers.retain(|watcher| watcher.strong_count() > 0);
        self.watchers.iter().filter_map(Weak::upgrade).collect()
    }
}

#[cfg(test)]
mod tests;
