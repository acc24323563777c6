//! Memory in pages that are shared, counted and reused one by one.
//!
//! Pages come from arenas of 2 MiB, each of which the kernel may back by one huge page: that saves
//! most of what touching fresh memory costs. A page is free again when the last [`Pages`] that has
//! it is dropped; a free page is used before a new arena is made, and an arena without a used page
//! goes back to the kernel, except for a few that are kept warm.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod arena;

use arena::Arena;

/// Bytes of a page of the pool, whatever the machine's own are.
pub const PAGE_BYTES: usize = 4096;

/// Pages of an arena.
const ARENA_PAGES: usize = 512;
const ARENA_BYTES: usize = ARENA_PAGES * PAGE_BYTES;
const WORDS: usize = ARENA_PAGES / 64;

/// Arenas without a used page that are kept.
const WARM: usize = 4;

/// Where pages come from. Pages keep it alive.
#[derive(Debug, Clone)]
pub struct PagePool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    used: Arc<AtomicU64>,
    backing: Backing,
    arenas: Mutex<Arenas>,
}

/// What the kernel is asked for.
#[derive(Debug, Clone, Copy)]
enum Backing {
    /// A huge page for each arena.
    Huge,
    /// Small pages, all of an arena at once.
    Small,
}

/// All arenas, and which of their pages are free.
#[derive(Debug, Default)]
struct Arenas {
    slots: Vec<Option<Slot>>,
    vacant: Vec<usize>,
    /// Slots with free pages. The lowest is used first, so that others run empty.
    partial: BTreeSet<usize>,
    /// How many of them have no used page.
    warm: usize,
    /// Free pages of all that have memory.
    free_pages: usize,
}

#[derive(Debug)]
struct Slot {
    arena: Arc<Arena>,
    /// A bit for each page.
    free: [u64; WORDS],
    free_pages: usize,
    /// A bit for each free page whose memory the kernel has back.
    bare: [u64; WORDS],
}

impl PagePool {
    /// An empty pool. The bytes of each page that becomes free are subtracted from `used`; to add
    /// those of pages that are taken is up to the caller, who knows the limit.
    pub fn new(used: Arc<AtomicU64>) -> Self {
        Self::with(used, Backing::Huge)
    }

    /// The same without huge pages: for what is about to be written from one end to the other. Where
    /// free memory is often given back to the host of a virtual machine, small pages are found warm and
    /// huge ones are not.
    pub fn of_small_pages(used: Arc<AtomicU64>) -> Self {
        Self::with(used, Backing::Small)
    }

    fn with(used: Arc<AtomicU64>, backing: Backing) -> Self {
        let arenas = Mutex::default();
        Self {
            inner: Arc::new(Inner {
                used,
                backing,
                arenas,
            }),
        }
    }

    /// Takes `count` pages, whose contents are what somebody left there or zero, as few successive
    /// runs. What was taken is freed, and subtracted from the number of used bytes, if not all can
    /// be had.
    ///
    /// # Errors
    /// If the kernel gives no memory; nothing is taken then, and the bytes of all `count` pages are
    /// subtracted.
    pub fn take(&self, count: usize) -> io::Result<Vec<PagesMut>> {
        let mut runs = Vec::with_capacity(1);
        let mut missing = count;
        let mut arenas = self.inner.lock();
        while missing > 0 {
            let index = match arenas.partial.first() {
                Some(index) => *index,
                None => match Arena::map(self.inner.backing) {
                    Ok(arena) => arenas.add(arena),
                    Err(error) => {
                        // The runs are freed without the lock, which they need.
                        drop(arenas);
                        let bytes = (missing * PAGE_BYTES) as u64;
                        self.inner.used.fetch_sub(bytes, Ordering::Relaxed);
                        return Err(error);
                    }
                },
            };
            let (arena, part) = arenas.take_from(index, missing);
            missing -= part.len();
            runs.push(PagesMut(Pages {
                pool: self.inner.clone(),
                arena,
                slot: index as u32,
                first: part.start as u16,
                count: part.len() as u16,
            }));
        }
        Ok(runs)
    }

    /// Bytes of pages that the pool has from the kernel and that nobody uses.
    pub fn idle(&self) -> u64 {
        (self.inner.lock().free_pages * PAGE_BYTES) as u64
    }

    /// Bytes that the pool has from the kernel, free pages included.
    pub fn mapped(&self) -> u64 {
        let arenas = self.inner.lock();
        ((arenas.slots.len() - arenas.vacant.len()) * ARENA_BYTES) as u64
    }
}

impl Inner {
    /// No step in between can panic.
    fn lock(&self) -> MutexGuard<'_, Arenas> {
        self.arenas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of pages that nobody has any more, and that are `bare` if they have no memory.
    fn free(&self, slot: usize, pages: Range<usize>, bare: bool) {
        let unused = self.lock().give_back(slot, pages.clone(), bare);
        let bytes = (pages.len() * PAGE_BYTES) as u64;
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        // Unmapped without the lock.
        drop(unused);
    }
}

impl Arenas {
    fn add(&mut self, arena: Arena) -> usize {
        let slot = Some(Slot {
            arena: Arc::new(arena),
            free: [u64::MAX; WORDS],
            free_pages: ARENA_PAGES,
            bare: [0; WORDS],
        });
        let index = match self.vacant.pop() {
            Some(index) => {
                self.slots[index] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.partial.insert(index);
        self.warm += 1;
        self.free_pages += ARENA_PAGES;
        index
    }

    /// Takes the first free pages of an arena that has some, at most so many and successive ones.
    fn take_from(&mut self, index: usize, most: usize) -> (Arc<Arena>, Range<usize>) {
        let Some(slot) = self.slots[index].as_mut() else {
            unreachable!("only slots with an arena have free pages")
        };
        if slot.free_pages == ARENA_PAGES {
            self.warm -= 1;
        }
        let is_free = |page: usize| slot.free[page / 64] & (1 << (page % 64)) != 0;
        let first = (0..WORDS).find(|word| slot.free[*word] != 0).unwrap_or(0);
        let first = first * 64 + slot.free[first].trailing_zeros() as usize;
        let mut end = first + 1;
        while end < ARENA_PAGES && end - first < most && is_free(end) {
            end += 1;
        }
        let mut bare = 0;
        for page in first..end {
            let bit = 1 << (page % 64);
            slot.free[page / 64] &= !bit;
            bare += usize::from(slot.bare[page / 64] & bit != 0);
            slot.bare[page / 64] &= !bit;
        }
        slot.free_pages -= end - first;
        self.free_pages -= end - first - bare;
        if slot.free_pages == 0 {
            self.partial.remove(&index);
        }
        (slot.arena.clone(), first..end)
    }

    /// Marks pages free, which are `bare` if they have no memory. Returns the arena if nothing of it is
    /// needed any more.
    fn give_back(&mut self, index: usize, pages: Range<usize>, bare: bool) -> Option<Slot> {
        let slot = self.slots[index].as_mut()?;
        slot.free_pages += pages.len();
        if !bare {
            self.free_pages += pages.len();
        }
        for page in pages {
            let bit = 1 << (page % 64);
            slot.free[page / 64] |= bit;
            slot.bare[page / 64] |= if bare { bit } else { 0 };
        }
        self.partial.insert(index);
        if slot.free_pages < ARENA_PAGES {
            return None;
        }
        let bare: u32 = slot.bare.iter().map(|word| word.count_ones()).sum();
        if self.warm < WARM && bare == 0 {
            self.warm += 1;
            return None;
        }
        self.partial.remove(&index);
        self.free_pages -= ARENA_PAGES - bare as usize;
        self.vacant.push(index);
        self.slots[index].take()
    }
}

/// Successive pages that nobody else has, to be written.
#[derive(Debug)]
pub struct PagesMut(Pages);

impl PagesMut {
    /// The same pages, to be read and shared.
    pub fn freeze(self) -> Pages {
        self.0
    }
}

impl Deref for PagesMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for PagesMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.0.len();
        let start = self.0.arena.at(self.0.first.into());
        // SAFETY: the pages are mapped for as long as the arena lives, which we hold; they were
        // taken from the free ones, and no Pages of them were handed out since, so that this borrow
        // is the only one.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// Successive pages that may be shared, and do not change. Each page is free when its last holder
/// is gone.
pub struct Pages {
    pool: Arc<Inner>,
    arena: Arc<Arena>,
    slot: u32,
    first: u16,
    count: u16,
}

impl Pages {
    /// Number of pages, at least one.
    pub fn count(&self) -> usize {
        self.count.into()
    }

    /// A second holder of some of the pages.
    ///
    /// # Panics
    /// If the range is empty or not one of these pages.
    pub fn share(&self, pages: Range<usize>) -> Pages {
        assert!(
            pages.start < pages.end && pages.end <= self.count(),
            "no pages {pages:?} of {}",
            self.count
        );
        let first = self.first + pages.start as u16;
        let count = pages.len() as u16;
        for page in first..first + count {
            // Whoever makes a holder is one: the number cannot be zero meanwhile.
            self.arena.holders[usize::from(page)].fetch_add(1, Ordering::Relaxed);
        }
        Pages {
            pool: self.pool.clone(),
            arena: self.arena.clone(),
            slot: self.slot,
            first,
            count,
        }
    }

    /// Keeps the first `count` pages, and returns the others.
    ///
    /// # Panics
    /// If either part would be empty.
    pub fn split_off(&mut self, count: usize) -> Pages {
        assert!(
            count > 0 && count < self.count(),
            "no border at {count} of {}",
            self.count
        );
        let rest = Pages {
            pool: self.pool.clone(),
            arena: self.arena.clone(),
            slot: self.slot,
            first: self.first + count as u16,
            count: self.count - count as u16,
        };
        self.count = count as u16;
        rest
    }

    /// The same pages, to be written again, if nobody else has one of them.
    pub fn unshared(&mut self) -> Option<&mut [u8]> {
        let pages = usize::from(self.first)..usize::from(self.first) + self.count();
        let holders = &self.arena.holders[pages];
        // What others have read they have read before they let go.
        let alone = |holders: &AtomicU32| holders.load(Ordering::Acquire) == 1;
        if !holders.iter().all(alone) {
            return None;
        }
        let start = self.arena.at(self.first.into());
        // SAFETY: as for reading; and we are the only holder of each page, so that others could be made
        // only through us, of whom this is the only borrow.
        Some(unsafe { std::slice::from_raw_parts_mut(start, self.count() * PAGE_BYTES) })
    }

    /// Drops these pages and gives the memory of those that nobody else has back to the kernel at once,
    /// unless the pool is short of free pages: for what will not come again while others need memory. Of
    /// an arena in one huge page the first costs the kernel some 0.1 ms.
    pub fn give_back(mut self) {
        let pool = self.pool.clone();
        let enough = pool.lock().free_pages >= WARM * ARENA_PAGES;
        let arena = self.arena.clone();
        self.let_go(|pages| {
            // SAFETY: asked only for pages that nobody has, before they are among the free ones.
            enough && unsafe { arena.release(pages) }
        });
        self.count = 0;
    }

    /// Frees the pages that nobody else has. `is_bare` is asked, of each run of them and while nobody can
    /// take them, whether they have lost their memory.
    fn let_go(&mut self, is_bare: impl Fn(Range<usize>) -> bool) {
        let first = usize::from(self.first);
        let end = first + self.count();
        let free = |pages: Range<usize>| {
            if !pages.is_empty() {
                let bare = is_bare(pages.clone());
                self.pool.free(self.slot as usize, pages, bare);
            }
        };
        let mut from = first;
        for page in first..end {
            let holders = &self.arena.holders[page];
            // The last one frees, after all that others have done with the page.
            if holders.fetch_sub(1, Ordering::Release) == 1 {
                fence(Ordering::Acquire);
                // For the next that takes it.
                holders.store(1, Ordering::Relaxed);
                continue;
            }
            free(from..page);
            from = page + 1;
        }
        free(from..end);
    }

    /// Takes `next` in if it goes on where these end, else gives it back.
    pub fn join(&mut self, mut next: Pages) -> Option<Pages> {
        let goes_on =
            Arc::ptr_eq(&self.arena, &next.arena) && next.first == self.first + self.count;
        if !goes_on {
            return Some(next);
        }
        self.count += next.count;
        // Its pages have the same holder now.
        next.count = 0;
        None
    }
}

impl Clone for Pages {
    fn clone(&self) -> Self {
        self.share(0..self.count())
    }
}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = self.arena.at(self.first.into());
        // SAFETY: the pages are mapped for as long as the arena lives, which we hold, and zeroed or
        // written; they are not free while we hold them, and only free pages become a PagesMut.
        unsafe { std::slice::from_raw_parts(start, self.count() * PAGE_BYTES) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.let_go(|_| false);
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} of {:?})", self.count, self.arena)
    }
}

#[cfg(test)]
mod tests;
