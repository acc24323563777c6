//! The source of a migration: `haulier migrate`.

pub mod again;
mod behind;
mod forwarding;
mod link;
mod pages;
mod plan;
mod pre_copy;
mod ready;
mod rounds;
mod settle;
mod switchover;
mod target;
mod veil;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use haulier_engine::convergence::{Mode, OnStall};
use haulier_engine::phase::Phase;
use haulier_engine::source::{Action, Event, Source};
use haulier_memory::stream::StreamOptions;
use haulier_proto::id::MigrationId;
use haulier_proto::message::{Begin, Commit, Frozen, Offer, control};
use haulier_targets::network::{Announcement, LockScope};
use haulier_transport::tcp;
use haulier_transport::wait::{Cancel, Wait};
use tracing::{debug, warn};

pub use self::plan::Options;

use self::behind::Behind;
use self::link::{Dialer, Link};
use self::pages::{Also, Streams};
use self::plan::Plan;
use self::ready::{Ready, interrupted};
use self::rounds::Rounds;
use self::target::{Target, TargetError};
use crate::checkpoint;
use crate::commands::Incoming;
use crate::directories::state_directory;
use crate::failure::Failure;
use crate::journal::{Holding, Journal};
use crate::report::{Progress, Report};
use crate::timeline::{Stopwatch, Timeline};

/// How long the way back may take, step by step: it is not cancelled.
const UNDO_TIME: Duration = Duration::from_secs(30);

/// How a migration ended.
#[derive(Debug)]
pub enum Outcome {
    /// The target runs on the destination.
    Moved(Box<Report>),
    /// The target was never touched; it runs here.
    NothingTouched(Failure),
    /// The target was frozen, and runs here again.
    RolledBack {
        /// What failed.
        failure: Failure,
        /// What could not be undone, if anything.
        left: Vec<String>,
    },
    /// The target was lost at the destination, after it may have run there; as it was frozen it
    /// stands here.
    Stranded {
        /// The migration.
        id: MigrationId,
        /// What is known.
        failure: Failure,
    },
    /// The target stands frozen here; whether it runs on the destination is not known.
    InDoubt {
        /// The migration.
        id: MigrationId,
        /// What is known.
        failure: Failure,
    },
}

/// Moves a process tree. `stop` cancels it at any moment before the commit.
pub fn migrate(options: &Options, stop: &Cancel, progress: &mut dyn Progress) -> Outcome {
    let mut timeline = Timeline::new();
    let ready = match Ready::make(options, stop, progress, &mut timeline) {
        Ok(ready) => ready,
        Err(failure) => return Outcome::NothingTouched(failure),
    };
    Migration::new(ready, options, stop, progress, timeline).run()
}

/// A migration that touches its target.
struct Migration<'a> {
    plan: Plan,
    dialer: Dialer,
    link: Option<Link>,
    peer: String,
    journal: Option<Journal>,
    options: &'a Options,
    stop: &'a Cancel,
    progress: &'a mut dyn Progress,
    timeline: Timeline,
    machine: Source,
    target: Option<Target>,
    streams: Option<Streams>,
    rounds: Option<Rounds>,
    /// The rounds ended with pages to be left here.
    leave_behind: bool,
    behind: Option<Behind>,
    /// The next serving of pages is one over new connections.
    rejoins: bool,
    memory_streams: u32,
    line_share: u8,
    report: Report,
}

/// A step that did not succeed. What it means depends on the state of the hand-over.
enum Setback {
    /// Something of this side, or the user.
    Here(Failure),
    /// The destination refused.
    There(Failure),
    /// The connection broke.
    Link(Failure),
}

impl<'a> Migration<'a> {
    fn new(
        ready: Ready,
        options: &'a Options,
        stop: &'a Cancel,
        progress: &'a mut dyn Progress,
        timeline: Timeline,
    ) -> Migration<'a> {
        let report = Report::new(&ready.plan.tree, &ready.plan.host.name, &ready.peer);
        Migration {
            plan: ready.plan,
            dialer: ready.dialer,
            link: Some(ready.link),
            peer: ready.peer,
            journal: Some(ready.journal),
            options,
            stop,
            progress,
            timeline,
            machine: Source::new(),
            target: None,
            streams: None,
            rounds: None,
            leave_behind: false,
            behind: None,
            rejoins: false,
            memory_streams: 1,
            line_share: pages::SHARED,
            report,
        }
    }

    fn run(mut self) -> Outcome {
        match self.hand_over() {
            Ok(()) => self.settle(),
            Err(setback) => self.undo(setback),
        }
    }

    /// The migration up to the commit, a line per phase.
    fn hand_over(&mut self) -> Result<(), Setback> {
        self.prepare()?;
        self.pre_copy()?;
        self.on(Event::Begin)?;
        let skeleton = self.dump()?;
        let sent = self.send(&skeleton)?;
        self.on(sent)?;
        self.serve_from_now_on()?;
        self.await_held()?;
        self.timeline.enter(Phase::Commit);
        self.on(Event::Held)
    }

    fn prepare(&mut self) -> Result<(), Setback> {
        self.timeline.enter(Phase::Prepare);
        let wait = self.step();
        let Some(journal) = &mut self.journal else {
            unreachable!("prepared without a journal")
        };
        for address in &self.options.move_addresses {
            let held = journal.hold(&Holding::Address(address.to_string()));
            if let Err(error) = held {
                return Err(self.setback(&error));
            }
        }
        let target = Target::prepare(&self.plan, &self.options.move_addresses, journal, &wait);
        self.target = Some(target.map_err(|e| self.not_taken(&*e))?);
        let mode = self.options.mode;
        let may_leave = matches!(mode, Mode::PostCopy | Mode::Hybrid)
            || self.options.policy.on_stall == OnStall::PostCopy;
        let local = self.local_address();
        let streams = self.options.streams;
        let streams = streams.unwrap_or_else(|| pages::suitable_streams(local));
        self.memory_streams = streams;
        let suitable = || {
            let moved = &self.options.move_addresses;
            pages::suitable_share(local, moved, self.plan.has_users)
        };
        self.line_share = self.options.line_share.unwrap_or_else(suitable);
        let begin = Begin {
            memory_streams: streams,
            faults: may_leave,
            packets: self.target.as_ref().is_some_and(Target::captures_packets),
        };
        let also = Also {
            faults: may_leave,
            packets: begin.packets,
        };
        self.tell(control::Body::Begin(begin))?;
        match self.answer("prepared")? {
            control::Body::Prepared(_) => {}
            other => return Err(self.unexpected(&other, "prepared")),
        }
        let wait = self.step();
        let stream_options = StreamOptions {
            compression: self.options.compression,
            bandwidth: self.options.bandwidth,
            line_share: self.line_share,
            ..StreamOptions::default()
        };
        let opened = Streams::open(&self.dialer, stream_options, streams, &also, &wait);
        self.streams = Some(opened.map_err(|e| self.setback(&*e))?);
        let Some(target) = &mut self.target else {
            unreachable!("ready before prepared")
        };
        let ready = target.get_ready(&self.plan, &wait);
        ready.map_err(|e| self.setback(&*e))
    }

    /// Why the target could not be confined.
    fn not_taken(&self, error: &(dyn std::error::Error + 'static)) -> Setback {
        let Some(TargetError::Claimed { pid, claim }) = error.downcast_ref() else {
            return self.setback(error);
        };
        let host = &self.plan.host.name;
        Setback::Here(plan::claimed(host, self.timeline.phase(), *pid, *claim))
    }

    /// The address of this host that the destination was reached from.
    fn local_address(&self) -> Option<IpAddr> {
        let link = self.link.as_ref()?;
        Some(tcp::local_address(link.channel())?.ip())
    }

    fn await_held(&mut self) -> Result<(), Setback> {
        self.timeline.enter(Phase::Restore);
        match self.answer("held")? {
            control::Body::Held(held) => {
                self.report.there(&held.phases);
                Ok(())
            }
            other => Err(self.unexpected(&other, "held")),
        }
    }

    /// The one place that undoes, for every failure before the commit.
    fn undo(mut self, setback: Setback) -> Outcome {
        let (event, failure) = match setback {
            Setback::Here(failure) => (Event::Failed, failure),
            Setback::There(failure) => (Event::Refused, failure),
            Setback::Link(failure) => (Event::Disconnected, failure),
        };
        if matches!(self.machine, Source::InDoubt(_)) {
            // The commit was about to be sent when this failed; it may have arrived.
            warn!(%failure, "after the commit");
            return self.settle();
        }
        let touched = !matches!(self.machine, Source::Running(_));
        let failure = self.with_log(failure);
        self.report.failure = Some(failure.clone());
        // Errors of the way back are in the report.
        let _ = self.on(event);
        // Confined, but not yet frozen: a way back as well, though nobody has noticed anything.
        let mut left = std::mem::take(&mut self.report.left);
        if let Some(mut target) = self.target.take() {
            left.extend(target.let_go(&Wait::uncancellable(UNDO_TIME)));
        }
        if let Some(journal) = self.journal.take() {
            journal.remove();
        }
        if touched || !left.is_empty() {
            Outcome::RolledBack { failure, left }
        } else {
            Outcome::NothingTouched(failure)
        }
    }

    /// Feeds an event to the hand-over and performs what follows.
    fn on(&mut self, event: Event) -> Result<(), Setback> {
        let (next, actions) = self.machine.on(event);
        debug!(?event, from = ?self.machine, to = ?next, "hand-over");
        let before = std::mem::replace(&mut self.machine, next);
        let mut result = Ok(());
        for action in actions {
            let done = self.perform(action);
            if done.is_err() && matches!(action, Action::Record(_)) && !self.machine.is_final() {
                // What is not on disk has not happened, and nothing that follows it either.
                self.machine = before;
                return done;
            }
            if result.is_ok() {
                result = done;
            }
            if result.is_err() && !self.machine.is_final() {
                return result;
            }
        }
        result
    }

    fn perform(&mut self, action: Action) -> Result<(), Setback> {
        checkpoint::reach("source", format_args!("{action:?}"));
        match action {
            Action::Record(record) => {
                let Some(journal) = &mut self.journal else {
                    return Ok(());
                };
                journal.source(record).map_err(|e| self.setback(&e))
            }
            Action::Freeze => self.freeze(),
            Action::SendOffer => {
                let offer = Offer {
                    pages: self.streams.as_ref().map_or(0, Streams::pages),
                    images: self.report.sent.images,
                    left_behind: self.report.left_behind,
                    rounds: self.streams.as_ref().map_or(0, Streams::rounds),
                };
                self.tell(control::Body::Offer(offer))
            }
            Action::SendCommit => {
                // Not to be cut in the middle by Ctrl-C: it would come too late anyhow.
                let wait = Wait::uncancellable(self.options.step_time);
                let Some(link) = &mut self.link else {
                    return Ok(());
                };
                let result = link.send(control::Body::Commit(Commit {}), &wait);
                result.map_err(|e| self.setback(&e))
            }
            Action::SendAbort => {
                let failure = self
                    .report
                    .failure
                    .as_ref()
                    .map(Into::into)
                    .unwrap_or_default();
                let wait = Wait::uncancellable(Duration::from_secs(2));
                if let Some(link) = &mut self.link {
                    // If it does not arrive, the end of the connection says the same.
                    let _ = link.send(control::Body::Failed(failure), &wait);
                }
                Ok(())
            }
            Action::Thaw => {
                self.behind = None;
                if let Some(mut target) = self.target.take() {
                    let left = target.let_go(&Wait::uncancellable(UNDO_TIME));
                    self.report.left.extend(left);
                }
                // A destination that gave it up at the last moment may have announced itself.
                for address in &self.options.move_addresses {
                    if let Err(error) = Announcement::prepare(address).and_then(|a| a.send()) {
                        warn!(%error, "announcing");
                    }
                }
                Ok(())
            }
            Action::Kill => {
                self.timeline.enter(Phase::Release);
                self.behind = None;
                if let Some(mut target) = self.target.take() {
                    let wait = Wait::uncancellable(UNDO_TIME);
                    let left = target.kill(&self.plan, &self.options.move_addresses, &wait);
                    self.report.packets = target.forwarded();
                    self.report.left.extend(left);
                }
                Ok(())
            }
            Action::Reconnect => self.reconnect(),
            Action::Depart => {
                self.timeline.enter(Phase::Arrive);
                if let Some(target) = &mut self.target {
                    let left = target.depart(&self.options.move_addresses);
                    self.report.left.extend(left);
                }
                Ok(())
            }
            Action::Serve => self.serve_again(),
        }
    }

    fn freeze(&mut self) -> Result<(), Setback> {
        self.timeline.enter(Phase::Freeze);
        let wait = self.step();
        let scope = LockScope::new(&self.options.move_addresses, &self.plan.connections);
        let Some(target) = &mut self.target else {
            unreachable!("frozen before prepared")
        };
        let mut clock = Stopwatch::new();
        let result = target.freeze(&self.plan, &scope, &wait);
        clock.lap("stop");
        if let (Ok(()), Some(streams)) = (&result, &mut self.streams) {
            if let Some(channel) = streams.packets.take() {
                target.forward(&self.plan, channel);
                clock.lap("packets");
            }
        }
        self.report.here(&clock.take());
        result.map_err(|e| self.setback(&*e))?;
        self.tell(control::Body::Frozen(Frozen {}))
    }

    fn step(&self) -> Wait {
        self.stop.wait(self.options.step_time)
    }

    fn tell(&mut self, body: control::Body) -> Result<(), Setback> {
        let wait = self.step();
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let result = link.send(body, &wait);
        result.map_err(|e| self.setback(&e))
    }

    /// The destination's next message, whatever it is but a failure.
    fn answer(&mut self, due: &'static str) -> Result<control::Body, Setback> {
        let phase = self.timeline.phase();
        let host = self.plan.host.name.clone();
        let deadline = Instant::now() + self.options.step_time;
        let Some(link) = &self.link else {
            unreachable!("asked without a link")
        };
        loop {
            match link.receive(Duration::from_millis(50)) {
                Some(Incoming::Message(control::Body::Failed(failure))) => {
                    return Err(Setback::There(failure.into()));
                }
                Some(Incoming::Message(body)) => return Ok(body),
                Some(Incoming::Lost(error)) => {
                    return Err(Setback::Link(Failure::from_error(&host, phase, &error)));
                }
                None if self.stop.is_cancelled() => {
                    return Err(Setback::Here(interrupted(&host, phase)));
                }
                None if Instant::now() > deadline => {
                    let what = format!("the destination was not {due} in time");
                    let failure = Failure::new(&host, phase, what);
                    return Err(Setback::Here(failure.remedy("allow more with --step-time")));
                }
                None => {}
            }
        }
    }

    /// Why a step of this side failed: if it was stopped because the destination failed or the
    /// link broke, that is the reason; if by the user, that; else its own error.
    fn setback(&self, error: &(dyn std::error::Error + 'static)) -> Setback {
        let phase = self.timeline.phase();
        let host = &self.plan.host.name;
        // A step that failed on a broken connection was told so before the command connection's own
        // end came in.
        let patience = if self.stop.is_cancelled() { 0 } else { 200 };
        let patience = Duration::from_millis(patience);
        let incoming = self.link.as_ref().and_then(|link| link.last_word(patience));
        match incoming {
            Some(Incoming::Message(control::Body::Failed(failure))) => {
                Setback::There(failure.into())
            }
            Some(Incoming::Lost(lost)) => Setback::Link(Failure::from_error(host, phase, &lost)),
            _ if self.stop.is_cancelled() => Setback::Here(interrupted(host, phase)),
            _ => Setback::Here(Failure::from_error(host, phase, error)),
        }
    }

    fn unexpected(&self, got: &control::Body, due: &str) -> Setback {
        let what = format!("the destination sent {} where {due} was due", got.name());
        Setback::Here(Failure::new(
            &self.plan.host.name,
            self.timeline.phase(),
            what,
        ))
    }

    /// Keeps CRIU's log of a dump that failed here and says where.
    fn with_log(&self, mut failure: Failure) -> Failure {
        let dumping = matches!(self.timeline.phase(), Phase::Freeze | Phase::Dump);
        if let Some(target) = self.target.as_ref().filter(|_| dumping) {
            let id = self.dialer.migration;
            failure = failure.or_for_lack_of_space(target.directory().fullness());
            if target
                .directory()
                .keep_log(id, haulier_criu::dump::LOG)
                .is_some()
            {
                let kept = state_directory(id).join(haulier_criu::dump::LOG);
                let note = format!("CRIU's log is {}", kept.display());
                failure.remedy = Some(match failure.remedy {
                    Some(remedy) => format!("{remedy}; {note}"),
                    None => note,
                });
            }
        }
        failure
    }
}
