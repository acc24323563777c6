//! Buffers of page contents, counted against the store's limit.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::StoreError;

/// Bytes in use and their limit, shared by a store and all its buffers.
#[derive(Debug)]
pub(super) struct Account {
    used: AtomicU64,
    limit: u64,
}

impl Account {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicU64::new(0),
            limit,
        })
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
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
}

/// A buffer to receive page contents into; handed to [`super::PageStore::insert`] once filled.
pub struct BatchBuffer {
    bytes: Box<[u8]>,
    account: Arc<Account>,
}

impl BatchBuffer {
    pub(super) fn new(account: &Arc<Account>, len: usize) -> Result<Self, StoreError> {
        account.charge(len as u64)?;
        // Of this size the allocator maps fresh memory, which the kernel has zeroed already.
        Ok(Self {
            bytes: vec![0; len].into(),
            account: account.clone(),
        })
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

/// Contents of successive pages, inside a shared buffer that lives as long as any such slice of it.
#[derive(Debug, Clone)]
pub struct PageData {
    pub(super) batch: Arc<BatchBuffer>,
    pub(super) offset: usize,
    pub(super) len: usize,
}

impl Deref for PageData {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.batch[self.offset..self.offset + self.len]
    }
}
