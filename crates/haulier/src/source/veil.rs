//! Private memory is hidden from CRIU's dump, and listed by us meanwhile.

use std::io;
use std::path::Path;

use haulier_criu::dump::Frozen;
use haulier_criu::image::ImageError;
use haulier_criu::pagemap;
use haulier_criu::skeleton::LazyRange;
use haulier_memory::page::PAGE;
use haulier_memory::ranges::RangeSet;
use haulier_memory::{mappings, present};
use haulier_targets::process::ProcessTree;

/// A question of CRIU's costs what it costs CRIU to find so many pages, some 20 us.
const PAGES_PER_QUESTION: u64 = 100;

/// `never` shows CRIU everything, `always` hides memory that is not worth it, too.
const VARIABLE: &str = "HAULIER_VEIL";

/// Whether hiding its memory makes the dump of a tree shorter: CRIU asks for each mapping, at most.
/// Never if this kernel does not tell us what we are to list instead.
pub(super) fn is_worth_it(tree: &ProcessTree, memory_bytes: u64) -> bool {
    if !present::is_supported() {
        return false;
    }
    match std::env::var(VARIABLE).as_deref() {
        Ok("never") => return false,
        Ok("always") => return true,
        _ => {}
    }
    let mappings = |pid: i32| mappings::read(pid).map_or(0, |mappings| mappings.len() as u64);
    let questions: u64 = tree.pids().into_iter().map(mappings).sum();
    memory_bytes / PAGE > questions * PAGES_PER_QUESTION
}

/// What is hidden: by task, its lazy mappings.
#[derive(Debug, Default)]
pub(super) struct Veiled(Vec<(i32, RangeSet)>);

impl Veiled {
    /// Hides all private memory of the tasks, which stand still, if that is possible with this CRIU.
    pub(super) fn draw(frozen: &Frozen, root: i32) -> io::Result<Veiled> {
        if !frozen.can_hide() {
            return Ok(Veiled::default());
        }
        let tree = ProcessTree::read(root).map_err(io::Error::other)?;
        let mut tasks = Vec::new();
        for pid in tree.pids() {
            let lazy = mappings::lazy(&mappings::read(pid)?);
            let ranges = lazy.iter().map(|range| (range.start, range.end()));
            frozen.hide(pid, ranges.collect());
            tasks.push((pid, lazy));
        }
        Ok(Veiled(tasks))
    }

    /// The pages that CRIU is not shown.
    pub(super) fn look(&self) -> io::Result<Found> {
        let mut found = Vec::new();
        for (pid, lazy) in self.0.iter().filter(|(_, lazy)| !lazy.is_empty()) {
            let pages = present::pages(*pid, lazy)?;
            let range = pages.iter().map(|range| LazyRange {
                start: range.start,
                pages: range.pages,
            });
            found.push((*pid as u32, range.collect()));
        }
        Ok(Found(found))
    }
}

/// Pages that CRIU was not shown, by task.
#[derive(Debug)]
pub(super) struct Found(Vec<(u32, Vec<LazyRange>)>);

impl Found {
    /// Enters them into CRIU's lists.
    pub(super) fn enter(&self, directory: &Path) -> Result<(), ImageError> {
        let mut tasks = self.0.iter();
        tasks.try_for_each(|(pid, pages)| pagemap::add_lazy(directory, *pid, pages))
    }
}
