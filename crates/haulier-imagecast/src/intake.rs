//! A session as the cache takes it in: frames in, snapshots in the store and answers out. No IO.

use std::collections::HashMap;
use std::sync::Arc;

use haulier_images::name::ImageName;
use haulier_proto::frame::Kind;
use haulier_proto::message::{ImagesDone, decode};
use haulier_sys::pages::PagesMut;
use thiserror::Error;

use crate::history::{BANK_COST, Bank};
use crate::lazy::Lazy;
use crate::message::session::Body;
use crate::message::{self, Abort, Begin, Held, Left, Refused, Release};
use crate::pages::LazyPages;
use crate::sessions::Outgoing;
use crate::store::{Key, State, Store, StoreError};
use images::Open;

mod images;

pub(crate) use images::PagesAhead;

/// Most snapshots of a session that are not settled.
const MOST_SNAPSHOTS: usize = 1024;
/// Snapshots with memory left behind that are remembered, those that are over included.
const MOST_LAZY: usize = 64;

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

    /// Takes a frame in, whose body ends with those pages if there are any.
    pub(crate) fn frame(
        &mut self,
        kind: Kind,
        body: &[u8],
        pages: Vec<PagesMut>,
    ) -> Result<(), Violation> {
        self.received += 1;
        let taken = match kind {
            Kind::ImageData => self.data(body, pages),
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
