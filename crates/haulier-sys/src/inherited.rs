//! Descriptors that whoever started this process handed over by number.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over a descriptor that this process was started with. It is closed with the result, and no
/// program that this one starts inherits it.
///
/// To be called at most once for a number, at the start, before anything else can have opened it:
/// otherwise it would close what is somebody else's.
///
/// # Errors
/// If the number is negative, one of the standard streams, or not open.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        let why = format!("{number} is no descriptor that can be handed over");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    // SAFETY: fcntl(2) with F_SETFD touches no memory; a number that is not open is an error.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the function's terms nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn what_is_open_is_taken_and_what_is_not_is_refused() {
        let (ours, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = ours.into_raw_fd();
        let taken = take(number).unwrap();
        rustix::io::write(&taken, b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(&other, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        for bad in [-1, 0, 2, 1_000_000] {
            assert!(take(bad).is_err(), "{bad}");
        }
    }
}
