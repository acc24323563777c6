//! One migration, at the destination.

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use haulier_engine::destination::{Destination, Event};
use haulier_engine::phase::Phase;
use haulier_images::account::Account;
use haulier_images::directory::{self, ImageCount, ImagesError};
use haulier_memory::lazy::FillStats;
use haulier_memory::post::FaultClient;
use haulier_memory::store::PageStore;
use haulier_proto::id::MigrationId;
use haulier_proto::message::{Begin, PUSH_ROUND, Requirements, Role, control};
use haulier_targets::network::MoveIp;
use haulier_transport::channel::Channel;
use tracing::{info, info_span, warn};

use crate::commands::Incoming;
use crate::destination::dialogue::Setback;
use crate::destination::hold::{Hold, Memory};
use crate::destination::link::Link;
use crate::destination::registry::Stream;
use crate::destination::{Shared, check};
use crate::failure::Failure;
use crate::journal::{Holding, Journal, Side};
use crate::timeline::Stopwatch;

/// How often it is looked whether the source still sends something.
const LOOK: Duration = Duration::from_millis(100);

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

pub(super) struct Session<'a> {
    pub(super) shared: &'a Shared,
    pub(super) id: MigrationId,
    /// `None` once it has broken; only after the commit may there be another.
    pub(super) link: Option<Link>,
    pub(super) streams: Receiver<Stream>,
    pub(super) machine: Destination,
    pub(super) journal: Option<Journal>,
    needs: Requirements,
    pub(super) hold: Option<Hold>,
    pub(super) store: Arc<PageStore>,
    pub(super) faults: Arc<FaultClient>,
    /// What the target's memory was filled with, once it is complete.
    pub(super) filled: Option<FillStats>,
    images: u32,
    /// Pages that are to come after the commit.
    pub(super) left_behind: u64,
    pub(super) failure: Option<Failure>,
    /// The source has said that the target stands.
    stands: bool,
    /// What was made for the target here is gone.
    pub(super) is_removed: bool,
    pub(super) clock: Stopwatch,
}

impl<'a> Session<'a> {
    fn new(
        shared: &'a Arc<Shared>,
        channel: Channel,
        id: MigrationId,
        streams: Receiver<Stream>,
    ) -> std::io::Result<Session<'a>> {
        let store = Arc::new(PageStore::new(shared.options.max_memory));
        Ok(Session {
            shared,
            id,
            link: Some(Link::new(channel, None)?),
            streams,
            machine: Destination::new(),
            journal: None,
            needs: Requirements::default(),
            hold: None,
            faults: FaultClient::new(Arc::clone(&store)),
            store,
            filled: None,
            images: 0,
            left_behind: 0,
            failure: None,
            stands: false,
            is_removed: false,
            clock: Stopwatch::new(),
        })
    }

    fn run(mut self) {
        let result = self.take_over();
        if self.machine.may_run() {
            self.arrive();
        } else if let Err(setback) = result {
            self.undo(setback);
        }
    }

    /// The migration, a line per step. It is over at once if the source only asked.
    fn take_over(&mut self) -> Result<(), Setback> {
        let Some(begin) = self.answer_checks()? else {
            return Ok(());
        };
        info!(
            program = self.needs.program,
            pid = self.needs.root_pid,
            "begins"
        );
        self.prepare()?;
        self.on(Event::Begun)?;
        let images = self.open_streams(&begin)?;
        self.receive_images(images)?;
        self.restore()?;
        self.check_offer()?;
        self.on(Event::Restored)?;
        self.await_commit()?;
        self.on(Event::Commit)
    }

    /// Answers checks until the source begins; `None` if it leaves instead.
    fn answer_checks(&mut self) -> Result<Option<Begin>, Setback> {
        loop {
            match self.next("a check") {
                Ok(control::Body::Check(needs)) => {
                    let Some(link) = &self.link else {
                        return Err(Setback::Disconnected);
                    };
                    let findings = check::findings(self.shared, &needs, &link.stop);
                    for problem in &findings.problems {
                        info!(what = problem.what, "cannot take {}", needs.program);
                    }
                    self.needs = needs;
                    self.tell(control::Body::Findings(findings))?;
                }
                Ok(control::Body::Begin(begin)) if self.needs.root_pid > 0 => {
                    return Ok(Some(begin));
                }
                // A source that asks again about what has been forgotten here. It may have run here:
                // to refuse it would let it run there as well, from an older state.
                Ok(other @ (control::Body::Commit(_) | control::Body::Rejoin(_))) => {
                    warn!(
                        message = other.name(),
                        "of a migration that is not known here: no answer"
                    );
                    return Ok(None);
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
        let Some(link) = &self.link else {
            unreachable!("prepared for a source that was never there")
        };
        let wait = self.shared.step(&link.stop);
        Hold::prepare(self.shared, self.id, addresses, self.needs.shell_job, &wait)
    }

    /// Waits for the connections, and starts to receive pages over each memory connection.
    fn open_streams(&mut self, begin: &Begin) -> Result<Channel, Setback> {
        let deadline = Instant::now() + self.shared.options.step_time;
        let mut images = None;
        let mut missing = begin.memory_streams.clamp(1, 64);
        let (mut faults, mut packets) = (begin.faults, begin.packets);
        let client = Arc::clone(&self.faults);
        while images.is_none() || missing > 0 || faults || packets {
            match self.streams.recv_timeout(Duration::from_millis(20)) {
                Ok(Stream { role, channel, .. }) => match role {
                    Role::Images if images.is_none() => images = Some(channel),
                    Role::Memory if missing > 0 => {
                        missing -= 1;
                        self.link_mut().receivers.add(channel, &client);
                    }
                    Role::Faults if faults => {
                        faults = false;
                        let client = Arc::clone(&self.faults);
                        let receivers = &mut self.link_mut().receivers;
                        receivers.add_faults(channel, PUSH_ROUND, &client);
                    }

                    Role::Packets if packets => {
                        packets = false;
                        if let Some(hold) = &mut self.hold {
                            hold.receive_packets(channel);
                        }
                    }
                    // More than announced: closed by being dropped.
                    _ => {}
                },
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    self.check_stop()?;
                    // Nothing is due before the connections. A source that says something all the
                    // same, be it a commit, gets its refusal now and not after the deadline.
                    // That the target stands may come before the last connection has been handed on.
                    match self.heard() {
                        Some(Incoming::Message(control::Body::Frozen(_))) => self.stands = true,
                        Some(incoming) => return Err(self.out_of_turn(&incoming)),
                        None => {}
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

    /// Receives the images, which come when the target is frozen, after rounds of whatever length.
    fn receive_images(&mut self, channel: Channel) -> Result<(), Setback> {
        let Some(mut hold) = self.hold.take() else {
            unreachable!("received before prepared")
        };
        let received = self.receive_into(&mut hold, channel);
        self.hold = Some(hold);
        self.images = received?.images;
        // The steps before it are the source's, which measures them itself.
        self.clock = Stopwatch::new();
        Ok(())
    }

    /// Receives the images. Does meanwhile what may be done from the moment on that the target
    /// stands, which the source tells.
    fn receive_into(&self, hold: &mut Hold, mut channel: Channel) -> Result<ImageCount, Setback> {
        let Some(link) = &self.link else {
            unreachable!("received from a source that was never there")
        };
        let (account, wait) = (
            Account::new(self.shared.options.max_memory),
            link.transfer(),
        );
        let (directory, store) = (hold.directory().path().to_owned(), &self.store);
        let patience = self.shared.options.step_time;
        let mut word = None;
        let received = thread::scope(|scope| {
            let (done, is_done) = mpsc::channel::<()>();
            let receiver = scope.spawn(|| {
                let _done = done;
                directory::receive_into_account(&directory, &account, &mut channel, &wait)
            });
            // A source that sends neither images nor pages any more is not waited for.
            let progress = || (store.received(), account.used());
            let (mut seen, mut since) = (progress(), Instant::now());
            loop {
                let look = match word {
                    Some(_) => LOOK,
                    None => {
                        word = self.hear_that_it_stands(hold);
                        Duration::ZERO
                    }
                };
                if let Some(Err(_)) = word {
                    link.stop.cancel();
                }
                if is_done.recv_timeout(look) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
                if seen != progress() {
                    (seen, since) = (progress(), Instant::now());
                }
                if since.elapsed() > patience {
                    link.stop.cancel();
                }
            }
            receiver.join()
        });
        let received = received.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        if let Some(Err(setback)) = word {
            return Err(setback);
        }
        let count = received.map_err(|e: ImagesError| {
            let phase = if word.is_some() {
                Phase::Send
            } else {
                Phase::PreCopy
            };
            match link.receivers.failure() {
                // It has cancelled the rest.
                Some(error) => self.streams_failed(phase, &error),
                None => self.here(phase, &e),
            }
        })?;
        // The images may have overtaken the word.
        let deadline = Instant::now() + patience;
        while word.is_none() && Instant::now() < deadline {
            word = self.hear_that_it_stands(hold);
        }
        let what = "the source did not say that the target stands";
        word.unwrap_or_else(|| Err(Setback::Here(self.failure(Phase::Send, what))))?;
        Ok(count)
    }

    /// If the source says within a moment that the target stands: how it went to make use of that.
    fn hear_that_it_stands(&self, hold: &mut Hold) -> Option<Result<(), Setback>> {
        if !self.stands {
            match self.link.as_ref()?.incoming.recv_timeout(LOOK).ok()? {
                Incoming::Message(control::Body::Frozen(_)) => {}
                other => return Some(Err(self.out_of_turn(&other))),
            }
        }
        let done = hold.approach(self.shared);
        Some(done.map_err(|e| self.here(Phase::Restore, &*e)))
    }

    fn restore(&mut self) -> Result<(), Setback> {
        let (Some(hold), Some(link)) = (&mut self.hold, &self.link) else {
            unreachable!("restored before prepared")
        };
        let wait = self.shared.step(&link.stop);
        let memory = Memory {
            store: &self.store,
            faults: &self.faults,
        };
        let result = hold.restore(self.shared, &memory, &mut self.clock, &wait);
        let Err(error) = result else {
            return Ok(());
        };
        let mut failure = Failure::from_error(&self.shared.host.name, Phase::Restore, &*error);
        let fullness = self
            .hold
            .as_ref()
            .and_then(|hold| hold.directory().fullness());
        failure = failure.or_for_lack_of_space(fullness);
        if let Some(log) = self.hold.as_ref().and_then(Hold::keep_log) {
            let note = format!("CRIU's log is {} there", log.display());
            failure.remedy = Some(match failure.remedy {
                Some(remedy) => format!("{remedy}; {note}"),
                None => note,
            });
        }
        Err(self.setback_or(failure))
    }

    /// The source's word on how much it sent, which has to be what came; what it kept has to be what
    /// is missing here.
    fn check_offer(&mut self) -> Result<(), Setback> {
        let offer = match self.next("an offer")? {
            control::Body::Offer(offer) => offer,
            other => return Err(self.unexpected(&other, "an offer")),
        };
        let (Some(hold), Some(link)) = (&self.hold, &self.link) else {
            unreachable!("offered before prepared")
        };
        let wait = self.shared.step(&link.stop);
        let came = link.receivers.wait_rounds(offer.rounds, &wait);
        let came = came.map_err(|e| self.streams_failed(Phase::Send, &e))?;
        // What the source keeps comes in at this moment, unless it keeps nothing.
        let missing = match offer.left_behind {
            0 => hold.missing_pages(),
            _ => 0,
        };
        if (came, self.images, missing) != (offer.pages, offer.images, 0) {
            let what = format!(
                "{came} of {} pages and {} of {} images came, and {missing} pages are missing",
                offer.pages, self.images, offer.images
            );
            return Err(Setback::Here(self.failure(Phase::Send, what)));
        }
        if offer.left_behind == 0 {
            self.store.seal();
        }
        self.left_behind = offer.left_behind;
        self.clock.lap("memory");
        Ok(())
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
        match was_held {
            true => self.close_journal(),
            false => {
                if let Some(journal) = self.journal.take() {
                    journal.remove();
                }
            }
        }
        info!("given up");
    }

    fn link_mut(&mut self) -> &mut Link {
        let Some(link) = &mut self.link else {
            unreachable!("connections of a source that was never there")
        };
        link
    }
}
