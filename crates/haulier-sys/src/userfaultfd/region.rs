//! Memory of our own that a userfaultfd may fill.

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr;

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};

/// A private anonymous mapping of our own, for tests and probes of memory machinery: its bytes are
/// only reached through volatile accesses, so that a userfaultfd may fill it behind our back.
pub struct Region {
    address: *mut u8,
    len: usize,
}

// SAFETY: a `Region` owns its mapping, and all access to it is volatile or by the kernel.
unsafe impl Send for Region {}
// SAFETY: as for `Send`; no reference to the mapped bytes is ever made.
unsafe impl Sync for Region {}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:#x}, {} bytes)", self.address(), self.len)
    }
}

impl Region {
    /// Maps `len` bytes (whole pages), readable and writable, untouched, without huge pages.
    pub fn map(len: usize) -> io::Result<Self> {
        // SAFETY: no address is asked for, so the kernel picks one that is free.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let region = Self {
            address: address.cast(),
            len,
        };
        region.advise(0..len, Advice::LinuxNoHugepage)?;
        Ok(region)
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the region has no bytes; never true, as the kernel maps at least a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads one byte, faulting as any program would.
    ///
    /// # Panics
    /// If `offset` lies outside.
    pub fn read(&self, offset: usize) -> u8 {
        assert!(offset < self.len, "offset {offset:#x} is outside {self:?}");
        // SAFETY: inside the mapping, by the line above.
        let at = unsafe { self.address.add(offset) };
        // SAFETY: mapped and readable; a byte has no alignment and no invalid value.
        unsafe { at.read_volatile() }
    }

    /// Writes one byte, faulting as any program would.
    ///
    /// # Panics
    /// If `offset` lies outside.
    pub fn write(&self, offset: usize, value: u8) {
        assert!(offset < self.len, "offset {offset:#x} is outside {self:?}");
        // SAFETY: inside the mapping, by the line above.
        let at = unsafe { self.address.add(offset) };
        // SAFETY: mapped and writable; nobody holds a reference to it.
        unsafe { at.write_volatile(value) }
    }

    /// Drops the content of a part (`MADV_DONTNEED`). With `EVENT_REMOVE` it blocks until the event
    /// was read.
    pub fn discard(&self, part: Range<usize>) -> io::Result<()> {
        self.advise(part, Advice::LinuxDontNeed)
    }

    /// Takes all access from a part (`PROT_NONE`); reading it through this type then kills us.
    pub fn forbid(&self, part: Range<usize>) -> io::Result<()> {
        let (at, len) = self.part(part);
        // SAFETY: inside our own mapping, to which no reference exists.
        unsafe { rustix::mm::mprotect(at.cast(), len, rustix::mm::MprotectFlags::empty()) }?;
        Ok(())
    }

    /// Leaves a hole in the mapping. With `EVENT_UNMAP` it blocks until the event was read. The hole
    /// must not be touched any more; it is filled again with an inaccessible mapping at once, so
    /// that nobody else's memory can come to lie there.
    pub fn unmap(&self, part: Range<usize>) -> io::Result<()> {
        let (at, len) = self.part(part);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: replaces a part of our own mapping, to which no reference exists.
        unsafe { rustix::mm::mmap_anonymous(at.cast(), len, ProtFlags::empty(), flags) }?;
        Ok(())
    }

    /// Moves the mapping to another address (`mremap`). With `EVENT_REMAP` it blocks until the event
    /// was read.
    pub fn relocate(self) -> io::Result<Self> {
        let target = Self::map(self.len)?;
        // SAFETY: both mappings are ours and whole, and no reference to either exists; the target's
        // is replaced.
        unsafe {
            rustix::mm::mremap_fixed(
                self.address.cast(),
                self.len,
                self.len,
                MremapFlags::MAYMOVE,
                target.address.cast(),
            )
        }?;
        // The old range is no longer ours to unmap.
        std::mem::forget(self);
        Ok(target)
    }

    fn advise(&self, part: Range<usize>, advice: Advice) -> io::Result<()> {
        let (at, len) = self.part(part);
        // SAFETY: inside our own mapping, to which no reference exists.
        unsafe { rustix::mm::madvise(at.cast(), len, advice) }?;
        Ok(())
    }

    fn part(&self, part: Range<usize>) -> (*mut u8, usize) {
        assert!(
            part.start <= part.end && part.end <= self.len,
            "{part:?} is outside {self:?}"
        );
        // SAFETY: inside the mapping, by the line above.
        let at = unsafe { self.address.add(part.start) };
        (at, part.end - part.start)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody holds a reference into it.
        let outcome = unsafe { rustix::mm::munmap(self.address.cast(), self.len) };
        debug_assert!(outcome.is_ok(), "munmap of {self:?}: {outcome:?}");
    }
}
