//! One address space that is being filled: its userfaultfd and what is to be placed through it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use haulier_sys::userfaultfd::{Event, Obstacle, PlaceError, Userfaultfd};

use super::LazyError;
use super::stats::Counters;
use super::todo::{Part, Todo};
use crate::page::{PAGE, PAGE_BYTES};
use crate::store::{Lookup, PageData, PageStore};

/// How long a page may lie in unregistered memory until it counts as an error: an `munmap` takes
/// effect before its event can be read.
const UNREGISTERED: Duration = Duration::from_secs(2);

/// An address space. Placing holds the gate shared; reading events holds it alone, from the read
/// until they are applied: a COPY in between would bring back a page that the task has just dropped.
pub(super) struct Space {
    /// The task whose dump has the contents; for a forked child, its parent.
    pub(super) vpid: u32,
    uffd: Userfaultfd,
    gate: RwLock<()>,
    todo: Mutex<Todo>,
    gone: AtomicBool,
    /// Serving it failed. It stays open, because closing it would make missing pages zero.
    broken: AtomicBool,
    /// Held by every address space that draws on the same pages of the store.
    family: Arc<()>,
}

/// How far placing came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something was placed, or the part is held by another thread; go on from here.
    Next(u64),
    /// Nothing to place at the address (or after it, if it need not be that one).
    Nothing,
    /// What is to be placed has not arrived; what may have arrived starts here.
    NotHere(Option<u64>),
    /// The task is changing its mappings: again, a moment later.
    Changing,
    /// There is no registered mapping at the address. Its unmap event may be on the way.
    Unregistered(u64),
    /// The address space is no more.
    Gone,
}

impl AsFd for Space {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

enum Content {
    Data(PageData),
    Zero,
}

impl Space {
    pub(super) fn new(vpid: u32, uffd: OwnedFd, todo: Todo) -> Result<Self, LazyError> {
        let uffd = Userfaultfd::from_fd(uffd).map_err(|source| LazyError::Descriptor {
            task: vpid,
            doing: "set up",
            source,
        })?;
        Ok(Self {
            vpid,
            uffd,
            gate: RwLock::new(()),
            todo: Mutex::new(todo),
            gone: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            family: Arc::new(()),
        })
    }

    pub(super) fn todo(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    pub(super) fn set_broken(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// Places up to `max_pages` at `from`, or if not `exact` at the first page after it that is
    /// missing.
    pub(super) fn place(
        &self,
        store: &PageStore,
        from: u64,
        exact: bool,
        max_pages: u64,
        counters: &Counters,
    ) -> Result<Step, LazyError> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let (part, content) = {
            let mut todo = self.todo();
            let Some(mut part) = todo.next(from).filter(|part| !exact || part.at == from) else {
                return Ok(Step::Nothing);
            };
            part.pages = part.pages.min(max_pages);
            let content = match store.lookup(self.vpid, part.image, part.pages) {
                Lookup::Data(data) => {
                    part.pages = data.len() as u64 / PAGE;
                    Content::Data(data)
                }
                Lookup::Zero(pages) => {
                    part.pages = pages;
                    Content::Zero
                }
                Lookup::Absent { next, sealed: true } => {
                    let gap = next.map_or(u64::MAX, |next| (next - part.image) / PAGE);
                    part.pages = part.pages.min(gap);
                    Content::Zero
                }
                Lookup::Absent {
                    next,
                    sealed: false,
                } => {
                    return Ok(Step::NotHere(next_arrived(&todo, part, next)));
                }
            };
            todo.claim(part);
            (part, content)
        };
        let (rest, step) = self.place_part(part, &content, counters);
        let step = {
            let mut todo = self.todo();
            todo.finish(part, rest);
            match step {
                // Counted for the address space, since its threads meet the page in turns.
                Ok(Step::Unregistered(address)) if todo.unregistered(address) > UNREGISTERED => {
                    Err(LazyError::Unregistered {
                        task: self.vpid,
                        address,
                    })
                }
                step => step,
            }
        };
        drop(content);
        if Arc::strong_count(&self.family) == 1 {
            let placed = Part {
                pages: part.pages - rest.pages,
                ..part
            };
            store.discard(self.vpid, placed.image_range());
        }
        step
    }

    /// Places a claimed part. Returns what remains of it.
    fn place_part(
        &self,
        part: Part,
        content: &Content,
        counters: &Counters,
    ) -> (Part, Result<Step, LazyError>) {
        let mut rest = part;
        let mut at_once = part.pages;
        while rest.pages > 0 {
            let pages = at_once.min(rest.pages);
            let bytes = pages as usize * PAGE_BYTES;
            let outcome = match content {
                Content::Data(data) => {
                    let from = (rest.at - part.at) as usize;
                    self.uffd.copy(rest.at, &data[from..from + bytes])
                }
                Content::Zero => self.uffd.zero(rest.at, bytes),
            };
            let done = match outcome {
                Ok(()) => pages,
                Err(PlaceError { done, .. }) => done as u64 / PAGE,
            };
            match content {
                Content::Data(_) => counters.copied(done),
                Content::Zero => counters.zeroed(done),
            }
            rest = rest.skip(done);
            let Err(PlaceError { obstacle, .. }) = outcome else {
                at_once = at_once.saturating_mul(2);
                continue;
            };
            let step = match obstacle {
                Obstacle::Exists => {
                    // Somebody faulted it in before; its waiters must not be left behind.
                    let _ = self.uffd.wake(rest.at, PAGE);
                    counters.present(1);
                    rest = rest.skip(1);
                    continue;
                }
                Obstacle::Changing => Ok(Step::Changing),
                // The kernel wants the whole range in one mapping, and the task may have split its
                // mappings (mprotect, madvise), which is reported to nobody.
                Obstacle::NotRegistered if pages > 1 => {
                    at_once = pages / 2;
                    continue;
                }
                Obstacle::NotRegistered => Ok(Step::Unregistered(rest.at)),
                Obstacle::Gone | Obstacle::NoSpace => {
                    self.gone.store(true, Ordering::Relaxed);
                    Ok(Step::Gone)
                }
                Obstacle::Errno(errno) => Err(LazyError::Place {
                    task: self.vpid,
                    address: rest.at,
                    source: std::io::Error::from_raw_os_error(errno),
                }),
            };
            return (rest, step);
        }
        (rest, Ok(Step::Next(part.end())))
    }

    /// Answers the faults that can be answered. True if some should be tried again in a moment.
    pub(super) fn answer(
        &self,
        store: &PageStore,
        fault_pages: u64,
        counters: &Counters,
    ) -> Result<bool, LazyError> {
        let waiting: Vec<u64> = self.todo().waiting.iter().copied().collect();
        let mut again = false;
        for page in waiting {
            if self.is_gone() {
                self.todo().waiting.clear();
                return Ok(false);
            }
            match self.place(store, page, true, fault_pages, counters)? {
                // Arrivals, and the thread that has it in hand, come back to it.
                Step::NotHere(_) => counters.parked(),
                Step::Next(_) | Step::Gone => {}
                Step::Changing => again = true,
                Step::Nothing => again |= self.answer_with_zero(page, counters)?,
                // Gone from under the waiter: it finds out by faulting again.
                Step::Unregistered(_) => self.forget(page),
            }
        }
        Ok(again)
    }

    /// Answers a fault on a page that is not to be placed: it never had contents, or has them now.
    fn answer_with_zero(&self, page: u64, counters: &Counters) -> Result<bool, LazyError> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let mut todo = self.todo();
        // Another thread may have claimed it since, or failed to place it and put it back.
        if todo.in_flight(page) || !todo.waiting.contains(&page) {
            return Ok(false);
        }
        if todo.next(page).is_some_and(|part| part.at == page) {
            return Ok(true);
        }
        match self
            .uffd
            .zero(page, PAGE_BYTES)
            .map_err(|error| error.obstacle)
        {
            Ok(()) => counters.zero_fault(),
            Err(Obstacle::Changing) => return Ok(true),
            Err(Obstacle::Exists | Obstacle::NotRegistered) => {
                let _ = self.uffd.wake(page, PAGE);
            }
            Err(Obstacle::Gone | Obstacle::NoSpace) => self.gone.store(true, Ordering::Relaxed),
            Err(Obstacle::Errno(errno)) => {
                return Err(LazyError::Place {
                    task: self.vpid,
                    address: page,
                    source: std::io::Error::from_raw_os_error(errno),
                });
            }
        }
        todo.waiting.remove(&page);
        Ok(false)
    }

    fn forget(&self, page: u64) {
        self.todo().waiting.remove(&page);
        let _ = self.uffd.wake(page, PAGE);
    }

    /// Reads the pending events and follows the task's own changes of its memory; faults join
    /// [`Todo::waiting`]. Returns the address spaces of forked children.
    pub(super) fn read_events(
        &self,
        store: &PageStore,
        counters: &Counters,
    ) -> Result<Vec<Space>, LazyError> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut events = Vec::new();
        self.uffd
            .read_events(&mut events)
            .map_err(|source| LazyError::Descriptor {
                task: self.vpid,
                doing: "read events of",
                source,
            })?;
        let mut children = Vec::new();
        let mut todo = self.todo();
        for event in events {
            match event {
                Event::Pagefault { address, .. } => {
                    counters.fault();
                    todo.waiting.insert(address & !(PAGE - 1));
                }
                Event::Fork { uffd } => {
                    let mut child = Space::new(self.vpid, uffd, todo.fork())?;
                    child.family = self.family.clone();
                    children.push(child);
                }
                Event::Remap { from, to, len } => todo.remap(from, to, len),
                Event::Remove { start, end } => {
                    self.drop_pages(&mut todo, store, start, end);
                    // The kernel gives zero pages there by itself then. It refuses if a part has
                    // been unmapped meanwhile, and faults there are answered with zero.
                    let _ = self.uffd.unregister(start, end - start);
                }
                Event::Unmap { start, end } => self.drop_pages(&mut todo, store, start, end),
            }
        }
        Ok(children)
    }

    fn drop_pages(&self, todo: &mut Todo, store: &PageStore, start: u64, end: u64) {
        let dropped = todo.cut(start, end);
        if Arc::strong_count(&self.family) == 1 {
            for range in dropped {
                store.discard(self.vpid, range);
            }
        }
    }
}

/// Where in the task to look for pages that have arrived, given the next one in the store.
fn next_arrived(todo: &Todo, part: Part, next: Option<u64>) -> Option<u64> {
    if !todo.in_place {
        return Some(part.end());
    }
    // A piece was cut short by the caller's limit: the next page may lie in its remainder.
    next.map(|next| next.max(part.at + PAGE))
}
