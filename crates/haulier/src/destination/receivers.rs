//! The memory connections of a migration: a thread each, which takes rounds into the page store.

use std::error::Error;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use haulier_memory::post::{self, FaultClient};
use haulier_memory::store::StoreError;
use haulier_memory::stream::{self, ReceiveStats};
use haulier_proto::message::PUSH_ROUND;
use haulier_sys::wait::{Cancel, Wait};
use haulier_transport::channel::Channel;
use tracing::warn;

/// How often a waiting thread looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// The memory connections that belong to one command connection.
#[derive(Debug)]
pub(crate) struct Receivers {
    stop: Cancel,
    idle: Duration,
    threads: Vec<JoinHandle<()>>,
    progress: Arc<Progress>,
}

/// Why rounds did not come in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReceiversError {
    /// A connection failed, or what came over it was refused.
    #[error("{0}")]
    Stream(String, Option<&'static str>),
    /// A connection said that nothing more would come.
    #[error("a memory connection ended after {came} of {due} rounds")]
    Early {
        /// Rounds that came.
        came: u32,
        /// Rounds that were announced.
        due: u32,
    },
    /// They did not come in time.
    #[error("the announced pages did not come in time")]
    Deadline,
}

impl ReceiversError {
    /// What to do about it, if that is known.
    pub(crate) fn remedy(&self) -> Option<&'static str> {
        match self {
            ReceiversError::Stream(_, remedy) => *remedy,
            ReceiversError::Early { .. } | ReceiversError::Deadline => None,
        }
    }

    fn of(error: &(dyn Error + 'static)) -> ReceiversError {
        let mut remedy = None;
        let mut next = Some(error);
        while let Some(error) = next {
            match error.downcast_ref() {
                Some(StoreError::Full { .. }) => {
                    remedy = Some("raise --max-memory of haulier serve")
                }
                Some(StoreError::Memory { .. }) => remedy = Some("free memory on that host"),
                _ => {}
            }
            next = error.source();
        }
        ReceiversError::Stream(chain(error), remedy)
    }
}

#[derive(Debug, Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    streams: Vec<Stream>,
    failure: Option<ReceiversError>,
    /// What ended the push; without pages left at the source, the end of the connection.
    push_failure: Option<String>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    rounds: u32,
    pages: u64,
    /// No round follows.
    over: bool,
    pushed: bool,
}

impl Receivers {
    /// None yet. A connection on which nothing comes for `idle` has failed; `stop` ends all, and is
    /// cancelled when one fails.
    pub(crate) fn new(stop: Cancel, idle: Duration) -> Receivers {
        Receivers {
            stop,
            idle,
            threads: Vec::new(),
            progress: Arc::default(),
        }
    }

    /// Receives the rounds over a connection, and then what was left behind.
    pub(crate) fn add(&mut self, mut channel: Channel, client: &Arc<FaultClient>) {
        let index = self.progress.open();
        let (client, progress) = (Arc::clone(client), Arc::clone(&self.progress));
        let (stop, wait) = (self.stop.clone(), self.stop.wait_idle(self.idle));
        self.threads.push(thread::spawn(move || {
            let each = |stats: &ReceiveStats| progress.round(index, stats);
            match stream::receive_rounds(&mut channel, client.store(), 0, each, &wait) {
                Ok(_) => {
                    progress.over(index);
                    push(&mut channel, &client, PUSH_ROUND, index, &progress, &wait);
                }
                Err(error) => {
                    // A broken stream ends the migration now, not when a page is missed.
                    if !stop.is_cancelled() {
                        warn!(error = chain(&error), "receiving pages");
                    }
                    progress.fail(ReceiversError::of(&error));
                    stop.cancel();
                }
            }
        }));
    }

    /// Receives over a new connection what was left behind, in the round of that number.
    pub(crate) fn add_push(&mut self, mut channel: Channel, round: u32, client: &Arc<FaultClient>) {
        let index = self.progress.open();
        self.progress.over(index);
        let (client, progress) = (Arc::clone(client), Arc::clone(&self.progress));
        let wait = self.stop.wait_idle(self.idle);
        self.threads.push(thread::spawn(move || {
            push(&mut channel, &client, round, index, &progress, &wait);
        }));
    }

    /// Has the client ask over a connection for pages that tasks wait for.
    pub(crate) fn add_faults(
        &mut self,
        mut channel: Channel,
        round: u32,
        client: &Arc<FaultClient>,
    ) {
        let index = self.progress.open();
        self.progress.over(index);
        self.progress.lock().streams[index].rounds = u32::MAX;
        let (client, progress) = (Arc::clone(client), Arc::clone(&self.progress));
        let wait = self.stop.wait_idle(self.idle);
        self.threads.push(thread::spawn(move || {
            let result = client.run(&mut channel, round, &wait);
            progress.pushed(index, result.map(drop).map_err(|error| chain(&error)));
        }));
    }

    /// Waits until every connection has brought so many rounds. Returns the pages of them.
    ///
    /// # Errors
    /// [`ReceiversError`].
    pub(crate) fn wait_rounds(&self, due: u32, wait: &Wait) -> Result<u64, ReceiversError> {
        let mut state = self.progress.lock();
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if let Some(early) = state.streams.iter().find(|s| s.over && s.rounds < due) {
                let came = early.rounds;
                return Err(ReceiversError::Early { came, due });
            }
            if state.streams.iter().all(|stream| stream.over) {
                return Ok(state.streams.iter().map(|stream| stream.pages).sum());
            }
            if wait.is_cancelled() || wait.remaining().is_zero() {
                return Err(ReceiversError::Deadline);
            }
            let waited = self.progress.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What a connection failed with, if one has.
    pub(crate) fn failure(&self) -> Option<ReceiversError> {
        self.progress.lock().failure.clone()
    }

    /// Whether every connection has brought all of what was left behind. An error if one broke
    /// before.
    pub(crate) fn pushed(&self) -> Result<bool, String> {
        let state = self.progress.lock();
        match &state.push_failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(!state.streams.is_empty() && state.streams.iter().all(|s| s.pushed)),
        }
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // A panic has nothing to tell that matters here.
            let _ = thread.join();
        }
    }
}

fn push(
    channel: &mut Channel,
    client: &FaultClient,
    round: u32,
    index: usize,
    progress: &Progress,
    wait: &Wait,
) {
    let result = post::receive_push(channel, client, round, wait);
    progress.pushed(index, result.map(drop).map_err(|error| chain(&error)));
}

impl Progress {
    fn open(&self) -> usize {
        let mut state = self.lock();
        state.streams.push(Stream::default());
        state.streams.len() - 1
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn round(&self, index: usize, stats: &ReceiveStats) {
        let mut state = self.lock();
        let stream = &mut state.streams[index];
        (stream.rounds, stream.pages) = (stats.rounds, stats.pages);
        self.changed.notify_all();
    }

    fn over(&self, index: usize) {
        self.lock().streams[index].over = true;
        self.changed.notify_all();
    }

    fn pushed(&self, index: usize, result: Result<(), String>) {
        let mut state = self.lock();
        match result {
            Ok(()) => state.streams[index].pushed = true,
            Err(reason) => {
                state.push_failure.get_or_insert(reason);
            }
        }
        self.changed.notify_all();
    }

    fn fail(&self, reason: ReceiversError) {
        self.lock().failure.get_or_insert(reason);
        self.changed.notify_all();
    }
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
