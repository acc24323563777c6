//! Snapshots from plain image directories, and into them.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use haulier_images::name::ImageName;
use haulier_images::page::{self, PAGE};
use haulier_sys::wait::Cancel;
use thiserror::Error;

use crate::control::Delivered;
use crate::inventory;
use crate::store::{Answer, End, INVENTORY, Image, Key, Next, Piece, State, Store, StoreError};

/// Bytes of an image that are handled at a time.
const CHUNK: usize = 256 * PAGE;

/// A snapshot could not be saved or loaded.
#[derive(Debug, Error)]
pub(crate) enum DirectoryError {
    /// A file or the directory failed.
    #[error("cannot {doing} {path}")]
    File {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// There is something in the directory.
    #[error("{0} is not empty")]
    NotEmpty(PathBuf),
    /// The directory has no images of its own.
    #[error("{directory} cannot be loaded: {why}")]
    NoDump {
        directory: PathBuf,
        why: &'static str,
    },
    /// There is no such snapshot, or it is not complete.
    #[error("there is no complete snapshot of {0} to save")]
    NoSnapshot(ImageName),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An error with its causes, in a line.
pub(crate) fn explain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Writes a released snapshot, the newest if none is named, into a directory that is empty or is
/// made. What was written of a snapshot that could not be written whole is removed again.
pub(crate) fn save(
    store: &Store,
    target: &ImageName,
    number: Option<u64>,
    directory: &Path,
    stop: &Cancel,
) -> Result<Delivered, DirectoryError> {
    let none = || DirectoryError::NoSnapshot(target.clone());
    let number = number.or_else(|| newest(store, target)).ok_or_else(none)?;
    let reading = store
        .pick(target, Some(number), || false)
        .ok_or_else(none)?;
    let inventory = ImageName::new(INVENTORY).map_err(|_| none())?;
    if !matches!(reading.request(&inventory, || false), Answer::Image(_)) {
        return Err(none());
    }
    let failed = |doing| {
        move |source| DirectoryError::File {
            doing,
            path: directory.to_owned(),
            source,
        }
    };
    fs::create_dir_all(directory).map_err(failed("make"))?;
    if fs::read_dir(directory)
        .map_err(failed("list"))?
        .next()
        .is_some()
    {
        return Err(DirectoryError::NotEmpty(directory.to_owned()));
    }
    let mut delivered = Delivered {
        snapshot: number,
        ..Delivered::default()
    };
    for (name, image) in store.images(reading.key()) {
        let path = directory.join(name.as_str());
        if let Err(source) = save_image(&image, &path, stop) {
            for (name, _) in store.images(reading.key()) {
                let _ = fs::remove_file(directory.join(name.as_str()));
            }
            return Err(DirectoryError::File {
                doing: "write",
                path,
                source,
            });
        }
        delivered.images += 1;
        delivered.bytes += image.length();
    }
    Ok(delivered)
}

/// Reads the images of a directory as a new snapshot of a target, which is released at once.
pub(crate) fn load(
    store: &Store,
    target: &ImageName,
    directory: &Path,
) -> Result<Delivered, DirectoryError> {
    let no_dump = |why| DirectoryError::NoDump {
        directory: directory.to_owned(),
        why,
    };
    if fs::symlink_metadata(directory.join("parent")).is_ok() {
        return Err(no_dump("it needs the images of its parent"));
    }
    if !directory.join(INVENTORY).is_file() {
        return Err(no_dump("it has no inventory, so it is no complete dump"));
    }
    let inventory = File::open(directory.join(INVENTORY));
    let mut seen = Vec::new();
    inventory
        .and_then(|file| file.take(inventory::LONGEST as u64).read_to_end(&mut seen))
        .map_err(|source| DirectoryError::File {
            doing: "read the inventory of",
            path: directory.to_owned(),
            source,
        })?;
    if inventory::is_of_pre_dump(&seen) {
        return Err(no_dump("it is a pre-dump"));
    }
    let key = store.begin(target)?;
    let loaded = load_images(store, &key, directory);
    match &loaded {
        Ok(_) => {
            store.settle(&key, State::Held)?;
            store.settle(&key, State::Released)?;
        }
        Err(error) => store.settle(&key, State::Failed(explain(error)))?,
    }
    loaded
}

fn newest(store: &Store, target: &ImageName) -> Option<u64> {
    let released = store
        .list()
        .into_iter()
        .filter(|info| &info.key.target == target && info.state == State::Released);
    released.map(|info| info.key.number).max()
}

fn save_image(image: &Image, path: &Path, stop: &Cancel) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let mut file = BufWriter::with_capacity(CHUNK, file);
    let mut index = 0;
    loop {
        if stop.is_cancelled() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
        }
        match image.next(index, CHUNK as u64, Duration::ZERO) {
            Next::Pieces(pieces) => {
                index += pieces.len();
                for piece in pieces {
                    match piece {
                        Piece::Data(blob) => file.write_all(&blob.read()?)?,
                        Piece::Zero { .. } => {
                            file.seek(SeekFrom::Current(piece.len() as i64))?;
                        }
                    }
                }
            }
            // Zeros at the end were not written.
            Next::End => return file.into_inner()?.set_len(image.length()),
            Next::NotYet | Next::Failed => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn load_images(store: &Store, key: &Key, directory: &Path) -> Result<Delivered, DirectoryError> {
    let failed = |doing, path: &Path, source| DirectoryError::File {
        doing,
        path: path.to_owned(),
        source,
    };
    let mut delivered = Delivered {
        snapshot: key.number,
        ..Delivered::default()
    };
    for entry in fs::read_dir(directory).map_err(|e| failed("list", directory, e))? {
        let entry = entry.map_err(|e| failed("list", directory, e))?;
        let path = entry.path();
        // Beside the images there are CRIU's log, statistics and sockets.
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.ends_with(".img")) else {
            continue;
        };
        let Ok(name) = ImageName::new(name) else {
            continue;
        };
        let mut file = File::open(&path).map_err(|e| failed("read", &path, e))?;
        let image = store.add(key, &name)?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = fill(&mut file, &mut buffer).map_err(|e| failed("read", &path, e))?;
            if count == 0 {
                break;
            }
            let mut pieces = Vec::new();
            if name.is_of_pages() {
                for part in buffer[..count].chunks(PAGE) {
                    if part.len() == PAGE && page::hash_unless_zero(part).is_none() {
                        pieces.push(Piece::Zero { pages: 1 });
                    } else {
                        pieces.push(Piece::Data(store.put(part)?));
                    }
                }
            } else {
                pieces.push(Piece::Data(store.put(&buffer[..count])?));
            }
            store.push(&image, pieces)?;
        }
        image.finish(End::Complete);
        delivered.images += 1;
        delivered.bytes += image.length();
    }
    Ok(delivered)
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
