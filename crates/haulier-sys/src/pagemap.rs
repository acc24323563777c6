//! `/proc/<pid>/pagemap`: which pages are there, and which were written.
//!
//! Two ways: the `PAGEMAP_SCAN` request (Linux 6.7) for ranges of pages by category, which can
//! write-protect what it finds in the same step; and the entries of single pages.

use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::ioctl::{Opcode, opcode};

/// Categories of a page, for [`Query`].
pub mod category {
    /// Written since it was last protected, or never protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 4;
    /// Of a file or of shared memory. To ask for it costs a look at every page itself.
    pub const FILE: u64 = 1 << 2;
    /// The kernel's page of zeros.
    pub const PFNZERO: u64 = 1 << 5;
    /// Written since the soft-dirty bits were cleared (Linux 6.8).
    pub const SOFT_DIRTY: u64 = 1 << 7;
    /// Not to be touched: a marker of `MADV_GUARD_INSTALL` (Linux 6.15).
    pub const GUARD: u64 = 1 << 8;
}

/// Bits of an entry ([`Pagemap::entries`]).
pub mod entry {
    /// Written since the soft-dirty bits were cleared.
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 62;
    /// In memory.
    pub const PRESENT: u64 = 1 << 63;
}

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
/// Ranges taken by one request.
const BATCH: usize = 4096;
/// Bytes of a page, and of an entry.
const PAGE: u64 = 4096;
const ENTRY: usize = 8;

/// Which pages are asked for, by their categories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Query {
    /// A page must be in all of these,
    pub all: u64,
    /// in at least one of these if there are any,
    pub any: u64,
    /// and in none of these.
    pub none: u64,
    /// Protect what is found, in the same step.
    pub protect: bool,
    /// Fail with EPERM at the first mapping that is not registered for asynchronous protection.
    pub registered: bool,
}

/// Pages of the same categories, side by side.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// Address of the first.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Their categories, of those that were asked for.
    pub categories: u64,
}

#[repr(C)]
#[derive(Debug)]
pub(crate) struct ScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

pub(crate) const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);

/// The open pagemap of one address space; it does not follow the process through an exec.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// All zero between requests.
    regions: Vec<Region>,
}

impl Pagemap {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// The process is gone, or may not be looked at.
    pub fn open(pid: i32) -> io::Result<Pagemap> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Pagemap::from_file(file))
    }

    /// The same, opened by somebody else.
    pub fn from_file(file: File) -> Pagemap {
        Pagemap {
            file,
            regions: vec![Region::default(); BATCH],
        }
    }

    /// Tells `found` every range of pages between two addresses that the query is for, ascending.
    /// What is not mapped is skipped.
    ///
    /// A range may be told twice.
    ///
    /// # Errors
    /// ENOTTY on kernels without the request, EPERM see [`Query::registered`]. What was found (and
    /// protected) up to the error has been told, perhaps twice; how far that was is not known.
    pub fn scan(
        &mut self,
        addresses: Range<u64>,
        query: Query,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut arg = ScanArg {
            size: mem::size_of::<ScanArg>() as u64,
            flags: if query.protect { WP_MATCHING } else { 0 }
                | if query.registered { CHECK_WPASYNC } else { 0 },
            start: addresses.start,
            end: addresses.end,
            walk_end: 0,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: query.none,
            category_mask: query.all | query.none,
            category_anyof_mask: query.any,
            // One that is the same for all of them, so that neighbours are joined.
            return_mask: query.all,
        };
        // Nothing is reported of pages for which no category is asked.
        if arg.return_mask == 0 {
            arg.return_mask = query.any;
        }
        while arg.start < arg.end {
            // SAFETY: the descriptor is open, `arg` is a live exclusive reference to the structure
            // of the request, and `vec` and `vec_len` are those of a vector that nobody else uses
            // and whose elements may have any value.
            let result = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    PAGEMAP_SCAN as _,
                    ptr::from_mut(&mut arg),
                )
            };
            let outcome = if result < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            };
            // After an error the kernel has written what it found before, but not told how much.
            // Otherwise it may have written more than it told, of what it told already.
            let told = if result < 0 { BATCH } else { result as usize };
            for (at, region) in self.regions.iter_mut().enumerate() {
                if region.end == 0 {
                    break;
                }
                if at < told {
                    found(region.start..region.end);
                }
                *region = Region::default();
            }
            outcome?;
            if arg.walk_end <= arg.start {
                break;
            }
            arg.start = arg.walk_end;
        }
        Ok(())
    }

    /// Whether the kernel has [`category::GUARD`]; it refuses to be asked for what it does not know.
    pub fn knows_guards(&mut self) -> bool {
        let query = Query {
            all: category::GUARD,
            ..Query::default()
        };
        self.scan(0..PAGE, query, |_| ()).is_ok()
    }

    /// Reads the [`entry`] of every page from `address` on, as many as `entries` takes; returns how
    /// many there are, which is less only at the end of the address space, or if it is gone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn entries(&self, address: u64, entries: &mut [u64]) -> io::Result<usize> {
        let mut bytes = vec![0; entries.len() * ENTRY];
        let mut len = 0;
        let offset = address / PAGE * ENTRY as u64;
        while len < bytes.len() {
            match self.file.read_at(&mut bytes[len..], offset + len as u64) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        for (entry, bytes) in entries.iter_mut().zip(bytes[..len].chunks_exact(ENTRY)) {
            let mut value = [0; ENTRY];
            value.copy_from_slice(bytes);
            *entry = u64::from_ne_bytes(value);
        }
        Ok(len / ENTRY)
    }
}

#[cfg(test)]
mod tests;
