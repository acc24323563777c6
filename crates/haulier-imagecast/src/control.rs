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
    /// What it was to be given cannot be read.
    #[error("cannot read what is to be loaded")]
    Read(#[source] io::Error),
    /// What it gives cannot be written.
    #[error("cannot write what is saved")]
    Write(#[source] io::Error),
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
    /// Of a cache: send a snapshot as a tar file over this connection, in chunks, then the answer.
    SaveHere {
        /// The newest released one, if none is given.
        snapshot: Option<u64>,
    },
    /// Of a cache: read a tar file from this connection, in chunks, as a new snapshot.
    LoadHere,
    /// Of a cache: have its reader look into a snapshot. After the answer come the names and lengths of the
    /// images, and then, for each [`ReadImage`], the contents; all in chunks.
    Inspect {
        /// The newest complete one, if none is given.
        snapshot: Option<u64>,
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
    /// It can be looked into.
    Opened(Opened),
    /// It is not done, for this reason.
    No(String),
}

/// What a reader that looks into a snapshot asks for: an image by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReadImage {
    pub(crate) name: String,
}

/// A snapshot that can be looked into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Its number in the cache.
    pub snapshot: u64,
    /// How it stands, as in a [`Listed`].
    pub state: String,
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
    let socket = question(directory, request, wait)?;
    answer(&socket, wait)
}

/// Asks, and leaves the answer to the caller.
pub(crate) fn question(
    directory: &Path,
    request: &Request,
    wait: &Wait,
) -> Result<OwnedFd, ControlError> {
    let socket = local::connect(directory, CONTROL_SOCKET)?;
    send(&socket, request, &wait.at_most(SAYING)).map_err(ControlError::Silent)?;
    Ok(socket)
}

/// The answer, unless it is no.
pub(crate) fn answer(socket: &OwnedFd, wait: &Wait) -> Result<Reply, ControlError> {
    let line = receive_line(socket, wait).map_err(ControlError::Silent)?;
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
    done(ask(directory, request, wait)?)
}

/// What was done.
pub(crate) fn done(reply: Reply) -> Result<Delivered, ControlError> {
    match reply {
        Reply::Done(delivered) => Ok(delivered),
        _ => Err(another()),
    }
}

/// It does not know what it was asked, or we do not know what it says.
pub(crate) fn another() -> ControlError {
    ControlError::No("another answer than asked for".to_owned())
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
    send_all(socket, &line, wait)
}

/// Sends bytes, all of them.
pub(crate) fn send_all(socket: &OwnedFd, bytes: &[u8], wait: &Wait) -> io::Result<()> {
    let mut rest = bytes;
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

/// Reads what is there, up to so much; nothing at the end.
pub(crate) fn receive_some(
    socket: &OwnedFd,
    buffer: &mut [u8],
    flags: RecvFlags,
    wait: &Wait,
) -> io::Result<usize> {
    loop {
        match rustix::net::recv(socket, &mut *buffer, flags) {
            Ok((_, count)) => return Ok(count),
            Err(Errno::AGAIN) => wait.readable(socket).map_err(waited)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Reads a line and nothing behind it.
fn receive_line(socket: &OwnedFd, wait: &Wait) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while line.last() != Some(&b'\n') {
        let seen = receive_some(socket, &mut buffer, RecvFlags::PEEK, wait)?;
        let end = buffer[..seen].iter().position(|byte| *byte == b'\n');
        let wanted = end.map_or(seen, |end| end + 1);
        let count = receive_some(socket, &mut buffer[..wanted], RecvFlags::empty(), wait)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&buffer[..count]);
        if line.len() > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(line)
}

pub(crate) fn waited(error: WaitError) -> io::Error {
    match error {
        WaitError::Deadline => io::ErrorKind::TimedOut.into(),
        WaitError::Cancelled => io::Error::other("cancelled"),
        WaitError::Io(error) => error,
    }
}
