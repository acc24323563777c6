//! What haulier needs to know of a skeleton: the tasks, and which of their pages are missing.

use std::fs;
use std::io;
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
        let open = |name: &str, kind| {
            let path = directory.join(name);
            match fs::exists(&path) {
                Ok(false) => Ok(None),
                Ok(true) => Image::open(&path, kind).map(Some),
                Err(source) => Err(ImageError::Read { path, source }),
            }
        };
        Skeleton::build(&open)
    }

    /// Reads the skeleton from images that are elsewhere: `contents` has those of an image by its
    /// name, or nothing if there is no such image. Checked as by [`Skeleton::read`].
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn from_images(
        contents: impl Fn(&str) -> io::Result<Option<Vec<u8>>>,
    ) -> Result<Skeleton, ImageError> {
        let open = |name: &str, kind| match contents(name) {
            Ok(None) => Ok(None),
            Ok(Some(bytes)) => Image::of(Path::new(name), bytes, kind).map(Some),
            Err(source) => Err(ImageError::Read {
                path: name.into(),
                source,
            }),
        };
        Skeleton::build(&open)
    }

    fn build(open: Open<'_>) -> Result<Skeleton, ImageError> {
        let mut image = there(open, "pstree.img", ImageKind::Pstree)?;
        let mut tasks = Vec::new();
        while let Some(entry) = image.next::<PstreeEntry>()? {
            tasks.push(read_task(open, entry)?);
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

/// The pages that the images of a dump leave with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeftBehind {
    /// Runs of pages, by address.
    pub ranges: Vec<LazyRange>,
    /// Whether the CRIU that wrote this counts pages in 64 bits, as from 4.2 on: then its page
    /// server does too.
    pub wide: bool,
}

impl LeftBehind {
    /// What the pagemap of a task (`pagemap-PID.img`) says of it.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn of(name: &str, pagemap: Vec<u8>) -> Result<LeftBehind, ImageError> {
        let mut pagemap = Image::of(Path::new(name), pagemap, ImageKind::Pagemap)?;
        let mut left = LeftBehind::default();
        each_run(&mut pagemap, |entry| {
            left.wide |= entry.pages.is_some();
            if entry.is_left_behind() {
                left.ranges.push(LazyRange {
                    start: entry.address,
                    pages: entry.page_count(),
                });
            }
        })?;
        Ok(left)
    }
}

type Open<'a> = &'a dyn Fn(&str, ImageKind) -> Result<Option<Image>, ImageError>;

fn there(open: Open<'_>, name: &str, kind: ImageKind) -> Result<Image, ImageError> {
    open(name, kind)?.ok_or_else(|| ImageError::Read {
        path: name.into(),
        source: io::ErrorKind::NotFound.into(),
    })
}

fn read_task(open: Open<'_>, entry: PstreeEntry) -> Result<Task, ImageError> {
    let PstreeEntry { pid, threads, .. } = entry;
    let mut task = Task {
        pid,
        threads,
        lazy: Vec::new(),
        mappings: Vec::new(),
    };
    let Some(mut mm) = open(&format!("mm-{pid}.img"), ImageKind::Mm)? else {
        return Ok(task);
    };
    let mm: MmEntry = mm.expect()?;
    task.mappings = mm
        .mappings
        .iter()
        .map(|mapping| (mapping.start, mapping.end))
        .collect();
    let mut pagemap = there(open, &format!("pagemap-{pid}.img"), ImageKind::Pagemap)?;
    each_run(&mut pagemap, |entry| {
        if entry.is_lazy() {
            task.lazy.push(LazyRange {
                start: entry.address,
                pages: entry.page_count(),
            });
        }
    })?;
    Ok(task)
}

/// Reads a pagemap, whose runs have to be aligned, ascending and disjoint.
pub(crate) fn each_run(
    pagemap: &mut Image,
    mut each: impl FnMut(&PagemapEntry),
) -> Result<(), ImageError> {
    pagemap.expect::<PagemapHead>()?;
    let mut from = 0;
    while let Some(entry) = pagemap.next::<PagemapEntry>()? {
        let end = end_of(&entry)
            .filter(|_| entry.address >= from)
            .ok_or_else(|| {
                pagemap.invalid(format!("run at {:#x} is out of place", entry.address))
            })?;
        from = end;
        each(&entry);
    }
    Ok(())
}

/// The address after a run; `None` if the run is empty, not aligned, or beyond the address space.
fn end_of(entry: &PagemapEntry) -> Option<u64> {
    let bytes = entry.page_count().checked_mul(PAGE)?;
    (bytes > 0 && entry.address % PAGE == 0).then_some(())?;
    entry.address.checked_add(bytes)
}
