//! Pages, ranges and runs of them.

use std::fmt;

/// Bytes of a page. haulier moves x86-64 processes, whose base pages have this size, and refuses
/// others at the check.
pub const PAGE: u64 = 4096;

/// [`PAGE`] as a length in memory.
pub const PAGE_BYTES: usize = PAGE as usize;

/// First address that no task of any supported machine has: 57-bit addresses (five-level tables).
pub const ADDRESS_END: u64 = 1 << 57;

/// A range of pages of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange {
    /// Address of the first byte, a multiple of [`PAGE`].
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

impl PageRange {
    /// The range from `start` to the byte before `end`, both multiples of [`PAGE`].
    pub fn between(start: u64, end: u64) -> Self {
        Self {
            start,
            pages: end.saturating_sub(start) / PAGE,
        }
    }

    /// First address beyond. Meaningful for ranges that pass [`Self::is_valid`].
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes())
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE)
    }

    /// The first `pages` of it, and the others.
    pub fn split(&self, pages: u64) -> (PageRange, PageRange) {
        let first = PageRange {
            start: self.start,
            pages: pages.min(self.pages),
        };
        let rest = PageRange {
            start: first.end(),
            pages: self.pages - first.pages,
        };
        (first, rest)
    }

    /// Whether it is aligned, not empty and inside the address space; the check for a range that
    /// came from a peer or a file.
    pub fn is_valid(&self) -> bool {
        let fits = self.pages <= ADDRESS_END / PAGE && self.start <= ADDRESS_END;
        self.pages > 0 && self.start % PAGE == 0 && fits && self.end() <= ADDRESS_END
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} ({} pages)", self.start, self.pages)
    }
}

/// A range of pages that are all zero, or none of which is known to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Which pages.
    pub range: PageRange,
    /// All are zero, and no content is stored or sent for them.
    pub zero: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_ranges_are_not_valid() {
        let valid = |start, pages| PageRange { start, pages }.is_valid();
        assert!(valid(0x1000, 1));
        assert!(valid(ADDRESS_END - PAGE, 1));
        assert!(!valid(0x1000, 0));
        assert!(!valid(0x1001, 1));
        assert!(!valid(ADDRESS_END, 1));
        assert!(!valid(ADDRESS_END - PAGE, 2));
        assert!(!valid(u64::MAX - 4095, u64::MAX));
        assert!(!valid(0, u64::MAX / PAGE + 1));
    }
}
