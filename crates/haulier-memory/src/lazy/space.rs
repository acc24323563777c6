//! One address space that is being filled: its userfaultfd and what is to be placed through it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use haulier_sys::userfaultfd::{Event, Obstacle, PlaceError, Userfaultfd};

use super::LazyError;
use super::content::{Content, give_back, pieces};
use super::desk::Desk;
use super::gate::Gate;
use super::guard::Held;
use super::todo::{Part, Todo};
use crate::page::{PAGE, PAGE_BYTES, PageRange};
use crate::store::Lookup;

/// How long a page may lie in unregistered memory until it counts as an error: an `munmap` takes
/// effect before its event can be read.
const UNREGISTERED: Duration = Duration::from_secs(2);

/// Pages placed by one COPY where others may wait for the gate, who are let in before the next one, or
/// the task for the first page. They take some 5 us, or 10 times that where the machine itself has to find
/// the memory.
const AT_ONCE: u64 = 4;

/// An address space. Who places is inside the gate together with others; who reads events is so
/// alone, from the read until they are applied: a COPY in between would bring back a page that the task has just dropped.
pub(super) struct Space {
    /// The task whose dump has the contents; for a forked child, its parent.
    pub(super) vpid: u32,
    uffd: Userfaultfd,
    /// The guard's duplicate. Both are closed for the memory to be nobody's.
    _held: Option<Held>,
    gate: Gate,
    todo: Mutex<Todo>,
    gone: AtomicBool,
    /// Serving it failed. It stays open, because closing it would make missing pages zero.
    broken: AtomicBool,
    /// Held by every address space that draws on the same pages of the store.
    family: Arc<()>,
}

/// What is to be placed next.
#[derive(Debug, Clone, Copy)]
pub(super) enum Aim {
    /// The page at this address, which a thread waits for, and those behind it.
    Fault(u64),
    /// What comes first from this address on.
    From(u64),
    /// What begins inside of this range of addresses, the first of it.
    Within(PageRange),
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
    /// As [`Self::NotHere`] for the very page, which has this address in the image and which a
    /// thread waits for; said once.
    Missing(u64),
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

impl Space {
    pub(super) fn new(
        vpid: u32,
        pid: Option<i32>,
        uffd: OwnedFd,
        todo: Todo,
        desk: &Desk,
    ) -> Result<Self, LazyError> {
        // Before anything else: until the guard has it nobody does if this process dies.
        let held = desk
            .guard
            .as_ref()
            .map(|guard| guard.hold(uffd.as_fd(), pid));
        let uffd = Userfaultfd::from_fd(uffd).map_err(|source| LazyError::Descriptor {
            task: vpid,
            doing: "set up",
            source,
        })?;
        Ok(Self {
            vpid,
            uffd,
            _held: held,
            gate: Gate::default(),
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

    /// Places up to `max_pages`.
    pub(super) fn place(&self, desk: &Desk, aim: Aim, max_pages: u64) -> Result<Step, LazyError> {
        let (from, until, exact) = match aim {
            Aim::Fault(page) => (page, page + PAGE, true),
            Aim::From(address) => (address, u64::MAX, false),
            Aim::Within(range) => (range.start, range.end(), false),
        };
        let _inside = self.gate.together();
        let (part, contents) = {
            let mut todo = self.todo();
            let Some(mut part) = todo.next(from).filter(|part| part.at < until) else {
                return Ok(Step::Nothing);
            };
            part.pages = part.pages.min(max_pages);
            let found = desk.store.lookup_all(self.vpid, part.image, part.pages);
            let contents = match found[..] {
                [Lookup::Absent { next, sealed: true }] => {
                    let gap = next.map_or(u64::MAX, |next| (next - part.image) / PAGE);
                    part.pages = part.pages.min(gap);
                    vec![(part.pages, Content::Zero)]
                }
                [
                    Lookup::Absent {
                        next,
                        sealed: false,
                    },
                ] => {
                    if exact && todo.is_missing(part.at, part.image) {
                        return Ok(Step::Missing(part.image));
                    }
                    return Ok(Step::NotHere(next_arrived(&todo, part, next)));
                }
                _ => {
                    part.pages = found.iter().map(Lookup::pages).sum();
                    pieces(found)
                }
            };
            todo.claim(part);
            (part, contents)
        };
        let begun = Instant::now();
        let at_once = match exact || desk.shares_gate {
            true => AT_ONCE,
            false => max_pages,
        };
        let (rest, step) = self.place_all(part, &contents, at_once, desk);
        desk.recycling
            .note(part.pages - rest.pages, begun.elapsed());
        let (answered, step) = {
            let mut todo = self.todo();
            let answered = todo.finish(part, rest);
            let step = match step {
                // Counted for the address space, since its threads meet the page in turns.
                Ok(Step::Unregistered(address)) if todo.unregistered(address) > UNREGISTERED => {
                    Err(LazyError::Unregistered {
                        task: self.vpid,
                        address,
                    })
                }
                step => step,
            };
            (answered, step)
        };
        for waiter in answered {
            desk.answered(self.vpid, waiter);
        }
        if Arc::strong_count(&self.family) == 1 {
            let placed = Part {
                pages: part.pages - rest.pages,
                ..part
            };
            desk.store.discard(self.vpid, placed.image_range());
        }
        // Last: with the last holder of a page memory may go back to the kernel, for which nobody
        // should wait at the store's lock.
        if desk.recycling.is_due() {
            give_back(contents);
        }
        step
    }

    /// Places a claimed part, whose contents come in pieces. Returns what remains of it.
    fn place_all(
        &self,
        part: Part,
        contents: &[(u64, Content)],
        at_once: u64,
        desk: &Desk,
    ) -> (Part, Result<Step, LazyError>) {
        let mut rest = part;
        for (pages, content) in contents {
            // The page in front, which may be waited for, is placed in any case.
            if rest.pages < part.pages && self.gate.is_wanted() {
                return (rest, Ok(Step::Next(rest.at)));
            }
            let piece = Part {
                pages: *pages,
                ..rest
            };
            let (left, step) = self.place_part(piece, content, at_once, desk);
            rest = rest.skip(pages - left.pages);
            if left.pages > 0 || step.is_err() {
                return (rest, step);
            }
        }
        (rest, Ok(Step::Next(part.end())))
    }

    /// Places a part of a claim. Returns what remains of it.
    fn place_part(
        &self,
        part: Part,
        content: &Content,
        most: u64,
        desk: &Desk,
    ) -> (Part, Result<Step, LazyError>) {
        let mut rest = part;
        let mut at_once = most;
        while rest.pages > 0 {
            // The page in front, which may be waited for, is placed in any case.
            if rest.pages < part.pages && self.gate.is_wanted() {
                return (rest, Ok(Step::Next(rest.at)));
            }
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
                Content::Data(_) => desk.counters.copied(done),
                Content::Zero => desk.counters.zeroed(done),
            }
            rest = rest.skip(done);
            let Err(PlaceError { obstacle, .. }) = outcome else {
                at_once = most.min(at_once * 2);
                continue;
            };
            let step = match obstacle {
                Obstacle::Exists => {
                    // Somebody faulted it in before; its waiters must not be left behind.
                    let _ = self.uffd.wake(rest.at, PAGE);
                    desk.counters.present(1);
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

    /// Answers the faults that can be answered, and asks for the pages of the others. True if some
    /// should be tried again in a moment.
    pub(super) fn answer(&self, desk: &Desk, fault_pages: u64) -> Result<bool, LazyError> {
        let awaited = self.todo().awaited();
        let mut missing = Vec::new();
        let mut again = false;
        for page in awaited {
            if self.is_gone() {
                for waiter in self.todo().answer_all() {
                    desk.settled(self.vpid, waiter);
                }
                return Ok(false);
            }
            match self.place(desk, Aim::Fault(page), fault_pages)? {
                // Arrivals, and the thread that has it in hand, come back to it.
                Step::NotHere(_) | Step::Next(_) | Step::Gone => {}
                Step::Missing(image) => {
                    desk.counters.parked();
                    missing.push(image);
                }
                Step::Changing => again = true,
                Step::Nothing => again |= self.answer_with_zero(page, desk)?,
                // Gone from under the waiter: it finds out by faulting again.
                Step::Unregistered(_) => self.forget(page, desk),
            }
        }
        desk.ask(self.vpid, &missing);
        Ok(again)
    }

    /// Answers a fault on a page that is not to be placed: it never had contents, or has them now.
    fn answer_with_zero(&self, page: u64, desk: &Desk) -> Result<bool, LazyError> {
        let _inside = self.gate.together();
        let mut todo = self.todo();
        // Another thread may have claimed it since, or failed to place it and put it back.
        if todo.in_flight(page) || !todo.is_awaited(page) {
            return Ok(false);
        }
        if todo.next(page).is_some_and(|part| part.at == page) {
            return Ok(true);
        }
        let placed = match self
            .uffd
            .zero(page, PAGE_BYTES)
            .map_err(|error| error.obstacle)
        {
            Ok(()) => true,
            Err(Obstacle::Changing) => return Ok(true),
            Err(Obstacle::Exists | Obstacle::NotRegistered) => {
                let _ = self.uffd.wake(page, PAGE);
                false
            }
            Err(Obstacle::Gone | Obstacle::NoSpace) => {
                self.gone.store(true, Ordering::Relaxed);
                false
            }
            Err(Obstacle::Errno(errno)) => {
                return Err(LazyError::Place {
                    task: self.vpid,
                    address: page,
                    source: std::io::Error::from_raw_os_error(errno),
                });
            }
        };
        let waiter = todo.answered(page);
        drop(todo);
        match waiter {
            Some(waiter) if placed => {
                desk.answered_with_zero(self.vpid, waiter.since.elapsed(), waiter);
            }
            Some(waiter) => desk.settled(self.vpid, waiter),
            None => {}
        }
        Ok(false)
    }

    fn forget(&self, page: u64, desk: &Desk) {
        let waiter = self.todo().answered(page);
        let _ = self.uffd.wake(page, PAGE);
        if let Some(waiter) = waiter {
            desk.settled(self.vpid, waiter);
        }
    }

    /// Whether a thread of the task waits for a page that has not arrived.
    pub(super) fn awaits_missing(&self) -> bool {
        self.todo().awaits_missing()
    }

    /// Whether a thread of the task waits for a page.
    pub(super) fn has_waiters(&self) -> bool {
        self.todo().has_waiters()
    }

    /// Reads the pending events and follows the task's own changes of its memory; faults join
    /// those that [`Self::answer`] answers. Returns the address spaces of forked children.
    pub(super) fn read_events(&self, desk: &Desk) -> Result<Vec<Space>, LazyError> {
        let _inside = self.gate.alone();
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
                    desk.counters.fault();
                    todo.wait_for(address & !(PAGE - 1));
                }
                Event::Fork { uffd } => {
                    let mut child = Space::new(self.vpid, None, uffd, todo.fork(), desk)?;
                    child.family = self.family.clone();
                    children.push(child);
                }
                Event::Remap { from, to, len } => todo.remap(from, to, len),
                Event::Remove { start, end } => {
                    self.drop_pages(&mut todo, desk, start, end);
                    // The kernel gives zero pages there by itself then. It refuses if a part has
                    // been unmapped meanwhile, and faults there are answered with zero.
                    let _ = self.uffd.unregister(start, end - start);
                }
                Event::Unmap { start, end } => self.drop_pages(&mut todo, desk, start, end),
            }
        }
        Ok(children)
    }

    fn drop_pages(&self, todo: &mut Todo, desk: &Desk, start: u64, end: u64) {
        let dropped = todo.cut(start, end);
        if Arc::strong_count(&self.family) == 1 {
            for range in dropped {
                desk.store.discard(self.vpid, range);
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
