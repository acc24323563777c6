//! What people and scripts ask of a running proxy or cache: a line of JSON each way over a socket in
//! its directory.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use haulier_sys::wait::{Wait, WaitError};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::local::{self, LocalError};

/// The socket.
pub(crate) const CONTROL_SOCKET: &str = "haulier-images.sock";

/// Longest line.
const LONGEST: usize = 1 << 20;
/// Longest time to say it.
pub(crate) const SAYING: Duration = Duration::from_secs(10);

/// Nothing could be asked, or the answer is no.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Nobody listens there.
    #[error("no image-proxy or image-cache serves this directory")]
    Nobody(#[from] LocalError),
    /// The directory cannot be read.
    #[error("cannot read {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It did not answer.
    #[error("no answer came")]
    Silent(#[source] io::Error),
    /// It answered something else.
    #[error("the answer makes no sense")]
    Nonsense(#[source] serde_json::Error),
    /// It said no.
    #[error("{0}")]
    No(String),
}

/// What may be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Of a proxy: whether the latest dump is delivered; waits until that is known.
    Wait {
        /// Only whether the proxy has taken every byte of it.
        taken: bool,
    },
    /// Of a cache: what it has.
    List,
    /// Of a cache: write a snapshot into an empty directory, or a tar file.
    Save {
        /// The newest released one, if none is given.
        snapshot: Option<u64>,
        /// Absolute.
        path: PathBuf,
    },
    /// Of a cache: read the images of a directory, or a tar file, as a new snapshot.
    Load {
        /// Absolute.
        path: PathBuf,
    },
    /// Of a cache: let a snapshot be restored whose sender was lost before it said so.
    Release {
        /// Which.
        snapshot: u64,
    },
    /// Of a cache: forget a snapshot.
    Drop {
        /// Which.
        snapshot: u64,
    },
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// It is done, to this snapshot.
    Done(Delivered),
    /// What a cache has.
    Listing(Listing),
    /// It is not done, for this reason.
    No(String),
}

/// A snapshot of which something was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// Its number in the cache; zero if it is not known yet.
    pub snapshot: u64,
    /// Its images.
    pub images: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The bytes that were sent for them (before compression), if it was a proxy that was asked.
    pub sent: u64,
}

/// What a cache has of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// Bytes of memory in use, of all targets.
    pub memory: u64,
    /// The most that ever were.
    pub peak: u64,
    /// Bytes in the spill directory.
    pub spilled: u64,
    /// The snapshots, oldest first.
    pub snapshots: Vec<Listed>,
}

/// A snapshot in a [`Listing`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its number.
    pub snapshot: u64,
    /// `arriving`, `held`, `released`, or `failed` with the reason.
    pub state: String,
    /// Its images.
    pub images: u64,
    /// Their bytes, as a restore gets them.
    pub bytes: u64,
}

/// Asks whoever serves `directory`.
pub(crate) fn ask(directory: &Path, request: &Request, wait: &Wait) -> Result<Reply, ControlError> {
    let socket = local::connect(directory, CONTROL_SOCKET)?;
    send(&socket, request, &wait.at_most(SAYING)).map_err(ControlError::Silent)?;
    let line = receive_line(&socket, wait).map_err(ControlError::Silent)?;
    match serde_json::from_slice(&line).map_err(ControlError::Nonsense)? {
        Reply::No(why) => Err(ControlError::No(why)),
        reply => Ok(reply),
    }
}

/// Asks for something that is done or not.
pub(crate) fn ask_to(
    directory: &Path,
    request: &Request,
    wait: &Wait,
) -> Result<Delivered, ControlError> {
    match ask(directory, request, wait)? {
        Reply::Done(delivered) => Ok(delivered),
        _ => Err(ControlError::No("another answer than asked for".to_owned())),
    }
}

/// Reads what was asked.
pub(crate) fn receive<T: DeserializeOwned>(socket: &OwnedFd, wait: &Wait) -> io::Result<T> {
    let line = receive_line(socket, wait)?;
    serde_json::from_slice(&line).map_err(io::Error::from)
}

/// Sends a line.
pub(crate) fn send(socket: &OwnedFd, message: &impl Serialize, wait: &Wait) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::from)?;
    line.push(b'\n');
    let mut rest = &line[..];
    while !rest.is_empty() {
        match rustix::net::send(socket, rest, SendFlags::NOSIGNAL) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::AGAIN) => wait.writable(socket).map_err(waited)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn receive_line(socket: &OwnedFd, wait: &Wait) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while line.last() != Some(&b'\n') {
        match rustix::net::recv(socket, &mut buffer, RecvFlags::empty()) {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, count)) => line.extend_from_slice(&buffer[..count]),
            Err(Errno::AGAIN) => wait.readable(socket).map_err(waited)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if line.len() > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(line)
}

fn waited(error: WaitError) -> io::Error {
    match error {
        WaitError::Deadline => io::ErrorKind::TimedOut.into(),
        WaitError::Cancelled => io::Error::new(io::ErrorKind::Interrupted, "cancelled"),
        WaitError::Io(error) => error,
    }
}
