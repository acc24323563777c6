//! `promote_secondaries`, set for as long as a primary address is being removed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::Error;

/// Another removal on the interface holds the lock for a millisecond or so.
const LOCK_WITHIN: Duration = Duration::from_secs(5);

/// While it lives, removing an interface's primary IPv4 address makes the next one of the
/// subnet primary, instead of deleting them all (net/ipv4/devinet.c). Dropped: the setting is
/// as it was.
///
/// The setting's file is locked meanwhile, so that two removals at once, in this process or
/// in two, do not take each other's value for the administrator's.
#[derive(Debug)]
pub(super) struct PromoteSecondaries {
    file: File,
    path: PathBuf,
    before: String,
}

impl PromoteSecondaries {
    pub(super) fn on(interface: &str) -> Result<Self, Error> {
        let path = PathBuf::from("/proc/sys/net/ipv4/conf").join(interface);
        let path = path.join("promote_secondaries");
        let fail = |operation| {
            let path = path.clone();
            move |source| Error::Sysctl {
                operation,
                path,
                source,
            }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(fail("open"))?;
        lock(&file).map_err(fail("lock"))?;
        let mut before = String::new();
        file.read_to_string(&mut before).map_err(fail("read"))?;
        let mut promote = Self { file, path, before };
        promote.set("1").map_err(|source| Error::Sysctl {
            operation: "write",
            path: promote.path.clone(),
            source,
        })?;
        Ok(promote)
    }

    fn set(&mut self, value: &str) -> io::Result<()> {
        // A sysctl takes its value from one write at offset 0.
        self.file.rewind()?;
        self.file.write_all(value.as_bytes())
    }
}

impl Drop for PromoteSecondaries {
    fn drop(&mut self) {
        let before = std::mem::take(&mut self.before);
        match self.set(before.trim()) {
            Ok(()) => {}
            // The interface went away, and its settings with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(
                path = %self.path.display(), value = before.trim(), %error,
                "could not set promote_secondaries back"
            ),
        }
    }
}

fn lock(file: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_WITHIN;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                if Instant::now() >= deadline {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                thread::sleep(Duration::from_millis(1));
            }
            result => return Ok(result?),
        }
    }
}
