//! What the peer has of pages that may be sent again: of those only the blocks that changed are sent.
//!
//! A program that is written to all the time rewrites little of each page that it touches. On a slow
//! line that decides whether the rounds get ahead of it. So, from when a line is known to be slow, a hash
//! of each block of a page that is sent is kept, some 200 bytes a page, and not the page itself: the peer
//! has that, in a version that is told by the round it was sent in.
//!
//! A hash decides here that a block need not be sent. It is keyed with a secret of this migration, so that
//! nobody can make two blocks collide, and the peer checks a second hash, of the whole page: what chance
//! may do once in 2^64 blocks ends the migration before anything has moved.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use haulier_sys::random;
use twox_hash::XxHash3_64;

use crate::page::{PAGE, PAGE_BYTES, PageRange};

/// Bytes of a block: a sixteenth of a page.
pub(super) const BLOCK_BYTES: usize = 256;
/// Blocks of a page.
pub(super) const BLOCKS: usize = PAGE_BYTES / BLOCK_BYTES;
/// A page of which more changed is sent whole: it costs the peer less.
const MOST_BLOCKS: u32 = 12;
/// Pages that are kept account of at most: those of 16 GiB.
const MOST_PAGES: usize = 4 << 20;
/// The threads of a round rarely want the same part at once.
const PARTS: usize = 64;
/// Bytes of the secret.
const SECRET: usize = 192;

/// What changed of a page since it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    /// The round in which it was sent.
    pub(super) base: u32,
    /// Its blocks that are not the same any more, the first one in the lowest bit.
    pub(super) blocks: u16,
    /// The hash of the page as it is now.
    pub(super) hash: u64,
}

/// The versions of pages that the peer has, shared by all channels.
pub(super) struct Versions {
    kept: AtomicBool,
    parts: Vec<Mutex<Part>>,
    /// Pages that may be added still.
    room: AtomicUsize,
    secret: [u8; SECRET],
}

/// By task and number of the page.
type Part = HashMap<(u32, u64), Version>;

#[derive(Debug)]
struct Version {
    round: u32,
    blocks: [u64; BLOCKS],
}

impl Versions {
    pub(super) fn new() -> Versions {
        Versions {
            kept: AtomicBool::new(false),
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
            room: AtomicUsize::new(MOST_PAGES),
            secret: random::bytes(),
        }
    }

    /// From now on they are kept account of.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Whether they are.
    pub(super) fn are_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// A page is sent in a round: as this change, or whole. In a round no page may be sent twice.
    pub(super) fn change(
        &self,
        task: u32,
        address: u64,
        round: u32,
        page: &[u8],
    ) -> Option<Change> {
        let mut now = [0; BLOCKS];
        for (hash, block) in now.iter_mut().zip(page.chunks_exact(BLOCK_BYTES)) {
            *hash = self.hash(block);
        }
        let number = address / PAGE;
        let mut part = self.part(task, number);
        let Some(version) = part.get_mut(&(task, number)) else {
            let take = |room: usize| room.checked_sub(1);
            let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
            if self.room.fetch_update(set, get, take).is_ok() {
                let blocks = now;
                part.insert((task, number), Version { round, blocks });
            }
            return None;
        };
        let base = version.round;
        let differs = |number: &usize| version.blocks[*number] != now[*number];
        let blocks = (0..BLOCKS).filter(differs);
        let blocks = blocks.fold(0_u16, |blocks, number| blocks | 1 << number);
        (version.round, version.blocks) = (round, now);
        drop(part);
        (base < round && blocks.count_ones() <= MOST_BLOCKS).then(|| Change {
            base,
            blocks,
            hash: page_hash(page),
        })
    }

    /// The peer has other pages in a range, or none.
    pub(super) fn forget(&self, task: u32, range: PageRange) {
        let numbers = range.start / PAGE..range.end() / PAGE;
        let forget = |part: &mut Part, number| {
            let gone = part.remove(&(task, number)).is_some();
            self.room.fetch_add(gone.into(), Ordering::Relaxed);
        };
        // Whatever is shorter.
        if range.pages <= (MOST_PAGES / PARTS) as u64 {
            numbers.for_each(|number| forget(&mut self.part(task, number), number));
            return;
        }
        for part in &self.parts {
            let mut part = lock(part);
            let inside = part.keys().filter(|key| key.0 == task);
            let inside: Vec<u64> = inside.map(|key| key.1).collect();
            let inside = inside.into_iter().filter(|number| numbers.contains(number));
            inside.for_each(|number| forget(&mut part, number));
        }
    }

    /// Forgets all of them, and keeps account no more.
    pub(super) fn clear(&self) {
        self.kept.store(false, Ordering::Relaxed);
        for part in &self.parts {
            let gone = std::mem::take(&mut *lock(part)).len();
            self.room.fetch_add(gone, Ordering::Relaxed);
        }
    }

    fn hash(&self, block: &[u8]) -> u64 {
        // It fails for secrets that are too short.
        XxHash3_64::oneshot_with_secret(&self.secret, block).unwrap_or_default()
    }

    /// Neighbours are in the same part.
    fn part(&self, task: u32, number: u64) -> MutexGuard<'_, Part> {
        let which = (number / 64 + u64::from(task)) % PARTS as u64;
        lock(&self.parts[which as usize])
    }
}

impl std::fmt::Debug for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let left = self.room.load(Ordering::Relaxed);
        write!(f, "Versions({} pages)", MOST_PAGES - left)
    }
}

/// The hash by which the peer knows that a page has become what was read.
pub(super) fn page_hash(page: &[u8]) -> u64 {
    XxHash3_64::oneshot(page)
}

/// A panic elsewhere ends the migration.
fn lock(part: &Mutex<Part>) -> MutexGuard<'_, Part> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 5 * PAGE;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange { start, pages }
    }

    #[test]
    fn what_changed_since_the_last_time_is_told() {
        let versions = Versions::new();
        let mut page = vec![7; PAGE_BYTES];
        assert_eq!(versions.change(1, AT, 0, &page), None, "the first time");
        assert_eq!(versions.change(2, AT, 0, &page), None, "of another task");
        page[0] = 1;
        page[PAGE_BYTES - 1] = 1;
        let change = versions.change(1, AT, 3, &page).unwrap();
        assert_eq!((change.base, change.blocks), (0, 0x8001));
        assert_eq!(change.hash, page_hash(&page));
        let change = versions.change(1, AT, 4, &page).unwrap();
        assert_eq!((change.base, change.blocks), (3, 0), "nothing");
        page.fill(2);
        assert_eq!(versions.change(1, AT, 5, &page), None, "all of it");
        page[256] = 3;
        let change = versions.change(1, AT, 6, &page).unwrap();
        assert_eq!((change.base, change.blocks), (5, 2));
        assert_eq!(versions.change(1, AT, 6, &page), None, "in the same round");
    }

    #[test]
    fn what_is_forgotten_is_sent_whole() {
        let versions = Versions::new();
        let page = vec![7; PAGE_BYTES];
        let send = |round| -> Vec<bool> {
            let sent = |number| versions.change(1, number * PAGE, round, &page).is_some();
            (0..200).map(sent).collect()
        };
        send(0);
        assert!(send(1).iter().all(|known| *known));
        versions.forget(1, range(10 * PAGE, 100));
        versions.forget(2, range(0, 1 << 40));
        let known = send(2);
        assert!((0..200).all(|number| known[number] != (10..110).contains(&number)));
        versions.forget(1, range(PAGE, 1 << 40));
        let known = send(3);
        assert_eq!(known.iter().filter(|known| **known).count(), 1);
        versions.clear();
        assert!(!versions.are_kept());
        assert_eq!(versions.room.load(Ordering::Relaxed), MOST_PAGES);
        assert!(send(4).iter().all(|known| !known));
    }

    #[test]
    fn only_so_many_pages_are_kept_account_of() {
        let versions = Versions::new();
        versions.room.store(1, Ordering::Relaxed);
        let page = vec![7; PAGE_BYTES];
        let known = |number, round| versions.change(1, number * PAGE, round, &page).is_some();
        assert!(!known(1, 0) && !known(2, 0));
        assert!(known(1, 1) && !known(2, 1));
    }
}
