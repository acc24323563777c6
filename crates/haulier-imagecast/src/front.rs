//! The cache's sockets in the directory of a target: for restores, of the newest snapshot and of each
//! by its number, and for what people ask.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use haulier_images::name::ImageName;
use haulier_sys::wait::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::archive;
use crate::chunks::{ChunkReader, ChunkWriter};
use crate::control::{self, CONTROL_SOCKET, Delivered, Listed, Listing, Reply, Request};
use crate::directory;
use crate::lazy::Daemon;
use crate::local::{LocalError, LocalListener};
use crate::reading;
use crate::serve;
use crate::store::{Info, Key, State, Store};
use crate::stream::{Connection, SERVE_SOCKET};

/// Most local connections at once.
const MOST_CONNECTIONS: usize = 1024;
/// How long whoever sends a tar file, or takes one, may pause.
const IDLE: Duration = Duration::from_secs(600);
/// How often the snapshots are looked at: each has a directory of its own.
const LOOK_NANOSECONDS: i64 = 100_000_000;

/// The sockets of a target.
#[derive(Debug)]
pub(crate) struct Front {
    store: Arc<Store>,
    /// For restores of what is not all here.
    daemon: Daemon,
    target: ImageName,
    directory: PathBuf,
    newest: LocalListener,
    control: LocalListener,
    /// By the snapshot's number.
    numbered: BTreeMap<u64, Numbered>,
    connections: Arc<AtomicUsize>,
}

/// The socket of one snapshot.
#[derive(Debug)]
struct Numbered {
    /// `None` if it cannot be had: the others work.
    listener: Option<LocalListener>,
    directory: PathBuf,
}

impl Front {
    /// Listens in a directory, which is there.
    pub(crate) fn new(
        daemon: Daemon,
        target: ImageName,
        directory: &Path,
    ) -> Result<Front, LocalError> {
        let mut front = Front {
            store: Arc::clone(&daemon.store),
            daemon,
            target,
            directory: directory.to_owned(),
            newest: LocalListener::bind(directory, SERVE_SOCKET)?,
            control: LocalListener::bind(directory, CONTROL_SOCKET)?,
            numbered: BTreeMap::new(),
            connections: Arc::default(),
        };
        front.follow();
        Ok(front)
    }

    /// Serves until stopped.
    pub(crate) fn run(&mut self, stop: &Cancel) -> io::Result<()> {
        while !stop.is_cancelled() {
            self.follow();
            let mut fds: Vec<PollFd<'_>> = [&self.newest, &self.control]
                .into_iter()
                .chain(self.numbered.values().filter_map(|n| n.listener.as_ref()))
                .map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN))
                .collect();
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: LOOK_NANOSECONDS,
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(errno.into()),
            }
            drop(fds);
            if let Some(socket) = self.newest.accept()? {
                self.restore(socket, None, stop);
            }
            if let Some(socket) = self.control.accept()? {
                self.control(socket, stop);
            }
            let mut asked = Vec::new();
            for (number, numbered) in &self.numbered {
                if let Some(listener) = &numbered.listener {
                    asked.extend(listener.accept()?.map(|socket| (socket, *number)));
                }
            }
            for (socket, number) in asked {
                self.restore(socket, Some(number), stop);
            }
        }
        Ok(())
    }

    /// Has a socket for every snapshot, and for the next one.
    fn follow(&mut self) {
        let mut wanted: Vec<u64> = self
            .store
            .list()
            .into_iter()
            .filter(|info| info.key.target == self.target)
            .filter(|info| !matches!(info.state, State::Failed(_)))
            .map(|info| info.key.number)
            .collect();
        wanted.push(self.store.next_number(&self.target));
        self.numbered.retain(|number, _| wanted.contains(number));
        for number in wanted {
            if !self.numbered.contains_key(&number) {
                let numbered = Numbered::new(self.directory.join(number.to_string()));
                self.numbered.insert(number, numbered);
            }
        }
    }

    fn restore(&self, socket: OwnedFd, number: Option<u64>, stop: &Cancel) {
        let (daemon, target, stop) = (self.daemon.clone(), self.target.clone(), stop.clone());
        self.start("restore", move || {
            let connection = Connection::new(socket);
            if let Err(error) = serve::restore(connection, &daemon, &target, number, &stop) {
                tracing::warn!("a restore of {target} was ended: {error}");
            }
        });
    }

    fn control(&self, socket: OwnedFd, stop: &Cancel) {
        let (store, target, stop) = (Arc::clone(&self.store), self.target.clone(), stop.clone());
        self.start("control", move || {
            let wait = stop.wait(control::SAYING);
            let reply = match control::receive(&socket, &wait) {
                Ok(Request::Inspect { snapshot }) => {
                    match reading::serve(&socket, &store, &target, snapshot, &stop) {
                        Ok(()) => return,
                        Err(why) => Reply::No(why),
                    }
                }
                Ok(request) => answer(&socket, &store, &target, request, &stop),
                Err(error) => Reply::No(format!("the question makes no sense: {error}")),
            };
            // Who does not wait for the answer does not want it.
            let _ = control::send(&socket, &reply, &stop.wait(control::SAYING));
        });
    }

    fn start(&self, name: &str, work: impl FnOnce() + Send + 'static) {
        let connections = Arc::clone(&self.connections);
        if connections.fetch_add(1, Ordering::SeqCst) >= MOST_CONNECTIONS {
            connections.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("too many connections in {}", self.directory.display());
            return;
        }
        let counted = Arc::clone(&connections);
        let started = thread::Builder::new().name(name.to_owned()).spawn(move || {
            work();
            counted.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = started {
            connections.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("cannot start a thread: {error}");
        }
    }
}

impl Numbered {
    fn new(directory: PathBuf) -> Numbered {
        let made = fs::DirBuilder::new().mode(0o700).create(&directory);
        let listener = match made {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.to_string()),
            _ => LocalListener::bind(&directory, SERVE_SOCKET).map_err(|error| error.to_string()),
        };
        let listener = listener
            .inspect_err(|error| tracing::warn!("{} is not served: {error}", directory.display()))
            .ok();
        Numbered {
            listener,
            directory,
        }
    }
}

impl Drop for Numbered {
    fn drop(&mut self) {
        self.listener = None;
        // What a restore has written there stays.
        let _ = fs::remove_dir(&self.directory);
    }
}

fn answer(
    socket: &OwnedFd,
    store: &Store,
    target: &ImageName,
    request: Request,
    stop: &Cancel,
) -> Reply {
    let key = |number| Key {
        target: target.clone(),
        number,
    };
    let done = |result: Result<Delivered, String>| result.map_or_else(Reply::No, Reply::Done);
    let of = |info: Result<(), crate::store::StoreError>, number| {
        done(info.map(|()| numbered(number)).map_err(|e| e.to_string()))
    };
    match request {
        Request::List => Reply::Listing(listing(store, target)),
        Request::Save { snapshot, path } => {
            let save = if archive::is_for_saving(&path) {
                archive::save
            } else {
                directory::save
            };
            done(
                save(store, target, snapshot, &path, stop)
                    .map_err(|error| directory::explain(&error)),
            )
        }
        Request::Load { path } => {
            let load = if archive::is_for_loading(&path) {
                archive::load
            } else {
                directory::load
            };
            done(load(store, target, &path).map_err(|error| directory::explain(&error)))
        }
        Request::SaveHere { snapshot } => {
            let wait = stop.wait_idle(IDLE);
            let mut to = ChunkWriter::new(socket, &wait);
            let saved = archive::save_to(store, target, snapshot, &mut to, stop);
            let ended = to.finish();
            done(match (saved, ended) {
                (Err(error), _) => Err(directory::explain(&error)),
                (Ok(_), Err(error)) => Err(error.to_string()),
                (Ok(delivered), Ok(())) => Ok(delivered),
            })
        }
        Request::LoadHere => {
            let wait = stop.wait_idle(IDLE);
            let from = ChunkReader::new(socket, &wait);
            let loaded = archive::load_from(store, target, from);
            done(loaded.map_err(|error| directory::explain(&error)))
        }
        // It is more than a question and an answer.
        Request::Inspect { .. } => Reply::No("this is not the place for it".to_owned()),
        Request::Release { snapshot } => {
            of(store.settle(&key(snapshot), State::Released), snapshot)
        }
        Request::Drop { snapshot } => {
            if let Some(lazy) = store.left(&key(snapshot)) {
                lazy.drop_unrestored();
            }
            of(store.forget(&key(snapshot)), snapshot)
        }
        Request::Wait { .. } => Reply::No("this is an image-cache, not an image-proxy".to_owned()),
    }
}

fn numbered(snapshot: u64) -> Delivered {
    Delivered {
        snapshot,
        ..Delivered::default()
    }
}

fn listing(store: &Store, target: &ImageName) -> Listing {
    let (memory, peak) = store.pool().used();
    let snapshots = store
        .list()
        .into_iter()
        .filter(|info| &info.key.target == target)
        .map(|info: Info| Listed {
            snapshot: info.key.number,
            state: describe(store, &info),
            images: info.images as u64,
            bytes: info.bytes,
        });
    Listing {
        memory,
        peak,
        spilled: store.pool().spilled(),
        snapshots: snapshots.collect(),
    }
}

/// How a snapshot stands, for people.
pub(crate) fn describe(store: &Store, info: &Info) -> String {
    match &info.state {
        State::Arriving => "arriving".to_owned(),
        State::Held => "held".to_owned(),
        State::Released => match store.left(&info.key) {
            None => "released".to_owned(),
            Some(lazy) => format!("released, {}", lazy.describe()),
        },
        // No page is missing any more.
        State::Failed(_) if store.left(&info.key).is_some_and(|lazy| lazy.is_placed()) => {
            "released, restored".to_owned()
        }
        State::Failed(why) => format!("failed: {why}"),
    }
}
