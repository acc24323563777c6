//! The helper's side.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::super::{Look, RemoteError, leftover, take_userfaultfd};
use super::wire::{self, Answer, Request, Work};

/// The longest that a client may ask to try for.
const LONGEST: Duration = Duration::from_secs(60);

/// The whole life of a helper, whose client is at the other end of its standard input. It ends when the
/// client is gone. `held` is called whenever a thread is held, for tests.
///
/// # Errors
/// The socket fails, or what comes is no request.
pub fn serve(held: impl Fn() + Sync) -> io::Result<()> {
    // Right only with the right of the system's administrator.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    serve_at(io::stdin().as_fd(), held)
}

pub(super) fn serve_at(client: BorrowedFd<'_>, held: impl Fn() + Sync) -> io::Result<()> {
    loop {
        let bytes = match wire::receive(client, None) {
            Ok((bytes, _)) => bytes,
            Err(error) if is_end(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let request = Request::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
        let answer = perform(&request, &held).unwrap_or_else(Answer::Failed);
        let (bytes, fds) = answer.encode();
        match wire::send(client, &bytes, &fds) {
            Err(error) if is_end(&error) => return Ok(()),
            other => other?,
        }
    }
}

fn perform(request: &Request, held: &(impl Fn() + Sync)) -> Result<Answer, RemoteError> {
    let Request { pid, timeout, work } = *request;
    let timeout = timeout.min(LONGEST);
    match work {
        Work::Take => {
            let look = || {
                held();
                Look::at(pid)
            };
            take_userfaultfd(pid, timeout, look).map(Answer::Taken)
        }
        Work::Close(what) => {
            leftover::close(pid, timeout, what)?;
            Ok(Answer::Closed)
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
