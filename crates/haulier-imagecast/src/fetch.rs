//! Fetches what a dump has left behind, from the page server that CRIU becomes, and ends that dump.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use haulier_criu::page_server::{self, PageServer, PageServerError};
use haulier_images::name::ImageName;
use haulier_images::page::PAGE;
use haulier_memory::page::PageRange;
use haulier_sys::wait::{Cancel, Wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::desk::Desk;
use crate::directory::explain;
use crate::keeper::{self, Keeper};
use crate::left::Errand;
use crate::pages::LazyPages;

/// Pages of a frame.
const FRAME_PAGES: u64 = 16;
/// How often it is looked whether the page server listens.
const RETRY: Duration = Duration::from_millis(20);
/// How long CRIU may take to become a page server: its user's scripts come before.
const PATIENCE: Duration = Duration::from_secs(3600);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a dump that was given up may take to become one, so that it can be told.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// Where the page servers of dumps are.
#[derive(Debug, Clone)]
pub(crate) enum Servers {
    /// They listen at `host:port`.
    At(String),
    /// They have been given their end of a connection; the newest one that nobody has taken.
    Given(Arc<Mutex<Option<Connected>>>),
}

/// A connection to a page server, or to what becomes one.
#[derive(Debug)]
pub(crate) struct Connected {
    socket: OwnedFd,
    keeper: Option<Keeper>,
}

/// The page server of a dump.
#[derive(Debug)]
pub(crate) enum Server {
    /// It will listen.
    At {
        address: String,
        /// Its process, if it can be seen from here.
        criu: Option<OwnedFd>,
        keeper: Option<Keeper>,
    },
    Given(Connected),
}

/// What is needed to fetch.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    pub(crate) desk: Arc<Desk>,
    pub(crate) target: ImageName,
    /// Its dumps'.
    pub(crate) directory: PathBuf,
    pub(crate) servers: Servers,
    pub(crate) keeper: Option<fn() -> io::Result<Command>>,
    pub(crate) stop: Cancel,
    /// Lives as long as somebody fetches.
    pub(crate) _active: Arc<()>,
}

impl Fetcher {
    /// Takes a connection that a dump will be given the other end of.
    pub(crate) fn take(&self, socket: OwnedFd) {
        let Servers::Given(newest) = &self.servers else {
            return;
        };
        let kept = self.keep().and_then(|keeper| {
            keeper
                .iter()
                .try_for_each(|keeper| keeper.hold(socket.as_fd()))?;
            Ok(keeper)
        });
        match kept {
            Ok(keeper) => {
                let mut newest = newest.lock().unwrap_or_else(PoisonError::into_inner);
                *newest = Some(Connected { socket, keeper });
            }
            Err(error) => {
                tracing::warn!("a connection of a page server was turned away: {error}");
                page_server::refuse(&socket);
            }
        }
    }

    /// Whether a dump was given a connection that nobody has taken.
    pub(crate) fn is_given(&self) -> bool {
        match &self.servers {
            Servers::At(_) => false,
            Servers::Given(newest) => newest
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_some(),
        }
    }

    /// Has the dump fail that was given a connection which nobody has taken, if there is one.
    pub(crate) fn refuse_given(&self) {
        if let Servers::Given(newest) = &self.servers {
            let given = newest.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Connected { socket, keeper }) = given {
                page_server::refuse(socket);
                keeper.into_iter().for_each(Keeper::over);
            }
        }
    }

    /// Makes sure that a dump which leaves memory behind does not end by the death of this process,
    /// and finds its page server. `criu`: its pid, if known.
    ///
    /// # Errors
    /// Why that cannot be had, in a line.
    pub(crate) fn prepare(&self, criu: Option<i32>) -> Result<Server, String> {
        match &self.servers {
            Servers::At(address) => {
                let criu = criu.and_then(keeper::process);
                let kept = self.keep().and_then(|keeper| {
                    let dump = criu.as_ref().map(AsFd::as_fd);
                    keeper
                        .iter()
                        .try_for_each(|keeper| keeper.watch(address, dump))?;
                    Ok(keeper)
                });
                Ok(Server::At {
                    address: address.clone(),
                    criu,
                    keeper: kept.map_err(|error| format!("there is no keeper: {error}"))?,
                })
            }
            Servers::Given(newest) => {
                let newest = newest.lock().unwrap_or_else(PoisonError::into_inner).take();
                newest.map(Server::Given).ok_or_else(|| {
                    "the image-proxy runs without --page-server, and the dump was given no connection \
                     to page-server.sock with --ps-socket"
                        .to_owned()
                })
            }
        }
    }

    fn keep(&self) -> io::Result<Option<Keeper>> {
        self.keeper
            .map(|command| Keeper::start(command()?, &self.target, &self.directory))
            .transpose()
    }

    /// The whole life of the pages of a dump: returns when the dump has been told how to end.
    pub(crate) fn run(&self, dump: u64, server: Server) {
        let Some(Connected { socket, keeper }) = self.connect(dump, server) else {
            let why = "CRIU did not become a page server; its log says why";
            self.desk.fail(dump, why);
            return;
        };
        if let Err(error) = self.serve(dump, socket, keeper) {
            self.desk.fail(dump, &explain(&error));
        }
    }

    fn connect(&self, dump: u64, server: Server) -> Option<Connected> {
        let (address, criu, keeper) = match server {
            Server::Given(connected) => return Some(connected),
            Server::At {
                address,
                criu,
                keeper,
            } => (address, criu, keeper),
        };
        let since = Instant::now();
        let mut failed = None;
        let mut said = false;
        while !self.stop.is_cancelled() && since.elapsed() < PATIENCE {
            match page_server::connect(&address) {
                Ok(Some(socket)) => {
                    let held = keeper.as_ref().map(|keeper| keeper.hold(socket.as_fd()));
                    if let Some(Err(error)) = held {
                        self.desk
                            .fail(dump, &format!("its keeper is gone: {error}"));
                    }
                    return Some(Connected { socket, keeper });
                }
                Ok(None) => {}
                Err(error) if !said => {
                    tracing::warn!("CRIU's page server cannot be reached: {error}");
                    said = true;
                }
                Err(_) => {}
            }
            let over = match &criu {
                Some(criu) => keeper::has_ended(criu),
                None if self.desk.is_failed(dump) => {
                    let since: Instant = *failed.get_or_insert_with(Instant::now);
                    since.elapsed() >= GIVEN_UP
                }
                None => false,
            };
            if over {
                keeper.into_iter().for_each(Keeper::over);
                return None;
            }
            thread::sleep(RETRY);
        }
        None
    }

    fn serve(
        &self,
        dump: u64,
        socket: OwnedFd,
        keeper: Option<Keeper>,
    ) -> Result<(), PageServerError> {
        let desk = &self.desk;
        let mut server = PageServer::new(socket, desk.is_wide(dump))?;
        let mut buffer = vec![0; crate::left::CHUNK as usize * PAGE];
        let mut first = desk.first_left(dump);
        if let Some((task, range)) = &first {
            // That it answers proves that CRIU is beyond its scripts. Without a page, that it listens does.
            let wait = self.stop.wait(PATIENCE);
            server.get(*task, range.start, &mut buffer[..PAGE], &wait)?;
        }
        desk.serves(dump);
        loop {
            if is_closed(&server) {
                let error = io::ErrorKind::UnexpectedEof.into();
                return Err(PageServerError::Broken(error));
            }
            match desk.errand(dump) {
                None if self.stop.is_cancelled() => {
                    self.stopped(dump, server, keeper);
                    return Ok(());
                }
                None => {}
                Some(Errand::Begin) => {
                    if let Some(keeper) = &keeper {
                        if let Err(error) = keeper.begun(desk.snapshot(dump)) {
                            desk.fail(dump, &format!("the keeper of its end is gone: {error}"));
                            continue;
                        }
                    }
                    desk.go(dump);
                    if let Some((task, range)) = first.take() {
                        self.send(dump, task, range, &buffer[..PAGE], false);
                    }
                }
                Some(Errand::Get(task, range, urgent)) => {
                    let bytes = range.pages as usize * PAGE;
                    let wait = Wait::uncancellable(ANSWER);
                    let pages = &mut buffer[..bytes];
                    let got = server.get(task, range.start, pages, &wait)?;
                    let (range, _) = range.split(got as u64);
                    self.send(dump, task, range, &buffer[..got * PAGE], urgent);
                }
                Some(Errand::Finish) => {
                    server.finish(&Wait::uncancellable(ANSWER))?;
                    tracing::info!("all memory of {} has moved: its dump ends", self.target);
                    keeper.into_iter().for_each(Keeper::over);
                    desk.ended(dump);
                    return Ok(());
                }
                Some(Errand::Refuse(why)) => {
                    tracing::warn!("{} runs on here: {why}", self.target);
                    server.refuse();
                    keeper.into_iter().for_each(Keeper::over);
                    desk.ended(dump);
                    return Ok(());
                }
                Some(Errand::Hold(why)) => {
                    self.hold(&why, keeper.as_ref());
                    while !self.stop.is_cancelled() && !is_closed(&server) {
                        thread::sleep(RETRY);
                    }
                    if !self.stop.is_cancelled() {
                        tracing::info!("{} does not stand here any more", self.target);
                        keeper.into_iter().for_each(Keeper::over);
                    }
                    desk.ended(dump);
                    return Ok(());
                }
            }
        }
    }

    /// Sends pages, in frames that a page which is waited for need not wait long for.
    fn send(&self, dump: u64, task: u32, range: PageRange, contents: &[u8], urgent: bool) {
        let mut rest = range;
        for contents in contents.chunks(FRAME_PAGES as usize * PAGE) {
            let (range, behind) = rest.split(FRAME_PAGES);
            let zero = contents.iter().all(|byte| *byte == 0);
            let pages = LazyPages {
                snapshot: dump,
                task,
                range,
                zero,
            };
            let contents = if zero { &[] } else { contents };
            self.desk.send_pages(&pages, contents.to_vec(), urgent);
            rest = behind;
        }
    }

    /// The proxy ends, and what is left undone is the keeper's.
    fn stopped(&self, dump: u64, server: PageServer, keeper: Option<Keeper>) {
        if self.desk.may_run_elsewhere(dump) {
            self.hold("the image-proxy was stopped", keeper.as_ref());
        } else {
            server.refuse();
            keeper.into_iter().for_each(Keeper::over);
        }
    }

    fn hold(&self, why: &str, keeper: Option<&Keeper>) {
        let how = match keeper.map(|keeper| keeper.doubt(why)) {
            Some(Ok(())) => format!(
                "To settle it: haulier image-proxy settle --dir {} --run-here, or --discard",
                self.directory.display()
            ),
            _ => "Its keeper is gone: to have them run on here, kill -9 the criu that dumps them"
                .to_owned(),
        };
        tracing::error!(
            "{why}: it is not known whether {} runs at its destination, so its tasks stay here as \
             they are, frozen. {how}",
            self.target
        );
    }
}

/// Whether CRIU has closed its end, unasked.
fn is_closed(server: &PageServer) -> bool {
    let socket = server.socket();
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}
