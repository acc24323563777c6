//! The source's side: pages of tasks, in chunks that several threads take from one queue.

use std::io;
use std::sync::{Mutex, PoisonError};

use haulier_sys::process_memory::{Piece, ProcessMemory};
use rustix::io::Errno;

use crate::page::{PAGE_BYTES, PageRange, PageRun};

/// Pages in a chunk: 256 KiB, which stay in the processor's cache from the reading to the sending,
/// and are enough for a compressor.
pub const CHUNK_PAGES: u64 = 64;

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
    /// Pages that were asked for and are not mapped any more.
    pub vanished: u64,
    /// The contents of all pages, the zero ones too.
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

impl Chunk {
    /// Reads these pages of a task, at most [`CHUNK_PAGES`] if they are to be sent: a frame takes only
    /// some more. While it is `running`, pages that are not mapped any more, or
    /// all if it has exited, are left out and counted; of a task that stands that is an error.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read(
        &mut self,
        task: &TaskMemory,
        ranges: &[PageRange],
        running: bool,
    ) -> Result<(), ReadError> {
        self.pieces.clear();
        for range in ranges {
            if !range.is_valid() {
                return Err(ReadError::Range {
                    pid: task.pid,
                    range: *range,
                });
            }
            self.pieces.push((range.start, range.bytes() as usize));
        }
        self.read_pieces(task, running)
    }

    fn read_pieces(&mut self, task: &TaskMemory, running: bool) -> Result<(), ReadError> {
        self.task = task.task;
        self.vanished = 0;
        self.runs.clear();
        let mut len: usize = self.pieces.iter().map(|piece| piece.1).sum();
        // Shrinking costs nothing; growing zeroes only what is new.
        self.bytes.resize(len, 0);
        let (mut filled, mut from) = (0, 0);
        while filled < len {
            let read = match task
                .memory
                .read(&self.pieces[from..], &mut self.bytes[filled..])
            {
                Ok(read) => read,
                Err(error) if running && is_gone(&error) => {
                    self.vanished += ((len - filled) / PAGE_BYTES) as u64;
                    self.pieces.truncate(from);
                    len = filled;
                    break;
                }
                Err(source) => {
                    return Err(ReadError::Process {
                        pid: task.pid,
                        source,
                    });
                }
            };
            // A page that was read in part is not there either.
            let read = read - read % PAGE_BYTES;
            filled += read;
            if filled == len {
                break;
            }
            let address;
            (from, address) = cut_page(&mut self.pieces, from, read);
            if !running {
                return Err(ReadError::Page {
                    pid: task.pid,
                    address,
                });
            }
            self.vanished += 1;
            len -= PAGE_BYTES;
        }
        self.bytes.truncate(len);
        self.classify();
        Ok(())
    }

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

/// The process is no more, or has no memory any more.
fn is_gone(error: &io::Error) -> bool {
    let number = error.raw_os_error().map(Errno::from_raw_os_error);
    // The second from /proc/<pid>/mem, when it is opened.
    matches!(number, Some(Errno::SRCH | Errno::NOENT))
}

/// Takes the page `offset` bytes after the beginning of piece number `from` out of the list.
/// Returns the number of the piece behind it, and its address.
fn cut_page(pieces: &mut Vec<Piece>, from: usize, mut offset: usize) -> (usize, u64) {
    let mut at = from;
    while offset >= pieces[at].1 {
        offset -= pieces[at].1;
        at += 1;
    }
    let (start, len) = pieces[at];
    let address = start + offset as u64;
    let parts = [
        (start, offset),
        (address + PAGE_BYTES as u64, len - offset - PAGE_BYTES),
    ];
    let before = usize::from(offset > 0);
    let parts = parts.into_iter().filter(|part| part.1 > 0);
    pieces.splice(at..=at, parts);
    (at + before, address)
}

/// The memory of a task, and the name it has on the wire.
#[derive(Debug)]
pub struct TaskMemory {
    pid: i32,
    task: u32,
    memory: ProcessMemory,
}

impl TaskMemory {
    /// Of the process `pid` of our PID namespace, whose pid in its own is `task`.
    pub fn new(pid: i32, task: u32) -> Self {
        Self {
            pid,
            task,
            memory: ProcessMemory::new(pid),
        }
    }
}

/// A list of pages that several threads read, each chunk once.
#[derive(Debug)]
pub struct PageReader {
    tasks: Vec<(TaskMemory, Vec<PageRange>)>,
    place: Mutex<Place>,
    chunk_pages: u64,
    running: bool,
}

#[derive(Debug, Default)]
struct Place {
    task: usize,
    range: usize,
    /// Pages of the range that are taken.
    taken: u64,
}

impl PageReader {
    /// A reader of the pages of all these tasks, which stand.
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
        let with_memory = |task: TaskPages| (TaskMemory::new(task.pid, task.task), task.ranges);
        Ok(Self {
            tasks: tasks.into_iter().map(with_memory).collect(),
            place: Mutex::default(),
            chunk_pages: CHUNK_PAGES,
            running: false,
        })
    }

    /// Says that the tasks may run: see [`Chunk::read`].
    pub fn running(self, running: bool) -> Self {
        Self { running, ..self }
    }

    /// Changes the size of the chunks, at most [`CHUNK_PAGES`].
    pub fn chunk_pages(self, pages: u64) -> Self {
        Self {
            chunk_pages: pages.clamp(1, CHUNK_PAGES),
            ..self
        }
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        let ranges = self.tasks.iter().flat_map(|task| &task.1);
        ranges.fold(0, |sum, range| sum.saturating_add(range.pages))
    }

    /// Reads the next chunk; false if all are taken. It has no pages if all of them have vanished.
    ///
    /// # Errors
    /// [`ReadError`]; the chunk is lost then.
    pub fn read(&self, chunk: &mut Chunk) -> Result<bool, ReadError> {
        let Some(task) = self.take(&mut chunk.pieces) else {
            return Ok(false);
        };
        chunk.read_pieces(task, self.running)?;
        Ok(true)
    }

    /// Takes the next pages of one task from the queue, in as many pieces as that needs.
    fn take(&self, pieces: &mut Vec<Piece>) -> Option<&TaskMemory> {
        pieces.clear();
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (task, ranges) = self.tasks.get(place.task)?;
            let mut room = self.chunk_pages;
            while let Some(range) = ranges.get(place.range).filter(|_| room > 0) {
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
                return Some(task);
            }
            *place = Place {
                task: place.task + 1,
                ..Place::default()
            };
        }
    }
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
