//! After the commit: the target runs, and its pages find their places.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use haulier_engine::destination::{Destination, Event};
use haulier_engine::phase::Phase;
use haulier_engine::recovery::{self as rule, Answer};
use haulier_memory::lazy::LazyError;
use haulier_memory::ranges::RangeSet;
use haulier_proto::id::MigrationId;
use haulier_proto::message::{
    Complete, Findings, Missing, MissingPages, PUSH_ROUND, Problem, Role, control,
};
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use tracing::{info, warn};

use crate::commands::Incoming;
use crate::destination::Shared;
use crate::destination::dialogue::Setback;
use crate::destination::hold::Hold;
use crate::destination::link::Link;
use crate::destination::registry::Stream;
use crate::destination::session::Session;
use crate::failure::Failure;
use crate::journal;
use crate::recovery;

/// How long a thaw that fails is tried again and again.
const THAW_PAUSE: Duration = Duration::from_millis(100);
/// How long a source that asks again waits for a decision.
const DECISION_TIME: Duration = Duration::from_secs(30);
/// How long until a record that could not be written is tried again.
const RECORD_PAUSE: Duration = Duration::from_millis(200);
/// How often everything is looked at while pages arrive.
const LOOK: Duration = Duration::from_millis(20);
/// How often a source that does not come back is complained about.
const COMPLAINT: Duration = Duration::from_secs(60);
/// How long the source's farewell is awaited once all is done.
const FAREWELL: Duration = Duration::from_secs(5);

/// Answers a source that has connected again to hear what became of its commit, or to bring pages
/// that are missing.
pub(crate) fn answer_again(shared: &Shared, channel: Channel, id: MigrationId) {
    let mut channel = channel;
    let wait = Wait::uncancellable(DECISION_TIME);
    let question = match channel.receive_control("a commit", &wait) {
        Ok(question @ (control::Body::Commit(_) | control::Body::Rejoin(_))) => question,
        Ok(other) => {
            info!(%id, message = other.name(), "of a migration that is known here: refused");
            // Not a word about the target, which may run here, or be on its way.
            let _ = channel.send_control(control::Body::Findings(known(id)), &wait);
            return;
        }
        Err(error) => return info!(%error, "asked about a commit"),
    };
    let deadline = Instant::now() + DECISION_TIME;
    while shared.registry.is_running(id) {
        if Instant::now() > deadline {
            return;
        }
        match shared.registry.rejoin(id, channel, &question) {
            None => return,
            Some(back) => channel = back,
        }
        thread::sleep(Duration::from_millis(10));
    }
    // What a server that was killed has left undecided.
    recovery::settle_destination(id, &shared.cgroups);
    if let Some(answer) = recorded_answer(shared, id) {
        let _ = channel.send_control(answer, &wait);
    }
}

/// The refusal of a migration that comes a second time.
fn known(id: MigrationId) -> Findings {
    let problem = Problem {
        what: format!("migration {id} is known here already: each happens once"),
        remedy: "begin a new one".to_owned(),
    };
    Findings {
        problems: vec![problem],
        ..Findings::default()
    }
}

/// What the journal alone can answer.
fn recorded_answer(shared: &Shared, id: MigrationId) -> Option<control::Body> {
    let failure = |phase, what: &str| Failure::new(&shared.host.name, phase, what);
    let contents = match journal::read(id) {
        Ok(contents) => contents?,
        Err(error) => {
            warn!(%id, %error, "the source asks, and the journal cannot be read: no answer");
            return None;
        }
    };
    match rule::answer(&contents.destination_records()) {
        Answer::Complete => Some(control::Body::Complete(Complete::default())),
        Answer::Lost => {
            let what = "haulier ended there before all memory was in its place: it was killed";
            let failure = failure(Phase::Arrive, what);
            Some(control::Body::Lost((&failure).into()))
        }
        Answer::Refused => {
            let what = "the connection broke before the commit arrived";
            let failure = failure(Phase::Commit, what);
            Some(control::Body::Failed((&failure).into()))
        }
        Answer::Silence => {
            warn!(%id, "the source asks about a target whose fate is not known here: no answer");
            None
        }
    }
}

/// Whether there is more to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    NotYet,
    Yes,
    /// Never: the target is gone with what it lacked.
    Lost,
}

impl Session<'_> {
    /// The target is this host's: it has to run, whatever else fails, and to get all of its pages.
    pub(super) fn arrive(&mut self) {
        while matches!(self.machine, Destination::Owner(_)) {
            if self.on(Event::Failed).is_err() {
                thread::sleep(THAW_PAUSE);
            }
        }
        info!("the target runs here");
        self.shared.registry.settle(self.id);
        let end = match self.fill() {
            Filled::Lost => Event::Lost,
            Filled::NotYet | Filled::Yes => {
                info!("its memory is complete");
                Event::Filled
            }
        };
        if self.record_end(end) {
            self.say_farewell();
        }
        self.hold = None;
    }

    /// How it ended is recorded before the source hears of it and gives up its copy: a disk that is
    /// full is waited for, and the source with it. False if the server is stopped before.
    fn record_end(&mut self, end: Event) -> bool {
        let mut restarts = 0;
        let mut complained: Option<Instant> = None;
        while let Err(setback) = self.on(end) {
            if complained.is_none_or(|then| then.elapsed() > COMPLAINT) {
                complained = Some(Instant::now());
                if let Setback::Here(failure) = setback {
                    warn!("{failure}");
                }
                warn!("the source keeps its copy until the end is recorded here");
            }
            if self.shared.stop.is_cancelled() {
                return false;
            }
            while let Some(incoming) = self.heard() {
                self.hear(incoming, &mut restarts);
            }
            match self.streams.recv_timeout(RECORD_PAUSE) {
                Ok(stream) => self.meet(stream, restarts),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(RECORD_PAUSE),
            }
        }
        true
    }

    /// Takes in pages, and the source whenever it comes back, until nothing is missing.
    fn fill(&mut self) -> Filled {
        let mut complained = Instant::now();
        let mut restarts = 0;
        loop {
            match self.filled() {
                Filled::NotYet => {}
                end => return end,
            }
            while let Some(incoming) = self.heard() {
                self.hear(incoming, &mut restarts);
            }
            match self.streams.recv_timeout(LOOK) {
                Ok(stream) => self.meet(stream, restarts),
                // The registry has let go of the migration: it is not used like that.
                Err(_) if self.link.is_some() => {}
                Err(_) if complained.elapsed() > COMPLAINT => {
                    complained = Instant::now();
                    warn!(
                        pages = self.hold.as_ref().map_or(0, Hold::missing_pages),
                        "the target lacks pages, and the source has not come back"
                    );
                }
                Err(_) => {}
            }
        }
    }

    fn filled(&mut self) -> Filled {
        self.seal_when_pushed();
        let Some(memory) = self.hold.as_ref().and_then(Hold::memory) else {
            return Filled::Yes;
        };
        match memory.wait_filled(Instant::now() + LOOK) {
            Ok(stats) => {
                self.filled = Some(stats);
                Filled::Yes
            }
            Err(LazyError::Deadline { .. }) => Filled::NotYet,
            Err(error) => {
                // Better gone than with zeros where its memory was.
                warn!(%error, "the memory of the target cannot be completed: it is killed");
                if let Some(mut hold) = self.hold.take() {
                    for left in hold.undo() {
                        warn!("{left}");
                    }
                }
                Filled::Lost
            }
        }
    }

    /// With everything here that was left behind, what is absent is not awaited any more.
    fn seal_when_pushed(&mut self) {
        if self.left_behind == 0 {
            return;
        }
        let pushed = self.link.as_ref().map(|link| link.receivers.pushed());
        let trouble = match pushed {
            None | Some(Ok(false)) => return,
            Some(Ok(true)) => match self.hold.as_ref().map_or(0, Hold::missing_pages) {
                0 => {
                    self.left_behind = 0;
                    return self.store.seal();
                }
                missing => format!("the source sent all but {missing} pages"),
            },
            Some(Err(error)) => error,
        };
        // The source notices, comes back, and is told what is missing.
        warn!(error = trouble, "the target waits for its pages");
        self.link = None;
    }

    fn hear(&mut self, incoming: Incoming, restarts: &mut u32) {
        match incoming {
            Incoming::Message(control::Body::Commit(_)) => {
                let _ = self.on(Event::Commit);
            }
            Incoming::Message(control::Body::Rejoin(_)) => {
                *restarts += 1;
                let missing = self.missing(PUSH_ROUND + *restarts);
                let _ = self.tell(control::Body::Missing(missing));
            }
            Incoming::Message(other) => info!(message = other.name(), "not expected any more"),
            Incoming::Lost(error) => {
                if self.left_behind > 0 {
                    warn!(%error, "the connection to the source broke; the target waits for pages");
                }
                self.link = None;
            }
        }
    }

    /// A connection of a source that has come back.
    fn meet(&mut self, stream: Stream, restarts: u32) {
        match stream.role {
            Role::Command => match Link::new(stream.channel, stream.first) {
                Ok(link) => {
                    info!("the source is back");
                    self.link = Some(link);
                }
                Err(error) => warn!(%error, "the source's new connection"),
            },
            Role::Memory => {
                let (round, faults) = (PUSH_ROUND + restarts, Arc::clone(&self.faults));
                if let Some(link) = &mut self.link {
                    link.receivers.add_push(stream.channel, round, &faults);
                }
            }
            Role::Faults => {
                let (round, faults) = (PUSH_ROUND + restarts, Arc::clone(&self.faults));
                if let Some(link) = &mut self.link {
                    link.receivers.add_faults(stream.channel, round, &faults);
                }
            }
            Role::Unset | Role::Images | Role::Packets => {}
        }
    }

    fn missing(&self, round: u32) -> Missing {
        let memory = self.hold.as_ref().and_then(Hold::memory);
        let pages = |(task, set): (u32, RangeSet)| MissingPages {
            task,
            starts: set.iter().map(|range| range.start / 4096).collect(),
            lengths: set.iter().map(|range| range.pages).collect(),
        };
        Missing {
            tasks: memory.map_or_else(Vec::new, |memory| {
                memory.missing().into_iter().map(pages).collect()
            }),
            round,
        }
    }

    /// A source that did not hear it asks again, over this connection or a new one.
    fn say_farewell(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        while Instant::now() < deadline {
            let Some(link) = &self.link else {
                return;
            };
            match link.incoming.recv_timeout(LOOK) {
                Ok(Incoming::Message(control::Body::Commit(_))) => {
                    let _ = self.on(Event::Commit);
                }
                Ok(Incoming::Message(_)) => {}
                Ok(Incoming::Lost(_)) => return,
                Err(_) => {}
            }
        }
    }
}
