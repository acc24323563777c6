//! One migration, at the destination.

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use haulier_engine::destination::{Action, Destination, Event};
use haulier_engine::phase::Phase;
use haulier_images::directory::{self, ImageCount, ImagesError};
use haulier_memory::store::PageStore;
use haulier_memory::stream;
use haulier_proto::id::MigrationId;
use haulier_proto::message::{
    Complete, Held, Offer, Prepared, Requirements, Resumed, Role, control,
};
use haulier_sys::wait::{Cancel, Wait};
use haulier_targets::network::MoveIp;
use haulier_transport::channel::Channel;
use tracing::{debug, info, info_span, warn};

use crate::commands::{self, Incoming};
use crate::destination::hold::Hold;
use crate::destination::registry::Stream;
use crate::destination::{Shared, check};
use crate::failure::Failure;
use crate::journal::{self, Decision, Holding, Journal, Side};
use crate::timeline::Stopwatch;

/// How long a thaw that fails is tried again and again.
const THAW_PAUSE: Duration = Duration::from_millis(100);
/// How long a source that asks again waits for a decision.
const DECISION_TIME: Duration = Duration::from_secs(30);

/// Why a migration is not going on.
enum Setback {
    /// Something of this side.
    Here(Failure),
    /// The source gave up.
    Aborted,
    /// The connection broke.
    Disconnected,
}

/// Runs a migration over its command connection, to its end.
pub(crate) fn run(
    shared: &Arc<Shared>,
    channel: Channel,
    from: &str,
    id: MigrationId,
    streams: Receiver<Stream>,
) {
    let _span = info_span!("migration", %id, from).entered();
    let session = match Session::new(shared, channel, id, streams) {
        Ok(session) => session,
        Err(error) => return warn!(%error, "cannot begin"),
    };
    session.run();
}

/// Answers a source that has connected again to hear what became of its commit.
pub(crate) fn answer_again(shared: &Shared, channel: &mut Channel, id: MigrationId) {
    let wait = Wait::uncancellable(DECISION_TIME);
    match channel.receive_control("a commit", &wait) {
        Ok(control::Body::Commit(_)) => {}
        Ok(other) => return info!(message = other.name(), "not a question about a commit"),
        Err(error) => return info!(%error, "asked about a commit"),
    }
    let deadline = Instant::now() + DECISION_TIME;
    while shared.registry.is_running(id) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let running = shared.registry.is_running(id);
    let answer = match journal::decision(id) {
        Ok(Some(Decision::Committed)) if !running => control::Body::Resumed(Resumed {
            pid: 0,
            phases: Vec::new(),
        }),
        Ok(Some(Decision::Refused | Decision::Open)) if !running => {
            let host = &shared.host.name;
            let what = "the connection broke before the commit arrived";
            control::Body::Failed((&Failure::new(host, Phase::Commit, what)).into())
        }
        // Undecided, or not to be read: no answer is the only one that is surely right.
        _ => return,
    };
    let _ = channel.send_control(answer, &wait);
}

/// What came of the target.
#[derive(Debug, Default, PartialEq, Eq)]
struct Received {
    pages: u64,
    images: u32,
}

struct Session<'a> {
    shared: &'a Shared,
    id: MigrationId,
    channel: Channel,
    incoming: Receiver<Incoming>,
    streams: Receiver<Stream>,
    stop: Cancel,
    machine: Destination,
    journal: Option<Journal>,
    needs: Requirements,
    hold: Option<Hold>,
    store: Arc<PageStore>,
    receivers: Vec<JoinHandle<Result<u64, String>>>,
    received: Received,
    failure: Option<Failure>,
    clock: Stopwatch,
}

impl<'a> Session<'a> {
    fn new(
        shared: &'a Arc<Shared>,
        channel: Channel,
        id: MigrationId,
        streams: Receiver<Stream>,
    ) -> std::io::Result<Session<'a>> {
        let stop = Cancel::new()?;
        let incoming = commands::listen(channel.try_clone()?, Some(stop.clone()));
        Ok(Session {
            shared,
            id,
            channel,
            incoming,
            streams,
            stop,
            machine: Destination::new(),
            journal: None,
            needs: Requirements::default(),
            hold: None,
            store: Arc::new(PageStore::new(shared.options.max_memory)),
            receivers: Vec::new(),
            received: Received::default(),
            failure: None,
            clock: Stopwatch::new(),
        })
    }

    fn run(mut self) {
        let result = self.take_over();
        if self.machine.may_run() {
            self.settle();
        } else if let Err(setback) = result {
            self.undo(setback);
        }
        self.stop.cancel();
        self.channel.shutdown();
        for receiver in self.receivers.drain(..) {
            let _ = receiver.join();
        }
    }

    /// The migration, a line per step. It is over at once if the source only asked.
    fn take_over(&mut self) -> Result<(), Setback> {
        let Some(streams) = self.answer_checks()? else {
            return Ok(());
        };
        info!(
            program = self.needs.program,
            pid = self.needs.root_pid,
            "begins"
        );
        self.prepare()?;
        self.on(Event::Begun)?;
        let images = self.open_streams(streams)?;
        self.received.images = self.receive_images(images)?.images;
        self.restore()?;
        self.check_offer()?;
        self.on(Event::Restored)?;
        self.await_commit()?;
        self.on(Event::Commit)
    }

    /// Answers checks until the source begins; `None` if it leaves instead.
    fn answer_checks(&mut self) -> Result<Option<u32>, Setback> {
        loop {
            match self.next("a check") {
                Ok(control::Body::Check(needs)) => {
                    let findings = check::findings(self.shared, &needs);
                    for problem in &findings.problems {
                        info!(what = problem.what, "cannot take {}", needs.program);
                    }
                    self.needs = needs;
                    self.tell(control::Body::Findings(findings))?;
                }
                Ok(control::Body::Begin(begin)) if self.needs.root_pid > 0 => {
                    return Ok(Some(begin.memory_streams.clamp(1, 64)));
                }
                Ok(other) => return Err(self.unexpected(&other, "a check")),
                Err(Setback::Disconnected | Setback::Aborted) => return Ok(None),
                Err(setback) => return Err(setback),
            }
        }
    }

    fn prepare(&mut self) -> Result<(), Setback> {
        let journal = Journal::begin(self.id, Side::Destination);
        let mut journal = journal.map_err(|e| self.here(Phase::Prepare, &e))?;
        let hold = self.make_hold(&mut journal);
        self.journal = Some(journal);
        self.hold = Some(hold.map_err(|e| self.here(Phase::Prepare, &*e))?);
        Ok(())
    }

    /// Notes what is going to be taken, and then takes what nobody outside can see.
    fn make_hold(&self, journal: &mut Journal) -> Result<Hold, Box<dyn Error + Send + Sync>> {
        let addresses = self.needs.move_addresses.iter().map(|text| text.parse());
        let addresses: Vec<MoveIp> = addresses.collect::<Result<_, _>>()?;
        let home = self.shared.cgroups.home_path(&self.id.to_string());
        journal.hold(&Holding::Cgroup(home))?;
        for address in &addresses {
            journal.hold(&Holding::Address(address.to_string()))?;
        }
        Hold::prepare(self.shared, self.id, addresses)
    }

    /// Waits for the connections, and starts to receive pages over each memory connection.
    fn open_streams(&mut self, memory: u32) -> Result<Channel, Setback> {
        let deadline = Instant::now() + self.shared.options.step_time;
        let mut images = None;
        let mut missing = memory;
        while images.is_none() || missing > 0 {
            match self.streams.recv_timeout(Duration::from_millis(20)) {
                Ok(Stream {
                    role: Role::Images,
                    channel,
                }) if images.is_none() => {
                    images = Some(channel);
                }
                Ok(Stream {
                    role: Role::Memory,
                    channel,
                }) if missing > 0 => {
                    missing -= 1;
                    self.receive_pages(channel);
                }
                // More than announced: closed by being dropped.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    self.check_stop()?;
                    // Nothing is due before the connections. A source that says something all the
                    // same, be it a commit, gets its refusal now and not after the deadline.
                    if let Ok(incoming) = self.incoming.try_recv() {
                        return Err(self.out_of_turn(&incoming));
                    }
                    if Instant::now() > deadline {
                        let what = "the source did not open its connections in time";
                        return Err(Setback::Here(self.failure(Phase::Send, what)));
                    }
                }
            }
        }
        images.ok_or(Setback::Disconnected)
    }

    fn receive_pages(&mut self, mut channel: Channel) {
        let store = Arc::clone(&self.store);
        let (stop, wait) = (self.stop.clone(), self.shared.step(&self.stop));
        self.receivers.push(thread::spawn(move || {
            let result = stream::receive_pages(&mut channel, &store, &wait);
            // A broken stream ends the migration now, not when somebody misses a page.
            if let Err(error) = &result {
                if !stop.is_cancelled() {
                    warn!(%error, "receiving pages");
                }
                stop.cancel();
            }
            result
                .map(|stats| stats.pages)
                .map_err(|error| error.to_string())
        }));
    }

    fn receive_images(&mut self, mut channel: Channel) -> Result<ImageCount, Setback> {
        let wait = self.shared.step(&self.stop);
        let Some(hold) = &self.hold else {
            unreachable!("received before prepared")
        };
        let limit = self.shared.options.max_memory;
        let received = directory::receive(hold.directory().path(), limit, &mut channel, &wait);
        let count = received.map_err(|e: ImagesError| self.here(Phase::Send, &e))?;
        // The steps before it are the source's, which measures them itself.
        self.clock = Stopwatch::new();
        Ok(count)
    }

    fn restore(&mut self) -> Result<(), Setback> {
        let wait = self.shared.step(&self.stop);
        let Some(hold) = &mut self.hold else {
            unreachable!("restored before prepared")
        };
        // The store is sealed when the last stream has ended, so that what is missing is zero.
        let receivers = std::mem::take(&mut self.receivers);
        let store = Arc::clone(&self.store);
        let sealer = thread::spawn(move || -> Result<u64, String> {
            let mut pages = 0;
            for receiver in receivers {
                pages += receiver
                    .join()
                    .map_err(|_| "a receiver panicked".to_owned())??;
            }
            store.seal();
            Ok(pages)
        });
        let shell_job = self.needs.shell_job;
        let result = hold.restore(self.shared, shell_job, &self.store, &mut self.clock, &wait);
        if result.is_err() {
            self.stop.cancel();
        }
        let sealed = sealer
            .join()
            .unwrap_or_else(|_| Err("a receiver panicked".to_owned()));
        let error = match (result, sealed) {
            (Ok(()), Ok(pages)) => {
                self.received.pages = pages;
                return Ok(());
            }
            (Ok(()), Err(reason)) => {
                return Err(self.setback_or(self.failure(Phase::Send, reason)));
            }
            (Err(error), _) => error,
        };
        let mut failure = Failure::from_error(&self.shared.host.name, Phase::Restore, &*error);
        if let Some(log) = self.hold.as_ref().and_then(Hold::keep_log) {
            let note = format!("CRIU's log is {} there", log.display());
            failure.remedy = Some(match failure.remedy {
                Some(remedy) => format!("{remedy}; {note}"),
                None => note,
            });
        }
        Err(self.setback_or(failure))
    }

    /// The source's word on how much it sent, which has to be what came.
    fn check_offer(&mut self) -> Result<(), Setback> {
        let Offer { pages, images, .. } = match self.next("an offer")? {
            control::Body::Offer(offer) => offer,
            other => return Err(self.unexpected(&other, "an offer")),
        };
        if self.received == (Received { pages, images }) {
            return Ok(());
        }
        let what = format!(
            "{} of {pages} pages and {} of {images} images came",
            self.received.pages, self.received.images
        );
        Err(Setback::Here(self.failure(Phase::Send, what)))
    }

    fn await_commit(&mut self) -> Result<(), Setback> {
        match self.next("a commit")? {
            control::Body::Commit(_) => {
                self.clock = Stopwatch::new();
                Ok(())
            }
            other => Err(self.unexpected(&other, "a commit")),
        }
    }

    /// The target is this host's: it has to run, whatever else fails.
    fn settle(&mut self) {
        while matches!(self.machine, Destination::Owner(_)) {
            if self.on(Event::Failed).is_err() {
                thread::sleep(THAW_PAUSE);
            }
        }
        info!("the target runs here");
        let _ = self.on(Event::Filled);
        // A source that did not hear it asks again, over this connection or a new one.
        while let Ok(control::Body::Commit(_)) = self.next("the end") {
            let _ = self.on(Event::Commit);
        }
        self.hold = None;
    }

    /// The one place that undoes.
    fn undo(&mut self, setback: Setback) {
        let event = match setback {
            Setback::Here(failure) => {
                warn!("{failure}");
                self.failure = Some(failure);
                Event::Failed
            }
            Setback::Aborted => Event::Aborted,
            Setback::Disconnected => Event::Disconnected,
        };
        // Only of what it has said to hold can the source ask again what became of it.
        let was_held = matches!(self.machine, Destination::Held(_));
        let _ = self.on(event);
        if let Some(journal) = self.journal.take().filter(|_| !was_held) {
            journal.remove();
        }
        info!("given up");
    }

    /// Feeds an event to the hand-over and performs what follows.
    fn on(&mut self, event: Event) -> Result<(), Setback> {
        let (next, actions) = self.machine.on(event);
        let before = std::mem::replace(&mut self.machine, next);
        for action in actions {
            match self.perform(action) {
                Ok(()) => {}
                // What is not on disk has not happened, and nothing that follows it either. But
                // nothing on disk means "refused" to whoever reads it later.
                Err(setback) if matches!(action, Action::Record(_)) && !self.machine.is_final() => {
                    self.machine = before;
                    return Err(setback);
                }
                Err(setback) if !self.machine.is_final() => return Err(setback),
                Err(_) => {}
            }
        }
        // The thaw is an action of this side; that it is done is the next event.
        if event == Event::Commit || event == Event::Failed {
            if let Destination::Owner(_) = self.machine {
                return self.on(Event::Thawed);
            }
        }
        Ok(())
    }

    fn perform(&mut self, action: Action) -> Result<(), Setback> {
        match action {
            Action::Record(record) => {
                let Some(journal) = &mut self.journal else {
                    return Ok(());
                };
                journal
                    .destination(record)
                    .map_err(|e| self.here(Phase::Commit, &e))
            }
            Action::SendPrepared => self.tell(control::Body::Prepared(Prepared {})),
            Action::SendHeld => {
                let phases = self.clock.take();
                self.tell(control::Body::Held(Held { phases }))
            }
            Action::Thaw => {
                let Some(hold) = &mut self.hold else {
                    unreachable!("thawed before prepared")
                };
                hold.thaw().map_err(|e| self.here(Phase::Commit, &*e))?;
                self.clock.lap("thaw");
                Ok(())
            }
            Action::SendResumed => {
                let pid = self.hold.as_ref().map_or(0, Hold::root);
                let phases = self.clock.take();
                self.tell(control::Body::Resumed(Resumed { pid, phases }))
            }
            Action::SendComplete => self.tell(control::Body::Complete(Complete { faults: None })),
            Action::Kill => {
                self.stop.cancel();
                if let Some(mut hold) = self.hold.take() {
                    for left in hold.undo() {
                        warn!("{left}");
                    }
                }
                Ok(())
            }
            Action::SendRefused => {
                let failure = self.failure.clone().unwrap_or_else(|| {
                    self.failure(
                        Phase::Restore,
                        "the source gave up, or the connection broke",
                    )
                });
                let wait = Wait::uncancellable(Duration::from_secs(5));
                let _ = self
                    .channel
                    .send_control(control::Body::Failed((&failure).into()), &wait);
                Ok(())
            }
        }
    }

    /// The next message of the source.
    fn next(&mut self, due: &'static str) -> Result<control::Body, Setback> {
        match self.incoming.recv_timeout(self.shared.options.step_time) {
            Ok(Incoming::Message(control::Body::Failed(_))) => Err(Setback::Aborted),
            Ok(Incoming::Message(body)) => Ok(body),
            Ok(Incoming::Lost(error)) => {
                debug!(%error, "the command connection ended");
                Err(Setback::Disconnected)
            }
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("the source did not send {due} in time");
                Err(Setback::Here(self.failure(Phase::Restore, what)))
            }
            Err(RecvTimeoutError::Disconnected) => Err(Setback::Disconnected),
        }
    }

    /// Whether the source has gone or given up meanwhile.
    fn check_stop(&mut self) -> Result<(), Setback> {
        if !self.stop.is_cancelled() {
            return Ok(());
        }
        Err(self.setback_or(self.failure(Phase::Send, "a connection of the source broke")))
    }

    /// A step of this side failed: because the source has gone or given up, if it has.
    fn setback_or(&self, failure: Failure) -> Setback {
        match self.incoming.try_recv() {
            Ok(Incoming::Message(control::Body::Failed(_))) => Setback::Aborted,
            Ok(Incoming::Lost(_)) => Setback::Disconnected,
            Ok(Incoming::Message(_)) | Err(_) => Setback::Here(failure),
        }
    }

    fn out_of_turn(&self, incoming: &Incoming) -> Setback {
        match incoming {
            Incoming::Message(control::Body::Failed(_)) => Setback::Aborted,
            Incoming::Message(got) => self.unexpected(got, "a connection"),
            Incoming::Lost(_) => Setback::Disconnected,
        }
    }

    fn tell(&mut self, body: control::Body) -> Result<(), Setback> {
        let wait = Wait::uncancellable(self.shared.options.step_time);
        self.channel
            .send_control(body, &wait)
            .map_err(|_| Setback::Disconnected)
    }

    fn failure(&self, phase: Phase, what: impl Into<String>) -> Failure {
        Failure::new(&self.shared.host.name, phase, what)
    }

    fn here(&self, phase: Phase, error: &(dyn Error + 'static)) -> Setback {
        self.setback_or(Failure::from_error(&self.shared.host.name, phase, error))
    }

    fn unexpected(&self, got: &control::Body, due: &str) -> Setback {
        let what = format!("the source sent {} where {due} was due", got.name());
        Setback::Here(self.failure(Phase::Check, what))
    }
}
