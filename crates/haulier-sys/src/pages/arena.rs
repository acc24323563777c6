//! The mappings that pages are taken from.

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{ARENA_BYTES, ARENA_PAGES, Backing, PAGE_BYTES};

/// A mapping, and how many [`Pages`](super::Pages) have each of its pages.
pub(super) struct Arena {
    base: NonNull<u8>,
    /// It is no huge page any more.
    split: AtomicBool,
    pub(super) holders: [AtomicU32; ARENA_PAGES],
}

// SAFETY: the mapping belongs to the arena alone and may be used from any thread; who may access
// which page of it is decided by the holders of Pages and PagesMut.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    pub(super) fn map(backing: Backing) -> io::Result<Self> {
        let twice = 2 * ARENA_BYTES;
        let flags = MapFlags::PRIVATE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping wherever the kernel likes.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), twice, prot, flags) }?;
        let before = start.align_offset(ARENA_BYTES);
        let base = start.wrapping_byte_add(before);
        // What is too much goes back; failing that, it stays unused.
        if before > 0 {
            // SAFETY: the beginning of the mapping just made, to which no reference exists.
            let _ = unsafe { rustix::mm::munmap(start, before) };
        }
        let end = base.wrapping_byte_add(ARENA_BYTES);
        // SAFETY: the rest of the mapping just made, to which no reference exists.
        let _ = unsafe { rustix::mm::munmap(end, ARENA_BYTES - before) };
        // Only a wish: without huge pages all works, slower.
        let advice = match backing {
            Backing::Huge => Advice::LinuxHugepage,
            Backing::Small => Advice::LinuxPopulateWrite,
        };
        // SAFETY: inside the mapping just made; the advice changes no contents.
        let _ = unsafe { rustix::mm::madvise(base, ARENA_BYTES, advice) };
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self {
            base,
            split: AtomicBool::new(false),
            holders: [const { AtomicU32::new(1) }; ARENA_PAGES],
        })
    }

    /// Gives the memory of pages back to the kernel. They are zero when they are used again. False if it
    /// cannot be had.
    ///
    /// # Safety
    /// Nobody has these pages, or can take them.
    pub(super) unsafe fn release(&self, pages: Range<usize>) -> bool {
        let start = self.at(pages.start).cast();
        let bytes = pages.len() * PAGE_BYTES;
        if !self.split.swap(true, Ordering::Relaxed) {
            // Of a huge page no part is freed. This splits it.
            // SAFETY: inside the mapping; nobody has these pages, so that what is in them is not needed.
            let _ = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxFree) };
        }
        // SAFETY: as above.
        unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxDontNeed) }.is_ok()
    }

    pub(super) fn at(&self, page: usize) -> *mut u8 {
        debug_assert!(page <= ARENA_PAGES, "page {page}");
        self.base.as_ptr().wrapping_add(page * PAGE_BYTES)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` at this length; no Pages exist, as each keeps the arena alive.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), ARENA_BYTES) };
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({:p})", self.base)
    }
}
