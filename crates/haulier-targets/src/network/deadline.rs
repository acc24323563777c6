//! Waiting on descriptors up to a point in time.

use std::io;
use std::time::Instant;

use rustix::event::{PollFd, Timespec, poll};

/// Waits for one of `fds`; spurious wakeups are possible.
///
/// # Errors
/// `TimedOut` at `until`.
pub(super) fn poll_until(fds: &mut [PollFd<'_>], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(fds, Some(&timeout)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
