//! The cache's store: snapshots by target, the images of each, and who waits for them.
//!
//! A snapshot is one dump of a target. It arrives, is held once every byte is there and checked, and
//! is released once its sender has said that the dump succeeded; or it fails. Only a released one
//! gives out its inventory, the first image that a restore asks for and the last that a dump
//! writes: so no restore begins of what is not complete, or of what still runs at its source.

mod image;
mod pool;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use haulier_images::name::ImageName;
use haulier_sys::pages::PagesMut;
use thiserror::Error;

use crate::lazy::Lazy;
pub(crate) use image::{End, Image, Next, Piece};
pub(crate) use pool::{Blob, Pool};

/// The image that a restore asks for first.
pub(crate) const INVENTORY: &str = "inventory.img";

/// Most images of a snapshot: CRIU writes some six per task and one per namespace.
const MOST_IMAGES: usize = 1 << 20;
/// What a snapshot and an image count for beside their contents.
const ENTRY_COST: u64 = 512;
/// How often those who wait look whether they still should.
const LOOK: Duration = Duration::from_millis(100);

/// Something cannot be kept.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is no room.
    #[error("the images are larger than the {memory} bytes of memory{} that the cache may use", spill_of(*spill))]
    Full {
        /// The allowance for memory.
        memory: u64,
        /// The one for the spill directory, zero without one.
        spill: u64,
    },
    /// The spill directory cannot be used.
    #[error("cannot {doing} {directory}")]
    Spill {
        /// What was being done.
        doing: &'static str,
        /// The directory.
        directory: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The cache has no such target.
    #[error("the cache has no directory for target {0}")]
    Target(ImageName),
    /// The snapshot is not there, or not in a state for what was asked.
    #[error("snapshot {number} of {target} {what}")]
    Snapshot {
        /// Its target.
        target: ImageName,
        /// Its number.
        number: u64,
        /// What is the matter with it.
        what: String,
    },
    /// An image came twice, or one too many.
    #[error("image {0} came twice, or is one too many")]
    Image(ImageName),
}

fn spill_of(room: u64) -> String {
    if room > 0 {
        format!(" and {room} bytes of disk")
    } else {
        String::new()
    }
}

/// Names a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// Whose it is.
    pub(crate) target: ImageName,
    /// Counted up from 1.
    pub(crate) number: u64,
}

/// How a snapshot stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Images may still come.
    Arriving,
    /// Everything is there; whether the dump succeeded is not known.
    Held,
    /// It may be restored.
    Released,
    /// It never will be complete, or its dump failed. Why.
    Failed(String),
}

/// What a reader of a snapshot hears of an image.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Here it is, or comes.
    Image(Arc<Image>),
    /// The dump has no such image.
    Absent,
    /// The snapshot failed. Why.
    Failed(String),
    /// Whoever asked no longer wants to know.
    Gone,
}

/// What is known of a snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Info {
    pub(crate) key: Key,
    pub(crate) state: State,
    pub(crate) images: usize,
    pub(crate) bytes: u64,
}

/// The store. Shared by reference between threads.
#[derive(Debug)]
pub(crate) struct Store {
    pool: Arc<Pool>,
    keep: usize,
    targets: Mutex<BTreeMap<ImageName, Target>>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Target {
    last: u64,
    snapshots: BTreeMap<u64, Snapshot>,
}

#[derive(Debug)]
struct Snapshot {
    state: State,
    images: BTreeMap<ImageName, Arc<Image>>,
    readers: usize,
    /// What is not in its images.
    lazy: Option<Arc<Lazy>>,
}

/// A snapshot that is being read, and stays for that long.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    store: &'a Store,
    key: Key,
}

impl Store {
    /// A store for these targets, which keeps the newest `keep` snapshots of each.
    pub(crate) fn new(
        pool: Pool,
        targets: impl IntoIterator<Item = ImageName>,
        keep: usize,
    ) -> Store {
        let targets = targets.into_iter().map(|name| (name, Target::default()));
        Store {
            pool: Arc::new(pool),
            keep: keep.max(1),
            targets: Mutex::new(targets.collect()),
            changed: Condvar::new(),
        }
    }

    /// What contents are kept in.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Keeps contents; drops old snapshots if there is no room otherwise.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<Arc<Blob>, StoreError> {
        self.with_room(|| self.pool.put(bytes).map(Arc::new))
    }

    /// Room for pages of contents, as [`Pool::pages`] has it; drops old snapshots if there is none
    /// otherwise.
    pub(crate) fn pages(&self, count: usize) -> Result<Option<Vec<PagesMut>>, StoreError> {
        self.with_room(|| self.pool.pages(count))
    }

    /// Adds pieces to an image; drops old snapshots if there is no room otherwise.
    pub(crate) fn push(&self, image: &Image, pieces: Vec<Piece>) -> Result<(), StoreError> {
        self.with_room(|| image.charge(pieces.len()))?;
        image.add(pieces);
        Ok(())
    }

    /// A new snapshot of a target, which arrives.
    pub(crate) fn begin(&self, target: &ImageName) -> Result<Key, StoreError> {
        self.with_room(|| self.pool.charge(ENTRY_COST))?;
        let mut targets = self.targets();
        let Some(of_target) = targets.get_mut(target) else {
            self.pool.release(ENTRY_COST);
            return Err(StoreError::Target(target.clone()));
        };
        of_target.last += 1;
        let number = of_target.last;
        // What failed before is of no more interest, and would add up.
        let mut failed = 0;
        of_target.snapshots.retain(|_, s| {
            let keep = s.readers > 0 || !matches!(s.state, State::Failed(_));
            failed += u64::from(!keep);
            keep
        });
        self.pool.release(failed * ENTRY_COST);
        let snapshot = Snapshot {
            state: State::Arriving,
            images: BTreeMap::new(),
            readers: 0,
            lazy: None,
        };
        of_target.snapshots.insert(number, snapshot);
        drop(targets);
        self.changed.notify_all();
        Ok(Key {
            target: target.clone(),
            number,
        })
    }

    /// A new image of a snapshot that arrives.
    pub(crate) fn add(&self, key: &Key, name: &ImageName) -> Result<Arc<Image>, StoreError> {
        self.with_room(|| self.pool.charge(ENTRY_COST))?;
        let mut targets = self.targets();
        let added = find(&mut targets, key).and_then(|snapshot| {
            let known = snapshot.images.contains_key(name);
            if known || snapshot.images.len() >= MOST_IMAGES {
                return Err(StoreError::Image(name.clone()));
            }
            let image = Arc::new(Image::new(&self.pool));
            snapshot.images.insert(name.clone(), Arc::clone(&image));
            Ok(image)
        });
        drop(targets);
        match &added {
            Ok(_) => self.changed.notify_all(),
            Err(_) => self.pool.release(ENTRY_COST),
        }
        added
    }

    /// A snapshot goes on to its next state: arriving, held, released; or it fails, and gives its
    /// contents back.
    pub(crate) fn settle(&self, key: &Key, state: State) -> Result<(), StoreError> {
        let mut targets = self.targets();
        let snapshot = find(&mut targets, key)?;
        let wrong = match (&snapshot.state, &state) {
            (State::Arriving, State::Held | State::Failed(_))
            | (State::Held, State::Released | State::Failed(_)) => None,
            // Its memory can be lost as long as it is not all here.
            (State::Released, State::Failed(_)) if snapshot.lazy.is_some() => None,
            (State::Failed(why), _) => Some(format!("has failed: {why}")),
            (State::Released, _) => Some("was released".to_owned()),
            _ => Some("is not complete".to_owned()),
        };
        if let Some(what) = wrong {
            return Err(missing(key, &what));
        }
        let failed = matches!(state, State::Failed(_));
        snapshot.state = state;
        let mut old = Vec::new();
        if failed {
            // Whoever follows one of its images is told by the image.
            for image in snapshot.images.values() {
                image.finish(End::Failed);
            }
            self.pool.release(snapshot.images.len() as u64 * ENTRY_COST);
            old.extend(std::mem::take(&mut snapshot.images).into_values());
        } else {
            while let Some(key) = superseded(&targets, &key.target, self.keep) {
                old.extend(self.remove(&mut targets, &key));
            }
        }
        drop(targets);
        self.changed.notify_all();
        // Giving back much memory takes its time.
        drop(old);
        Ok(())
    }

    /// Pages of a snapshot stay with its dump.
    pub(crate) fn leave(&self, key: &Key, lazy: Arc<Lazy>) -> Result<(), StoreError> {
        find(&mut self.targets(), key)?.lazy = Some(lazy);
        Ok(())
    }

    /// What is not in the images of a snapshot.
    pub(crate) fn left(&self, key: &Key) -> Option<Arc<Lazy>> {
        find(&mut self.targets(), key).ok()?.lazy.clone()
    }

    /// How a snapshot stands.
    pub(crate) fn state(&self, key: &Key) -> Option<State> {
        let mut targets = self.targets();
        find(&mut targets, key).ok().map(|s| s.state.clone())
    }

    /// The number that the next snapshot of a target will have.
    pub(crate) fn next_number(&self, target: &ImageName) -> u64 {
        self.targets().get(target).map_or(1, |t| t.last + 1)
    }

    /// Forgets a snapshot that nobody reads.
    pub(crate) fn forget(&self, key: &Key) -> Result<(), StoreError> {
        let mut targets = self.targets();
        let snapshot = find(&mut targets, key)?;
        if snapshot.readers > 0 {
            return Err(missing(key, "is being read"));
        }
        if snapshot.state == State::Arriving {
            return Err(missing(key, "is still arriving"));
        }
        let old = self.remove(&mut targets, key);
        drop(targets);
        drop(old);
        Ok(())
    }

    /// Every snapshot.
    pub(crate) fn list(&self) -> Vec<Info> {
        let targets = self.targets();
        let all = targets.iter().flat_map(|(target, of_target)| {
            of_target.snapshots.iter().map(|(number, snapshot)| Info {
                key: Key {
                    target: target.clone(),
                    number: *number,
                },
                state: snapshot.state.clone(),
                images: snapshot.images.len(),
                bytes: snapshot.images.values().map(|image| image.length()).sum(),
            })
        });
        all.collect()
    }

    /// The names and images of a snapshot.
    pub(crate) fn images(&self, key: &Key) -> Vec<(ImageName, Arc<Image>)> {
        let mut targets = self.targets();
        find(&mut targets, key).map_or_else(
            |_| Vec::new(),
            |snapshot| {
                let images = snapshot.images.iter();
                images.map(|(n, i)| (n.clone(), Arc::clone(i))).collect()
            },
        )
    }

    /// The snapshot that a new reader of a target gets: the one of that number, or the newest. Waits
    /// for it while `wanted`; `None` if it no longer is, or if the snapshot was forgotten.
    ///
    /// A newest one that failed is waited past: an older one is what the target no longer is, and
    /// has to be asked for by number.
    pub(crate) fn pick(
        &self,
        target: &ImageName,
        number: Option<u64>,
        wanted: impl Fn() -> bool,
    ) -> Option<Reading<'_>> {
        let mut targets = self.targets();
        loop {
            if let Some(of_target) = targets.get_mut(target) {
                let found = match number {
                    Some(number) if number <= of_target.last => {
                        Some(of_target.snapshots.get_key_value(&number)?)
                    }
                    Some(_) => None,
                    None => of_target.snapshots.last_key_value(),
                };
                let by_number = number.is_some();
                let usable =
                    found.filter(|(_, s)| by_number || !matches!(s.state, State::Failed(_)));
                if let Some(number) = usable.map(|(number, _)| *number) {
                    let key = Key {
                        target: target.clone(),
                        number,
                    };
                    find(&mut targets, &key).ok()?.readers += 1;
                    return Some(Reading { store: self, key });
                }
            }
            if !wanted() {
                return None;
            }
            targets = self.look_again(targets);
        }
    }

    /// Drops old snapshots until `attempt` has room or none is left.
    fn with_room<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            match attempt() {
                Err(full @ StoreError::Full { .. }) => {
                    let mut targets = self.targets();
                    let names: Vec<ImageName> = targets.keys().cloned().collect();
                    let oldest = names
                        .iter()
                        .find_map(|target| superseded(&targets, target, 1));
                    let Some(key) = oldest else {
                        return Err(full);
                    };
                    tracing::info!(
                        "snapshot {} of {} gives way to a newer one",
                        key.number,
                        key.target
                    );
                    let old = self.remove(&mut targets, &key);
                    drop(targets);
                    drop(old);
                }
                other => return other,
            }
        }
    }

    fn remove(&self, targets: &mut BTreeMap<ImageName, Target>, key: &Key) -> Vec<Arc<Image>> {
        let of_target = targets.get_mut(&key.target);
        let Some(gone) = of_target.and_then(|t| t.snapshots.remove(&key.number)) else {
            return Vec::new();
        };
        self.pool
            .release((gone.images.len() as u64 + 1) * ENTRY_COST);
        gone.images.into_values().collect()
    }

    fn look_again<'a>(
        &self,
        targets: MutexGuard<'a, BTreeMap<ImageName, Target>>,
    ) -> MutexGuard<'a, BTreeMap<ImageName, Target>> {
        self.changed
            .wait_timeout(targets, LOOK)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn targets(&self) -> MutexGuard<'_, BTreeMap<ImageName, Target>> {
        // Whoever panicked left it as it was before or after a step.
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reading<'_> {
    /// Which snapshot it is.
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// An image of it: at once if it has arrived or arrives, otherwise when it does, or when it is
    /// known that it will not, while `wanted`. The inventory comes last of all, with the release.
    pub(crate) fn request(&self, name: &ImageName, wanted: impl Fn() -> bool) -> Answer {
        let mut targets = self.store.targets();
        loop {
            let Ok(snapshot) = find(&mut targets, &self.key) else {
                return Answer::Failed("it was forgotten".to_owned());
            };
            let released = snapshot.state == State::Released;
            if let State::Failed(why) = &snapshot.state {
                return Answer::Failed(why.clone());
            }
            match snapshot.images.get(name) {
                Some(image) if released || name.as_str() != INVENTORY => {
                    return Answer::Image(Arc::clone(image));
                }
                None if released || snapshot.state == State::Held => return Answer::Absent,
                _ => {}
            }
            if !wanted() {
                return Answer::Gone;
            }
            targets = self.store.look_again(targets);
        }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Ok(snapshot) = find(&mut self.store.targets(), &self.key) {
            snapshot.readers -= 1;
        }
    }
}

fn find<'a>(
    targets: &'a mut BTreeMap<ImageName, Target>,
    key: &Key,
) -> Result<&'a mut Snapshot, StoreError> {
    targets
        .get_mut(&key.target)
        .and_then(|target| target.snapshots.get_mut(&key.number))
        .ok_or_else(|| missing(key, "is not there"))
}

fn missing(key: &Key, what: &str) -> StoreError {
    StoreError::Snapshot {
        target: key.target.clone(),
        number: key.number,
        what: what.to_owned(),
    }
}

/// The oldest snapshot of a target that is not among its newest `keep` released ones and that nobody
/// needs.
fn superseded(
    targets: &BTreeMap<ImageName, Target>,
    target: &ImageName,
    keep: usize,
) -> Option<Key> {
    let of_target = targets.get(target)?;
    let released = |snapshot: &&Snapshot| snapshot.state == State::Released;
    let newest_kept = of_target
        .snapshots
        .iter()
        .rev()
        .filter(|(_, snapshot)| released(snapshot))
        .nth(keep - 1)
        .map(|(number, _)| *number)?;
    let number = of_target
        .snapshots
        .range(..newest_kept)
        .find(|(_, snapshot)| {
            // One that is held behind a newer one that was released is nobody's any more.
            snapshot.state != State::Arriving && snapshot.readers == 0
        })
        .map(|(number, _)| *number)?;
    Some(Key {
        target: target.clone(),
        number,
    })
}

#[cfg(test)]
mod tests;
