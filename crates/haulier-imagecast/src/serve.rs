//! A restore's connection to the cache.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use haulier_images::name::ImageName;
use haulier_images::page::PAGE;
use haulier_sys::wait::{Cancel, Wait, WaitError};
use rustix::io::Errno;
use thiserror::Error;

use crate::lazy::Daemon;
use crate::store::{Answer, INVENTORY, Image, Next, Piece};
use crate::stream::{Connection, Incoming, StreamError};

/// How long a restore may leave a pipe full, or not say which image it opens next.
const IDLE: Duration = Duration::from_secs(3600);
/// How long CRIU may take to send a pipe after the answer.
const PIPE: Duration = Duration::from_secs(60);
/// How long a reader waits before it looks whether it still should.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes written at a time.
const BATCH: u64 = 1 << 20;
/// What a pipe should hold, if an image is worth it.
const PIPE_SIZE: usize = 1 << 20;
/// Zeros to write.
static ZEROS: [u8; 16 * PAGE] = [0; 16 * PAGE];

/// A restore could not be served to its end.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    /// CRIU did something wrong, or its connection broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// What it wants cannot be had.
    #[error("the snapshot failed: {0}")]
    Failed(String),
    /// It does not know that memory is missing.
    #[error("the dump left its memory at the source: criu restore needs --lazy-pages")]
    NotLazy,
    /// It expects memory from elsewhere.
    #[error(
        "all memory of the dump is in its images: criu restore needs no --lazy-pages for it, and there is \
         no lazy-pages daemon"
    )]
    NothingLeft,
    /// It is not known where it looks for the daemon.
    #[error("CRIU is in another PID namespace, or gone: its work directory cannot be found")]
    WorkDirectory,
    /// It took too long, or the cache ends.
    #[error("the wait for CRIU ended")]
    Waited,
    /// There is no thread for it.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl From<WaitError> for ServeError {
    fn from(error: WaitError) -> ServeError {
        match error {
            WaitError::Io(error) => StreamError::Broken(error).into(),
            WaitError::Deadline | WaitError::Cancelled => ServeError::Waited,
        }
    }
}

/// Serves a restore: the newest snapshot of a target, or the one of that number. Returns when CRIU
/// has closed its connection and taken every image that it opened.
pub(crate) fn restore(
    mut connection: Connection,
    daemon: &Daemon,
    target: &ImageName,
    number: Option<u64>,
    stop: &Cancel,
) -> Result<(), ServeError> {
    let store = &daemon.store;
    let picked = store.pick(target, number, || wanted(&connection, stop));
    let Some(reading) = picked else {
        return if connection.is_closed() || stop.is_cancelled() {
            Ok(())
        } else {
            Err(ServeError::Failed("it was forgotten".to_owned()))
        };
    };
    tracing::info!(
        "a restore reads snapshot {} of {target}",
        reading.key().number
    );
    // It owns the connection: that is closed before the images that are still being written are
    // waited for, so that CRIU ends where this fails.
    thread::scope(move |scope| {
        let mut begun = None;
        loop {
            let name = match connection.requested()? {
                Incoming::Some(name) => name,
                Incoming::End => return Ok(()),
                Incoming::NotYet => {
                    stop.wait(IDLE).readable(&connection)?;
                    continue;
                }
            };
            let image = match reading.request(&name, || wanted(&connection, stop)) {
                Answer::Image(image) => image,
                Answer::Absent => {
                    connection.answer(false)?;
                    continue;
                }
                Answer::Failed(why) => return Err(ServeError::Failed(why)),
                Answer::Gone => return Ok(()),
            };
            match (store.left(reading.key()), &begun) {
                (Some(lazy), None) if name.as_str() == INVENTORY => {
                    let directory = connection.work_directory();
                    let directory = directory.ok_or(ServeError::WorkDirectory)?;
                    let go_on = || wanted(&connection, stop);
                    let started = daemon.begin(&lazy, &directory, go_on);
                    begun = Some(started.map_err(ServeError::Failed)?);
                }
                (Some(_), Some(begun)) if is_memory(&name) && !begun.is_connected() => {
                    return Err(ServeError::NotLazy);
                }
                (Some(_), None) if is_memory(&name) => return Err(ServeError::NotLazy),
                // It would fail, with less to be understood in its log.
                (None, _) if name.as_str() == INVENTORY && connection.lacks_daemon() => {
                    return Err(ServeError::NothingLeft);
                }
                _ => {}
            }
            connection.answer(true)?;
            let pipe = take_pipe(&connection, stop)?;
            let write = move || {
                if let Err(error) = write(&image, &pipe, stop) {
                    // CRIU closes images that it has seen enough of.
                    if error.kind() != io::ErrorKind::BrokenPipe {
                        tracing::warn!("image {name} did not reach its reader: {error}");
                    }
                }
            };
            thread::Builder::new()
                .name("image".to_owned())
                .spawn_scoped(scope, write)
                .map_err(ServeError::Thread)?;
        }
    })
}

/// Whether a restore that asks for this image is about to make memory of it.
fn is_memory(name: &ImageName) -> bool {
    name.as_str().starts_with("pagemap-") || name.is_of_pages()
}

fn wanted(connection: &Connection, stop: &Cancel) -> bool {
    !stop.is_cancelled() && !connection.is_closed()
}

fn take_pipe(connection: &Connection, stop: &Cancel) -> Result<OwnedFd, ServeError> {
    let wait = stop.wait(PIPE);
    loop {
        if let Some(pipe) = connection.pipe()? {
            return Ok(pipe);
        }
        wait.readable(connection)?;
    }
}

/// Writes an image into a pipe, following it as it arrives.
fn write(image: &Arc<Image>, pipe: &OwnedFd, stop: &Cancel) -> io::Result<()> {
    if image.length() > (64 << 10) {
        // Less will do, if the system allows no more.
        let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_SIZE);
    }
    let wait = stop.wait_idle(IDLE);
    let mut index = 0;
    loop {
        match image.next(index, BATCH, LOOK) {
            Next::Pieces(pieces) => {
                index += pieces.len();
                write_pieces(&pieces, pipe, &wait)?;
            }
            Next::End => return Ok(()),
            Next::Failed => return Err(io::Error::other("it failed while it arrived")),
            Next::NotYet if stop.is_cancelled() => return Err(io::ErrorKind::Interrupted.into()),
            Next::NotYet => {}
        }
    }
}

fn write_pieces(pieces: &[Piece], pipe: &OwnedFd, wait: &Wait) -> io::Result<()> {
    let mut contents = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match piece.read()? {
            Some(bytes) => contents.push(bytes),
            None => {
                let length = piece.len() as usize;
                let (whole, rest) = (length / ZEROS.len(), length % ZEROS.len());
                contents.extend((0..whole).map(|_| ZEROS[..].into()));
                if rest > 0 {
                    contents.push(ZEROS[..rest].into());
                }
            }
        }
    }
    // writev(2) takes no more at a time.
    for part in contents.chunks(1024) {
        let mut slices: Vec<IoSlice<'_>> = part.iter().map(|bytes| IoSlice::new(bytes)).collect();
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            match rustix::io::writev(pipe, slices) {
                Ok(count) => IoSlice::advance_slices(&mut slices, count),
                Err(Errno::AGAIN) => wait.writable(pipe).map_err(|error| match error {
                    WaitError::Io(error) => error,
                    WaitError::Deadline => io::ErrorKind::TimedOut.into(),
                    WaitError::Cancelled => io::ErrorKind::Interrupted.into(),
                })?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}
