//! Why images could not be moved.

use std::io;
use std::path::{Path, PathBuf};

use haulier_transport::error::TransportError;
use thiserror::Error;

use crate::name::BadName;

/// Images could not be sent or received.
#[derive(Debug, Error)]
pub enum ImagesError {
    /// A file of this host failed.
    #[error("cannot {doing} {path}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection failed.
    #[error("the images did not get through")]
    Transport(#[from] TransportError),
    /// The peer sent a name that is none.
    #[error("the peer sent a name that cannot be an image's")]
    Name(#[from] BadName),
    /// The peer sent something out of order or damaged.
    #[error("{peer} sent images wrongly: {what}")]
    Wrong {
        /// The peer.
        peer: String,
        /// What is wrong.
        what: String,
    },
    /// The images are larger than this host allows.
    #[error("the images are larger than the {limit} bytes that this host allows")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
}

impl ImagesError {
    pub(crate) fn file(doing: &'static str, path: &Path, source: io::Error) -> ImagesError {
        ImagesError::File {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}
