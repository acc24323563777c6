//! A failed dump or restore, with CRIU's own reason.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::log::{self, Reason};
use crate::messages::Response;
use crate::swrk::{RpcError, RunError};

/// CRIU failed, or could not be talked to.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct CriuFailure {
    what: String,
    reason: Option<Reason>,
    log: PathBuf,
    cancelled: bool,
}

impl CriuFailure {
    pub(crate) fn from_rpc(what: &str, error: RpcError, log: &Path) -> CriuFailure {
        let cancelled = matches!(error, RpcError::Cancelled);
        let detail = match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        let what = format!("{what}: {detail}");
        CriuFailure {
            what,
            reason: log::reason_in(log),
            log: log.to_owned(),
            cancelled,
        }
    }

    pub(crate) fn from_response(what: &str, response: &Response, log: &Path) -> CriuFailure {
        let mut what = what.to_owned();
        if let Some(errno) = response.errno.filter(|errno| *errno != 0) {
            let error = std::io::Error::from_raw_os_error(errno);
            what += &format!(" ({error})");
        }
        CriuFailure {
            what,
            reason: log::reason_in(log),
            log: log.to_owned(),
            cancelled: false,
        }
    }

    pub(crate) fn from_run(what: &str, error: RunError, log: &Path) -> CriuFailure {
        match error {
            RunError::Ended(response) => CriuFailure::from_response(what, &response, log),
            RunError::Rpc(error) => CriuFailure::from_rpc(what, error, log),
        }
    }

    /// CRIU's reason, dug out of its log; `None` if the log has none.
    pub fn reason(&self) -> Option<&Reason> {
        self.reason.as_ref()
    }

    /// CRIU's log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether the failure is that someone cancelled the wait.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled
    }
}
