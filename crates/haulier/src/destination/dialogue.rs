//! What a migration hears of its source and says to it, and why it does not go on.

use std::error::Error;
use std::sync::mpsc::RecvTimeoutError;

use haulier_engine::phase::Phase;
use haulier_proto::message::control;
use haulier_sys::wait::Wait;
use tracing::debug;

use crate::commands::Incoming;
use crate::destination::receivers::ReceiversError;
use crate::destination::session::Session;
use crate::failure::Failure;

/// Why a migration is not going on.
pub(super) enum Setback {
    /// Something of this side.
    Here(Failure),
    /// The source gave up.
    Aborted,
    /// The connection broke.
    Disconnected,
}

impl Session<'_> {
    /// The next message of the source.
    pub(super) fn next(&mut self, due: &'static str) -> Result<control::Body, Setback> {
        let Some(link) = &self.link else {
            return Err(Setback::Disconnected);
        };
        match link.incoming.recv_timeout(self.shared.options.step_time) {
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
    pub(super) fn check_stop(&mut self) -> Result<(), Setback> {
        if !self
            .link
            .as_ref()
            .is_some_and(|link| link.stop.is_cancelled())
        {
            return Ok(());
        }
        Err(self.setback_or(self.failure(Phase::Send, "a connection of the source broke")))
    }

    /// A step of this side failed: because the source has gone or given up, if it has.
    pub(super) fn setback_or(&self, failure: Failure) -> Setback {
        match self.heard() {
            Some(Incoming::Message(control::Body::Failed(_))) => Setback::Aborted,
            Some(Incoming::Lost(_)) => Setback::Disconnected,
            Some(Incoming::Message(_)) | None => Setback::Here(failure),
        }
    }
    /// What the source has said, if it has.
    pub(super) fn heard(&self) -> Option<Incoming> {
        self.link.as_ref()?.incoming.try_recv().ok()
    }

    pub(super) fn out_of_turn(&self, incoming: &Incoming) -> Setback {
        match incoming {
            Incoming::Message(control::Body::Failed(_)) => Setback::Aborted,
            Incoming::Message(got) => self.unexpected(got, "a connection"),
            Incoming::Lost(_) => Setback::Disconnected,
        }
    }

    pub(super) fn tell(&mut self, body: control::Body) -> Result<(), Setback> {
        let wait = Wait::uncancellable(self.shared.options.step_time);
        let Some(link) = &mut self.link else {
            return Err(Setback::Disconnected);
        };
        link.send(body, &wait).map_err(|_| Setback::Disconnected)
    }

    pub(super) fn failure(&self, phase: Phase, what: impl Into<String>) -> Failure {
        Failure::new(&self.shared.host.name, phase, what)
    }

    pub(super) fn here(&self, phase: Phase, error: &(dyn Error + 'static)) -> Setback {
        self.setback_or(Failure::from_error(&self.shared.host.name, phase, error))
    }

    pub(super) fn streams_failed(&self, phase: Phase, error: &ReceiversError) -> Setback {
        let failure = Failure::from_error(&self.shared.host.name, phase, error);
        self.setback_or(match error.remedy() {
            Some(remedy) => failure.remedy(remedy),
            None => failure,
        })
    }

    pub(super) fn unexpected(&self, got: &control::Body, due: &str) -> Setback {
        let what = format!("the source sent {} where {due} was due", got.name());
        Setback::Here(self.failure(Phase::Check, what))
    }
}
