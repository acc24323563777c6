//! Tracking by soft-dirty bits.
//!
//! The bits are read, then cleared. A write between the two would be lost, and no order of the two
//! steps avoids that; so the tasks are stopped for both.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Duration;

use haulier_sys::pagemap::category::{PRESENT, SOFT_DIRTY, SWAPPED};
use haulier_sys::pagemap::{Pagemap, Query, entry};
use rustix::io::Errno;

use super::space::{Identity, is_gone};
use super::{Hold, TaskId, TaskScan, TrackError};
use crate::mappings;
use crate::page::{PAGE, PageRange};
use crate::ranges::RangeSet;

/// What to write to `clear_refs`.
const CLEAR_SOFT_DIRTY: &str = "4";
/// Entries read at once: of 128 MiB of memory.
const BATCH: usize = 32 << 10;

const POPULATED: Query = Query {
    all: 0,
    any: PRESENT | SWAPPED,
    none: 0,
    protect: false,
    registered: false,
};
const DIRTY: Query = Query {
    all: SOFT_DIRTY,
    ..POPULATED
};

/// Address spaces whose bits were cleared at the last look.
#[derive(Debug, Default)]
pub(super) struct SoftDirty {
    cleared: BTreeMap<TaskId, Identity>,
}

impl SoftDirty {
    pub(super) fn look(
        &mut self,
        tasks: &[TaskId],
        hold: &mut dyn Hold,
    ) -> Result<Vec<TaskScan>, TrackError> {
        hold.stop().map_err(TrackError::Stop)?;
        let outcome = self.look_at_all(tasks, true);
        hold.resume().map_err(TrackError::Resume)?;
        outcome
    }

    /// There is nothing to let go of: bits that are read but not cleared concern nobody.
    pub(super) fn finish(&mut self, tasks: &[TaskId]) -> Result<Vec<TaskScan>, TrackError> {
        let outcome = self.look_at_all(tasks, false);
        self.cleared.clear();
        outcome
    }

    fn look_at_all(&mut self, tasks: &[TaskId], clear: bool) -> Result<Vec<TaskScan>, TrackError> {
        let before = std::mem::take(&mut self.cleared);
        let mut scans = Vec::with_capacity(tasks.len());
        for task in tasks {
            match self.look_at(*task, before.get(task), clear) {
                Ok(scan) => scans.extend(scan),
                Err(error) if is_gone(&error) => {}
                Err(source) => {
                    return Err(TrackError::Read {
                        pid: task.pid,
                        source,
                    });
                }
            }
        }
        Ok(scans)
    }

    fn look_at(
        &mut self,
        task: TaskId,
        before: Option<&Identity>,
        clear: bool,
    ) -> io::Result<Option<TaskScan>> {
        let Some(identity) = Identity::of(task.pid)? else {
            return Ok(None);
        };
        let mapped = mappings::lazy(&mappings::read(task.pid)?);
        let only_dirty = before == Some(&identity);
        let written = written(task.pid, &mapped, only_dirty)?;
        if clear {
            fs::write(format!("/proc/{}/clear_refs", task.pid), CLEAR_SOFT_DIRTY)?;
            self.cleared.insert(task, identity);
        }
        Ok(Some(TaskScan {
            pid: task.pid,
            task: task.task,
            written,
            mapped,
            untracked: None,
            stopped: Duration::ZERO,
        }))
    }
}

/// Pages that are populated, or of these the dirty ones.
fn written(pid: i32, mapped: &RangeSet, only_dirty: bool) -> io::Result<RangeSet> {
    let mut pagemap = Pagemap::open(pid)?;
    match by_request(&mut pagemap, mapped, only_dirty) {
        // Before Linux 6.7 there is no such request, and before 6.8 it does not know the category.
        Err(error) if has_no_request(&error) => by_entry(&pagemap, mapped, only_dirty),
        other => other,
    }
}

fn has_no_request(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOTTY | Errno::INVAL))
}

fn by_request(pagemap: &mut Pagemap, mapped: &RangeSet, only_dirty: bool) -> io::Result<RangeSet> {
    let query = if only_dirty { DIRTY } else { POPULATED };
    let mut found = Vec::new();
    for range in mapped.iter() {
        pagemap.scan(range.start..range.end(), query, |pages| {
            found.push(PageRange::between(pages.start, pages.end));
        })?;
    }
    Ok(found.into_iter().collect())
}

fn by_entry(pagemap: &Pagemap, mapped: &RangeSet, only_dirty: bool) -> io::Result<RangeSet> {
    let mut found = Vec::new();
    let mut entries = vec![0; BATCH];
    for range in mapped.iter() {
        let mut start = range.start;
        while start < range.end() {
            let pages = ((range.end() - start) / PAGE).min(BATCH as u64);
            let read = pagemap.entries(start, &mut entries[..pages as usize])?;
            collect(start, &entries[..read], only_dirty, &mut found);
            if read == 0 {
                break;
            }
            start += read as u64 * PAGE;
        }
    }
    Ok(found.into_iter().collect())
}

/// Appends the pages whose entries, from the page at `start` on, are asked for.
fn collect(start: u64, entries: &[u64], only_dirty: bool, found: &mut Vec<PageRange>) {
    let is_wanted = |value: u64| {
        let populated = value & (entry::PRESENT | entry::SWAPPED) != 0;
        populated && (!only_dirty || value & entry::SOFT_DIRTY != 0)
    };
    for (address, value) in (start..).step_by(PAGE as usize).zip(entries) {
        if !is_wanted(*value) {
            continue;
        }
        match found.last_mut() {
            Some(range) if range.end() == address => range.pages += 1,
            _ => found.push(PageRange {
                start: address,
                pages: 1,
            }),
        }
    }
}

/// Whether the bits mean anything on this kernel: tried on the memory of ours at `address`, of which
/// `write` writes a byte.
pub(super) fn probe(address: u64, mut write: impl FnMut()) -> io::Result<bool> {
    let pid = std::process::id() as i32;
    let pagemap = Pagemap::open(pid)?;
    let is_dirty = || {
        let mut value = [0];
        pagemap.entries(address, &mut value)?;
        Ok::<bool, io::Error>(value[0] & entry::SOFT_DIRTY != 0)
    };
    write();
    fs::write("/proc/self/clear_refs", CLEAR_SOFT_DIRTY)?;
    let before = is_dirty()?;
    write();
    Ok(!before && is_dirty()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_are_collected_from_entries() {
        let (present, swapped, dirty) = (entry::PRESENT, entry::SWAPPED, entry::SOFT_DIRTY);
        let entries = [
            present | dirty,
            swapped | dirty,
            present,
            dirty,
            0,
            present | dirty,
        ];
        let collected = |only_dirty| {
            let mut found = Vec::new();
            collect(0x10000, &entries[..4], only_dirty, &mut found);
            collect(0x14000, &entries[4..], only_dirty, &mut found);
            found
                .iter()
                .map(|range| (range.start, range.pages))
                .collect::<Vec<_>>()
        };
        assert_eq!(collected(true), [(0x10000, 2), (0x15000, 1)]);
        assert_eq!(collected(false), [(0x10000, 3), (0x15000, 1)]);
    }

    #[test]
    fn entries_and_the_request_agree_on_what_is_populated() {
        let region = haulier_sys::userfaultfd::Region::map(64 * PAGE as usize).unwrap();
        for page in [0, 1, 7, 63] {
            region.write(page * PAGE as usize, 1);
        }
        let mapped = [PageRange {
            start: region.address(),
            pages: 64,
        }]
        .into_iter()
        .collect();
        let mut pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let entries = by_entry(&pagemap, &mapped, false).unwrap();
        assert_eq!(entries, by_request(&mut pagemap, &mapped, false).unwrap());
        assert_eq!(entries.pages(), 4);
    }
}
