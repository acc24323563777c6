//! A session as the cache takes it in: frames in, snapshots in the store and answers out. No IO.

use std::collections::HashMap;
use std::sync::Arc;

use haulier_images::name::ImageName;
use haulier_images::page::{self, PAGE, PageHash, PagesHasher, ZERO_HASH};
use haulier_images::runs::{self, PAGED, Run};
use haulier_proto::frame::Kind;
use haulier_proto::message::{ImageEnd, ImageHeader, ImagesDone, decode};
use thiserror::Error;

use crate::compress::{self, COMPRESSED};
use crate::history::{BANK_COST, Bank};
use crate::lazy::Lazy;
use crate::message::session::Body;
use crate::message::{self, Abort, Begin, Held, Left, Refused, Release};
use crate::pages::LazyPages;
use crate::sessions::Outgoing;
use crate::store::{End, Image, Key, Piece, State, Store, StoreError};

/// Most snapshots of a session that are not settled.
const MOST_SNAPSHOTS: usize = 1024;
/// Snapshots with memory left behind that are remembered, those that are over included.
const MOST_LAZY: usize = 64;
/// Most images of a session that are under way.
const MOST_OPEN: usize = 8192;
/// What an image under way counts for beside its contents: the state of its hash.
const OPEN_COST: u64 = 4096;
/// Most pages that a frame may stand for.
pub(crate) const MOST_PAGES: u64 = 1024;

/// The peer broke the protocol: the session is over.
#[derive(Debug, Error)]
#[error("the image-proxy broke the protocol: {0}")]
pub(crate) struct Violation(String);

impl Violation {
    /// A frame of a kind that is not due.
    pub(crate) fn kind(kind: Kind) -> Violation {
        Violation(format!("a {kind:?} frame"))
    }
}

/// A session's side of the cache.
#[derive(Debug)]
pub(crate) struct Intake {
    store: Arc<Store>,
    received: u64,
    snapshots: HashMap<u64, Incoming>,
    images: HashMap<u32, Open>,
    banks: HashMap<ImageName, Bank>,
    answers: Vec<Body>,
    over: bool,
    outgoing: Arc<Outgoing>,
    /// Whether pages may be left behind.
    lazy: bool,
    /// Snapshots with such pages, for as long as those may come.
    lazies: HashMap<u64, Arc<Lazy>>,
}

/// A snapshot that is not settled.
#[derive(Debug)]
struct Incoming {
    key: Key,
    images: u32,
    bytes: u64,
    open: usize,
    /// What the proxy was told of it.
    said: Option<Body>,
}

/// An image under way.
#[derive(Debug)]
struct Open {
    snapshot: u64,
    name: ImageName,
    /// `None` if the snapshot was refused: what still comes of it is passed over.
    wanted: Option<Wanted>,
}

/// An image that is kept.
#[derive(Debug)]
struct Wanted {
    store: Arc<Store>,
    image: Arc<Image>,
    length: u64,
    hasher: Hasher,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.store.pool().release(OPEN_COST);
    }
}

#[derive(Debug)]
enum Hasher {
    Plain(Box<blake3::Hasher>),
    Pages(Box<PagesHasher>),
}

/// Why a frame could not be taken in.
enum Trouble {
    /// The session is over.
    Violation(String),
    /// The snapshot is.
    Snapshot(String),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Trouble {
        Trouble::Snapshot(error.to_string())
    }
}

fn violation(what: impl Into<String>) -> Trouble {
    Trouble::Violation(what.into())
}

impl Intake {
    pub(crate) fn new(store: Arc<Store>, outgoing: Arc<Outgoing>, lazy: bool) -> Intake {
        Intake {
            store,
            received: 0,
            snapshots: HashMap::new(),
            images: HashMap::new(),
            banks: HashMap::new(),
            answers: Vec::new(),
            over: false,
            outgoing,
            lazy,
            lazies: HashMap::new(),
        }
    }

    /// Frames taken in.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Whether the proxy has ended the session.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// What is to be told to the proxy since the last call.
    pub(crate) fn answers(&mut self) -> Vec<Body> {
        std::mem::take(&mut self.answers)
    }

    /// What the proxy was told of snapshots that are not settled: it may not have heard.
    pub(crate) fn said(&self) -> Vec<Body> {
        let settled = self.snapshots.values();
        let settled = settled.filter_map(|snapshot| snapshot.said.clone());
        let lazy = self.lazies.values().flat_map(|lazy| lazy.said());
        settled.chain(lazy).collect()
    }

    /// Takes a frame in.
    pub(crate) fn frame(&mut self, kind: Kind, body: &[u8]) -> Result<(), Violation> {
        self.received += 1;
        let taken = match kind {
            Kind::ImageData => self.data(body),
            Kind::LazyPages => self.pages(body),
            Kind::ImageHeader => part(kind, body).and_then(|header| self.header(&header)),
            Kind::ImageEnd => part(kind, body).and_then(|end| self.end(&end)),
            Kind::ImagesDone => part(kind, body).and_then(|done| self.done(&done)),
            Kind::ImageSession => message::read(body)
                .map_err(|error| violation(error.to_string()))
                .and_then(|body| self.message(body)),
            other => Err(violation(format!("a {other:?} frame"))),
        };
        taken.map_err(|trouble| match trouble {
            Trouble::Violation(what) | Trouble::Snapshot(what) => Violation(what),
        })
    }

    /// The session is lost: what is not complete will never be. What is held stays: whether its
    /// dump succeeded is not known here.
    pub(crate) fn lost(&mut self, why: &str) {
        self.images.clear();
        for (number, snapshot) in self.snapshots.drain() {
            let arriving = self.store.state(&snapshot.key) == Some(State::Arriving);
            if arriving || self.lazies.contains_key(&number) {
                fail(&self.store, &snapshot.key, why);
            }
        }
        for (_, lazy) in self.lazies.drain() {
            if lazy.lost(why) {
                fail(&self.store, lazy.key(), why);
            }
        }
        self.drop_banks();
    }

    fn message(&mut self, body: Body) -> Result<(), Trouble> {
        match body {
            Body::Begin(begin) => self.begin(&begin),
            Body::Release(release) => self.release(&release),
            Body::Abort(abort) => self.abort(&abort),
            Body::Bye(_) => {
                self.over = true;
                Ok(())
            }
            Body::Left(left) => self.left(&left),
            Body::Go(go) => {
                if let Some(lazy) = self.lazies.get(&go.snapshot) {
                    lazy.go();
                }
                Ok(())
            }
            Body::Over(over) => {
                if let Some(lazy) = self.lazies.remove(&over.snapshot) {
                    let why = message::reason(&over.reason);
                    if lazy.lost(&why) {
                        fail(&self.store, lazy.key(), &why);
                    }
                }
                Ok(())
            }
            other => Err(violation(format!("out of order: {other:?}"))),
        }
    }

    fn begin(&mut self, begin: &Begin) -> Result<(), Trouble> {
        let target = ImageName::new(&begin.target).map_err(|e| violation(e.to_string()))?;
        if self.snapshots.contains_key(&begin.snapshot) {
            return Err(violation(format!("snapshot {} again", begin.snapshot)));
        }
        if self.snapshots.len() >= MOST_SNAPSHOTS {
            return Err(violation("too many snapshots at once"));
        }
        let unfinished = |s: &Incoming| s.key.target == target && s.said.is_none();
        if self.snapshots.values().any(unfinished) {
            return Err(violation(format!("two dumps of {target} at once")));
        }
        let begun = self.store.begin(&target);
        let (key, refusal) = match begun {
            Ok(key) => (key, None),
            Err(error) => (Key { target, number: 0 }, Some(error.to_string())),
        };
        let incoming = Incoming {
            key,
            images: 0,
            bytes: 0,
            open: 0,
            said: None,
        };
        self.snapshots.insert(begin.snapshot, incoming);
        if let Some(why) = refusal {
            self.refuse(begin.snapshot, &why);
        }
        Ok(())
    }

    fn header(&mut self, header: &ImageHeader) -> Result<(), Trouble> {
        let name = ImageName::new(&header.name).map_err(|e| violation(e.to_string()))?;
        if header.number & (PAGED | COMPRESSED) != 0 || self.images.contains_key(&header.number) {
            return Err(violation(format!("image number {}", header.number)));
        }
        if self.images.len() >= MOST_OPEN {
            return Err(violation("too many images at once"));
        }
        let snapshot = self.unfinished(header.snapshot)?;
        snapshot.images += 1;
        snapshot.open += 1;
        let wanted = snapshot.said.is_none();
        let key = snapshot.key.clone();
        let mut open = Open {
            snapshot: header.snapshot,
            name,
            wanted: None,
        };
        if wanted {
            match self.want(&key, &open.name) {
                Ok(wanted) => open.wanted = Some(wanted),
                Err(error) => self.refuse(header.snapshot, &error.to_string()),
            }
        }
        self.images.insert(header.number, open);
        Ok(())
    }

    fn want(&self, key: &Key, name: &ImageName) -> Result<Wanted, StoreError> {
        self.store.pool().charge(OPEN_COST)?;
        let hasher = if name.is_of_pages() {
            Hasher::Pages(Box::default())
        } else {
            Hasher::Plain(Box::default())
        };
        // Made first: it gives the charge back.
        let mut wanted = Wanted {
            store: Arc::clone(&self.store),
            image: Arc::new(Image::new(self.store.pool())),
            length: 0,
            hasher,
        };
        wanted.image = self.store.add(key, name)?;
        Ok(wanted)
    }

    fn data(&mut self, body: &[u8]) -> Result<(), Trouble> {
        let Some((number, data)) = body.split_first_chunk::<4>() else {
            return Err(violation("image data without a number"));
        };
        let number = u32::from_le_bytes(*number);
        let Some(open) = self.images.get_mut(&(number & !(PAGED | COMPRESSED))) else {
            return Err(violation(format!("data for image {number:#x}")));
        };
        let snapshot = open.snapshot;
        let Some(wanted) = &mut open.wanted else {
            return Ok(());
        };
        let decompressed;
        let data = if number & COMPRESSED != 0 {
            decompressed = compress::decompress(data).map_err(violation)?;
            &decompressed[..]
        } else {
            data
        };
        let paged = number & PAGED != 0;
        let taken = match (paged, &mut wanted.hasher) {
            (false, Hasher::Plain(hasher)) => {
                hasher.update(data);
                self.store.put(data).map_err(Trouble::from).map(|blob| {
                    if data.is_empty() {
                        Vec::new()
                    } else {
                        vec![Piece::Data(blob)]
                    }
                })
            }
            (true, Hasher::Pages(hasher)) => {
                let target = &self.snapshots[&snapshot].key.target;
                let bank = self.banks.entry(target.clone()).or_default();
                pages(data, hasher, bank, &self.store)
            }
            _ => Err(violation(format!(
                "data of the wrong form for {}",
                open.name
            ))),
        };
        let taken = taken.and_then(|pieces| {
            wanted.length += pieces.iter().map(Piece::len).sum::<u64>();
            Ok(self.store.push(&wanted.image, pieces)?)
        });
        self.or_refuse(snapshot, taken)
    }

    fn end(&mut self, end: &ImageEnd) -> Result<(), Trouble> {
        let Some(open) = self.images.remove(&end.number) else {
            return Err(violation(format!("end of image {}", end.number)));
        };
        let snapshot = self.snapshot(open.snapshot)?;
        snapshot.open -= 1;
        let Some(wanted) = &open.wanted else {
            return Ok(());
        };
        let hash = match &wanted.hasher {
            Hasher::Plain(hasher) => *hasher.finalize().as_bytes(),
            Hasher::Pages(hasher) => hasher.finalize(),
        };
        if wanted.length == end.length && hash[..] == end.blake3 {
            snapshot.bytes += wanted.length;
            wanted.image.finish(End::Complete);
        } else {
            wanted.image.finish(End::Failed);
            self.refuse(
                open.snapshot,
                &format!("{} was damaged on the way", open.name),
            );
        }
        Ok(())
    }

    fn done(&mut self, done: &ImagesDone) -> Result<(), Trouble> {
        let snapshot = self.unfinished(done.snapshot)?;
        if snapshot.open > 0 || snapshot.images != done.images {
            let what = format!(
                "{} of {} images came, {} of them cut",
                snapshot.images, done.images, snapshot.open
            );
            return Err(violation(what));
        }
        if snapshot.said.is_some() {
            return Ok(());
        }
        let key = snapshot.key.clone();
        let held = Body::Held(Held {
            snapshot: done.snapshot,
            number: key.number,
            images: snapshot.images,
            bytes: snapshot.bytes,
        });
        snapshot.said = Some(held.clone());
        if let Some(bank) = self.banks.get_mut(&key.target) {
            self.store.pool().release(bank.finish() as u64 * BANK_COST);
        }
        self.store.settle(&key, State::Held)?;
        self.answers.push(held);
        Ok(())
    }

    fn release(&mut self, release: &Release) -> Result<(), Trouble> {
        let snapshot = self.snapshot(release.snapshot)?;
        if !matches!(snapshot.said, Some(Body::Held(_))) {
            return Err(violation("a snapshot that is not held was released"));
        }
        let key = snapshot.key.clone();
        self.snapshots.remove(&release.snapshot);
        // A person may have been faster.
        if self.store.state(&key) == Some(State::Held) {
            self.store.settle(&key, State::Released)?;
        }
        if self.lazies.contains_key(&release.snapshot) {
            let Key { target, number } = &key;
            tracing::info!(
                "snapshot {number} of {target} waits to be restored, with its memory at its source"
            );
        }
        Ok(())
    }

    /// Pages of a snapshot stay with its dump.
    fn left(&mut self, left: &Left) -> Result<(), Trouble> {
        if self.lazies.len() >= MOST_LAZY {
            // What those said was heard long ago.
            self.lazies.retain(|_, lazy| !lazy.is_over());
        }
        if self.lazies.len() >= MOST_SNAPSHOTS {
            return Err(violation("too many snapshots with memory left behind"));
        }
        let allowed = self.lazy;
        let snapshot = self.unfinished(left.snapshot)?;
        if snapshot.said.is_some() {
            return Ok(());
        }
        if !allowed {
            let why = "the dump leaves memory behind (criu dump --lazy-pages), but this image-cache \
                       runs without --lazy-pages";
            self.refuse(left.snapshot, why);
            return Ok(());
        }
        let key = snapshot.key.clone();
        let lazy = Lazy::new(left.snapshot, key.clone(), Arc::clone(&self.outgoing));
        let lazy = Arc::new(lazy);
        self.store.leave(&key, Arc::clone(&lazy))?;
        self.lazies.insert(left.snapshot, lazy);
        Ok(())
    }

    /// Whose pages these are.
    pub(crate) fn lazy_of(&self, body: &[u8]) -> Option<Arc<Lazy>> {
        let (pages, ..) = LazyPages::head_of(body).ok()?;
        self.lazies.get(&pages.snapshot).cloned()
    }

    fn pages(&mut self, body: &[u8]) -> Result<(), Trouble> {
        let (pages, contents) = LazyPages::decode(body).map_err(violation)?;
        // Those of a restore that is over may still come.
        match self.lazies.get(&pages.snapshot) {
            Some(lazy) => lazy.take(&pages, &contents).map_err(violation),
            None => Ok(()),
        }
    }

    fn abort(&mut self, abort: &Abort) -> Result<(), Trouble> {
        self.snapshot(abort.snapshot)?;
        self.lazies.remove(&abort.snapshot);
        self.images
            .retain(|_, open| open.snapshot != abort.snapshot);
        if let Some(snapshot) = self.snapshots.remove(&abort.snapshot) {
            fail(&self.store, &snapshot.key, &message::reason(&abort.reason));
            self.drop_bank(&snapshot.key.target);
        }
        Ok(())
    }

    /// Gives a snapshot up, of which more may come.
    fn refuse(&mut self, number: u64, why: &str) {
        for open in self.images.values_mut() {
            if open.snapshot == number {
                open.wanted = None;
            }
        }
        let Some(snapshot) = self.snapshots.get_mut(&number) else {
            return;
        };
        let refused = Body::Refused(Refused {
            snapshot: number,
            reason: message::reason(why),
        });
        self.lazies.remove(&number);
        snapshot.said = Some(refused.clone());
        self.answers.push(refused);
        let key = snapshot.key.clone();
        fail(&self.store, &key, why);
        self.drop_bank(&key.target);
    }

    fn or_refuse(&mut self, snapshot: u64, taken: Result<(), Trouble>) -> Result<(), Trouble> {
        match taken {
            Err(Trouble::Snapshot(why)) => {
                self.refuse(snapshot, &why);
                Ok(())
            }
            other => other,
        }
    }

    fn snapshot(&mut self, number: u64) -> Result<&mut Incoming, Trouble> {
        self.snapshots
            .get_mut(&number)
            .ok_or_else(|| violation(format!("snapshot {number} is not under way")))
    }

    /// A snapshot of which more may come.
    fn unfinished(&mut self, number: u64) -> Result<&mut Incoming, Trouble> {
        let snapshot = self.snapshot(number)?;
        if matches!(snapshot.said, Some(Body::Held(_))) {
            return Err(violation(format!("snapshot {number} is complete")));
        }
        Ok(snapshot)
    }

    fn drop_bank(&mut self, target: &ImageName) {
        if let Some(bank) = self.banks.remove(target) {
            self.store.pool().release(bank.len() as u64 * BANK_COST);
        }
    }

    fn drop_banks(&mut self) {
        for (_, bank) in self.banks.drain() {
            self.store.pool().release(bank.len() as u64 * BANK_COST);
        }
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.drop_banks();
    }
}

/// Takes in the pages of a frame.
fn pages(
    body: &[u8],
    hasher: &mut PagesHasher,
    bank: &mut Bank,
    store: &Store,
) -> Result<Vec<Piece>, Trouble> {
    let (runs, mut literal) = runs::decode(body).map_err(violation)?;
    let count: u64 = runs.iter().map(|run| u64::from(run.pages())).sum();
    if count > MOST_PAGES {
        return Err(violation(format!("{count} pages in a frame")));
    }
    let mut pieces = Vec::with_capacity(count as usize);
    for run in runs {
        match run {
            Run::Zero { pages } => {
                for _ in 0..pages {
                    hasher.update(&ZERO_HASH);
                }
                pieces.push(Piece::Zero { pages });
            }
            Run::Bank { first, pages } => {
                for index in 0..pages {
                    let known = first.checked_add(index).and_then(|n| bank.refer(n));
                    let Some((hash, blob)) = known else {
                        return Err(violation(format!("page {first} of a run is not known")));
                    };
                    hasher.update(&hash);
                    pieces.push(Piece::Data(blob));
                }
            }
            Run::Literal { pages } => {
                // The decoder has checked that they are there.
                let (data, rest) = literal.split_at(pages as usize * PAGE);
                for contents in data.chunks_exact(PAGE) {
                    let hash: PageHash = page::hash(contents);
                    hasher.update(&hash);
                    let blob = store.put(contents)?;
                    store.pool().charge(BANK_COST)?;
                    bank.add(hash, Arc::clone(&blob));
                    pieces.push(Piece::Data(blob));
                }
                literal = rest;
            }
        }
    }
    Ok(pieces)
}

fn part<M: prost::Message + Default>(kind: Kind, body: &[u8]) -> Result<M, Trouble> {
    decode(kind, body).map_err(|error| violation(error.to_string()))
}

/// Says in the store that a snapshot failed, if it was there at all.
fn fail(store: &Store, key: &Key, why: &str) {
    // It is not there if the store refused it, and settled if a person released it.
    if store.settle(key, State::Failed(why.to_owned())).is_ok() {
        tracing::warn!("snapshot {} of {} failed: {why}", key.number, key.target);
    }
}

#[cfg(test)]
mod tests;
