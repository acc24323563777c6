//! Two hosts, and what is between them.

use std::collections::VecDeque;

use haulier_engine::destination::{self, Destination};
use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_engine::source::{self, Source};

/// Everything that there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: SourceHost,
    pub(crate) destination: DestinationHost,
    /// The command connections, in the order in which they were made.
    pub(crate) connections: Vec<Connection>,
    /// Pages stay on the source until after the commit.
    pub(crate) leaves_pages: bool,
    pub(crate) faults: Budget,
    pub(crate) past: Past,
}

/// The tasks of the target on one of the hosts, as they really are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tasks {
    /// There have never been any.
    None,
    Running,
    Frozen,
    Dead,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct SourceHost {
    /// `None` once it has been removed.
    pub(crate) journal: Option<Vec<SourceRecord>>,
    pub(crate) tasks: Tasks,
    /// The cgroup holds the tasks. Before that CRIU does, and they run on when it dies.
    pub(crate) confined: bool,
    /// `haulier migrate`, or what recovers it. It holds the journal's lock.
    pub(crate) agent: Option<SourceAgent>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct SourceAgent {
    /// `None` if the journal alone has decided.
    pub(crate) machine: Option<Source>,
    /// The state to go back to if the record that is due cannot be written.
    pub(crate) before: Option<Source>,
    /// What is left of the last list of actions.
    pub(crate) todo: VecDeque<source::Action>,
    /// It has taken over from one that was killed, and gives up where it cannot go on.
    pub(crate) recovers: bool,
    /// The destination is ready.
    pub(crate) prepared: bool,
    /// The next serving of pages is one over a new connection.
    pub(crate) rejoins: bool,
    /// It holds the means to read the pages of the frozen tasks.
    pub(crate) reads_pages: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DestinationHost {
    pub(crate) journal: Option<Vec<DestinationRecord>>,
    pub(crate) tasks: Tasks,
    pub(crate) guard: Guard,
    /// `haulier serve` is alive.
    pub(crate) up: bool,
    /// It has heard of the migration since it was started.
    pub(crate) knows: bool,
    pub(crate) session: Option<Session>,
    /// What is left to be done of a recovery. It holds the journal's lock, as a session does.
    pub(crate) recovery: Option<VecDeque<destination::Action>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Session {
    pub(crate) machine: Destination,
    pub(crate) before: Destination,
    pub(crate) todo: VecDeque<destination::Action>,
    pub(crate) offered: bool,
    /// Every page has come.
    pub(crate) has_pages: bool,
    /// It said "held" before it refused.
    pub(crate) was_held: bool,
}

/// The process that keeps missing pages from becoming zeros, and the word that it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Guard {
    None,
    Watching,
    Complete,
    /// It killed tasks that were frozen.
    KilledFrozen,
    /// It killed tasks that ran.
    KilledRunning,
    /// It died with its host, without a word.
    Dumb,
}

/// A command connection. One that is broken may deliver what is on its way, or not.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Connection {
    /// The source's agent holds its end.
    pub(crate) source: bool,
    pub(crate) destination: End,
    pub(crate) cut: bool,
    pub(crate) there: VecDeque<There>,
    /// Pages that were left behind are on their way, over connections of their own.
    pub(crate) pages: bool,
    /// Such connections belong to it, or are being asked for.
    pub(crate) serves: bool,
    pub(crate) back: VecDeque<Back>,
}

/// Who holds the destination's end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum End {
    Session,
    /// Somebody who answers a source that asks again.
    Answerer,
    Closed,
}

/// To the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum There {
    Begin,
    Offer,
    Commit,
    Rejoin,
    Abort,
}

/// To the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Back {
    Prepared,
    Held,
    Resumed,
    Complete,
    Missing,
    Lost,
    Refused,
}

/// How much may still go wrong, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Budget {
    /// Deaths of the source's agent.
    pub(crate) source_crashes: u8,
    /// Deaths of the destination's server, with whatever recovers there.
    pub(crate) destination_crashes: u8,
    /// Connections that are cut.
    pub(crate) cuts: u8,
    /// Steps of the source that fail, deadlines, Ctrl-C.
    pub(crate) source_failures: u8,
    /// Steps of the destination that fail, and deadlines.
    pub(crate) destination_failures: u8,
    /// Records that cannot be written, or not be synced.
    pub(crate) bad_records: u8,
    /// Losses of power of the source.
    pub(crate) source_power: u8,
    /// Losses of power of the destination.
    pub(crate) destination_power: u8,
    /// Weeks that pass: a settled journal is removed.
    pub(crate) weeks: u8,
}

/// What has happened, as far as it matters later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Past {
    /// Tasks have run on the destination.
    pub(crate) ran_there: bool,
    /// They have, with all of their pages.
    pub(crate) whole_there: bool,
    /// A person has spoken.
    pub(crate) person: bool,
    /// Tasks of the source died with their host.
    pub(crate) source_power: bool,
    /// Tasks of the destination did.
    pub(crate) destination_power: bool,
    /// A server was killed, or its filling of memory failed.
    pub(crate) server_failed: bool,
    /// The destination's journal has a record that was taken for one that failed.
    pub(crate) false_record: bool,
    /// The destination has forgotten.
    pub(crate) forgotten: bool,
}

impl World {
    /// The target runs on the source, a connection is made, and the source says that it begins.
    pub(crate) fn at_first(leaves_pages: bool, faults: Budget) -> World {
        World {
            source: SourceHost {
                journal: Some(Vec::new()),
                tasks: Tasks::Running,
                confined: false,
                agent: Some(SourceAgent {
                    machine: Some(Source::new()),
                    before: None,
                    todo: VecDeque::new(),
                    recovers: false,
                    prepared: false,
                    rejoins: false,
                    reads_pages: true,
                }),
            },
            destination: DestinationHost {
                journal: None,
                tasks: Tasks::None,
                guard: Guard::None,
                up: true,
                knows: true,
                session: Some(Session::new(!leaves_pages)),
                recovery: None,
            },
            connections: vec![Connection {
                source: true,
                destination: End::Session,
                cut: false,
                there: VecDeque::from([There::Begin]),
                pages: false,
                serves: false,
                back: VecDeque::new(),
            }],
            leaves_pages,
            faults,
            past: Past::default(),
        }
    }

    /// The connection of the source's agent.
    pub(crate) fn source_link(&mut self) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|link| link.source)
    }

    /// The connection of the destination's session.
    pub(crate) fn session_link(&mut self) -> Option<&mut Connection> {
        let mut links = self.connections.iter_mut();
        links.find(|link| link.destination == End::Session)
    }

    /// Sends to the destination. Into a connection that is broken, into nothing.
    pub(crate) fn say_there(&mut self, message: There) {
        if let Some(link) = self.source_link().filter(|link| !link.is_broken()) {
            link.there.push_back(message);
        }
    }

    /// Sends what was left behind.
    pub(crate) fn send_pages(&mut self) {
        if let Some(link) = self.source_link().filter(|link| !link.is_broken()) {
            link.pages = true;
            link.serves = true;
        }
    }

    /// Sends to the source.
    pub(crate) fn say_back(&mut self, message: Back) {
        if let Some(link) = self.session_link().filter(|link| !link.is_broken()) {
            link.back.push_back(message);
        }
    }

    pub(crate) fn close_source_end(&mut self) {
        for link in &mut self.connections {
            link.source = false;
            link.back.clear();
        }
        self.forget_closed();
    }

    pub(crate) fn close_session_end(&mut self) {
        if let Some(link) = self.session_link() {
            link.close_destination();
        }
        self.forget_closed();
    }

    pub(crate) fn close_destination_ends(&mut self) {
        for link in &mut self.connections {
            link.close_destination();
        }
        self.forget_closed();
    }

    pub(crate) fn forget_closed(&mut self) {
        self.connections
            .retain(|link| link.source || link.destination != End::Closed);
    }
}

impl Connection {
    /// Nothing that is sent from now on arrives, and each end may notice at any time.
    pub(crate) fn is_broken(&self) -> bool {
        self.cut || !self.source || self.destination == End::Closed
    }

    pub(crate) fn close_destination(&mut self) {
        self.destination = End::Closed;
        self.there.clear();
        self.pages = false;
    }
}

impl Session {
    pub(crate) fn new(has_pages: bool) -> Session {
        Session {
            machine: Destination::new(),
            before: Destination::new(),
            todo: VecDeque::new(),
            offered: false,
            has_pages,
            was_held: false,
        }
    }
}

impl Tasks {
    pub(crate) fn live(self) -> bool {
        matches!(self, Tasks::Running | Tasks::Frozen)
    }

    pub(crate) fn thaw(&mut self) {
        if self.live() {
            *self = Tasks::Running;
        }
    }

    pub(crate) fn kill(&mut self) {
        if *self != Tasks::None {
            *self = Tasks::Dead;
        }
    }
}

/// Adds a record that is not there yet: what is said twice means the same.
pub(crate) fn write<R: PartialEq>(journal: &mut Option<Vec<R>>, record: R) {
    if let Some(journal) = journal {
        if !journal.contains(&record) {
            journal.push(record);
        }
    }
}
