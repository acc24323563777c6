//! The lazy-pages daemon of a restore whose memory is still at its source.

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use haulier_criu::lazy_socket::LazySocketError;
use haulier_criu::skeleton::Skeleton;
use haulier_images::name::ImageName;
use haulier_memory::lazy::guard::Guard;
use haulier_memory::lazy::{FaultSink, FillStats, LazyError, LazyMap, LazyPages, LazyPagesHandle};
use haulier_memory::store::PageStore;
use haulier_sys::wait::{Cancel, Wait};

use super::{Lazy, Phase};
use crate::directory::explain;
use crate::message::session::Body;
use crate::message::{Placed, Restored, Wanted};
use crate::store::{Image, Next, Pool, State as Snapshot, Store};

/// Memory for pages on their way into their places.
const ROOM: u64 = 32 << 20;
/// How often the daemon is looked at.
const STEP: Duration = Duration::from_millis(5);
/// How long a connection to the daemon may take to be seen.
const CONNECT: Duration = Duration::from_secs(5);
/// How long CRIU may take for its last word, once everything is placed.
const LAST_WORD: Duration = Duration::from_secs(600);
/// How long the guard may take to get ready.
const GUARD: Duration = Duration::from_secs(10);
/// Longest image that is read to find out which pages are missing.
const LONGEST: u64 = 256 << 20;

/// What a restore needs to begin.
#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    pub(crate) store: Arc<Store>,
    /// The program that calls [`haulier_memory::lazy::guard::run_for_tasks`].
    pub(crate) guard: Option<fn() -> io::Result<Command>>,
    pub(crate) stop: Cancel,
    /// Lives as long as a restore is followed.
    pub(crate) _active: Arc<()>,
}

/// A restore that has begun. To be dropped when CRIU has closed its connection for images.
#[derive(Debug)]
pub(crate) struct Begun {
    connected: Arc<AtomicBool>,
    reader_gone: Arc<AtomicBool>,
}

impl Begun {
    /// Whether CRIU knows that memory is missing: it connects to the daemon before it makes tasks.
    pub(crate) fn is_connected(&self) -> bool {
        let deadline = Instant::now() + CONNECT;
        while !self.connected.load(Ordering::SeqCst) {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(STEP);
        }
        true
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.reader_gone.store(true, Ordering::SeqCst);
    }
}

impl Daemon {
    /// Begins the restore of a snapshot by a CRIU with this work directory; waits for the proxy's
    /// agreement while `wanted`.
    pub(crate) fn begin(
        &self,
        lazy: &Arc<Lazy>,
        work_dir: &Path,
        wanted: impl Fn() -> bool,
    ) -> Result<Begun, String> {
        lazy.claim()?;
        let begun = self.prepare(lazy, work_dir).and_then(|(handle, room)| {
            lazy.outgoing.say(Body::Wanted(Wanted {
                snapshot: lazy.number,
            }));
            lazy.await_go(wanted)?;
            let begun = Begun {
                connected: Arc::default(),
                reader_gone: Arc::default(),
            };
            let follower = Follower {
                daemon: self.clone(),
                lazy: Arc::clone(lazy),
                connected: Arc::clone(&begun.connected),
                reader_gone: Arc::clone(&begun.reader_gone),
                _room: room,
            };
            thread::Builder::new()
                .name("lazy".to_owned())
                .spawn(move || follower.run(handle))
                .map_err(|error| format!("cannot start a thread: {error}"))?;
            Ok(begun)
        });
        begun.inspect_err(|why| self.failed(lazy, why, false))
    }

    fn prepare(
        &self,
        lazy: &Arc<Lazy>,
        work_dir: &Path,
    ) -> Result<(LazyPagesHandle, Room), String> {
        let pool = self.store.pool();
        pool.charge(ROOM).map_err(|error| error.to_string())?;
        let room = Room(Arc::clone(pool));
        let images = self.store.images(&lazy.key);
        let contents = |name: &str| {
            let image = images.iter().find(|(known, _)| known.as_str() == name);
            image.map(|(name, image)| read(name, image)).transpose()
        };
        let skeleton = Skeleton::from_images(contents).map_err(|error| explain(&error))?;
        let store = Arc::new(PageStore::new(ROOM));
        lazy.state().pages = Some(Arc::clone(&store));
        let daemon = LazyPages::listen(work_dir).map_err(|error| explain(&error))?;
        let mut daemon = daemon.faults_to(Arc::clone(lazy) as Arc<dyn FaultSink>);
        if let Some(command) = self.guard {
            let command = command().map_err(|error| error.to_string())?;
            let guard = Guard::spawn(command, &Wait::uncancellable(GUARD));
            daemon = daemon.guarded_by(guard.map_err(|error| explain(&error))?);
        }
        let handle = daemon.start(LazyMap::of(&skeleton), store);
        Ok((handle.map_err(|error| explain(&error))?, room))
    }

    fn failed(&self, lazy: &Lazy, why: &str, ran: bool) {
        lazy.give_up(why, ran);
        // It may have failed before, for the same reason.
        let failed = Snapshot::Failed(why.to_owned());
        if self.store.settle(&lazy.key, failed).is_ok() {
            tracing::warn!(
                "snapshot {} of {} failed: {why}",
                lazy.key.number,
                lazy.key.target
            );
        }
    }
}

/// Memory that is counted.
struct Room(Arc<Pool>);

impl Drop for Room {
    fn drop(&mut self) {
        self.0.release(ROOM);
    }
}

/// Follows a restore to the end of its daemon.
struct Follower {
    daemon: Daemon,
    lazy: Arc<Lazy>,
    connected: Arc<AtomicBool>,
    reader_gone: Arc<AtomicBool>,
    _room: Room,
}

impl Follower {
    fn run(self, mut handle: LazyPagesHandle) {
        match self.follow(&mut handle) {
            Ok(stats) => {
                self.lazy.placed();
                let snapshot = self.lazy.number;
                let placed = Body::Placed(Placed { snapshot });
                self.lazy.outgoing.say(placed);
                self.report(&stats);
                let deadline = Instant::now() + LAST_WORD;
                while !handle.restore_finished() && Instant::now() < deadline {
                    thread::sleep(STEP);
                }
            }
            Err((why, ran)) => {
                // First the tasks are killed, then the source hears of it.
                drop(handle);
                if ran {
                    tracing::error!(
                        "what was restored of {} was killed with its memory incomplete: {why}",
                        self.lazy.key.target
                    );
                }
                self.daemon.failed(&self.lazy, &why, ran);
            }
        }
        self.lazy.state().pages = None;
    }

    /// Until everything is placed; or why that will not be, and whether the tasks may have run.
    fn follow(&self, handle: &mut LazyPagesHandle) -> Result<FillStats, (String, bool)> {
        let mut filling = false;
        let mut left = None;
        loop {
            match handle.wait_filled(Instant::now() + STEP) {
                Ok(stats) => return Ok(stats),
                Err(LazyError::Deadline { .. }) => {}
                Err(LazyError::Socket(error @ LazySocketError::RestoreFailed)) => {
                    return Err((error.to_string(), false));
                }
                Err(error) => return Err((explain(&error), handle.is_connected())),
            }
            let connected = handle.is_connected();
            self.connected.store(connected, Ordering::SeqCst);
            if handle.restore_finished() && !filling {
                filling = true;
                handle.fill().map_err(|error| (explain(&error), true))?;
                self.lazy.step(&[Phase::Going], Phase::Restored);
                let snapshot = self.lazy.number;
                let restored = Body::Restored(Restored { snapshot });
                self.lazy.outgoing.say(restored);
                let target = &self.lazy.key.target;
                tracing::info!("{target} is restored, its memory follows");
            }
            if let Some(why) = self.lazy.trouble() {
                return Err((why, connected));
            }
            if self.daemon.stop.is_cancelled() {
                return Err(("the image-cache was stopped".to_owned(), connected));
            }
            if !connected && self.reader_gone.load(Ordering::SeqCst) {
                let since: Instant = *left.get_or_insert_with(Instant::now);
                if since.elapsed() >= CONNECT {
                    let why = "the restore ended before it had made any task; its log says why";
                    return Err((why.to_owned(), false));
                }
            }
        }
    }

    fn report(&self, stats: &FillStats) {
        tracing::info!(
            "all memory of {} is in its place: {} pages, {} of them waited for, {} us at most",
            self.lazy.key.target,
            stats.copied,
            stats.remote_faults,
            stats.remote_latency.longest_us
        );
    }
}

/// A whole image, which is there.
fn read(name: &ImageName, image: &Image) -> io::Result<Vec<u8>> {
    if image.length() > LONGEST {
        return Err(io::Error::other(format!("{name} is too long")));
    }
    let (mut index, mut bytes) = (0, Vec::new());
    loop {
        match image.next(index, LONGEST, Duration::ZERO) {
            Next::Pieces(pieces) => {
                index += pieces.len();
                for piece in pieces {
                    piece.append_to(&mut bytes)?;
                }
            }
            Next::End => return Ok(bytes),
            Next::Failed | Next::NotYet => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
