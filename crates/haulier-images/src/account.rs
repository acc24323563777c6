//! Memory that images and pages sent ahead take at the destination, and its limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::ImagesError;

/// Bytes in use, the most there ever were, and their limit. Shared by reference between threads.
#[derive(Debug)]
pub struct Account {
    limit: u64,
    used: Arc<AtomicU64>,
    peak: AtomicU64,
}

impl Account {
    /// An account of which at most `limit` bytes may be in use.
    pub fn new(limit: u64) -> Account {
        Account {
            limit,
            used: Arc::default(),
            peak: AtomicU64::new(0),
        }
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The bytes in use, for whoever gives back what was charged without knowing the account.
    pub fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.used)
    }

    /// The most bytes that were in use at once.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Counts `bytes` as in use.
    ///
    /// # Errors
    /// [`ImagesError::TooLarge`] if the limit would be passed; nothing is counted then.
    pub fn charge(&self, bytes: u64) -> Result<(), ImagesError> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        let before = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map_err(|_| ImagesError::TooLarge { limit: self.limit })?;
        self.peak.fetch_max(before + bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Gives back what was charged before.
    pub fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_what_is_given_back_can_be_had_again() {
        let account = Account::new(10);
        account.charge(7).unwrap();
        assert!(account.charge(4).is_err());
        assert!(account.charge(u64::MAX).is_err());
        assert_eq!(account.used(), 7);
        account.release(7);
        account.charge(10).unwrap();
        assert_eq!((account.used(), account.peak()), (10, 10));
    }
}
