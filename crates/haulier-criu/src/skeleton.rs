//! What haulier needs to know of a skeleton: the tasks, and which of their pages are missing.

use std::fs;
use std::path::Path;

use crate::image::{Image, ImageError, ImageKind, MmEntry, PagemapEntry, PagemapHead, PstreeEntry};

/// Bytes of a page, the unit of CRIU's pagemaps on the architectures it supports here.
pub const PAGE: u64 = 4096;

/// The images of a dump without the contents of lazy pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skeleton {
    /// The tasks, parents first. Zombies are among them, without memory.
    pub tasks: Vec<Task>,
}

/// A task of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its process number.
    pub pid: u32,
    /// Numbers of its threads, itself included.
    pub threads: Vec<u32>,
    /// Runs of pages that exist and whose contents are not in the images, by address.
    pub lazy: Vec<LazyRange>,
    /// Its mappings, by address: first address and the one after the last.
    pub mappings: Vec<(u64, u64)>,
}

/// A run of pages whose contents are not in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LazyRange {
    /// Address of the first page.
    pub start: u64,
    /// Number of pages, at least one.
    pub pages: u64,
}

impl Skeleton {
    /// Reads the skeleton in an image directory. The pagemaps are checked: runs are aligned,
    /// ascending and disjoint.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn read(directory: &Path) -> Result<Skeleton, ImageError> {
        let mut image = Image::open(&directory.join("pstree.img"), ImageKind::Pstree)?;
        let mut tasks = Vec::new();
        while let Some(entry) = image.next::<PstreeEntry>()? {
            tasks.push(read_task(directory, entry)?);
        }
        Ok(Skeleton { tasks })
    }

    /// Number of pages that are not in the images.
    pub fn lazy_pages(&self) -> u64 {
        self.tasks
            .iter()
            .flat_map(|task| &task.lazy)
            .map(|range| range.pages)
            .sum()
    }
}

fn read_task(directory: &Path, entry: PstreeEntry) -> Result<Task, ImageError> {
    let PstreeEntry { pid, threads, .. } = entry;
    let mut task = Task {
        pid,
        threads,
        lazy: Vec::new(),
        mappings: Vec::new(),
    };
    let mm = directory.join(format!("mm-{pid}.img"));
    if !fs::exists(&mm).map_err(|source| ImageError::Read {
        path: mm.clone(),
        source,
    })? {
        return Ok(task);
    }
    let mm: MmEntry = Image::open(&mm, ImageKind::Mm)?.expect()?;
    task.mappings = mm
        .mappings
        .iter()
        .map(|mapping| (mapping.start, mapping.end))
        .collect();
    let mut pagemap = Image::open(
        &directory.join(format!("pagemap-{pid}.img")),
        ImageKind::Pagemap,
    )?;
    pagemap.expect::<PagemapHead>()?;
    let mut from = 0;
    while let Some(entry) = pagemap.next::<PagemapEntry>()? {
        let end = end_of(&entry)
            .filter(|_| entry.address >= from)
            .ok_or_else(|| {
                pagemap.invalid(format!("run at {:#x} is out of place", entry.address))
            })?;
        from = end;
        if entry.is_lazy() {
            task.lazy.push(LazyRange {
                start: entry.address,
                pages: entry.page_count(),
            });
        }
    }
    Ok(task)
}

/// The address after a run; `None` if the run is empty, not aligned, or beyond the address space.
fn end_of(entry: &PagemapEntry) -> Option<u64> {
    let bytes = entry.page_count().checked_mul(PAGE)?;
    (bytes > 0 && entry.address % PAGE == 0).then_some(())?;
    entry.address.checked_add(bytes)
}
