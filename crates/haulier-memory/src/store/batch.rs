//! Buffers of page contents, counted against the store's limit.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use haulier_sys::pages::{PagePool, Pages, PagesMut};

use super::StoreError;
use crate::page::PAGE_BYTES;

/// Bytes in use and their limit, shared by a store and all its buffers, and the pages that are
/// counted there.
#[derive(Debug)]
pub(super) struct Account {
    used: Arc<AtomicU64>,
    limit: u64,
    pool: PagePool,
}

impl Account {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        let used = Arc::new(AtomicU64::new(0));
        Arc::new(Self {
            used: used.clone(),
            limit,
            pool: PagePool::new(used),
        })
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let sum = self.used().checked_add(bytes);
        sum.is_some_and(|sum| sum <= self.limit)
    }

    pub(super) fn charge(&self, bytes: u64) -> Result<(), StoreError> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        match self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
        {
            Ok(_) => Ok(()),
            Err(used) => Err(StoreError::Full {
                limit: self.limit,
                used,
                wanted: bytes,
            }),
        }
    }

    /// Replaces one amount by another without a look at the limit.
    pub(super) fn adjust(&self, from: u64, to: u64) {
        self.used.fetch_add(to, Ordering::Relaxed);
        self.used.fetch_sub(from, Ordering::Relaxed);
    }

    /// Pages to be filled, so many, counted from now on until each of them is free again.
    pub(super) fn pages(&self, count: usize) -> Result<PageBuffer, StoreError> {
        self.charge((count * PAGE_BYTES) as u64)?;
        Ok(PageBuffer {
            runs: self.pool.take(count).map_err(no_memory)?,
        })
    }
}

fn no_memory(source: io::Error) -> StoreError {
    StoreError::Memory {
        number: source.raw_os_error().unwrap_or_default(),
    }
}

/// Pages of a store to receive contents into: a few runs, counted as one buffer.
#[derive(Debug)]
pub struct PageBuffer {
    runs: Vec<PagesMut>,
}

impl PageBuffer {
    /// The buffer, in the parts it consists of; each has whole pages.
    pub fn parts(&mut self) -> Vec<&mut [u8]> {
        self.runs.iter_mut().map(|run| &mut run[..]).collect()
    }

    /// The same, to be read.
    pub fn contents(&self) -> impl Iterator<Item = &[u8]> {
        self.runs.iter().map(|run| &run[..])
    }

    /// Copies contents of the same length in.
    pub(crate) fn fill(&mut self, mut contents: &[u8]) {
        for run in &mut self.runs {
            let (part, rest) = contents.split_at(run.len().min(contents.len()));
            run[..part.len()].copy_from_slice(part);
            contents = rest;
        }
    }

    /// The pages, to be taken in the order in which they were filled.
    pub(crate) fn freeze(self) -> FilledPages {
        FilledPages {
            // Taken from the end.
            runs: self.runs.into_iter().rev().map(PagesMut::freeze).collect(),
        }
    }
}

/// Pages that were received, on their way into the extents.
#[derive(Debug)]
pub(crate) struct FilledPages {
    runs: Vec<Pages>,
}

impl FilledPages {
    /// The next pages, at most so many; none at the end.
    pub(crate) fn take(&mut self, most: u64) -> Option<Pages> {
        let mut run = self.runs.pop()?;
        if (run.count() as u64) > most {
            self.runs.push(run.split_off(most as usize));
        }
        Some(run)
    }
}

/// A buffer in one piece to put page contents into; handed to [`super::PageStore::insert`] once
/// filled. Its bytes become pages there.
pub struct BatchBuffer {
    bytes: Box<[u8]>,
    account: Arc<Account>,
}

impl BatchBuffer {
    pub(super) fn new(account: &Arc<Account>, len: usize) -> Result<Self, StoreError> {
        account.charge(len as u64)?;
        Ok(Self {
            bytes: vec![0; len].into(),
            account: account.clone(),
        })
    }

    /// Its contents in pages. They are counted in its stead: the limit is not passed on the way.
    pub(super) fn into_pages(mut self) -> Result<FilledPages, StoreError> {
        let bytes = std::mem::take(&mut self.bytes);
        let runs = self.account.pool.take(bytes.len() / PAGE_BYTES);
        let mut buffer = PageBuffer {
            runs: runs.map_err(no_memory)?,
        };
        buffer.fill(&bytes);
        Ok(buffer.freeze())
    }
}

impl Drop for BatchBuffer {
    fn drop(&mut self) {
        self.account.adjust(self.bytes.len() as u64, 0);
    }
}

impl Deref for BatchBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for BatchBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl fmt::Debug for BatchBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BatchBuffer({} bytes)", self.bytes.len())
    }
}

/// Contents of successive pages, which stay in memory, and are counted, as long as any such slice
/// of them lives.
#[derive(Debug, Clone)]
pub struct PageData(pub(crate) Pages);

impl Deref for PageData {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
