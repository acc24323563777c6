//! What the connection to the cache does at the desk.

use std::sync::Arc;
use std::time::Instant;

use super::{Desk, Dump, Finish, LASTING, Stage, outbox};
use crate::link::{self, SessionId};
use crate::message::{Held, Refused};
use crate::outbox::Frame;

impl Desk {
    /// Which session to open, and whether the cache is to know it.
    pub(crate) fn session(&self) -> (SessionId, bool) {
        let state = self.state();
        (state.session, state.opened)
    }

    /// The cache has so many frames of the session. The number of the connection; `None` if there
    /// never were as many: the session is then lost.
    pub(crate) fn connected(&self, received: u64) -> Option<u64> {
        let mut state = self.state();
        if !state.outbox.resume(received) {
            return None;
        }
        state.opened = true;
        state.connections += 1;
        let connection = state.connections;
        state.up = Some(connection);
        state.up_since = Instant::now();
        drop(state);
        self.changed.notify_all();
        Some(connection)
    }

    /// The connection is down.
    pub(crate) fn disconnected(&self, connection: u64) {
        let mut state = self.state();
        if state.up == Some(connection) {
            state.up = None;
            let acknowledged = state.outbox.acknowledged();
            // One that came back only to break at once, with nothing through, has not been back.
            if acknowledged != state.acknowledged || state.up_since.elapsed() >= LASTING {
                state.down_since = Instant::now();
            }
            state.acknowledged = acknowledged;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The cache has nothing of the session: what is not held will not be.
    pub(crate) fn lost(&self, why: &str) {
        let mut state = self.state();
        for snapshot in state.outbox.unheard_releases() {
            let number = state
                .dumps
                .get(&snapshot)
                .map_or(0, |d| d.delivered.snapshot);
            tracing::error!(
                "the image-cache may not have heard that snapshot {number} can be restored; if it \
                 cannot, have it released there: haulier image-cache release {number}"
            );
        }
        let dumps: Vec<u64> = state.dumps.keys().copied().collect();
        for dump in dumps {
            if state
                .dumps
                .get(&dump)
                .is_some_and(|d| d.stage != Stage::Connected)
            {
                state.fail(dump, why);
            }
        }
        state.outbox = outbox(self.memory);
        state.session = link::random();
        state.opened = false;
        drop(state);
        self.changed.notify_all();
    }

    /// Gives the session up if the connection has been down for too long and something waits for
    /// it.
    pub(crate) fn look(&self) {
        let state = self.state();
        let undecided = |dump: &Dump| matches!(dump.stage, Stage::Capturing | Stage::Taken);
        let is_leaving = |dump: &Dump| dump.stage == Stage::Released && !dump.is_settled();
        let over = state.up.is_none()
            && state.down_since.elapsed() >= self.patience
            && state
                .dumps
                .values()
                .any(|dump| undecided(dump) || is_leaving(dump));
        drop(state);
        if over {
            self.lost(&format!(
                "the connection to the image-cache was lost for {} s",
                self.patience.as_secs()
            ));
        }
    }

    /// The next frame for a connection; waits for one. `None` if the connection is down, or the
    /// proxy ends.
    pub(crate) fn next_frame(&self, connection: u64) -> Option<Arc<Frame>> {
        let mut state = self.state();
        loop {
            if state.up != Some(connection) {
                return None;
            }
            // Messages still go out in the end, images do not.
            if self.stop.is_cancelled() && !state.outbox.has_messages() {
                return None;
            }
            if let Some(frame) = state.outbox.next() {
                drop(state);
                // Whoever waits for room.
                self.changed.notify_all();
                return Some(frame);
            }
            state = self.look_again(state);
        }
    }

    /// The cache has taken in so many frames. False if there never were as many.
    pub(crate) fn acknowledge(&self, received: u64) -> bool {
        let possible = self.state().outbox.acknowledge(received);
        self.changed.notify_all();
        possible
    }

    /// The cache holds a snapshot.
    pub(crate) fn held(&self, held: &Held) {
        let mut state = self.state();
        let sent = state.outbox.bytes_of(held.snapshot);
        if let Some(dump) = state.dumps.get_mut(&held.snapshot) {
            let agrees = (u64::from(held.images), held.bytes)
                == (dump.delivered.images, dump.delivered.bytes);
            if dump.stage == Stage::Taken && agrees {
                dump.stage = Stage::Held;
                dump.delivered.snapshot = held.number;
                dump.delivered.sent = sent;
                tracing::info!(
                    "the cache holds {} as snapshot {}: {} images, {} bytes, {sent} bytes sent",
                    dump.target,
                    held.number,
                    held.images,
                    held.bytes,
                );
                if dump.finish != Some(Finish::Vote) {
                    state.release(held.snapshot);
                }
            } else if dump.stage == Stage::Taken {
                state.fail(held.snapshot, "the image-cache holds something else");
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The cache gives a snapshot up.
    pub(crate) fn refused(&self, refused: &Refused) {
        self.fail(
            refused.snapshot,
            &format!("the image-cache refused: {}", refused.reason),
        );
    }
}
