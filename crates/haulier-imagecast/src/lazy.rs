//! A restore whose memory is still at its source: what the cache knows of it, and the lazy-pages daemon
//! that serves it.
//!
//! Such a snapshot can be restored once. Its inventory is given out when the proxy has agreed
//! ([`Body::Go`]): from then on the proxy does not let the tasks run on at their source, unless it is
//! told that the restore failed before they ran.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use haulier_memory::lazy::FaultSink;
use haulier_memory::page::PageRun;
use haulier_memory::store::PageStore;
use haulier_sys::wait::{Wait, WaitError};

use crate::message::session::Body;
use crate::message::{self, Fault, GaveUp, Placed, Restored, Wanted};
use crate::pages;
use crate::sessions::Outgoing;
use crate::store::Key;

mod daemon;

pub(crate) use daemon::Daemon;

/// What a frame needs of it.
const FRAME_ROOM: u64 = pages::MOST * 4096 + (64 << 10);
/// How often those who wait look whether they still should.
const LOOK: Duration = Duration::from_millis(100);
/// How long room for a frame is waited for between looks.
const ROOM_STEP: Duration = Duration::from_millis(1);
/// Most pages that are named in a message.
const NAMED: usize = 4096;

/// A snapshot with pages that are still at its source.
#[derive(Debug)]
pub(crate) struct Lazy {
    /// As its proxy numbers it.
    number: u64,
    key: Key,
    outgoing: Arc<Outgoing>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Pages that tasks wait for.
    asked: BTreeSet<(u32, u64)>,
    pages: Option<Arc<PageStore>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Nobody has restored it.
    Idle,
    /// A restore waits for the proxy.
    Wanted,
    /// It is under way.
    Going,
    /// CRIU is done.
    Restored,
    /// Everything is in its place.
    Placed,
    /// The restore failed here. Why, and whether it may have run.
    GaveUp(String, bool),
    /// The pages cannot be had any more. Why.
    Lost(String),
}

impl Lazy {
    pub(crate) fn new(number: u64, key: Key, outgoing: Arc<Outgoing>) -> Lazy {
        Lazy {
            number,
            key,
            outgoing,
            state: Mutex::new(State {
                phase: Phase::Idle,
                asked: BTreeSet::new(),
                pages: None,
            }),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    // What the session does. It has locks: nothing is said from here.

    /// The proxy agrees.
    pub(crate) fn go(&self) {
        self.step(&[Phase::Wanted], Phase::Going);
    }

    /// Pages have come.
    pub(crate) fn take(&self, pages: &pages::LazyPages, contents: &[u8]) -> Result<(), String> {
        let store = match &*self.state() {
            State {
                phase: Phase::Going | Phase::Restored,
                pages: Some(store),
                ..
            } => Arc::clone(store),
            _ => return Ok(()),
        };
        let run = PageRun {
            range: pages.range,
            zero: pages.zero,
        };
        let mut buffer = store.buffer(contents.len()).map_err(|e| e.to_string())?;
        buffer.copy_from_slice(contents);
        let inserted = store.insert(pages.task, 0, &[run], buffer);
        inserted.map_err(|error| error.to_string())
    }

    /// Waits until there is room for a frame.
    pub(crate) fn await_room(&self, wait: &Wait) -> Result<(), WaitError> {
        loop {
            let full = match &*self.state() {
                State {
                    phase: Phase::Going | Phase::Restored,
                    pages: Some(store),
                    ..
                } => !store.has_room(FRAME_ROOM),
                _ => false,
            };
            if !full {
                return Ok(());
            }
            if wait.is_cancelled() {
                return Err(WaitError::Cancelled);
            }
            if wait.remaining().is_zero() {
                return Err(WaitError::Deadline);
            }
            thread::sleep(ROOM_STEP);
        }
    }

    /// The pages cannot be had any more. False if that is nothing new, or does not matter.
    pub(crate) fn lost(&self, why: &str) -> bool {
        let open = [Phase::Idle, Phase::Wanted, Phase::Going, Phase::Restored];
        self.step(&open, Phase::Lost(why.to_owned()))
    }

    /// Whether nothing will change any more.
    pub(crate) fn is_over(&self) -> bool {
        matches!(
            self.state().phase,
            Phase::Placed | Phase::GaveUp(..) | Phase::Lost(_)
        )
    }

    /// How its memory stands, for people.
    pub(crate) fn describe(&self) -> &'static str {
        match self.state().phase {
            Phase::Idle | Phase::Wanted => "memory at its source",
            Phase::Going | Phase::Restored => "restored, memory follows",
            Phase::Placed => "restored",
            Phase::GaveUp(..) | Phase::Lost(_) => "memory lost",
        }
    }

    /// What the proxy may not have heard.
    pub(crate) fn said(&self) -> Vec<Body> {
        let state = self.state();
        let snapshot = self.number;
        let wanted = Body::Wanted(Wanted { snapshot });
        let restored = Body::Restored(Restored { snapshot });
        match &state.phase {
            Phase::Idle | Phase::Lost(_) => Vec::new(),
            Phase::Wanted => vec![wanted],
            Phase::Going => self.faults(&state.asked),
            Phase::Restored => {
                let mut all = self.faults(&state.asked);
                all.push(restored);
                all
            }
            Phase::Placed => vec![Body::Placed(Placed { snapshot })],
            Phase::GaveUp(why, ran) => vec![self.gave_up(why, *ran)],
        }
    }

    fn faults(&self, asked: &BTreeSet<(u32, u64)>) -> Vec<Body> {
        let mut faults: Vec<Fault> = Vec::new();
        for (task, page) in asked {
            match faults.last_mut() {
                Some(last) if last.task == *task && last.pages.len() < NAMED => {
                    last.pages.push(*page);
                }
                _ => faults.push(Fault {
                    snapshot: self.number,
                    task: *task,
                    pages: vec![*page],
                }),
            }
        }
        faults.into_iter().map(Body::Fault).collect()
    }

    fn gave_up(&self, why: &str, ran: bool) -> Body {
        Body::GaveUp(GaveUp {
            snapshot: self.number,
            reason: message::reason(why),
            ran,
        })
    }

    /// Pages may come, into so many bytes. What they take.
    #[cfg(test)]
    pub(crate) fn goes_with(&self, room: u64) -> Arc<PageStore> {
        let mut state = self.state();
        state.phase = Phase::Going;
        let store = state
            .pages
            .get_or_insert_with(|| Arc::new(PageStore::new(room)));
        Arc::clone(store)
    }

    // What restores do.

    /// A restore begins, the only one.
    fn claim(&self) -> Result<(), String> {
        if self.step(&[Phase::Idle], Phase::Wanted) {
            return Ok(());
        }
        Err(match &self.state().phase {
            Phase::Lost(why) => why.clone(),
            Phase::GaveUp(why, _) => format!("its restore has failed: {why}"),
            _ => {
                "it was restored before, and its memory is not at its source any more; a dump with \
                  --lazy-pages can be restored once"
                    .to_owned()
            }
        })
    }

    /// The restore failed here, or will not be. Whether that is new.
    pub(crate) fn give_up(&self, why: &str, ran: bool) -> bool {
        let open = [Phase::Idle, Phase::Wanted, Phase::Going, Phase::Restored];
        let new = self.step(&open, Phase::GaveUp(why.to_owned(), ran));
        if new {
            self.outgoing.say(self.gave_up(why, ran));
        }
        new
    }

    /// It is not wanted: its tasks run on at their source, unless a restore has begun.
    pub(crate) fn drop_unrestored(&self) {
        let why = "it was dropped at the image-cache";
        if self.step(&[Phase::Idle], Phase::GaveUp(why.to_owned(), false)) {
            self.outgoing.say(self.gave_up(why, false));
        }
    }

    /// Waits for the proxy's word.
    fn await_go(&self, wanted: impl Fn() -> bool) -> Result<(), String> {
        let mut state = self.state();
        loop {
            match &state.phase {
                Phase::Going => return Ok(()),
                Phase::Lost(why) => return Err(why.clone()),
                _ if !wanted() => return Err("the restore was ended".to_owned()),
                _ => {}
            }
            let waited = self.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Every page is in its place. That holds even if no more could have come: its tasks run on.
    fn placed(&self) {
        self.state().phase = Phase::Placed;
        self.changed.notify_all();
    }

    /// Whether it runs with all of its memory.
    pub(crate) fn is_placed(&self) -> bool {
        self.state().phase == Phase::Placed
    }

    /// Why it cannot go on, if it cannot.
    fn trouble(&self) -> Option<String> {
        match &self.state().phase {
            Phase::Lost(why) | Phase::GaveUp(why, _) => Some(why.clone()),
            _ => None,
        }
    }

    fn step(&self, from: &[Phase], to: Phase) -> bool {
        let mut state = self.state();
        let may = from.contains(&state.phase);
        if may {
            state.phase = to;
        }
        drop(state);
        self.changed.notify_all();
        may
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked left it as it was before or after a step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FaultSink for Lazy {
    fn missing(&self, task: u32, pages: &[u64]) {
        {
            let mut state = self.state();
            state.asked.extend(pages.iter().map(|page| (task, *page)));
        }
        for pages in pages.chunks(NAMED) {
            self.outgoing.say(Body::Fault(Fault {
                snapshot: self.number,
                task,
                pages: pages.to_vec(),
            }));
        }
    }

    fn settled(&self, task: u32, page: u64) {
        self.state().asked.remove(&(task, page));
    }
}

#[cfg(test)]
mod tests {
    use haulier_images::name::ImageName;

    use super::*;

    #[test]
    fn what_has_all_its_memory_is_never_said_to_be_lost() {
        let target = ImageName::new("a").unwrap();
        let lazy = Lazy::new(1, Key { target, number: 1 }, Arc::default());
        assert!(lazy.lost("the link") && !lazy.is_placed());
        // The last pages had come before, and were placed meanwhile.
        lazy.placed();
        assert!(lazy.is_placed() && !lazy.lost("the link again"));
        assert_eq!(lazy.describe(), "restored");
        assert!(matches!(&lazy.said()[..], [Body::Placed(_)]));
    }
}
