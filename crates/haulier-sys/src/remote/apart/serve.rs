//! The helper's side.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::super::{RemoteError, as_tracer, leftover, take};
use super::HOLD;
use super::wire::{self, Answer, Request, Work};

/// The longest that a client may ask to try for.
const LONGEST: Duration = Duration::from_secs(60);

/// The whole life of a helper, whose client is at the other end of its standard input. It ends when the
/// client is gone.
///
/// # Errors
/// The socket fails, or what comes is no request.
pub fn serve() -> io::Result<()> {
    // Right only with the right of the system's administrator.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let stdin = io::stdin();
    serve_at(stdin.as_fd())
}

pub(super) fn serve_at(client: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        let bytes = match wire::receive_some_time(client) {
            Ok((bytes, _)) => bytes,
            Err(error) if is_end(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        match Request::decode(&bytes).ok_or(io::ErrorKind::InvalidData)? {
            Request::Do {
                id,
                pid,
                timeout,
                work,
            } => {
                let outcome = match work {
                    Work::Take => take_for(client, id, pid, timeout.min(LONGEST)),
                    Work::Close(what) => close(pid, timeout.min(LONGEST), what),
                };
                let answer = outcome.unwrap_or_else(Answer::Failed);
                match wire::send(client, &answer.encode(id), None) {
                    Err(error) if is_end(&error) => return Ok(()),
                    other => other?,
                }
            }
            // It came too late, and the answer has said so.
            Request::GoOn { .. } => {}
        }
    }
}

fn close(pid: i32, timeout: Duration, what: leftover::Leftover) -> Result<Answer, RemoteError> {
    leftover::close(pid, timeout, what)?;
    Ok(Answer::Done {
        stopped: Duration::ZERO,
        in_time: true,
    })
}

fn take_for(
    client: BorrowedFd<'_>,
    id: u32,
    pid: i32,
    timeout: Duration,
) -> Result<Answer, RemoteError> {
    let deadline = Instant::now() + timeout;
    let held = |userfaultfd| Ok(hold(client, id, userfaultfd));
    let (in_time, stopped) = as_tracer(|| take(pid, deadline, held))?;
    Ok(Answer::Done { stopped, in_time })
}

/// Gives the client the descriptor, and waits until it has looked. Whether it has.
fn hold(client: BorrowedFd<'_>, id: u32, userfaultfd: OwnedFd) -> bool {
    let answer = Answer::Held.encode(id);
    if wire::send(client, &answer, Some(userfaultfd.as_fd())).is_err() {
        return false;
    }
    // The client's is the only one from now on.
    drop(userfaultfd);
    let deadline = Instant::now() + HOLD;
    loop {
        let Ok((bytes, _)) = wire::receive(client, deadline) else {
            return false;
        };
        match Request::decode(&bytes) {
            Some(Request::GoOn { id: of }) if of == id => return true,
            // Late, of an earlier one.
            Some(Request::GoOn { .. }) => {}
            _ => return false,
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
