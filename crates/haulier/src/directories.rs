//! Where haulier keeps things on a host.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use haulier_proto::id::MigrationId;
use haulier_targets::host;
use rustix::fs::statvfs;

/// Journals, by migration; logs of failed ones.
pub const STATE: &str = "/var/lib/haulier";
/// CRIU's log and its smallest images need more.
const LITTLE_ROOM: u64 = 64 << 10;
/// Candidates for image directories; the first on a file system in memory is taken.
const IN_MEMORY: [&str; 2] = ["/run", "/dev/shm"];

/// A private directory for the images of one migration, on a file system in memory. Removed when
/// it is dropped.
#[derive(Debug)]
pub struct ImageDirectory {
    path: PathBuf,
}

impl ImageDirectory {
    /// Creates it.
    ///
    /// # Errors
    /// If no file system in memory is mounted at `/run` or `/dev/shm`, or it exists already.
    pub fn create(id: MigrationId, side: &str) -> io::Result<ImageDirectory> {
        let base = IN_MEMORY
            .into_iter()
            .map(Path::new)
            .find(|path| host::is_in_memory(path));
        let base = base.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "neither /run nor /dev/shm is a tmpfs",
            )
        })?;
        let path = base.join(format!("haulier-{id}-{side}"));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(ImageDirectory { path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to say of a failure in it whose cause could not be logged there: that it is full, if it is.
    pub fn fullness(&self) -> Option<String> {
        let room = statvfs(&self.path).ok()?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        let base = self.path.parent()?.display();
        (free < LITTLE_ROOM).then(|| format!("No space left in {base}"))
    }

    /// Copies CRIU's log to where it outlives the migration, and says where that is.
    pub fn keep_log(&self, id: MigrationId, name: &str) -> Option<PathBuf> {
        let from = self.path.join(name);
        let folder = state_directory(id);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .ok()?;
        let to = folder.join(name);
        if fs::copy(&from, &to).is_err() {
            // Half a log on a disk that is full helps nobody.
            let _ = fs::remove_file(&to);
            let _ = fs::remove_dir(&folder);
            return None;
        }
        Some(to)
    }
}

impl Drop for ImageDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the image directories of a migration whose haulier was killed.
pub fn remove_image_directories(id: MigrationId) {
    for base in IN_MEMORY {
        for side in ["dump", "restore"] {
            let _ = fs::remove_dir_all(Path::new(base).join(format!("haulier-{id}-{side}")));
        }
    }
}

/// Where the journal and kept logs of a migration are.
pub fn state_directory(id: MigrationId) -> PathBuf {
    Path::new(STATE).join(id.to_string())
}
