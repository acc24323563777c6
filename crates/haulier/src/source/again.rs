//! A migration whose source was killed after its commit: asking the destination again, and doing what
//! follows from its answer, pages that it lacks included.

use std::io;
use std::time::{Duration, Instant};

use haulier_engine::journal::SourceRecord;
use haulier_engine::source::{Action, Event, Source};
use haulier_memory::stream::StreamOptions;
use haulier_proto::message::{Commit, Missing, Rejoin, Role, control};
use haulier_targets::cgroup::CgroupFs;
use haulier_targets::host::Host;
use haulier_transport::greeting::Identity;
use haulier_transport::tcp::LinkTime;
use haulier_transport::wait::{Cancel, Wait};
use thiserror::Error;
use tracing::{info, warn};

use super::behind::{Behind, Serving as Look, missing_ranges};
use super::link::{Dialer, Link};
use super::pages::{SHARED, open_memory, suitable_streams};
use crate::SOFTWARE;
use crate::commands::Incoming;
use crate::failure::Failure;
use crate::journal::{Holding, Journal, Side};
use crate::recovery;

/// Pause between attempts to reach the destination.
const PAUSE: Duration = Duration::from_millis(500);
/// How often everything is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// A migration of this host that only its destination can settle. As long as this exists nobody else
/// works on it.
#[derive(Debug)]
pub struct Unsettled {
    journal: Journal,
    machine: Source,
}

/// How to ask.
#[derive(Debug, Clone)]
pub struct Asking {
    /// How long the destination may be out of reach, or silent.
    pub patience: Duration,
    /// Whether to bring pages that the target lacks there, however long that takes.
    pub bring: bool,
    /// How long a connection may be dead before it counts as broken.
    pub link_time: LinkTime,
}

/// What the destination said of it.
#[derive(Debug)]
pub enum Settled {
    /// The target runs there, whole, and is removed here.
    Released,
    /// It will never run there; it runs on here.
    RunsHere,
    /// It was lost there; as it was frozen it stands here, for a person.
    Stranded(Failure),
    /// The destination could not be reached, or does not know. Nothing has changed.
    Unanswered(String),
}

#[derive(Debug, Error)]
enum AskError {
    #[error("the journal does not tell whom to ask")]
    NoPeer,
    #[error("the target runs there and waits for pages that are here: haulier recover brings them")]
    Left,
    #[error("a person settles it")]
    Wanted,
    #[error("the connection ended: {0}")]
    Lost(String),
    #[error("asking {address}")]
    Transport {
        address: String,
        #[source]
        source: haulier_transport::error::TransportError,
    },
    #[error("the destination asks for memory of process {0}, which is none of the migration's")]
    NotItsOwn(u32),
    #[error("serving pages")]
    Serve(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("journal")]
    Journal(#[from] io::Error),
}

impl Unsettled {
    /// The machine is to go on from that state.
    pub(crate) fn new(journal: Journal, machine: Source) -> Unsettled {
        Unsettled { journal, machine }
    }

    /// The migration.
    pub fn id(&self) -> haulier_proto::id::MigrationId {
        self.journal.id()
    }

    /// Asks the destination until it has answered or could not be reached for the time allowed, or
    /// `stop` is cancelled.
    ///
    /// # Errors
    /// If what follows from the answer cannot be done here; it is tried again by the next recovery.
    pub fn ask(self, cgroups: &CgroupFs, how: &Asking, stop: &Cancel) -> io::Result<Settled> {
        let mut asking = Conversation {
            how: how.clone(),
            cgroups: cgroups.clone(),
            journal: self.journal,
            machine: self.machine,
            link: None,
            dialer: None,
            behind: None,
            streams: 1,
            failure: None,
        };
        let result = asking.run(stop);
        let Conversation {
            journal,
            machine,
            failure,
            ..
        } = asking;
        match machine {
            Source::Released(_) => {
                recovery::finish(journal, cgroups)?;
                Ok(Settled::Released)
            }
            Source::RolledBack(_) => {
                recovery::finish(journal, cgroups)?;
                Ok(Settled::RunsHere)
            }
            Source::Stranded(_) => Ok(Settled::Stranded(failure.unwrap_or_else(|| {
                let host = Host::this().name;
                let what = "the destination lost the target";
                Failure::new(&host, haulier_engine::phase::Phase::Arrive, what)
            }))),
            Source::Running(_)
            | Source::Frozen(_)
            | Source::Offered(_)
            | Source::InDoubt(_)
            | Source::Serving(_) => Ok(Settled::Unanswered(match result {
                Ok(()) => "there was no answer in time".to_owned(),
                Err(error) => describe(&error),
            })),
        }
    }
}

struct Conversation {
    how: Asking,
    cgroups: CgroupFs,
    journal: Journal,
    machine: Source,
    link: Option<Link>,
    dialer: Option<Dialer>,
    behind: Option<Behind>,
    streams: u32,
    failure: Option<Failure>,
}

impl Conversation {
    /// Until the machine is at its end, the time without an answer is over, or it is stopped.
    fn run(&mut self, stop: &Cancel) -> Result<(), AskError> {
        let dialer = dialer(&self.journal, self.how.link_time);
        self.dialer = Some(dialer.ok_or(AskError::NoPeer)?);
        let (patience, attempt) = (self.how.patience, self.how.link_time.attempt());
        let mut silent_since = Instant::now();
        let mut last = Ok(());
        while !self.machine.is_final() && !stop.is_cancelled() {
            if self.journal.is_wanted() {
                return Err(AskError::Wanted);
            }
            if self.link.is_none() {
                if silent_since.elapsed() > patience {
                    return last;
                }
                if let Err(error) = self.connect() {
                    last = Err(error);
                    std::thread::sleep(PAUSE);
                    continue;
                }
            }
            match self.listen() {
                Ok(true) => silent_since = Instant::now(),
                Ok(false) if self.behind.is_some() => silent_since = Instant::now(),
                // It is connected and says nothing: it places pages, or knows no answer.
                Ok(false) if silent_since.elapsed() > patience.max(attempt) => {
                    self.link = None;
                }
                Ok(false) => {}
                Err(error @ AskError::Left) => return Err(error),
                Err(error) => {
                    last = Err(error);
                    self.link = None;
                    self.behind = None;
                    std::thread::sleep(PAUSE);
                }
            }
        }
        last
    }

    fn connect(&mut self) -> Result<(), AskError> {
        let Some(dialer) = &self.dialer else {
            return Err(AskError::NoPeer);
        };
        let wait = Wait::uncancellable(self.how.link_time.attempt());
        let link = dialer.command(None, &wait);
        let link = link.map_err(|source| transport(dialer, source))?;
        let local = haulier_transport::tcp::local_address(link.channel());
        self.streams = suitable_streams(local.map(|address| address.ip()));
        self.link = Some(link);
        self.on(Event::Reconnected)
    }

    /// Takes in what the destination says; whether it said something.
    fn listen(&mut self) -> Result<bool, AskError> {
        let Some(link) = &self.link else {
            return Ok(false);
        };
        match link.receive(LOOK) {
            Some(Incoming::Message(control::Body::Resumed(_))) => self.on(Event::Resumed)?,
            Some(Incoming::Message(control::Body::Complete(_))) => self.on(Event::Complete)?,
            Some(Incoming::Message(control::Body::Missing(missing))) => self.serve(&missing)?,
            Some(Incoming::Message(control::Body::Failed(failure))) => {
                let failure = Failure::from(failure);
                self.failure = Some(failure.clone());
                self.on(Event::Refused)?;
                // It has said before that it runs there.
                if !self.machine.is_final() {
                    return Err(AskError::Lost(failure.to_string()));
                }
            }
            Some(Incoming::Message(control::Body::Lost(failure))) => {
                self.failure = Some(failure.into());
                self.on(Event::Lost)?;
            }
            Some(Incoming::Message(_)) => {}
            Some(Incoming::Lost(error)) => return Err(AskError::Lost(error.to_string())),
            None => {
                if let Some(Look::Broken(_) | Look::Lost(_)) =
                    self.behind.as_mut().map(Behind::look)
                {
                    return Err(AskError::Lost("pages cannot be sent".to_owned()));
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn on(&mut self, event: Event) -> Result<(), AskError> {
        let (next, actions) = self.machine.on(event);
        let before = std::mem::replace(&mut self.machine, next);
        for action in actions {
            let done = self.perform(action);
            if done.is_err() {
                self.machine = match action {
                    Action::Record(_) => before,
                    _ => self.machine,
                };
                return done;
            }
        }
        Ok(())
    }

    fn perform(&mut self, action: Action) -> Result<(), AskError> {
        match action {
            // Recorded by what carries it out.
            Action::Record(SourceRecord::RolledBack) => Ok(()),
            Action::Record(record) => Ok(self.journal.source(record)?),
            Action::SendCommit => self.send(control::Body::Commit(Commit {})),
            // Both when it is asked for the first time and after every break.
            Action::Serve => {
                let memory_streams = self.streams;
                self.send(control::Body::Rejoin(Rejoin { memory_streams }))
            }
            Action::Depart => {
                // Should one stay, so does the lock, and the end of it all is tried again.
                for address in recovery::addresses(self.journal.contents(), Side::Source) {
                    if let Err(error) = haulier_targets::network::remove(&address) {
                        warn!(%error, "an address that has moved is still here");
                    }
                }
                Ok(())
            }
            // The loop makes a new connection by itself; the ends are carried out by whoever asked.
            Action::Reconnect | Action::Kill | Action::Thaw | Action::SendAbort => Ok(()),
            Action::Freeze | Action::SendOffer => Ok(()),
        }
    }

    fn send(&mut self, body: control::Body) -> Result<(), AskError> {
        let (Some(link), Some(dialer)) = (&mut self.link, &self.dialer) else {
            return Ok(());
        };
        let wait = Wait::uncancellable(self.how.link_time.attempt());
        let sent = link.send(body, &wait);
        sent.map_err(|source| transport(dialer, source))
    }

    /// Sends what is missing there from the tasks that stand frozen here.
    fn serve(&mut self, missing: &Missing) -> Result<(), AskError> {
        let Some(dialer) = &self.dialer else {
            return Err(AskError::NoPeer);
        };
        if missing.tasks.iter().all(|task| task.starts.is_empty()) {
            return Ok(());
        }
        if !self.how.bring {
            return Err(AskError::Left);
        }
        let tasks = missing_ranges(missing);
        // The destination names tasks by their numbers, and gets the memory of none but its own.
        let own = recovery::tasks(&self.journal, &self.cgroups);
        if let Some((task, _)) = tasks.iter().find(|(task, _)| !own.contains(task)) {
            let error = AskError::NotItsOwn(*task);
            warn!(id = %self.journal.id(), "{error}");
            return Err(error);
        }
        let wait = Wait::uncancellable(self.how.link_time.attempt());
        let memory = open_memory(dialer, self.streams, &wait);
        let memory = memory.map_err(|source| transport(dialer, source))?;
        let faults = dialer.open(Role::Faults, 0, &wait);
        let (faults, _) = faults.map_err(|source| transport(dialer, source))?;
        let serving = |error: Box<dyn std::error::Error + Send + Sync>| AskError::Serve(error);
        let options = StreamOptions {
            line_share: SHARED,
            ..StreamOptions::default()
        };
        let behind = Behind::new(tasks, options, self.how.link_time);
        let mut behind = behind.map_err(|e| serving(e.into()))?;
        info!(id = %self.journal.id(), pages = behind.remaining(), "serving again");
        let started = behind.start(faults, memory, missing.round);
        started.map_err(|e| serving(e.into()))?;
        self.behind = Some(behind);
        Ok(())
    }
}

fn dialer(journal: &Journal, link_time: LinkTime) -> Option<Dialer> {
    let holdings = journal.contents().holdings(Side::Source).into_iter();
    let mut peer = holdings.filter_map(|holding| match holding {
        Holding::Peer { address, secret } => Some((address, secret)),
        Holding::Cgroup(_) | Holding::Address(_) | Holding::Throttle(_) => None,
    });
    let (address, secret) = peer.next_back()?;
    Some(Dialer {
        address,
        me: Identity {
            software: SOFTWARE.to_owned(),
            host: Host::this().name,
        },
        migration: journal.id(),
        secret,
        link_time,
    })
}

fn transport(dialer: &Dialer, source: haulier_transport::error::TransportError) -> AskError {
    AskError::Transport {
        address: dialer.address.clone(),
        source,
    }
}

fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
