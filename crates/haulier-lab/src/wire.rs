//! Messages between the library and a host's PID 1: JSON in sequenced packets, descriptors beside
//! them. One connection per request; the one that spawned a program stays open and brings its exit
//! status.

use crate::{Error, Result};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest message; a sequenced packet must fit the default socket buffer (212 992 bytes).
const MAX_MESSAGE: usize = 160 * 1024;

/// Most descriptors in one message: stdin, stdout, stderr.
const MAX_DESCRIPTORS: usize = 3;

/// What the library asks PID 1.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Spawn(SpawnRequest),
    /// Send a signal inside the host, to a process or to a process group.
    Signal {
        pid: i32,
        group: bool,
        signal: i32,
    },
    /// Raw wait status of a process that PID 1 has reaped, the newest of that PID.
    Reaped {
        pid: i32,
    },
}

/// What PID 1 answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Spawned {
        pid: i32,
    },
    /// Comes later, on the connection of the spawn.
    Exited {
        status: i32,
    },
    Signalled,
    Reaped {
        status: Option<i32>,
    },
    Failed {
        message: String,
    },
}

/// A program to run on a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SpawnRequest {
    /// At least the program.
    pub(crate) argv: Vec<OsString>,
    /// The whole environment.
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) cwd: PathBuf,
    /// stdin, stdout, stderr.
    pub(crate) stdio: [Stream; 3],
    /// Become leader of a session of its own.
    pub(crate) setsid: bool,
    /// The PID it must have.
    pub(crate) pid: Option<i32>,
    /// A cgroup below the host's root to start in, created if need be.
    pub(crate) cgroup: Option<String>,
}

/// Where a standard stream goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Stream {
    /// `/dev/null`, opened inside the host.
    Null,
    /// A file opened inside the host: read for stdin, created and appended to otherwise.
    File(PathBuf),
    /// The n-th descriptor that came with the message.
    Descriptor(usize),
}

/// Connects to the socket of a PID 1.
pub(crate) fn connect_to(path: &Path) -> Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(Error::system("create a unix socket"))?;
    let address = SocketAddrUnix::new(path).map_err(Error::file_errno("address", path))?;
    connect(&socket, &address).map_err(Error::file_errno("connect to", path))?;
    Ok(socket)
}

/// Sends one message.
pub(crate) fn send<T: Serialize>(
    socket: &OwnedFd,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(Error::System {
            operation: "send a request of more than 160 KiB to PID 1",
            source: Errno::MSGSIZE.into(),
        });
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::System {
            operation: "send more than three descriptors",
            source: Errno::INVAL.into(),
        });
    }
    sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .map_err(Error::system("send a message to or from PID 1"))?;
    Ok(())
}

/// Receives one message; `None` if the other side has closed, or if nothing came by the deadline.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: &OwnedFd,
    deadline: Duration,
) -> Result<Received<T>> {
    if !readable_within(socket.as_fd(), deadline)? {
        return Ok(Received::Nothing);
    }
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let answer = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let length = match answer {
        Ok(message) if message.bytes > 0 => message.bytes,
        // A killed peer with unread packets resets rather than closes.
        Ok(_) | Err(Errno::CONNRESET) => return Ok(Received::Closed),
        Err(other) => return Err(Error::system("receive a message to or from PID 1")(other)),
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let Some(text) = bytes.get(..length) else {
        return Ok(Received::Closed);
    };
    Ok(Received::Message(
        serde_json::from_slice(text)?,
        descriptors,
    ))
}

/// What [`receive`] found.
#[derive(Debug)]
pub(crate) enum Received<T> {
    Message(T, Vec<OwnedFd>),
    Closed,
    Nothing,
}

/// Waits until the descriptor has something to read or its other end is closed.
pub(crate) fn readable_within(descriptor: BorrowedFd<'_>, deadline: Duration) -> Result<bool> {
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut watched = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
        match poll(&mut watched, Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(other) => return Err(Error::system("poll")(other)),
        }
    }
}
