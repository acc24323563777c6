//! What the hand-over decides, as the destination does it.

use std::thread;
use std::time::Duration;

use haulier_engine::destination::{Action, Destination, Event};
use haulier_engine::journal::DestinationRecord;
use haulier_engine::phase::Phase;
use haulier_memory::lazy::FillStats;
use haulier_proto::message::{Complete, Faults, Held, Prepared, Resumed, control};
use haulier_sys::wait::{Cancel, Wait};
use tracing::warn;

use crate::checkpoint;
use crate::destination::dialogue::Setback;
use crate::destination::hold::Hold;
use crate::destination::session::Session;
use crate::journal::Journal;

/// How long until a note that could not be written is tried again.
const NOTE_PAUSE: Duration = Duration::from_secs(1);

impl Session<'_> {
    /// Feeds an event to the hand-over and performs what follows.
    pub(super) fn on(&mut self, event: Event) -> Result<(), Setback> {
        let (next, actions) = self.machine.on(event);
        let before = std::mem::replace(&mut self.machine, next);
        for action in actions {
            match self.perform(action) {
                Ok(()) => {}
                // What is not on disk has not happened, and nothing that follows it either. But
                // nothing on disk means "refused" to whoever reads it later.
                Err(setback)
                    if matches!(action, Action::Record(_))
                        && !matches!(self.machine, Destination::Refused(_)) =>
                {
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
        checkpoint::reach("destination", format_args!("{action:?}"));
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
            Action::SendComplete => {
                // Whoever hears it may move the target on at once.
                self.close_journal();
                let faults = self.filled.as_ref().map(faults_of);
                self.tell(control::Body::Complete(Complete { faults }))
            }
            Action::SendLost => {
                self.note_removed();
                self.close_journal();
                let what = "memory of the target could not be completed: it was killed";
                let failure = self.failure(Phase::Arrive, what);
                self.tell(control::Body::Lost((&failure).into()))
            }
            Action::Kill => {
                if let Some(link) = &self.link {
                    link.stop.cancel();
                }
                if let Some(mut hold) = self.hold.take() {
                    for left in hold.undo() {
                        warn!("{left}");
                    }
                    self.note_removed();
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
                if let Some(link) = &mut self.link {
                    let _ = link.send(control::Body::Failed((&failure).into()), &wait);
                }
                Ok(())
            }
        }
    }

    /// So that no recovery removes it again, an address least of all.
    fn note_removed(&mut self) {
        self.is_removed = true;
        if let Some(journal) = &mut self.journal {
            if let Err(error) = journal.destination(DestinationRecord::Removed) {
                warn!(%error, "journal");
            }
        }
    }

    /// Lets go of the journal, once it says what is to be known of the end. A later migration may
    /// bring the same address, which nobody may take for this one's.
    pub(super) fn close_journal(&mut self) {
        let Some(journal) = self.journal.take() else {
            return;
        };
        let noted = journal
            .contents()
            .has_destination(DestinationRecord::Removed);
        if self.is_removed && !noted {
            let stop = self.shared.stop.clone();
            thread::spawn(move || note_late(journal, &stop));
        }
    }
}

/// Goes on trying to note that what a migration had here is removed. If the server ends before, the
/// next one does it all again, before it takes anything in.
fn note_late(mut journal: Journal, stop: &Cancel) {
    while !stop.is_cancelled() {
        thread::sleep(NOTE_PAUSE);
        if journal.destination(DestinationRecord::Removed).is_ok() {
            return;
        }
    }
}

fn faults_of(stats: &FillStats) -> Faults {
    Faults {
        local: stats.local_faults,
        remote: stats.remote_faults,
        zero: stats.zero_faults,
        latency: stats
            .local_latency
            .merged(&stats.remote_latency)
            .buckets
            .to_vec(),
        remote_latency: stats.remote_latency.buckets.to_vec(),
    }
}
