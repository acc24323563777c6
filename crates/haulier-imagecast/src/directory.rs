//! Snapshots from plain image directories, and into them.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use haulier_images::name::ImageName;
use haulier_images::page::{self, PAGE};
use haulier_sys::wait::Cancel;
use thiserror::Error;

use crate::control::Delivered;
use crate::inventory;
use crate::store::{
    Answer, End, INVENTORY, Image, Key, Next, Piece, Reading, State, Store, StoreError,
};

/// Bytes of an image that are handled at a time.
pub(crate) const CHUNK: usize = 256 * PAGE;

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
    /// What is there is not a dump that is complete by itself.
    #[error("{path} cannot be loaded: {why}")]
    NoDump { path: PathBuf, why: String },
    /// What is there is no archive of images.
    #[error("{path} cannot be read: {why}")]
    NoArchive { path: PathBuf, why: String },
    /// There is no such snapshot, or it is not complete.
    #[error("there is no complete snapshot of {0} to save")]
    NoSnapshot(ImageName),
    /// It is not all here.
    #[error("snapshot {0} cannot be saved: its dump left its memory at the source (--lazy-pages)")]
    LeftBehind(u64),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl DirectoryError {
    pub(crate) fn file(doing: &'static str, path: &Path, source: io::Error) -> DirectoryError {
        DirectoryError::File {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}

/// An image could not be read, or not be kept.
pub(crate) enum LoadError {
    Read(io::Error),
    Store(StoreError),
}

impl LoadError {
    /// The same of the file that it was read from.
    pub(crate) fn of(self, path: &Path) -> DirectoryError {
        match self {
            LoadError::Read(source) => DirectoryError::file("read", path, source),
            LoadError::Store(error) => error.into(),
        }
    }
}

/// A snapshot that can be saved, and stays for that long.
pub(crate) struct Snapshot<'a> {
    store: &'a Store,
    reading: Reading<'a>,
}

impl<'a> Snapshot<'a> {
    /// The released one of that number, or the newest.
    pub(crate) fn complete(
        store: &'a Store,
        target: &ImageName,
        number: Option<u64>,
    ) -> Result<Snapshot<'a>, DirectoryError> {
        let none = || DirectoryError::NoSnapshot(target.clone());
        let number = number.or_else(|| newest(store, target)).ok_or_else(none)?;
        let reading = store
            .pick(target, Some(number), || false)
            .ok_or_else(none)?;
        if store.left(reading.key()).is_some() {
            return Err(DirectoryError::LeftBehind(number));
        }
        let inventory = ImageName::new(INVENTORY).map_err(|_| none())?;
        match reading.request(&inventory, || false) {
            Answer::Image(_) => Ok(Snapshot { store, reading }),
            _ => Err(none()),
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.reading.key().number
    }

    pub(crate) fn images(&self) -> Vec<(ImageName, Arc<Image>)> {
        self.store.images(self.reading.key())
    }
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
    let snapshot = Snapshot::complete(store, target, number)?;
    let failed = |doing| move |source| DirectoryError::file(doing, directory, source);
    fs::create_dir_all(directory).map_err(failed("make"))?;
    if fs::read_dir(directory)
        .map_err(failed("list"))?
        .next()
        .is_some()
    {
        return Err(DirectoryError::NotEmpty(directory.to_owned()));
    }
    let mut delivered = Delivered {
        snapshot: snapshot.number(),
        ..Delivered::default()
    };
    for (name, image) in snapshot.images() {
        let path = directory.join(name.as_str());
        if let Err(source) = save_image(&image, &path, stop) {
            for (name, _) in snapshot.images() {
                let _ = fs::remove_file(directory.join(name.as_str()));
            }
            return Err(DirectoryError::file("write", &path, source));
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
    let no_dump = |why: &str| DirectoryError::NoDump {
        path: directory.to_owned(),
        why: why.to_owned(),
    };
    if fs::symlink_metadata(directory.join("parent")).is_ok() {
        return Err(no_dump("it needs the images of its parent"));
    }
    if !directory.join(INVENTORY).is_file() {
        return Err(no_dump("it has no inventory, so it is no complete dump"));
    }
    let mut seen = Vec::new();
    File::open(directory.join(INVENTORY))
        .and_then(|file| file.take(inventory::LONGEST as u64).read_to_end(&mut seen))
        .map_err(|e| DirectoryError::file("read the inventory of", directory, e))?;
    if inventory::is_of_pre_dump(&seen) {
        return Err(no_dump("it is a pre-dump"));
    }
    load_as_snapshot(store, target, |key| load_images(store, key, directory))
}

/// Has `load` fill a new snapshot of a target, which is released at once; or leaves none.
pub(crate) fn load_as_snapshot(
    store: &Store,
    target: &ImageName,
    load: impl FnOnce(&Key) -> Result<Delivered, DirectoryError>,
) -> Result<Delivered, DirectoryError> {
    let key = store.begin(target)?;
    let loaded = load(&key);
    match &loaded {
        Ok(_) => {
            store.settle(&key, State::Held)?;
            store.settle(&key, State::Released)?;
        }
        Err(error) => {
            store.settle(&key, State::Failed(explain(error)))?;
            // Restores go on with the one before. It stays if somebody reads it already.
            let _ = store.forget(&key);
        }
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
                    match piece.read()? {
                        Some(bytes) => file.write_all(&bytes)?,
                        None => {
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
    let mut delivered = Delivered {
        snapshot: key.number,
        ..Delivered::default()
    };
    for entry in fs::read_dir(directory).map_err(|e| DirectoryError::file("list", directory, e))? {
        let entry = entry.map_err(|e| DirectoryError::file("list", directory, e))?;
        let path = entry.path();
        // Beside the images there are CRIU's log, statistics and sockets.
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.ends_with(".img")) else {
            continue;
        };
        let Ok(name) = ImageName::new(name) else {
            continue;
        };
        let mut file = File::open(&path).map_err(|e| DirectoryError::file("read", &path, e))?;
        let image = store.add(key, &name)?;
        load_image(store, &image, &name, &mut |buffer: &mut [u8]| {
            file.read(buffer)
        })
        .map_err(|error| error.of(&path))?;
        delivered.images += 1;
        delivered.bytes += image.length();
    }
    Ok(delivered)
}

/// Fills an image with what `read` reads, to its end.
pub(crate) fn load_image(
    store: &Store,
    image: &Image,
    name: &ImageName,
    read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
) -> Result<(), LoadError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = fill(read, &mut buffer).map_err(LoadError::Read)?;
        if count == 0 {
            break;
        }
        let mut pieces = Vec::new();
        if name.is_of_pages() {
            for part in buffer[..count].chunks(PAGE) {
                if part.len() == PAGE && page::hash_unless_zero(part).is_none() {
                    pieces.push(Piece::Zero { pages: 1 });
                } else {
                    pieces.push(Piece::Data(store.put(part).map_err(LoadError::Store)?));
                }
            }
        } else {
            let blob = store.put(&buffer[..count]).map_err(LoadError::Store)?;
            pieces.push(Piece::Data(blob));
        }
        store.push(image, pieces).map_err(LoadError::Store)?;
    }
    image.finish(End::Complete);
    Ok(())
}

/// Reads until the buffer is full or the file ends.
fn fill(
    read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
