//! `haulier image-proxy`: takes what dumps write, and sends it to a cache.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use haulier_images::name::ImageName;
use haulier_sys::tcp;
use haulier_sys::wait::{Cancel, Wait};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::Identity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::capture;
use crate::compress::Compression;
use crate::control::{self, CONTROL_SOCKET, ControlError, Delivered, Reply, Request};
use crate::desk::{Desk, DumpFailed};
use crate::directory::explain;
use crate::fetch::{Fetcher, Servers};
use crate::keeper;
use crate::link::{self, Connector, FRAME, Key, LinkError, Way};
use crate::local::{self, LocalError, LocalListener};
use crate::message::Bye;
use crate::message::session::Body;
use crate::stream::{CAPTURE_SOCKET, Connection};
use crate::turned_away::turn_away;

/// How long a proxy waits before it tries to connect again.
const RETRY: Duration = Duration::from_millis(300);
/// How often deadlines are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Most dumps and questions at once.
const MOST_CONNECTIONS: usize = 1024;
/// A cache says nothing for as long as nothing is sent.
const IDLE: Duration = Duration::from_secs(24 * 3600);
/// Bytes that may wait in the socket where pages are left behind.
const UNSENT: u32 = 64 << 10;
/// How long the last message may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// What a proxy is to do.
#[derive(Debug)]
pub struct Options {
    /// How it reaches the cache, or the cache it.
    pub way: Way,
    /// The targets whose dumps it takes, each with the directory for them.
    pub targets: Vec<(ImageName, PathBuf)>,
    /// Most memory for images, in bytes.
    pub max_memory: usize,
    /// How image data is compressed on its way.
    pub compression: Compression,
    /// How long the cache may be out of reach before dumps fail.
    pub reconnect: Duration,
    /// Whether dumps may leave pages behind, to be fetched from the page server that CRIU becomes.
    pub lazy_pages: Option<LazyPages>,
    /// What both sides know.
    pub key: Key,
    /// What the cache is told.
    pub me: Identity,
}

/// How pages that dumps leave behind are fetched.
#[derive(Debug)]
pub struct LazyPages {
    /// Where a target's page server listens (`host:port`). One without such an address is given a
    /// connection to the socket [`PAGE_SOCKET`] in the target's directory.
    pub servers: Vec<(ImageName, String)>,
    /// The program that holds a dump's end when the proxy dies: it calls [`keep`]. Without it a proxy
    /// that dies has the dump kill its tasks.
    pub keeper: Option<fn() -> io::Result<Command>>,
}

/// The socket to connect a dump's `--ps-socket` to.
pub const PAGE_SOCKET: &str = "page-server.sock";

/// The work of the program that [`LazyPages::keeper`] starts.
///
/// # Errors
/// What the sockets say.
pub fn keep() -> io::Result<()> {
    keeper::run()
}

/// A proxy could not start, or had to end.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// It cannot listen.
    #[error("cannot wait for the image-cache")]
    Listen(#[from] TransportError),
    /// A directory cannot be served.
    #[error("dumps cannot be taken")]
    Local(#[from] LocalError),
    /// The system refused.
    #[error("cannot go on")]
    System(#[source] io::Error),
    /// The one connection that it was given has ended.
    #[error("the connection to the image-cache has ended")]
    Connection(#[source] LinkError),
}

/// Runs a proxy until stopped, or until the connection that it was given has ended. `ready` is called
/// once dumps may begin, with the address that it listens on, if it does.
///
/// # Errors
/// See [`ProxyError`].
pub fn run(
    options: Options,
    stop: &Cancel,
    ready: impl FnOnce(Option<&str>),
) -> Result<(), ProxyError> {
    let desk = Arc::new(Desk::new(
        options.max_memory,
        options.reconnect,
        stop.clone(),
    ));
    let mut doors = Vec::new();
    let fetching = Arc::new(());
    for (target, directory) in &options.targets {
        let mut door = Door {
            desk: Arc::clone(&desk),
            target: target.clone(),
            dumps: LocalListener::bind(directory, CAPTURE_SOCKET)?,
            control: LocalListener::bind(directory, CONTROL_SOCKET)?,
            pages: None,
            fetcher: None,
            connections: Arc::default(),
        };
        if let Some(lazy) = &options.lazy_pages {
            let servers = match lazy.servers.iter().find(|(of, _)| of == target) {
                Some((_, address)) => Servers::At(address.clone()),
                None => {
                    door.pages = Some(LocalListener::bind(directory, PAGE_SOCKET)?);
                    Servers::Given(Arc::default())
                }
            };
            door.fetcher = Some(Fetcher {
                desk: Arc::clone(&desk),
                target: target.clone(),
                directory: directory.clone(),
                servers,
                keeper: lazy.keeper,
                stop: stop.clone(),
                _active: Arc::clone(&fetching),
            });
        }
        doors.push(door);
    }
    let mut connector = Connector::new(options.way)?;
    ready(connector.listens_on().as_deref());
    let result = thread::scope(|scope| {
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new()
                .name(name.to_owned())
                .spawn_scoped(scope, work)
                .map(drop)
                .map_err(ProxyError::System)
        };
        for door in doors {
            let stop = stop.clone();
            let work = move || {
                if let Err(error) = door.run(&stop) {
                    tracing::error!("dumps are no longer taken: {error}");
                    stop.cancel();
                }
            };
            spawn("door", Box::new(work))?;
        }
        let (watched, end) = (Arc::clone(&desk), stop.clone());
        let watch = move || {
            while !end.is_cancelled() {
                watched.look();
                thread::sleep(LOOK);
            }
        };
        spawn("deadlines", Box::new(watch))?;
        let side = Side {
            desk: &desk,
            me: &options.me,
            key: &options.key,
            compression: options.compression,
            sender: sender(&options.targets).unwrap_or_default(),
            brief: options.lazy_pages.is_some(),
        };
        let result = links(&mut connector, &side, stop);
        if result.is_err() {
            stop.cancel();
        }
        result
    });
    // Those who fetch decide how their dumps end, and say so.
    let deadline = Instant::now() + GOODBYE;
    while Arc::strong_count(&fetching) > 1 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    result
}

/// Asks the proxy that serves `directory` about the newest dump there, and waits: until the cache
/// holds every byte of it; or, if `taken`, only until the proxy does.
///
/// # Errors
/// [`ControlError::No`] with the reason if the images will not be delivered, any other
/// [`ControlError`] if that is not known: the process has to live either way.
pub fn wait(directory: &Path, taken: bool, wait: &Wait) -> Result<Delivered, ControlError> {
    control::ask_to(directory, &Request::Wait { taken }, wait)
}

/// What every connection to the cache needs.
struct Side<'a> {
    desk: &'a Desk,
    me: &'a Identity,
    key: &'a Key,
    compression: Compression,
    sender: Vec<u8>,
    /// Keep what waits in the socket short: pages that tasks wait for come behind it.
    brief: bool,
}

/// What a proxy for these directories is, whichever process it is: its sockets are there only once. So
/// the cache need not wait for one that was killed when the next one comes.
fn sender(targets: &[(ImageName, PathBuf)]) -> io::Result<Vec<u8>> {
    let mut hasher = blake3::Hasher::new_derive_key("haulier 2026 image-proxy, its directories");
    hasher.update(&fs::read("/proc/sys/kernel/random/boot_id")?);
    for (target, directory) in targets {
        let place = fs::metadata(directory)?;
        hasher.update(&place.dev().to_le_bytes());
        hasher.update(&place.ino().to_le_bytes());
        hasher.update(target.as_str().as_bytes());
        hasher.update(b"/");
    }
    Ok(hasher.finalize().as_bytes().to_vec())
}

/// Keeps a connection to the cache until stopped.
fn links(connector: &mut Connector, side: &Side<'_>, stop: &Cancel) -> Result<(), ProxyError> {
    let desk = side.desk;
    let mut said = String::new();
    while !stop.is_cancelled() {
        let ended = connector
            .next(&stop.wait(Duration::from_secs(3600)))
            .and_then(|channel| link(channel, side, stop));
        if stop.is_cancelled() {
            return Ok(());
        }
        let error = match ended {
            Ok(()) => continue,
            Err(LinkError::Accept(error)) if !local::passes(&error) => {
                return Err(ProxyError::System(error));
            }
            Err(error) => error,
        };
        if let LinkError::Denied { unknown: true, .. } = error {
            desk.lost("the image-cache has lost the session");
        }
        if !connector.can_reconnect() {
            desk.lost("the connection to the image-cache has ended");
            return Err(ProxyError::Connection(error));
        }
        // Once, not with every attempt.
        let text = explain(&error);
        if text != said {
            tracing::warn!("{text}");
            said = text;
        }
        thread::sleep(RETRY);
    }
    Ok(())
}

/// A connection from its greeting to its end.
fn link(mut channel: Channel, side: &Side<'_>, stop: &Cancel) -> Result<(), LinkError> {
    let desk = side.desk;
    let (session, resume) = desk.session();
    let wait = stop.wait(link::GREETING);
    let which = (&session, &side.sender[..]);
    let received = link::open(&mut channel, side.me, side.key, which, resume, &wait)?;
    let Some(connection) = desk.connected(received) else {
        desk.lost("the image-cache speaks of another session");
        return Ok(());
    };
    if side.brief {
        // Another kind of socket does without.
        let _ = tcp::keep_unsent_short(channel.socket(), UNSENT);
    }
    tracing::info!("connected to the image-cache at {}", channel.peer());
    let reader = channel.try_clone().map_err(LinkError::Accept)?;
    let ended = thread::scope(|scope| {
        let answers = thread::Builder::new()
            .name("answers".to_owned())
            .spawn_scoped(scope, || {
                let ended = answers(reader, desk, stop);
                desk.disconnected(connection);
                ended
            })
            .map_err(LinkError::Accept)?;
        let sent = send(&mut channel, side, connection);
        if stop.is_cancelled() && sent.is_ok() {
            let bye = link::send(
                &mut channel,
                Body::Bye(Bye {}),
                &Wait::uncancellable(GOODBYE),
            );
            tracing::debug!("goodbye: {bye:?}");
        }
        desk.disconnected(connection);
        channel.shutdown();
        let answered = answers.join().unwrap_or(Ok(()));
        sent?;
        answered
    });
    tracing::info!("the connection to the image-cache has ended");
    ended
}

/// Sends what there is to send.
fn send(channel: &mut Channel, side: &Side<'_>, connection: u64) -> Result<(), LinkError> {
    while let Some(frame) = side.desk.next_frame(connection) {
        frame.send(side.compression, channel, &Wait::uncancellable(FRAME))?;
    }
    Ok(())
}

/// Listens to the cache.
fn answers(mut channel: Channel, desk: &Desk, stop: &Cancel) -> Result<(), LinkError> {
    let wait = stop.wait(IDLE);
    loop {
        match link::receive(&mut channel, &wait)? {
            Body::Ack(ack) => {
                if !desk.acknowledge(ack.received) {
                    return Err(link::unexpected(&channel, Body::Ack(ack)));
                }
            }
            Body::Held(held) => desk.held(&held),
            Body::Refused(refused) => desk.refused(&refused),
            other => {
                let heard = desk.hear(other);
                heard.map_err(|other| link::unexpected(&channel, other))?;
            }
        }
    }
}

/// The sockets in the directory of a target.
struct Door {
    desk: Arc<Desk>,
    target: ImageName,
    dumps: LocalListener,
    control: LocalListener,
    /// For dumps that become page servers.
    pages: Option<LocalListener>,
    fetcher: Option<Fetcher>,
    connections: Arc<AtomicUsize>,
}

impl Door {
    fn run(&self, stop: &Cancel) -> io::Result<()> {
        let step = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        while !stop.is_cancelled() {
            let mut fds: Vec<_> = [&self.dumps, &self.control]
                .into_iter()
                .chain(&self.pages)
                .map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN))
                .collect();
            match poll(&mut fds, Some(&step)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if let (Some(pages), Some(fetcher)) = (&self.pages, &self.fetcher) {
                if let Some(socket) = pages.accept()? {
                    fetcher.take(socket);
                }
            }
            // Dumps first: who asks about the newest dump means one that has connected before.
            while let Some(socket) = self.dumps.accept()? {
                self.dump(socket, stop);
            }
            if let Some(socket) = self.control.accept()? {
                while let Some(socket) = self.dumps.accept()? {
                    self.dump(socket, stop);
                }
                self.question(socket, stop);
            }
        }
        Ok(())
    }

    fn dump(&self, socket: OwnedFd, stop: &Cancel) {
        let connection = Connection::new(socket);
        let criu = connection.peer();
        let ticket = match self.desk.register(&self.target) {
            Ok(ticket) => ticket,
            Err(error) => {
                tracing::warn!("a dump of {} was turned away: {error}", self.target);
                drop(connection);
                turn_away(criu);
                return;
            }
        };
        let (desk, stop, number) = (Arc::clone(&self.desk), stop.clone(), ticket.dump);
        let fetcher = self.fetcher.clone();
        let started = self.start("dump", move || {
            if let Err(error) =
                capture::capture(connection, &ticket, &desk, fetcher.as_ref(), &stop)
            {
                desk.fail(ticket.dump, &error.to_string());
            }
        });
        if !started {
            self.desk.fail(number, "there is no thread for it");
            turn_away(criu);
        }
    }

    fn question(&self, socket: OwnedFd, stop: &Cancel) {
        // Now, not in the thread: another dump may come any moment.
        let newest = self.desk.newest(&self.target);
        let (desk, stop) = (Arc::clone(&self.desk), stop.clone());
        self.start("question", move || {
            let request = control::receive(&socket, &stop.wait(control::SAYING));
            let reply_to = |reply: &Reply| {
                let wait = Wait::uncancellable(control::SAYING);
                control::send(&socket, reply, &wait)
            };
            let no = |why: &str| {
                // Who does not wait for the answer does not want it.
                let _ = reply_to(&Reply::No(why.to_owned()));
            };
            let taken = match request {
                Ok(Request::Wait { taken }) => taken,
                Ok(_) => return no("this is an image-proxy, not an image-cache"),
                Err(error) => return no(&format!("the question makes no sense: {error}")),
            };
            let Some(dump) = newest else {
                return no("no dump has come");
            };
            let connection = Connection::new(match socket.try_clone() {
                Ok(socket) => socket,
                Err(error) => return no(&error.to_string()),
            });
            match desk.wait_for(dump, !taken, || !connection.is_closed()) {
                Ok(delivered) => match reply_to(&Reply::Done(delivered)) {
                    Ok(()) if !taken => desk.release(dump),
                    Ok(()) => {}
                    Err(_) => desk.fail(dump, "nobody waits for it any more"),
                },
                Err(DumpFailed(why)) => {
                    desk.fail(dump, &why);
                    no(&why);
                }
            }
        });
    }

    fn start(&self, name: &str, work: impl FnOnce() + Send + 'static) -> bool {
        let connections = Arc::clone(&self.connections);
        if connections.fetch_add(1, Ordering::SeqCst) >= MOST_CONNECTIONS {
            connections.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        let counted = Arc::clone(&connections);
        let started = thread::Builder::new().name(name.to_owned()).spawn(move || {
            work();
            counted.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = &started {
            connections.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("cannot start a thread: {error}");
        }
        started.is_ok()
    }
}
