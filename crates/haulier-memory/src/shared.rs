//! The pages that CRIU dumps with contents: shared memory, and what of private memory cannot be
//! lazy. They are read while the target runs, so that they can be sent ahead.
//!
//! Nothing tells cheaply and surely which shared pages were written: write-protect sees only the
//! mapping it was set on, and other mappings and `write()` pass it by. So every pass reads all of
//! them, and what is new is told by contents. What is read may be torn or stale: it serves to know
//! contents that the frozen target will probably still have, never to decide what it has.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::mappings::{self, MappingKind};
use crate::page::{PAGE, PAGE_BYTES};

mod object;
mod private;
#[cfg(test)]
mod tests;

use object::{KernelMount, Key, Object};
use private::PrivatePages;

/// Most bytes that are read at once and given on together.
pub const BATCH: usize = 1 << 20;
/// Less than this is sent in no time while the target is frozen.
const WORTH_IT: u64 = 1 << 20;

/// Where the eagerly dumped pages of some tasks are, as of one moment.
#[derive(Debug)]
pub struct EagerPages {
    objects: Vec<Object>,
    private: Vec<PrivatePages>,
    unreadable: Vec<Unreadable>,
}

/// Memory that could not be looked at although its task was there. It is not sent ahead; the dump
/// has it all the same.
#[derive(Debug)]
pub struct Unreadable {
    /// The task's process on this host.
    pub pid: i32,
    /// What of it: a file below `/proc/<pid>`.
    pub what: String,
    /// The system's reason.
    pub source: io::Error,
}

/// What a pass read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Pages that were read and given on.
    pub pages: u64,
    /// Pages, or all pages of an object, that were gone before they could be read.
    pub vanished: u64,
    /// How long it took, the time of the taker included.
    pub time: Duration,
}

impl EagerPages {
    /// Looks for the pages of processes, by their ids on this host. Memory that several of them
    /// share is found once. A process that is gone has none.
    ///
    /// # Errors
    /// If this process is out of descriptors or memory.
    pub fn scan(pids: impl IntoIterator<Item = i32>) -> io::Result<EagerPages> {
        let mount = KernelMount::find()?;
        let mut pages = EagerPages {
            objects: Vec::new(),
            private: Vec::new(),
            unreadable: Vec::new(),
        };
        let mut known = HashSet::new();
        for pid in pids {
            pages.scan_mappings(pid, mount, &mut known);
            pages.scan_descriptors(pid, mount, &mut known);
        }
        Ok(pages)
    }

    /// Bytes of all pages that were there.
    pub fn bytes(&self) -> u64 {
        let objects: u64 = self.objects.iter().map(Object::bytes).sum();
        let private: u64 = self.private.iter().map(PrivatePages::pages).sum();
        objects + private * PAGE
    }

    /// Whether there are enough of them to be sent ahead.
    pub fn worth_it(&self) -> bool {
        self.bytes() >= WORTH_IT
    }

    /// What could not be looked at.
    pub fn unreadable(&self) -> &[Unreadable] {
        &self.unreadable
    }

    /// Reads all pages once while the target runs, and gives them to `take`, at most [`BATCH`]
    /// bytes at a time, always whole pages. Neighbours in memory come one behind the other. Pages
    /// that are gone meanwhile are left out. `take` may end the pass.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn read<E>(
        &self,
        take: impl FnMut(&[u8]) -> Result<ControlFlow<()>, E>,
    ) -> Result<ReadStats, E> {
        let started = Instant::now();
        let mut batch = Batch::new(take);
        let pass = |batch: &mut Batch<_>| {
            for object in &self.objects {
                object.read(batch)?;
            }
            for pages in &self.private {
                pages.read(batch)?;
            }
            batch.flush()
        };
        match pass(&mut batch) {
            Ok(()) | Err(Stop::Enough) => {}
            Err(Stop::Failed(error)) => return Err(error),
        }
        Ok(ReadStats {
            time: started.elapsed(),
            ..batch.stats
        })
    }

    fn scan_mappings(&mut self, pid: i32, mount: KernelMount, known: &mut HashSet<Key>) {
        let mappings = match mappings::read(pid) {
            Ok(mappings) => mappings,
            Err(source) => return self.skip(pid, "maps", source),
        };
        let mut ranges = Vec::new();
        for mapping in &mappings {
            match mapping.kind {
                MappingKind::PrivateFile(_) | MappingKind::Eager => ranges.push(mapping.range),
                MappingKind::Shared(origin) if mount.holds(origin.device) => {
                    if !known.insert(Key::of_mapping(origin, &mapping.path)) {
                        continue;
                    }
                    match Object::mapped(pid, mapping.range, mount) {
                        Ok(object) => self.objects.push(object),
                        Err(source) => self.skip(pid, "map_files", source),
                    }
                }
                MappingKind::Shared(_) | MappingKind::Lazy | MappingKind::Special => {}
            }
        }
        match PrivatePages::find(pid, &ranges) {
            Ok(pages) => self.private.push(pages),
            Err(source) => self.skip(pid, "pagemap", source),
        }
    }

    /// A memfd that is mapped by nobody is dumped too.
    fn scan_descriptors(&mut self, pid: i32, mount: KernelMount, known: &mut HashSet<Key>) {
        let descriptors = match object::memfds(pid) {
            Ok(descriptors) => descriptors,
            Err(source) => return self.skip(pid, "fd", source),
        };
        for path in descriptors {
            match Object::open(path, mount) {
                Ok(object) => {
                    if known.insert(object.key()) {
                        self.objects.push(object);
                    }
                }
                Err(source) => self.skip(pid, "fd", source),
            }
        }
    }

    fn skip(&mut self, pid: i32, what: &str, source: io::Error) {
        if !is_gone(&source) {
            self.unreadable.push(Unreadable {
                pid,
                what: what.to_owned(),
                source,
            });
        }
    }
}

/// Whether the reason is that a process, or a mapping or descriptor of it, is no longer there.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Why a pass ends early.
enum Stop<E> {
    Enough,
    Failed(E),
}

/// Pages on their way to who takes them, gathered to reads and hand-overs of a good size.
struct Batch<F> {
    take: F,
    buffer: Vec<u8>,
    filled: usize,
    stats: ReadStats,
}

impl<E, F: FnMut(&[u8]) -> Result<ControlFlow<()>, E>> Batch<F> {
    fn new(take: F) -> Self {
        Batch {
            take,
            buffer: vec![0; BATCH],
            filled: 0,
            stats: ReadStats::default(),
        }
    }

    /// Room for at least one page.
    fn room(&mut self) -> Result<&mut [u8], Stop<E>> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    /// The first `bytes` of the room are read now; a part of a page is dropped.
    fn filled(&mut self, bytes: usize) {
        let pages = bytes / PAGE_BYTES;
        self.stats.pages += pages as u64;
        self.filled += pages * PAGE_BYTES;
    }

    fn vanished(&mut self, pages: u64) {
        self.stats.vanished += pages;
    }

    fn flush(&mut self) -> Result<(), Stop<E>> {
        let filled = std::mem::take(&mut self.filled);
        if filled == 0 {
            return Ok(());
        }
        match (self.take)(&self.buffer[..filled]) {
            Ok(ControlFlow::Continue(())) => Ok(()),
            Ok(ControlFlow::Break(())) => Err(Stop::Enough),
            Err(error) => Err(Stop::Failed(error)),
        }
    }
}
