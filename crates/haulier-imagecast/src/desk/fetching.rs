//! What the fetching of pages that a dump has left behind knows and does.

use haulier_memory::page::PageRange;

use super::{Desk, Dump, Stage, wake};
use crate::left::{Errand, LeftBehind, Phase, Room};
use crate::message::Go;
use crate::message::session::Body;
use crate::pages::LazyPages;

impl Desk {
    /// Its page server has answered.
    pub(crate) fn serves(&self, dump: u64) {
        let mut state = self.state();
        if let Some(entry) = state.dumps.get_mut(&dump) {
            entry.left.iter_mut().for_each(|left| left.serving = true);
            wake(&entry.wake);
        }
    }

    /// Whether it was given up.
    pub(crate) fn is_failed(&self, dump: u64) -> bool {
        let failed = |dump: &Dump| matches!(dump.stage, Stage::Failed(_));
        self.state().dumps.get(&dump).is_none_or(failed)
    }

    /// Whether its CRIU counts pages in 64 bits.
    pub(crate) fn is_wide(&self, dump: u64) -> bool {
        self.with_left(dump, |left| left.wide).unwrap_or(true)
    }

    /// A page that it has.
    pub(crate) fn first_left(&self, dump: u64) -> Option<(u32, PageRange)> {
        self.with_left(dump, |left| left.first()).flatten()
    }

    /// How the cache presents it.
    pub(crate) fn snapshot(&self, dump: u64) -> u64 {
        let state = self.state();
        state.dumps.get(&dump).map_or(0, |d| d.delivered.snapshot)
    }

    /// Whether a restore may have begun.
    pub(crate) fn may_run_elsewhere(&self, dump: u64) -> bool {
        let begun = |left: &mut LeftBehind| *left.phase() != Phase::Waiting;
        self.with_left(dump, begun).unwrap_or(false)
    }

    /// What is to be done next; waits a moment for it.
    pub(crate) fn errand(&self, dump: u64) -> Option<Errand> {
        let mut state = self.state();
        for last in [false, true] {
            let released = match &state.dumps.get(&dump)?.stage {
                Stage::Failed(why) => return Some(Errand::Refuse(why.0.clone())),
                stage => *stage == Stage::Released,
            };
            let room = Room {
                urgent: state.outbox.has_room_for_urgent(),
                others: state.up.is_some() && state.outbox.has_room_for_pages(),
            };
            let left = state.dumps.get_mut(&dump)?.left.as_mut()?;
            let errand = if released { left.next(room) } else { None };
            if errand.is_some() || last || self.stop.is_cancelled() {
                if let Some(Errand::Get(task, range, _)) = &errand {
                    tracing::trace!("fetching {range} of {task}");
                }
                return errand;
            }
            state = self.look_again(state);
        }
        None
    }

    /// The restore may begin.
    pub(crate) fn go(&self, dump: u64) {
        let mut state = self.state();
        let begun = state.left(dump).is_some_and(LeftBehind::begin);
        if begun {
            state.outbox.say(Body::Go(Go { snapshot: dump }));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Pages were fetched.
    pub(crate) fn send_pages(&self, pages: &LazyPages, contents: Vec<u8>, urgent: bool) {
        let mut state = self.state();
        if let Some(left) = state.left(pages.snapshot) {
            left.fetched(pages.task, pages.range);
            state.outbox.pages(pages, contents, urgent);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The dump was told how to end.
    pub(crate) fn ended(&self, dump: u64) {
        if let Some(left) = self.state().left(dump) {
            tracing::debug!("{} pages were not fetched", left.pages());
        }
    }

    pub(super) fn with_left<T>(
        &self,
        dump: u64,
        ask: impl FnOnce(&mut LeftBehind) -> T,
    ) -> Option<T> {
        self.state().left(dump).map(ask)
    }
}
