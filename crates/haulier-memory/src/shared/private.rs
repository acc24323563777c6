//! Private memory that is dumped with contents: locked memory and written pages of files.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use haulier_sys::process_memory::{Piece, ProcessMemory};

use super::{Batch, Stop};
use crate::page::{PAGE, PAGE_BYTES, PageRange};
use crate::ranges::RangeSet;

/// Bits of a pagemap entry.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page belongs to a file (or to shared memory): the private mapping has no copy of it.
const OF_FILE: u64 = 1 << 61;
/// Bytes of a pagemap entry.
const ENTRY: usize = 8;
/// Entries read at once: those of 128 MiB.
const ENTRIES: usize = 32 << 10;

/// Pages of one process that are its own.
#[derive(Debug)]
pub(super) struct PrivatePages {
    pid: i32,
    ranges: RangeSet,
}

impl PrivatePages {
    /// Finds the pages in `ranges` that the process has a copy of its own of.
    pub(super) fn find(pid: i32, ranges: &[PageRange]) -> io::Result<PrivatePages> {
        let mut found = PrivatePages {
            pid,
            ranges: RangeSet::new(),
        };
        if ranges.is_empty() {
            return Ok(found);
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut buffer = vec![0; ENTRIES * ENTRY];
        for range in ranges {
            let mut next = range.start;
            while next < range.end() {
                let entries = (((range.end() - next) / PAGE) as usize).min(ENTRIES);
                let buffer = &mut buffer[..entries * ENTRY];
                let count = pagemap.read_at(buffer, next / PAGE * ENTRY as u64)?;
                if count < ENTRY {
                    // The address space is gone.
                    return Ok(found);
                }
                next = found.add(next, &buffer[..count]);
            }
        }
        Ok(found)
    }

    pub(super) fn pages(&self) -> u64 {
        self.ranges.pages()
    }

    /// Reads them, as far as they are still there.
    pub(super) fn read<E, F>(&self, batch: &mut Batch<F>) -> Result<(), Stop<E>>
    where
        F: FnMut(&[u8]) -> Result<ControlFlow<()>, E>,
    {
        let memory = ProcessMemory::new(self.pid);
        let mut left: Vec<PageRange> = self.ranges.iter().collect();
        // The next one is the last.
        left.reverse();
        while !left.is_empty() {
            let room = batch.room()?;
            let pieces = next_pieces(&mut left, room.len());
            let wanted: usize = pieces.iter().map(|piece| piece.1).sum();
            let Ok(count) = memory.read(&pieces, &mut room[..wanted]) else {
                let pages = left.iter().map(|range| range.pages).sum::<u64>();
                batch.vanished(pages + (wanted / PAGE_BYTES) as u64);
                return Ok(());
            };
            batch.filled(count);
            if count < wanted {
                batch.vanished(1);
                // The page after the last whole one is not mapped any more; the rest may be.
                give_back(&mut left, &pieces, count - count % PAGE_BYTES + PAGE_BYTES);
            }
        }
        Ok(())
    }

    /// Takes in what the entries of the pages from `start` on say, and returns the page after them.
    fn add(&mut self, start: u64, entries: &[u8]) -> u64 {
        let mut own: Option<PageRange> = None;
        let mut at = start;
        for entry in entries.chunks_exact(ENTRY) {
            let mut bits = [0; ENTRY];
            bits.copy_from_slice(entry);
            let bits = u64::from_ne_bytes(bits);
            if bits & (PRESENT | SWAPPED) != 0 && bits & OF_FILE == 0 {
                own.get_or_insert(PageRange {
                    start: at,
                    pages: 0,
                })
                .pages += 1;
            } else if let Some(range) = own.take() {
                self.ranges.insert(range);
            }
            at += PAGE;
        }
        if let Some(range) = own {
            self.ranges.insert(range);
        }
        at
    }
}

/// Takes pieces of at most `room` bytes from the end of the list.
fn next_pieces(left: &mut Vec<PageRange>, mut room: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    while let Some(range) = left.last_mut() {
        let pages = range.pages.min((room / PAGE_BYTES) as u64);
        if pages == 0 {
            break;
        }
        let bytes = pages as usize * PAGE_BYTES;
        pieces.push((range.start, bytes));
        room -= bytes;
        range.start += bytes as u64;
        range.pages -= pages;
        if range.pages == 0 {
            left.pop();
        }
    }
    pieces
}

/// Puts all but the first `done` bytes of the pieces back to the end of the list.
fn give_back(left: &mut Vec<PageRange>, pieces: &[Piece], mut done: usize) {
    let mut rest = Vec::new();
    for &(start, bytes) in pieces {
        let step = done.min(bytes);
        done -= step;
        if step < bytes {
            let start = start + step as u64;
            rest.push(PageRange::between(start, start + (bytes - step) as u64));
        }
    }
    left.extend(rest.into_iter().rev());
}
