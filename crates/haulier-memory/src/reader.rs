//! The source's side: pages of frozen tasks, in chunks that several threads take from one queue.

use std::io;
use std::sync::{Mutex, PoisonError};

use haulier_sys::process_memory::{Piece, ProcessMemory};

use crate::page::{PAGE_BYTES, PageRange, PageRun};

/// Pages in a chunk: 1 MiB, from which on neither reading nor sending gets faster.
pub const CHUNK_PAGES: u64 = 256;

/// What is to be read of one task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskPages {
    /// Its pid in our PID namespace.
    pub pid: i32,
    /// Its pid in its own PID namespace, which names it on the wire and in the store.
    pub task: u32,
    /// Its pages, for instance what its pagemap image has as `PE_LAZY`.
    pub ranges: Vec<PageRange>,
}

/// Why a page could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The kernel refuses: the process is gone, or not ours to read.
    #[error("cannot read the memory of process {pid}")]
    Process {
        /// Its pid in our PID namespace.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A page is not mapped. The task is not frozen, or the list of its pages is not its own.
    #[error("process {pid} has no page at {address:#x} to be read; is it frozen?")]
    Page {
        /// Its pid in our PID namespace.
        pid: i32,
        /// Address of the page.
        address: u64,
    },
    /// A range to be read is empty, not aligned, or beyond the address space.
    #[error("no valid range of pages of process {pid}: {range}")]
    Range {
        /// Its pid in our PID namespace.
        pid: i32,
        /// The range.
        range: PageRange,
    },
}

/// Pages of one task, read at one time. One is reused for all chunks of a thread.
#[derive(Debug, Default)]
pub struct Chunk {
    /// The task's pid in its own PID namespace.
    pub task: u32,
    /// The pages in the order of the request; neighbours are joined.
    pub runs: Vec<PageRun>,
    /// The contents of all pages, the zero ones too.
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

impl Chunk {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.range.pages).sum()
    }

    /// Number of pages that are zero.
    pub fn zero_pages(&self) -> u64 {
        self.runs
            .iter()
            .filter(|run| run.zero)
            .map(|run| run.range.pages)
            .sum()
    }

    /// Contents of the runs that are not zero, one behind the other.
    pub fn contents(&self) -> impl Iterator<Item = &[u8]> {
        let mut offset = 0;
        self.runs.iter().filter_map(move |run| {
            let start = offset;
            offset += run.range.bytes() as usize;
            (!run.zero).then(|| &self.bytes[start..offset])
        })
    }

    /// Tells zero pages from others, and joins neighbours.
    fn classify(&mut self) {
        self.runs.clear();
        let mut pages = self.bytes.chunks_exact(PAGE_BYTES);
        for &(address, len) in &self.pieces {
            let addresses = (address..).step_by(PAGE_BYTES);
            for (start, page) in addresses.zip(pages.by_ref().take(len / PAGE_BYTES)) {
                let zero = is_zero(page);
                match self.runs.last_mut() {
                    Some(run) if run.zero == zero && run.range.end() == start => {
                        run.range.pages += 1;
                    }
                    _ => self.runs.push(PageRun {
                        range: PageRange { start, pages: 1 },
                        zero,
                    }),
                }
            }
        }
    }
}

/// By pieces that the compiler turns into vector instructions; most pages differ in the first.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(128)
        .all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}

/// A list of pages that several threads read, each chunk once.
#[derive(Debug)]
pub struct PageReader {
    tasks: Vec<(TaskPages, ProcessMemory)>,
    place: Mutex<Place>,
}

#[derive(Debug, Default)]
struct Place {
    task: usize,
    range: usize,
    /// Pages of the range that are taken.
    taken: u64,
}

impl PageReader {
    /// A reader of the pages of all these tasks.
    ///
    /// # Errors
    /// [`ReadError::Range`].
    pub fn new(tasks: Vec<TaskPages>) -> Result<Self, ReadError> {
        for task in &tasks {
            if let Some(range) = task.ranges.iter().find(|range| !range.is_valid()) {
                return Err(ReadError::Range {
                    pid: task.pid,
                    range: *range,
                });
            }
        }
        let with_memory = |task: TaskPages| {
            let memory = ProcessMemory::new(task.pid);
            (task, memory)
        };
        Ok(Self {
            tasks: tasks.into_iter().map(with_memory).collect(),
            place: Mutex::default(),
        })
    }

    /// Reads the next chunk; false if all are taken.
    ///
    /// # Errors
    /// [`ReadError`]; the chunk is lost then.
    pub fn read(&self, chunk: &mut Chunk) -> Result<bool, ReadError> {
        let Some((task, memory)) = self.take(&mut chunk.pieces) else {
            return Ok(false);
        };
        chunk.task = task.task;
        let len = chunk.pieces.iter().map(|piece| piece.1).sum();
        chunk.bytes.resize(len, 0);
        let read = memory
            .read(&chunk.pieces, &mut chunk.bytes)
            .map_err(|source| ReadError::Process {
                pid: task.pid,
                source,
            })?;
        if read < len {
            let address = address_at(&chunk.pieces, read);
            return Err(ReadError::Page {
                pid: task.pid,
                address,
            });
        }
        chunk.classify();
        Ok(true)
    }

    /// Takes the next pages of one task from the queue: at most [`CHUNK_PAGES`], in as many pieces as
    /// that needs.
    fn take(&self, pieces: &mut Vec<Piece>) -> Option<(&TaskPages, &ProcessMemory)> {
        pieces.clear();
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (task, memory) = self.tasks.get(place.task)?;
            let mut room = CHUNK_PAGES;
            while let Some(range) = task.ranges.get(place.range).filter(|_| room > 0) {
                let pages = room.min(range.pages - place.taken);
                let address = range.start + place.taken * PAGE_BYTES as u64;
                pieces.push((address, pages as usize * PAGE_BYTES));
                room -= pages;
                place.taken += pages;
                if place.taken == range.pages {
                    place.range += 1;
                    place.taken = 0;
                }
            }
            if !pieces.is_empty() {
                return Some((task, memory));
            }
            *place = Place {
                task: place.task + 1,
                ..Place::default()
            };
        }
    }
}

/// Address of the page that has the byte at `offset` of the pieces.
fn address_at(pieces: &[Piece], mut offset: usize) -> u64 {
    for &(address, len) in pieces {
        if offset < len {
            return address + (offset - offset % PAGE_BYTES) as u64;
        }
        offset -= len;
    }
    0
}

#[cfg(test)]
mod tests {
    use haulier_sys::userfaultfd::Region;

    use super::*;
    use crate::page::PAGE;

    fn own(region: &Region, ranges: &[(u64, u64)]) -> TaskPages {
        let range = |&(page, pages)| PageRange {
            start: region.address() + page * PAGE,
            pages,
        };
        TaskPages {
            pid: std::process::id() as i32,
            task: 5,
            ranges: ranges.iter().map(range).collect(),
        }
    }

    #[test]
    fn every_page_comes_once_and_zero_pages_are_told_apart() {
        let region = Region::map(2000 * PAGE_BYTES).unwrap();
        for page in (0..2000).filter(|page| page % 3 != 0) {
            // One byte suffices, wherever it lies.
            region.write(page * PAGE_BYTES + page * 2 + 95, 1);
        }
        let ranges = [(0, 700), (701, 1), (703, 1), (800, 1200)];
        let reader = PageReader::new(vec![own(&region, &ranges), own(&region, &[(0, 1)])]).unwrap();
        let mut chunk = Chunk::default();
        let mut seen = Vec::new();
        while reader.read(&mut chunk).unwrap() {
            assert!(chunk.pages() <= CHUNK_PAGES);
            assert_eq!(chunk.task, 5);
            let mut contents = chunk.contents();
            for run in &chunk.runs {
                let first = (run.range.start - region.address()) / PAGE;
                let bytes = if run.zero {
                    &[][..]
                } else {
                    contents.next().unwrap()
                };
                for page in first..first + run.range.pages {
                    assert_eq!(run.zero, page % 3 == 0, "page {page}");
                    if !run.zero {
                        let at = (page - first) as usize * PAGE_BYTES + page as usize * 2 + 95;
                        assert_eq!(bytes[at], 1);
                    }
                    seen.push(page);
                }
            }
            assert!(contents.next().is_none());
        }
        let mut expected: Vec<u64> = ranges
            .iter()
            .flat_map(|&(page, pages)| page..page + pages)
            .collect();
        expected.push(0);
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_missing_page_is_named() {
        let region = Region::map(8 * PAGE_BYTES).unwrap();
        let mut task = own(&region, &[(0, 3), (5, 1)]);
        task.ranges.push(PageRange {
            start: PAGE,
            pages: 2,
        });
        let reader = PageReader::new(vec![task.clone()]).unwrap();
        let error = reader.read(&mut Chunk::default()).unwrap_err();
        assert!(
            matches!(error, ReadError::Page { address: PAGE, .. }),
            "{error}"
        );

        task.ranges.push(PageRange { start: 3, pages: 1 });
        assert!(matches!(
            PageReader::new(vec![task]),
            Err(ReadError::Range { .. })
        ));
    }
}
