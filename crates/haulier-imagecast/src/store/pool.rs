//! Contents of images, in memory up to an allowance, and beyond it in a file if there is one.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use haulier_images::account::Account;
use haulier_sys::pages::{PAGE_BYTES, PagePool, PagesMut};
use rustix::fs::FallocateFlags;

use super::StoreError;

/// What a blob counts for beyond its bytes: itself, its count of references, the allocator.
const OVERHEAD: u64 = 128;

/// Memory that pages may leave unused beyond the allowance.
const SPARE: u64 = 8 << 20;

/// Where contents are kept.
#[derive(Debug)]
pub(crate) struct Pool {
    memory: Account,
    /// Pages, which most contents are. They are counted in `memory`.
    pages: PagePool,
    spill: Option<Spill>,
}

/// A file without a name, for contents that memory has no room for.
#[derive(Debug)]
struct Spill {
    directory: PathBuf,
    file: File,
    room: Account,
    /// Where the file ends. Room that was given back becomes a hole and is not used again: a file
    /// has more offsets than a cache will ever need.
    end: AtomicU64,
}

impl Pool {
    /// A pool of at most `memory` bytes.
    pub(crate) fn new(memory: u64) -> Pool {
        let memory = Account::new(memory);
        Pool {
            pages: PagePool::of_small_pages(memory.counter()),
            memory,
            spill: None,
        }
    }

    /// Lets it use a file in `directory`, of at most `room` bytes.
    pub(crate) fn spill_into(&mut self, directory: &Path, room: u64) -> Result<(), StoreError> {
        let file = tempfile::tempfile_in(directory).map_err(|source| StoreError::Spill {
            doing: "make a file in",
            directory: directory.to_owned(),
            source,
        })?;
        self.spill = Some(Spill {
            directory: directory.to_owned(),
            file,
            room: Account::new(room),
            end: AtomicU64::new(0),
        });
        Ok(())
    }

    /// Bytes of memory in use, and the most that there ever were.
    pub(crate) fn used(&self) -> (u64, u64) {
        (self.memory.used(), self.memory.peak())
    }

    /// Bytes in the file.
    pub(crate) fn spilled(&self) -> u64 {
        self.spill.as_ref().map_or(0, |spill| spill.room.used())
    }

    /// Counts memory that is not contents.
    pub(crate) fn charge(&self, bytes: u64) -> Result<(), StoreError> {
        self.memory.charge(bytes).map_err(|_| self.full())
    }

    /// Gives it back.
    pub(crate) fn release(&self, bytes: u64) {
        self.memory.release(bytes);
    }

    /// Room for so many pages of contents. `None` if memory has none, but there is a file: contents go
    /// through [`Pool::put`] then.
    pub(crate) fn pages(&self, count: usize) -> Result<Option<Vec<PagesMut>>, StoreError> {
        let bytes = (count * PAGE_BYTES) as u64;
        let fits = self.memory.used() + bytes <= self.most();
        if !fits || self.charge(bytes).is_err() {
            return if self.spill.is_some() {
                Ok(None)
            } else {
                Err(self.full())
            };
        }
        // It gives the charge back if it fails.
        let taken = self.pages.take(count);
        taken.map(Some).map_err(|_| self.full())
    }

    /// Keeps contents.
    pub(crate) fn put(self: &Arc<Self>, bytes: &[u8]) -> Result<Blob, StoreError> {
        let length = bytes.len() as u64;
        let place = if self.has_memory_for(length) && self.memory.charge(length + OVERHEAD).is_ok()
        {
            Place::Memory(bytes.into())
        } else {
            let spill = self.spill.as_ref().ok_or_else(|| self.full())?;
            self.charge(OVERHEAD)?;
            match spill.put(bytes) {
                Ok(offset) => Place::Spilled {
                    offset,
                    length: bytes.len(),
                },
                Err(error) => {
                    self.release(OVERHEAD);
                    return Err(error);
                }
            }
        };
        Ok(Blob {
            pool: Arc::clone(self),
            place,
        })
    }

    /// Whether contents have room in memory. What pages have left unused is of use for pages only.
    fn has_memory_for(&self, bytes: u64) -> bool {
        let idle = self.pages.idle().saturating_sub(SPARE);
        self.memory.used() + idle + bytes + OVERHEAD <= self.most()
    }

    /// Memory for contents. With a file to go to, they leave a part of it to what is counted beside
    /// them: it is needed for those in the file too.
    fn most(&self) -> u64 {
        let limit = self.memory.limit();
        match self.spill {
            Some(_) => limit - limit / 4,
            None => limit,
        }
    }

    fn full(&self) -> StoreError {
        StoreError::Full {
            memory: self.memory.limit(),
            spill: self.spill.as_ref().map_or(0, |spill| spill.room.limit()),
        }
    }
}

impl Spill {
    fn put(&self, bytes: &[u8]) -> Result<u64, StoreError> {
        let length = bytes.len() as u64;
        self.room.charge(length).map_err(|_| StoreError::Full {
            memory: 0,
            spill: self.room.limit(),
        })?;
        let offset = self.end.fetch_add(length, Ordering::Relaxed);
        self.file.write_all_at(bytes, offset).map_err(|source| {
            self.give_back(offset, length);
            StoreError::Spill {
                doing: "write to a file in",
                directory: self.directory.clone(),
                source,
            }
        })?;
        Ok(offset)
    }

    fn give_back(&self, offset: u64, length: u64) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system without holes keeps the blocks until the cache ends.
        let _ = rustix::fs::fallocate(&self.file, hole, offset, length);
        self.room.release(length);
    }
}

/// Contents that are kept until it is dropped.
#[derive(Debug)]
pub(crate) struct Blob {
    pool: Arc<Pool>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(Box<[u8]>),
    Spilled { offset: u64, length: usize },
}

impl Blob {
    /// Bytes of the contents.
    pub(crate) fn len(&self) -> usize {
        match &self.place {
            Place::Memory(bytes) => bytes.len(),
            Place::Spilled { length, .. } => *length,
        }
    }

    /// The contents.
    pub(crate) fn read(&self) -> io::Result<Cow<'_, [u8]>> {
        match (&self.place, &self.pool.spill) {
            (Place::Memory(bytes), _) => Ok(Cow::Borrowed(bytes)),
            (Place::Spilled { offset, length }, Some(spill)) => {
                let mut bytes = vec![0; *length];
                spill.file.read_exact_at(&mut bytes, *offset)?;
                Ok(Cow::Owned(bytes))
            }
            (Place::Spilled { .. }, None) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        match (&self.place, &self.pool.spill) {
            (Place::Memory(bytes), _) => self.pool.release(bytes.len() as u64 + OVERHEAD),
            (Place::Spilled { offset, length }, spill) => {
                if let Some(spill) = spill {
                    spill.give_back(*offset, *length as u64);
                }
                self.pool.release(OVERHEAD);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_makes_room() {
        let pool = Arc::new(Pool::new(2 * (100 + OVERHEAD)));
        let first = pool.put(&[1; 100]).unwrap();
        let second = pool.put(&[2; 100]).unwrap();
        assert!(matches!(pool.put(&[3]), Err(StoreError::Full { .. })));
        drop(first);
        let third = pool.put(&[3; 100]).unwrap();
        assert_eq!(*second.read().unwrap(), [2; 100]);
        assert_eq!(*third.read().unwrap(), [3; 100]);
        drop((second, third));
        assert_eq!(pool.used().0, 0);
    }

    #[test]
    fn pages_are_counted_until_the_last_part_of_them_is_dropped() {
        let pool = Arc::new(Pool::new(64 << 20));
        let mut room = pool.pages(100).unwrap().unwrap();
        assert_eq!(pool.used().0, 100 * PAGE_BYTES as u64);
        let part = room.remove(0).freeze().share(3..5);
        drop(room);
        assert_eq!(pool.used().0, 2 * PAGE_BYTES as u64);
        drop(part);
        assert_eq!(pool.used().0, 0);
        assert!(matches!(pool.pages(1 << 20), Err(StoreError::Full { .. })));
        assert_eq!(pool.used().0, 0);
    }

    #[test]
    fn pages_at_the_end_of_memory_are_hashed_without_a_look_beyond() {
        let pool = Arc::new(Pool::new(64 << 20));
        let mut arena = pool.pages(512).unwrap().unwrap().remove(0);
        arena.fill(7);
        let one = haulier_images::page::hash(&[7; PAGE_BYTES]);
        for count in 1..40 {
            let end = &arena[arena.len() - count * PAGE_BYTES..];
            let hashes = haulier_images::page::hash_all(end);
            assert_eq!(hashes, vec![one; count]);
        }
    }

    #[test]
    fn memory_that_pages_leave_in_pieces_is_not_given_out_twice() {
        let memory = 64 << 20;
        let pool = Arc::new(Pool::new(memory));
        let runs = pool.pages(15_000).unwrap().unwrap();
        let runs: Vec<_> = runs.into_iter().map(PagesMut::freeze).collect();
        // One of each run stays, and no piece of the others is large enough for the kernel.
        let kept: Vec<_> = runs.iter().map(|run| run.share(7..8)).collect();
        drop(runs);
        assert!(pool.used().0 < 1 << 20);
        let mut large = Vec::new();
        while let Ok(blob) = pool.put(&[1; 1 << 20]) {
            large.push(blob);
        }
        let used = pool.pages.mapped() + (large.len() as u64) * (1 << 20);
        assert!(used <= memory + SPARE, "{used}");
        // For pages there is room in between.
        let more = pool.pages(1000).unwrap();
        drop((kept, large, more));
        assert_eq!(pool.used().0, 0);
        assert!(pool.pages.mapped() <= SPARE);
    }

    #[test]
    fn what_memory_has_no_room_for_goes_to_the_file_up_to_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let mut pool = Pool::new(2 * (100 + OVERHEAD));
        pool.spill_into(directory.path(), 150).unwrap();
        let pool = Arc::new(pool);
        let first = pool.put(&[1; 100]).unwrap();
        let second = pool.put(&[2; 100]).unwrap();
        assert_eq!((pool.spilled(), second.len()), (100, 100));
        assert!(matches!(pool.put(&[3; 100]), Err(StoreError::Full { .. })));
        assert_eq!(*first.read().unwrap(), [1; 100]);
        assert_eq!(*second.read().unwrap(), [2; 100]);
        drop(second);
        assert_eq!(pool.spilled(), 0);
        assert_eq!(*pool.put(&[4; 100]).unwrap().read().unwrap(), [4; 100]);
        // It has no name that anything could be left under.
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
