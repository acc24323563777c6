//! What can go wrong on a channel.

use std::io;

use haulier_proto::frame::FrameError;
use thiserror::Error;

/// An error of a channel. After any of them the channel is of no further use.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The peer could not be reached.
    #[error("cannot connect to {address}")]
    Connect {
        /// The address as the user gave it.
        address: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The address to listen on cannot be had.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address as the user gave it.
        address: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to {peer} broke while {doing}")]
    Broken {
        /// The peer's address.
        peer: String,
        /// What this side was doing.
        doing: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection where more was due.
    #[error("{peer} closed the connection while {doing}")]
    Closed {
        /// The peer's address.
        peer: String,
        /// What this side was doing.
        doing: &'static str,
    },
    /// The deadline passed.
    #[error("{peer} did not answer in time while {doing}")]
    Deadline {
        /// The peer's address.
        peer: String,
        /// What this side was doing.
        doing: &'static str,
    },
    /// The wait was cancelled by the user or by another part of the migration.
    #[error("cancelled while {doing}")]
    Cancelled {
        /// What this side was doing.
        doing: &'static str,
    },
    /// What came is not what the protocol asks for.
    #[error("{peer} broke the protocol")]
    Frame {
        /// The peer's address.
        peer: String,
        /// What is wrong with it.
        #[source]
        source: FrameError,
    },
    /// A control message of a later version, or one that is not due now.
    #[error("{peer} sent {got} where {expected} was due")]
    Unexpected {
        /// The peer's address.
        peer: String,
        /// What came.
        got: String,
        /// What was due.
        expected: &'static str,
    },
    /// The peer refused the connection in its welcome.
    #[error("{peer} refused the connection: {reason}")]
    Refused {
        /// The peer's address.
        peer: String,
        /// The peer's reason.
        reason: String,
    },
}

impl TransportError {
    /// Whether the wait ended because someone cancelled it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, TransportError::Cancelled { .. })
    }
}
