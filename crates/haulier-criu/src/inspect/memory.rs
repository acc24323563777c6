//! Where the memory of a task is.

use prost::Message;
use serde::Serialize;

use super::InspectError;
use super::fields::{Cut, Fields, Value};
use super::source::Images;
use crate::image::{Image, ImageError, ImageKind, Mapping, PagemapEntry};
use crate::skeleton::{PAGE, each_run};

/// Number of the field of a mapping in the entry of `mm-PID.img`.
const MAPPING: u64 = 14;
/// Number of the one that says which file is executed.
const EXECUTABLE: u64 = 12;
/// Most mappings of a task: 64 Ki by default, and some systems allow a million.
const MOST_MAPPINGS: usize = 4 << 20;

/// Where the memory of a task is, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TaskMemory {
    /// Address space in use: all mappings.
    pub mapped: u64,
    /// Contents that are in the images.
    pub in_images: u64,
    /// Of the private memory that is no file's, what was never touched, or is all zero: nothing has to be kept of it.
    pub zero: u64,
    /// Mappings that others may have too: shared memory, and files that are written through. Contents
    /// of shared memory are counted for the dump, not here.
    pub shared: u64,
    /// Contents that were left with the dump, which hands them out (`--lazy-pages`).
    pub left_at_source: u64,
    /// Contents that are in the images of an earlier dump, which belong to these.
    pub in_parent: u64,
}

/// The memory of a task, and the file that it executes; `None` if it has no memory.
pub(super) fn of_task(
    pid: u32,
    images: &mut Images<'_>,
    wide: &mut Option<bool>,
) -> Result<Option<(TaskMemory, u32)>, InspectError> {
    let Some(mut image) = images.open(&format!("mm-{pid}.img"), ImageKind::Mm)? else {
        return Ok(None);
    };
    let mm = Mm::read(&mut image)?;
    drop(image);
    let name = format!("pagemap-{pid}.img");
    let mut pagemap = images
        .open(&name, ImageKind::Pagemap)?
        .ok_or_else(|| images.missing(&name))?;
    let mut memory = TaskMemory {
        mapped: mm.mapped,
        shared: mm.shared,
        zero: length(&mm.anonymous),
        ..TaskMemory::default()
    };
    let mut anonymous = mm.anonymous.into_iter().peekable();
    each_run(&mut pagemap, |run| {
        let bytes = count(run, wide);
        if is_in_parent(run) {
            memory.in_parent += bytes;
        } else if run.is_left_behind() {
            memory.left_at_source += bytes;
        } else {
            memory.in_images += bytes;
        }
        // Both ascend.
        let end = run.address + bytes;
        while let Some((from, to)) = anonymous.peek().copied() {
            let both = to.min(end).saturating_sub(from.max(run.address));
            memory.zero = memory.zero.saturating_sub(both);
            if to > end {
                break;
            }
            anonymous.next();
        }
    })?;
    Ok(Some((memory, mm.executable)))
}

/// How much of a piece of shared memory is in the images.
pub(super) fn of_shared(
    name: &str,
    images: &mut Images<'_>,
    wide: &mut Option<bool>,
) -> Result<u64, InspectError> {
    let mut pagemap = images
        .open(name, ImageKind::Pagemap)?
        .ok_or_else(|| images.missing(name))?;
    let mut in_images = 0;
    each_run(&mut pagemap, |run| {
        let bytes = count(run, wide);
        if !is_in_parent(run) && !run.is_left_behind() {
            in_images += bytes;
        }
    })?;
    Ok(in_images)
}

/// Bytes of a run; runs do not overlap, so that all of them are less than an address space.
fn count(run: &PagemapEntry, wide: &mut Option<bool>) -> u64 {
    *wide = Some(wide.unwrap_or(false) || run.pages.is_some());
    run.page_count() * PAGE
}

fn is_in_parent(run: &PagemapEntry) -> bool {
    const PARENT: u32 = 1;
    match run.flags {
        Some(flags) => flags & PARENT != 0,
        None => run.in_parent.unwrap_or(false),
    }
}

/// What of an mm image counts.
struct Mm {
    executable: u32,
    mapped: u64,
    shared: u64,
    /// Private memory that is no file's, by address.
    anonymous: Vec<(u64, u64)>,
}

impl Mm {
    fn read(image: &mut Image) -> Result<Mm, ImageError> {
        let mut mm = Mm {
            executable: 0,
            mapped: 0,
            shared: 0,
            anonymous: Vec::new(),
        };
        let read = match image.next_bytes()? {
            Some(entry) => mm.add(entry),
            None => Err("it is empty"),
        };
        read.map_err(|why| image.invalid(why.to_owned()))?;
        mm.anonymous.sort_unstable();
        let overlaps = mm.anonymous.windows(2).any(|pair| pair[0].1 > pair[1].0);
        if overlaps {
            return Err(image.invalid("mappings overlap".to_owned()));
        }
        Ok(mm)
    }

    fn add(&mut self, entry: &[u8]) -> Result<(), &'static str> {
        let mut mappings = 0;
        for field in Fields(entry) {
            match field.map_err(|Cut| Cut::WHY)? {
                (EXECUTABLE, Value::Number(file)) => self.executable = file as u32,
                (MAPPING, Value::Bytes(mapping)) => {
                    mappings += 1;
                    if mappings > MOST_MAPPINGS {
                        return Err("it has too many mappings");
                    }
                    let mapping = Mapping::decode(mapping).map_err(|_| Cut::WHY)?;
                    self.map(&mapping)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn map(&mut self, mapping: &Mapping) -> Result<(), &'static str> {
        const SHARED: u32 = 1;
        if mapping.is_guard() {
            return Ok(());
        }
        let bytes = mapping.end.checked_sub(mapping.start);
        let bytes = bytes.ok_or("a mapping ends before it begins")?;
        self.mapped = self.mapped.saturating_add(bytes);
        if mapping.flags & SHARED != 0 {
            self.shared = self.shared.saturating_add(bytes);
        } else if mapping.is_private_anonymous() && bytes > 0 {
            self.anonymous.push((mapping.start, mapping.end));
        }
        Ok(())
    }
}

fn length(ranges: &[(u64, u64)]) -> u64 {
    ranges.iter().map(|(from, to)| to - from).sum()
}
