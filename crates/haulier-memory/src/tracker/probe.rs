//! What the kernel offers, tried on ourselves.

use std::io;

use haulier_sys::pagemap::category::{PRESENT, WRITTEN};
use haulier_sys::pagemap::{Pagemap, Query};
use haulier_sys::userfaultfd::{Region, Userfaultfd, features};

use super::{NoTracker, TrackerChoice, TrackerKind, soft_dirty};
use crate::page::PAGE_BYTES;

/// The tracker to be used; none only if none was asked for. Whether a given task can be tracked is
/// another question, which [`super::TaskScan::untracked`] answers.
///
/// # Errors
/// [`NoTracker`].
pub fn choose(choice: TrackerChoice) -> Result<Option<TrackerKind>, NoTracker> {
    let one = |kind| match probe(kind) {
        Ok(()) => Ok(Some(kind)),
        Err(reason) => Err(NoTracker::One { kind, reason }),
    };
    match choice {
        TrackerChoice::None => Ok(None),
        TrackerChoice::WriteProtect => one(TrackerKind::WriteProtect),
        TrackerChoice::SoftDirty => one(TrackerKind::SoftDirty),
        TrackerChoice::Auto => {
            let Err(write_protect) = probe(TrackerKind::WriteProtect) else {
                return Ok(Some(TrackerKind::WriteProtect));
            };
            let Err(soft_dirty) = probe(TrackerKind::SoftDirty) else {
                return Ok(Some(TrackerKind::SoftDirty));
            };
            Err(NoTracker::Any {
                write_protect,
                soft_dirty,
            })
        }
    }
}

fn probe(kind: TrackerKind) -> Result<(), String> {
    match kind {
        TrackerKind::WriteProtect => write_protect(),
        TrackerKind::SoftDirty => soft_dirty(),
    }
}

fn write_protect() -> Result<(), String> {
    let memory = memory()?;
    let uffd = Userfaultfd::create(features::WP_ASYNC).map_err(|error| {
        format!("userfaultfd has no asynchronous write protection ({error}); Linux 6.7 has it")
    })?;
    uffd.register_write_protect(memory.address(), memory.len() as u64)
        .map_err(|error| format!("memory cannot be registered for write protection ({error})"))?;
    memory.write(0, 1);
    let first = is_written(&memory)?;
    let second = is_written(&memory)?;
    memory.write(0, 2);
    let third = is_written(&memory)?;
    if (first, second, third) == (true, false, true) {
        Ok(())
    } else {
        Err("PAGEMAP_SCAN does not tell what was written".to_owned())
    }
}

fn is_written(memory: &Region) -> Result<bool, String> {
    let query = Query {
        all: WRITTEN,
        any: PRESENT,
        none: 0,
        protect: true,
        registered: true,
    };
    let addresses = memory.address()..memory.address() + memory.len() as u64;
    let mut written = false;
    Pagemap::open(std::process::id() as i32)
        .and_then(|mut pagemap| pagemap.scan(addresses, query, |_| written = true))
        .map_err(|error| format!("PAGEMAP_SCAN fails ({error}); Linux 6.7 has it"))?;
    Ok(written)
}

fn soft_dirty() -> Result<(), String> {
    let memory = memory()?;
    match soft_dirty::probe(memory.address(), || memory.write(0, 1)) {
        Ok(true) => Ok(()),
        Ok(false) => Err("the kernel is built without CONFIG_MEM_SOFT_DIRTY".to_owned()),
        Err(error) => Err(format!(
            "the soft-dirty bits cannot be read and cleared ({error})"
        )),
    }
}

fn memory() -> Result<Region, String> {
    Region::map(PAGE_BYTES).map_err(|error: io::Error| format!("no memory to try it on ({error})"))
}
