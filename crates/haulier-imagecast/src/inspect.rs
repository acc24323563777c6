//! `haulier inspect`: what is in a dump that an image-cache has, or a directory, or a tar file.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use haulier_criu::inspect::{self, Dump, ImageDirectory, ImageSize, ImageSource};
use haulier_sys::wait::Wait;
use serde::Serialize;
use thiserror::Error;

use crate::archive::ArchiveImages;
use crate::chunks::ChunkReader;
use crate::control::{self, ControlError, Opened, ReadImage, Reply, Request};
use crate::directory::DirectoryError;
use crate::store::INVENTORY;

/// Longest list of images: each has some 40 bytes.
const LONGEST_LIST: u64 = 64 << 20;

/// A dump that was looked into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspected {
    /// Where it is.
    pub origin: Origin,
    /// What is in it.
    #[serde(flatten)]
    pub dump: Dump,
}

/// Where a dump is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Origin {
    /// In a running image-cache.
    Cache {
        /// Its number there.
        snapshot: u64,
        /// How it stands there, as the cache's list says.
        state: String,
    },
    /// In a directory.
    Directory,
    /// In a tar file.
    Archive,
}

/// A dump cannot be looked into.
#[derive(Debug, Error)]
pub enum InspectError {
    /// There is nothing of that name.
    #[error("cannot look at {path}")]
    Path {
        /// The name.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The image-cache has it not, or does not answer.
    #[error(transparent)]
    Cache(#[from] ControlError),
    /// A number was given for what has none.
    #[error("{0} is not the directory of a running image-cache: only there dumps have numbers")]
    NoNumbers(PathBuf),
    /// A directory with nothing in it.
    #[error("{0} has no images, and no image-cache serves it")]
    Nothing(PathBuf),
    /// A file that is no tar file of images.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The images are no dump.
    #[error(transparent)]
    Dump(#[from] inspect::InspectError),
}

/// A tar file cannot be used.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct ArchiveError(DirectoryError);

/// Looks into the dump at `path`: in the image-cache that serves this directory, the one of that number
/// or the newest that is complete; in the directory itself; or in a tar file. For the cache it is one
/// more reader, and no restore: it neither begins one nor has memory moved that is still at the source.
///
/// # Errors
/// See [`InspectError`].
pub fn inspect(path: &Path, snapshot: Option<u64>, wait: &Wait) -> Result<Inspected, InspectError> {
    let found = fs::metadata(path).map_err(|source| InspectError::Path {
        path: path.to_owned(),
        source,
    })?;
    let (origin, dump) = if found.is_dir() {
        match CacheImages::open(path, snapshot, wait) {
            Ok((mut images, Opened { snapshot, state })) => {
                let origin = Origin::Cache { snapshot, state };
                (origin, inspect::inspect(&mut images)?)
            }
            // One that has died leaves its socket.
            Err(ControlError::Nobody(_)) if snapshot.is_some() => {
                return Err(InspectError::NoNumbers(path.to_owned()));
            }
            Err(ControlError::Nobody(_)) if !path.join(INVENTORY).exists() => {
                let mut images = ImageDirectory::new(path);
                let some = images.images().is_ok_and(|images| !images.is_empty());
                return Err(match some {
                    true => inspect::InspectError::NoDump(INVENTORY).into(),
                    false => InspectError::Nothing(path.to_owned()),
                });
            }
            Err(ControlError::Nobody(_)) => {
                let dump = inspect::inspect(&mut ImageDirectory::new(path))?;
                (Origin::Directory, dump)
            }
            Err(error) => return Err(error.into()),
        }
    } else if snapshot.is_some() {
        return Err(InspectError::NoNumbers(path.to_owned()));
    } else {
        let mut images = ArchiveImages::open(path).map_err(ArchiveError)?;
        (Origin::Archive, inspect::inspect(&mut images)?)
    };
    Ok(Inspected { origin, dump })
}

/// The images of a snapshot that an image-cache has.
#[derive(Debug)]
struct CacheImages<'a> {
    socket: OwnedFd,
    wait: &'a Wait,
    images: Vec<ImageSize>,
}

impl<'a> CacheImages<'a> {
    fn open(
        directory: &Path,
        snapshot: Option<u64>,
        wait: &'a Wait,
    ) -> Result<(CacheImages<'a>, Opened), ControlError> {
        let socket = control::question(directory, &Request::Inspect { snapshot }, wait)?;
        let Reply::Opened(opened) = control::answer(&socket, wait)? else {
            return Err(control::another());
        };
        let mut list = Vec::new();
        let mut chunks = ChunkReader::new(&socket, wait).take(LONGEST_LIST);
        chunks
            .read_to_end(&mut list)
            .map_err(ControlError::Silent)?;
        let images = serde_json::from_slice(&list).map_err(ControlError::Nonsense)?;
        let images = CacheImages {
            socket,
            wait,
            images,
        };
        Ok((images, opened))
    }
}

impl ImageSource for CacheImages<'_> {
    fn images(&mut self) -> io::Result<Vec<ImageSize>> {
        Ok(std::mem::take(&mut self.images))
    }

    fn read(&mut self, image: &ImageSize) -> io::Result<Vec<u8>> {
        let name = image.name.clone();
        control::send(&self.socket, &ReadImage { name }, self.wait)?;
        let mut contents = Vec::new();
        let mut chunks = ChunkReader::new(&self.socket, self.wait).take(image.bytes + 1);
        chunks.read_to_end(&mut contents)?;
        match contents.len() as u64 == image.bytes {
            true => Ok(contents),
            false => Err(io::Error::other("it has another length than it had")),
        }
    }
}

#[cfg(test)]
mod tests;
