//! From the commit on: only the destination's answers lead on, over whatever connection.

use std::time::{Duration, Instant};

use haulier_engine::phase::Phase;
use haulier_engine::source::{Event, Source};
use haulier_proto::message::{Missing, Rejoin, Role, control};
use haulier_transport::wait::Wait;
use tracing::{debug, info, warn};

use super::behind::Serving;
use super::pages::open_memory;
use super::{Migration, Outcome, Setback};
use crate::commands::Incoming;
use crate::failure::Failure;

/// Pause between attempts to reach the destination again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);
/// How often everything is looked at.
const LOOK: Duration = Duration::from_millis(20);

impl Migration<'_> {
    /// Waits for the end, and asks for it again and again.
    pub(super) fn settle(mut self) -> Outcome {
        let deadline = Instant::now() + self.options.doubt_time;
        let mut reason = None;
        loop {
            if let Some(event) = self.next_event(&mut reason) {
                // Nothing here may end the migration but the answer: errors are only noted.
                let result = self.on(event);
                if self.machine.is_final() {
                    return self.finish(reason);
                }
                if let Err(
                    Setback::Here(failure) | Setback::There(failure) | Setback::Link(failure),
                ) = result
                {
                    let is_new =
                        reason.as_ref().map(ToString::to_string) != Some(failure.to_string());
                    if is_new {
                        warn!(%failure, "after the commit");
                    }
                    reason = Some(failure);
                    // What was half said, or could not be recorded, is asked again over a new one.
                    self.link = None;
                }
            }
            if matches!(self.machine, Source::Serving(_)) {
                if let Some(failure) = self.watch_serving() {
                    return self.give_up_asking(Some(failure));
                }
            } else if Instant::now() > deadline {
                return self.give_up_asking(reason);
            }
        }
    }

    /// What the destination says, or that it cannot be heard.
    fn next_event(&mut self, reason: &mut Option<Failure>) -> Option<Event> {
        let Some(link) = &self.link else {
            // An attempt to reconnect failed.
            return Some(Event::Disconnected);
        };
        match link.receive(LOOK)? {
            Incoming::Message(control::Body::Resumed(resumed)) => {
                // An answer that was repeated says less.
                if resumed.pid > 0 {
                    self.report.pid = resumed.pid;
                }
                self.report.there(&resumed.phases);
                Some(Event::Resumed)
            }
            Incoming::Message(control::Body::Complete(complete)) => {
                self.report.faults(complete.faults.as_ref());
                if let Some(behind) = &mut self.behind {
                    self.report.post_copy(behind.totals());
                }
                Some(Event::Complete)
            }
            Incoming::Message(control::Body::Failed(failure)) => {
                *reason = Some(Failure::from(failure));
                Some(Event::Refused)
            }
            Incoming::Message(control::Body::Lost(failure)) => {
                *reason = Some(Failure::from(failure));
                Some(Event::Lost)
            }
            Incoming::Message(other) => {
                debug!(message = other.name(), "ignored after the commit");
                None
            }
            Incoming::Lost(error) => {
                let host = &self.plan.host.name;
                *reason = Some(Failure::from_error(host, self.timeline.phase(), &error));
                self.link = None;
                Some(Event::Disconnected)
            }
        }
    }

    /// Looks after the serving of pages. A failure is the end of it.
    fn watch_serving(&mut self) -> Option<Failure> {
        let behind = self.behind.as_mut()?;
        match behind.look() {
            Serving::Going | Serving::Over => None,
            Serving::Broken(error) => {
                // A connection that broke alone: all of them are made anew.
                if self.link.take().is_some() {
                    let reason = error.map_or_else(String::new, |error| error.to_string());
                    warn!(reason, "the link broke while pages were sent");
                }
                None
            }
            Serving::Lost(error) => {
                let host = &self.plan.host.name;
                let failure = Failure::from_error(host, Phase::Arrive, &error);
                Some(failure.remedy("end it at the destination: it waits for pages that are gone"))
            }
        }
    }

    /// Asks what is missing at the destination, and serves that over new connections.
    pub(super) fn serve_again(&mut self) -> Result<(), Setback> {
        // What began before the commit goes on until a connection breaks.
        if !std::mem::replace(&mut self.rejoins, true) {
            return Ok(());
        }
        let memory_streams = self.memory_streams;
        // Not cancelled by what cancels everything before the commit: the end of the first connection.
        let wait = Wait::uncancellable(self.options.link_time.attempt());
        if let Some(link) = &mut self.link {
            let sent = link.send(control::Body::Rejoin(Rejoin { memory_streams }), &wait);
            sent.map_err(|e| self.setback(&e))?;
        }
        let Some(missing) = self.await_missing()? else {
            return Ok(());
        };
        // It has everything, and has not placed it all yet.
        if self.behind.is_none() {
            return Ok(());
        }
        let wait = Wait::uncancellable(self.options.link_time.attempt());
        let memory = open_memory(&self.dialer, memory_streams, &wait);
        let memory = memory.map_err(|e| self.setback(&e))?;
        let faults = self.dialer.open(Role::Faults, 0, &wait);
        let (faults, _) = faults.map_err(|e| self.setback(&e))?;
        let Some(behind) = &mut self.behind else {
            return Ok(());
        };
        let resumed = behind.resume(&missing);
        let remaining = behind.remaining();
        let started = resumed.map(|()| behind.start(faults, memory, missing.round));
        match started {
            Err(error) => Err(self.setback(&error)),
            Ok(Err(error)) => Err(self.setback(&error)),
            Ok(Ok(())) => {
                info!(pages = remaining, "serving again");
                Ok(())
            }
        }
    }

    /// What the destination lacks; `None` if the migration is over.
    fn await_missing(&mut self) -> Result<Option<Missing>, Setback> {
        let deadline = Instant::now() + self.options.link_time.attempt();
        while Instant::now() < deadline {
            let Some(link) = &self.link else { break };
            match link.receive(LOOK) {
                Some(Incoming::Message(control::Body::Missing(missing))) => {
                    return Ok(Some(missing));
                }
                Some(Incoming::Message(control::Body::Complete(complete))) => {
                    self.report.faults(complete.faults.as_ref());
                    self.on(Event::Complete)?;
                    return Ok(None);
                }
                Some(Incoming::Message(control::Body::Lost(failure))) => {
                    self.report.failure = Some(failure.into());
                    self.on(Event::Lost)?;
                    return Ok(None);
                }
                Some(Incoming::Message(_)) | None => {}
                Some(Incoming::Lost(_)) => break,
            }
        }
        self.link = None;
        let what = "the destination did not say which pages it lacks";
        let host = &self.plan.host.name;
        Err(Setback::Link(Failure::new(host, Phase::Arrive, what)))
    }

    pub(super) fn reconnect(&mut self) -> Result<(), Setback> {
        self.progress.in_doubt(&self.peer);
        std::thread::sleep(RECONNECT_PAUSE);
        match self
            .dialer
            .command(None, &Wait::uncancellable(self.options.link_time.attempt()))
        {
            Ok(link) => {
                info!("reconnected");
                self.link = Some(link);
                self.on(Event::Reconnected)
            }
            Err(error) => {
                let host = &self.plan.host.name;
                let phase = self.timeline.phase();
                Err(Setback::Link(Failure::from_error(host, phase, &error)))
            }
        }
    }

    /// Moved, refused after the commit was sent, or lost.
    fn finish(mut self, reason: Option<Failure>) -> Outcome {
        self.timeline.finish();
        self.link = None;
        if matches!(self.machine, Source::Stranded(_)) {
            return self.strand(reason);
        }
        // What could not be removed now, the next haulier on this host tries again by the journal.
        if let Some(journal) = self.journal.take().filter(|_| self.report.left.is_empty()) {
            journal.remove();
        }
        if matches!(self.machine, Source::RolledBack(_)) {
            let host = &self.plan.host.name;
            let failure = reason
                .unwrap_or_else(|| Failure::new(host, Phase::Commit, "the destination refused"));
            return Outcome::RolledBack {
                failure,
                left: self.report.left,
            };
        }
        self.report.close(&self.timeline);
        Outcome::Moved(Box::new(self.report))
    }

    /// Leaves the last copy as it stands, for a person.
    fn strand(mut self, reason: Option<Failure>) -> Outcome {
        self.behind = None;
        if let Some(target) = self.target.take() {
            target.keep();
        }
        let host = &self.plan.host.name;
        let said = self.report.failure.take().or(reason);
        let failure = said.unwrap_or_else(|| {
            Failure::new(host, Phase::Arrive, "the destination lost the target")
        });
        Outcome::Stranded {
            id: self.dialer.migration,
            failure,
        }
    }

    fn give_up_asking(mut self, reason: Option<Failure>) -> Outcome {
        self.behind = None;
        if let Some(target) = self.target.take() {
            target.keep();
        }
        let host = &self.plan.host.name;
        let failure = reason.unwrap_or_else(|| {
            Failure::new(
                host,
                Phase::Commit,
                "the destination did not answer the commit",
            )
        });
        Outcome::InDoubt {
            id: self.dialer.migration,
            failure,
        }
    }
}
