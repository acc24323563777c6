//! Asking a migration under way on this host to bring its process back: `haulier cancel`.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use haulier_engine::journal::SourceRecord;
use haulier_proto::id::MigrationId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;

use crate::journal::{self, Contents, Side};

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It runs here.
    RunsHere,
    /// The commit was sent, now or before: the destination decides, and nothing was changed.
    TooLate,
}

/// Why a migration cannot be cancelled.
#[derive(Debug, Error)]
pub enum CancelError {
    /// There is no journal of it, or its end has removed it.
    #[error("there is no migration {0} on this host")]
    Unknown(MigrationId),
    /// This host is the destination.
    #[error("this host is the destination of migration {0}: cancel it on its source")]
    NotTheSource(MigrationId),
    /// Nobody does what could be cancelled.
    #[error("nobody works on migration {0} at this moment: haulier recover finishes or undoes it")]
    NotUnderWay(MigrationId),
    /// The lock of its journal is held by another program than `haulier migrate`.
    #[error("process {pid} works on migration {id}, and is no haulier migrate")]
    NotAMigrate {
        /// The process.
        pid: i32,
        /// The migration.
        id: MigrationId,
    },
    /// It has been asked, and is not back yet.
    #[error("migration {0} was asked to end, and has not within {1:?}")]
    Slow(MigrationId, Duration),
    /// Its journal cannot be read.
    #[error("reading the journal")]
    Journal(#[source] io::Error),
    /// The signal could not be sent, or the end not be awaited.
    #[error("asking process {pid} to end")]
    Signal {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Cancels a migration of which this host is the source, and waits for so long until its process
/// runs here again. After the commit it changes nothing.
///
/// # Errors
/// See [`CancelError`].
pub fn cancel(id: MigrationId, time: Duration) -> Result<Cancelled, CancelError> {
    let mut file = match File::open(journal::file_of(id)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(CancelError::Unknown(id));
        }
        Err(error) => return Err(CancelError::Journal(error)),
    };
    let contents = read(&mut file)?;
    if contents.is_of(Side::Destination) {
        return Err(CancelError::NotTheSource(id));
    }
    if is_committed(&contents) {
        return Ok(Cancelled::TooLate);
    }
    let (pid, process) = worker(id)?;
    let signal = |source: rustix::io::Errno| CancelError::Signal {
        pid,
        source: source.into(),
    };
    pidfd_send_signal(&process, Signal::TERM).map_err(signal)?;
    let deadline = Instant::now() + time;
    while !has_ended(&process).map_err(signal)? {
        if Instant::now() > deadline {
            return Err(CancelError::Slow(id, time));
        }
        // From then on it does not end before the destination has answered.
        if is_committed(&read(&mut file)?) {
            return Ok(Cancelled::TooLate);
        }
    }
    // The journal has been removed by its end, and is still told by this descriptor.
    Ok(match is_committed(&read(&mut file)?) {
        true => Cancelled::TooLate,
        false => Cancelled::RunsHere,
    })
}

fn is_committed(contents: &Contents) -> bool {
    contents.has_source(SourceRecord::InDoubt)
}

fn read(file: &mut File) -> Result<Contents, CancelError> {
    let mut bytes = Vec::new();
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut bytes));
    read.and_then(|_| journal::parse(&bytes))
        .map_err(CancelError::Journal)
}

/// The `haulier migrate` that works on it. Its number is looked up again once there is a descriptor
/// of it: that one does not become another process.
fn worker(id: MigrationId) -> Result<(i32, OwnedFd), CancelError> {
    let pid = journal::worker(id).ok_or(CancelError::NotUnderWay(id))?;
    let process = Pid::from_raw(pid).ok_or(CancelError::NotUnderWay(id))?;
    let process =
        pidfd_open(process, PidfdFlags::empty()).map_err(|source| CancelError::Signal {
            pid,
            source: source.into(),
        })?;
    if journal::worker(id) != Some(pid) {
        return Err(CancelError::NotUnderWay(id));
    }
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !arguments
        .split(|byte| *byte == 0)
        .any(|word| word == b"migrate")
    {
        return Err(CancelError::NotAMigrate { pid, id });
    }
    Ok((pid, process))
}

/// Looks for a moment.
fn has_ended(process: &OwnedFd) -> Result<bool, rustix::io::Errno> {
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 20_000_000,
    };
    match poll(&mut ended, Some(&moment)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error),
    }
}
