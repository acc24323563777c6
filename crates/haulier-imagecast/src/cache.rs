//! `haulier image-cache`: keeps the images that proxies send, and serves restores.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use haulier_images::name::ImageName;
use haulier_sys::wait::{Cancel, Wait};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::Identity;
use thiserror::Error;

use crate::chunks::{ChunkReader, ChunkWriter};
use crate::control::{self, ControlError, Delivered, Listing, Reply, Request};
use crate::directory::CHUNK;
use crate::front::Front;
use crate::lazy::Daemon;
use crate::link::{Connector, Key, LinkError, Way};
use crate::local::{self, LocalError};
use crate::sessions::{self, Greeting, SessionError, Sessions};
use crate::store::{Pool, Store, StoreError};

/// How long a cache that connects waits before it tries again.
const RETRY: Duration = Duration::from_millis(300);

/// How long restores that lack pages may take to end with the cache.
const ENDING: Duration = Duration::from_secs(15);

/// What a cache is to do.
#[derive(Debug)]
pub struct Options {
    /// How proxies reach it, or it them.
    pub way: Way,
    /// The targets it takes images of, each with the directory for its restores.
    pub targets: Vec<(ImageName, PathBuf)>,
    /// Most memory for images, in bytes.
    pub max_memory: u64,
    /// Where images go that memory has no room for, and how many bytes of them.
    pub spill: Option<(PathBuf, u64)>,
    /// How many snapshots of each target are kept.
    pub keep: usize,
    /// How long a proxy may be out of reach before what it has not sent is given up.
    pub reconnect: Duration,
    /// Whether dumps may leave pages at their source, from where they are fetched by the tasks' faults.
    pub lazy_pages: Option<LazyPages>,
    /// What both sides know.
    pub key: Key,
    /// What the proxies are told.
    pub me: Identity,
}

/// How restores are served whose pages were left behind.
#[derive(Debug)]
pub struct LazyPages {
    /// The program that kills restored tasks when the cache dies before they have all their pages: it
    /// calls [`haulier_memory::lazy::guard::run_for_tasks`]. Without it they would see zeros then.
    pub guard: Option<fn() -> io::Result<Command>>,
}

/// A cache could not start, or had to end.
#[derive(Debug, Error)]
pub enum CacheError {
    /// It cannot listen.
    #[error("cannot wait for image-proxies")]
    Listen(#[from] TransportError),
    /// A directory cannot be served.
    #[error("restores cannot be served")]
    Local(#[from] LocalError),
    /// The spill directory cannot be used.
    #[error("images have nowhere to go")]
    Store(#[from] StoreError),
    /// The system refused.
    #[error("cannot go on")]
    System(#[source] io::Error),
    /// The one connection that it was given has ended.
    #[error("the connection has ended")]
    Connection(#[source] LinkError),
}

/// Runs a cache until stopped, or until the connection that it was given has ended and no snapshot
/// is left to be restored. `ready` is called once restores may begin, with the address that it listens
/// on, if it does.
///
/// # Errors
/// See [`CacheError`].
pub fn run(
    options: Options,
    stop: &Cancel,
    ready: impl FnOnce(Option<&str>),
) -> Result<(), CacheError> {
    let mut pool = Pool::new(options.max_memory);
    if let Some((directory, room)) = &options.spill {
        pool.spill_into(directory, *room)?;
    }
    let names = options.targets.iter().map(|(name, _)| name.clone());
    let store = Arc::new(Store::new(pool, names, options.keep));
    let mut fronts = Vec::new();
    let following = Arc::new(());
    for (target, directory) in &options.targets {
        let daemon = Daemon {
            store: Arc::clone(&store),
            guard: options.lazy_pages.as_ref().and_then(|lazy| lazy.guard),
            stop: stop.clone(),
            _active: Arc::clone(&following),
        };
        fronts.push(Front::new(daemon, target.clone(), directory)?);
    }
    let mut connector = Connector::new(options.way)?;
    let sessions = Sessions::new(
        Arc::clone(&store),
        options.me,
        options.key,
        options.lazy_pages.is_some(),
        options.reconnect,
    );
    let sessions = &sessions;
    ready(connector.listens_on().as_deref());
    let result = thread::scope(|scope| {
        for mut front in fronts {
            let stop = stop.clone();
            spawn(scope, "front", move || {
                if let Err(error) = front.run(&stop) {
                    tracing::error!("restores are no longer served: {error}");
                    stop.cancel();
                }
            })?;
        }
        let end = stop.clone();
        spawn(scope, "sessions", move || {
            while !end.is_cancelled() {
                sessions.expire(false);
                thread::sleep(sessions::LOOK);
            }
            sessions.expire(true);
        })?;
        let links = links(&mut connector, sessions, stop, scope);
        if links.is_err() {
            stop.cancel();
        }
        links
    });
    // Restores that lack pages are ended, and that is said.
    let deadline = Instant::now() + ENDING;
    while Arc::strong_count(&following) > 1 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    result
}

/// Takes connections until stopped.
fn links<'scope>(
    connector: &mut Connector,
    sessions: &'scope Sessions,
    stop: &Cancel,
    scope: &'scope thread::Scope<'scope, '_>,
) -> Result<(), CacheError> {
    while !stop.is_cancelled() {
        let wait = stop.wait(Duration::from_secs(3600));
        match (connector.next(&wait), &*connector) {
            (Ok(channel), Connector::Listen(_)) => {
                // Whoever finds no room tries again.
                if let Some(greeting) = sessions.admit() {
                    let stop = stop.clone();
                    let work = move || serve(sessions, channel, greeting, &stop);
                    spawn(scope, "session", work)?;
                }
            }
            (Ok(channel), Connector::To(_)) => {
                if let Some(greeting) = sessions.admit() {
                    serve(sessions, channel, greeting, stop);
                }
                pause(stop);
            }
            (Ok(channel), Connector::Given(_)) => {
                if let Some(greeting) = sessions.admit() {
                    serve(sessions, channel, greeting, stop);
                }
                // Nobody can come back: what is not complete will never be.
                sessions.expire(true);
                wait_for_end(stop);
            }
            (Err(LinkError::Accept(error)), _) if local::passes(&error) => {
                tracing::warn!("no connection can be taken: {error}");
                pause(stop);
            }
            (Err(LinkError::Accept(error)), _) => return Err(CacheError::System(error)),
            (Err(LinkError::Nobody), _) => {}
            (Err(error), Connector::To(_)) => {
                tracing::debug!("{error}");
                pause(stop);
            }
            (Err(error), _) => return Err(CacheError::Connection(error)),
        }
    }
    Ok(())
}

fn serve(sessions: &Sessions, channel: Channel, greeting: Greeting<'_>, stop: &Cancel) {
    match sessions.serve(channel, greeting, stop) {
        Ok(()) | Err(SessionError::Replaced) => {}
        Err(error) if !stop.is_cancelled() => {
            tracing::warn!("{}", crate::directory::explain(&error));
        }
        Err(_) => {}
    }
}

/// Restores may still come.
fn wait_for_end(stop: &Cancel) {
    while !stop.is_cancelled() {
        thread::sleep(sessions::LOOK);
    }
}

fn pause(stop: &Cancel) {
    if !stop.is_cancelled() {
        thread::sleep(RETRY);
    }
}

fn spawn<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() + Send + 'scope,
) -> Result<(), CacheError> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn_scoped(scope, work)
        .map(drop)
        .map_err(CacheError::System)
}

/// What the cache that serves `directory` has.
///
/// # Errors
/// See [`ControlError`].
pub fn list(directory: &Path, wait: &Wait) -> Result<Listing, ControlError> {
    match control::ask(directory, &Request::List, wait)? {
        Reply::Listing(listing) => Ok(listing),
        _ => Err(control::another()),
    }
}

/// Has the cache that serves `directory` write a snapshot (the newest that is released, if none is
/// named) into `to`, an absolute path: a directory that is empty or is made, or a tar file if the path
/// ends with `.tar` and is no directory.
///
/// # Errors
/// See [`ControlError`].
pub fn save(
    directory: &Path,
    snapshot: Option<u64>,
    to: &Path,
    wait: &Wait,
) -> Result<Delivered, ControlError> {
    let request = Request::Save {
        snapshot,
        path: to.to_owned(),
    };
    control::ask_to(directory, &request, wait)
}

/// Has the cache that serves `directory` read the images in `from`, an absolute path of a directory or
/// a tar file, as a new snapshot.
///
/// # Errors
/// See [`ControlError`].
pub fn load(directory: &Path, from: &Path, wait: &Wait) -> Result<Delivered, ControlError> {
    let request = Request::Load {
        path: from.to_owned(),
    };
    control::ask_to(directory, &request, wait)
}

/// Has the cache that serves `directory` send a snapshot (the newest that is released, if none is named)
/// as a tar file, which is written to `to`. It is whole if this succeeds: without its end otherwise, so
/// that nobody takes it for whole.
///
/// # Errors
/// See [`ControlError`].
pub fn save_to(
    directory: &Path,
    snapshot: Option<u64>,
    to: &mut dyn Write,
    wait: &Wait,
) -> Result<Delivered, ControlError> {
    let request = Request::SaveHere { snapshot };
    let socket = control::question(directory, &request, wait)?;
    let mut from = ChunkReader::new(&socket, wait);
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = from.read(&mut buffer).map_err(ControlError::Silent)?;
        if count == 0 {
            break;
        }
        to.write_all(&buffer[..count])
            .map_err(ControlError::Write)?;
    }
    let delivered = control::done(control::answer(&socket, wait)?)?;
    to.flush().map_err(ControlError::Write)?;
    Ok(delivered)
}

/// Has the cache that serves `directory` take the tar file that is read from `from` as a new snapshot.
///
/// # Errors
/// See [`ControlError`].
pub fn load_from(
    directory: &Path,
    from: &mut dyn Read,
    wait: &Wait,
) -> Result<Delivered, ControlError> {
    let socket = control::question(directory, &Request::LoadHere, wait)?;
    let mut to = ChunkWriter::new(&socket, wait);
    let mut buffer = vec![0; CHUNK];
    let sent = loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break to.finish(),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // It is not told where the file ends, and forgets it.
            Err(error) => return Err(ControlError::Read(error)),
        };
        if let Err(error) = to.write_all(&buffer[..count]) {
            break Err(error);
        }
    };
    // One that does not want the rest has said why.
    match (control::answer(&socket, wait), sent) {
        (Ok(reply), _) => control::done(reply),
        (Err(ControlError::Silent(_)), Err(error)) => Err(ControlError::Silent(error)),
        (Err(error), _) => Err(error),
    }
}

/// Lets a snapshot be restored that is complete, but whose proxy was lost before it said that the
/// dump succeeded.
///
/// # Errors
/// See [`ControlError`].
pub fn release(directory: &Path, snapshot: u64, wait: &Wait) -> Result<Delivered, ControlError> {
    control::ask_to(directory, &Request::Release { snapshot }, wait)
}

/// Forgets a snapshot.
///
/// # Errors
/// See [`ControlError`].
pub fn forget(directory: &Path, snapshot: u64, wait: &Wait) -> Result<Delivered, ControlError> {
    control::ask_to(directory, &Request::Drop { snapshot }, wait)
}
