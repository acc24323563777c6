//! Snapshots from tar files, and into them: plain files under their own names, nothing else.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use haulier_criu::inspect::{ImageSize, ImageSource};
use haulier_images::name::ImageName;
use haulier_sys::wait::Cancel;
use tar::{Builder, Entry, EntryType, Header};

use crate::control::Delivered;
use crate::directory::{self, CHUNK, DirectoryError, Snapshot};
use crate::inventory;
use crate::store::{INVENTORY, Image, Key, Next, Piece, Store};

/// What the names of tar files end with.
const ENDING: &str = "tar";
/// What an archive is made of, in bytes.
const BLOCK: u64 = 512;
/// Most images that are looked into.
const MOST_IMAGES: usize = 1 << 20;
/// Nobody else's business: images are the memory of a process.
const MODE: u32 = 0o600;
/// What errors call one that has no path.
const STREAM: &str = "the tar file";
/// Zeros to write.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Whether a snapshot is to be saved into a file of this path, not into a directory.
pub(crate) fn is_for_saving(path: &Path) -> bool {
    // A slash at the end is no part of the path's last name.
    let as_directory = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    path.extension().is_some_and(|ending| ending == ENDING) && !as_directory && !path.is_dir()
}

/// Whether there is a file to load from, not a directory.
pub(crate) fn is_for_loading(path: &Path) -> bool {
    path.is_file()
}

/// Writes a released snapshot, the newest if none is named, into a file. The file is there when all of
/// it is on disk, or not at all; one that was there before gives way.
pub(crate) fn save(
    store: &Store,
    target: &ImageName,
    number: Option<u64>,
    path: &Path,
    stop: &Cancel,
) -> Result<Delivered, DirectoryError> {
    let snapshot = Snapshot::complete(store, target, number)?;
    let failed = |source| DirectoryError::file("write", path, source);
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let file = tempfile::Builder::new()
        .prefix(".haulier-images-")
        .permissions(fs::Permissions::from_mode(MODE))
        .tempfile_in(folder)
        .map_err(failed)?;
    let delivered = write(&snapshot, file.as_file(), stop).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    // The name too.
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed)?;
    Ok(delivered)
}

/// Writes a released snapshot, the newest if none is named, to somebody else. What is not whole has no
/// end.
pub(crate) fn save_to(
    store: &Store,
    target: &ImageName,
    number: Option<u64>,
    to: impl Write,
    stop: &Cancel,
) -> Result<Delivered, DirectoryError> {
    let snapshot = Snapshot::complete(store, target, number)?;
    write(&snapshot, to, stop)
        .map_err(|source| DirectoryError::file("write", Path::new(STREAM), source))
}

/// Reads the images of a file as a new snapshot of a target, which is released at once.
pub(crate) fn load(
    store: &Store,
    target: &ImageName,
    path: &Path,
) -> Result<Delivered, DirectoryError> {
    let file = File::open(path).map_err(|source| DirectoryError::file("open", path, source))?;
    directory::load_as_snapshot(store, target, |key| read(store, key, file, path))
}

/// Reads a file that somebody sends as a new snapshot of a target, which is released at once.
pub(crate) fn load_from(
    store: &Store,
    target: &ImageName,
    from: impl Read,
) -> Result<Delivered, DirectoryError> {
    directory::load_as_snapshot(store, target, |key| {
        read(store, key, from, Path::new(STREAM))
    })
}

fn write(snapshot: &Snapshot<'_>, to: impl Write, stop: &Cancel) -> io::Result<Delivered> {
    let to = Unfinished { to, stuck: false };
    let mut archive = Builder::new(BufWriter::with_capacity(CHUNK, to));
    let written = write_images(snapshot, &mut archive, stop);
    if written.is_err() {
        // It would be given an end, and taken for whole.
        archive.get_mut().get_mut().stuck = true;
    }
    let delivered = written?;
    archive.into_inner()?.flush()?;
    Ok(delivered)
}

fn write_images(
    snapshot: &Snapshot<'_>,
    archive: &mut Builder<impl Write>,
    stop: &Cancel,
) -> io::Result<Delivered> {
    let mut delivered = Delivered {
        snapshot: snapshot.number(),
        ..Delivered::default()
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap_or_default().as_secs();
    for (name, image) in snapshot.images() {
        let mut header = Header::new_gnu();
        header.set_path(name.as_str())?;
        header.set_entry_type(EntryType::Regular);
        header.set_mode(MODE);
        header.set_mtime(now);
        header.set_size(image.length());
        header.set_cksum();
        archive.append(&header, ImageReader::new(&image, stop))?;
        delivered.images += 1;
        delivered.bytes += image.length();
    }
    Ok(delivered)
}

/// An archive that is being written. An end is put to it when it is dropped.
struct Unfinished<W> {
    to: W,
    stuck: bool,
}

impl<W: Write> Write for Unfinished<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stuck {
            false => self.to.write(bytes),
            true => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn read(
    store: &Store,
    key: &Key,
    from: impl Read,
    path: &Path,
) -> Result<Delivered, DirectoryError> {
    let failed = |source| DirectoryError::file("read", path, source);
    let no_dump = |why: String| DirectoryError::NoDump {
        path: path.to_owned(),
        why,
    };
    let mut from = Whole {
        from: BufReader::with_capacity(CHUNK, from),
        ended: false,
    };
    let mut archive = tar::Archive::new(&mut from);
    let mut delivered = Delivered {
        snapshot: key.number,
        ..Delivered::default()
    };
    let mut is_dump = false;
    // Raw: extensions, which give entries other names and sizes, are entries like others here.
    for entry in archive.entries().map_err(failed)?.raw(true) {
        let mut entry = entry.map_err(failed)?;
        let Some(own) = own_name(&entry).map_err(no_dump)? else {
            continue;
        };
        let (image, size) = (store.add(key, &own)?, entry.size());
        let mut start = Vec::new();
        directory::load_image(store, &image, &own, &mut |buffer: &mut [u8]| {
            let count = entry.read(buffer)?;
            if own.as_str() == INVENTORY {
                let room = inventory::LONGEST.saturating_sub(start.len());
                start.extend_from_slice(&buffer[..count.min(room)]);
            }
            Ok(count)
        })
        .map_err(|error| error.of(path))?;
        if image.length() != size {
            return Err(no_dump(format!("it ends in the middle of {own}")));
        }
        if own.as_str() == INVENTORY {
            is_dump = true;
            if inventory::is_of_pre_dump(&start) {
                return Err(no_dump("it is a pre-dump".to_owned()));
            }
        }
        delivered.images += 1;
        delivered.bytes += size;
    }
    if from.ended {
        return Err(no_dump("its end is missing".to_owned()));
    }
    if !is_dump {
        return Err(no_dump("it has no inventory".to_owned()));
    }
    Ok(delivered)
}

/// Knows whether more was wanted than there was: an archive says itself where it ends.
struct Whole<R> {
    from: R,
    ended: bool,
}

impl<R: Read> Read for &mut Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        self.ended |= count == 0 && !buffer.is_empty();
        Ok(count)
    }
}

/// The images of a file, to be looked into.
#[derive(Debug)]
pub(crate) struct ArchiveImages {
    file: File,
    /// Where each begins, and how long it is.
    images: BTreeMap<String, (u64, u64)>,
}

impl ArchiveImages {
    /// Finds them.
    pub(crate) fn open(path: &Path) -> Result<ArchiveImages, DirectoryError> {
        let failed = |source| DirectoryError::file("read", path, source);
        let no_dump = |why: String| DirectoryError::NoArchive {
            path: path.to_owned(),
            why,
        };
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut images = BTreeMap::new();
        let mut archive = tar::Archive::new(&file);
        let mut last = 0;
        for entry in archive.entries_with_seek().map_err(failed)?.raw(true) {
            let entry = entry.map_err(failed)?;
            let own = own_name(&entry).map_err(no_dump)?;
            let (from, size) = (entry.raw_file_position(), entry.size());
            last = size
                .checked_next_multiple_of(BLOCK)
                .and_then(|size| from.checked_add(size))
                .filter(|end| *end <= length)
                .ok_or_else(|| no_dump("it ends in the middle of an image".to_owned()))?;
            let Some(own) = own else {
                continue;
            };
            if images.len() >= MOST_IMAGES {
                return Err(no_dump("it has too many images".to_owned()));
            }
            if images.insert(own.to_string(), (from, size)).is_some() {
                return Err(no_dump(format!("{own} is in it twice")));
            }
        }
        if length < last + BLOCK {
            return Err(no_dump("its end is missing".to_owned()));
        }
        Ok(ArchiveImages { file, images })
    }
}

impl ImageSource for ArchiveImages {
    fn images(&mut self) -> io::Result<Vec<ImageSize>> {
        let images = self.images.iter().map(|(name, (_, bytes))| ImageSize {
            name: name.clone(),
            bytes: *bytes,
        });
        Ok(images.collect())
    }

    fn read(&mut self, image: &ImageSize) -> io::Result<Vec<u8>> {
        let found = self.images.get(&image.name).copied();
        let (from, size) = found.ok_or(io::ErrorKind::NotFound)?;
        let mut contents = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut contents, from)?;
        Ok(contents)
    }
}

/// The image that an entry of an archive is; nothing for what may be there beside them.
fn own_name(entry: &Entry<'_, impl Read>) -> Result<Option<ImageName>, String> {
    let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    let kind = entry.header().entry_type();
    // As "tar -C DIR ." calls them.
    let own = name.strip_prefix("./").unwrap_or(&name);
    if own.is_empty() && kind.is_dir() {
        return Ok(None);
    }
    if kind != EntryType::Regular {
        return Err(format!("{name:?} in it is no plain file"));
    }
    let own = ImageName::new(own).map_err(|error| error.to_string())?;
    // Beside the images there are CRIU's log and statistics.
    Ok(Some(own).filter(|own| own.as_str().ends_with(".img")))
}

/// A complete image, read from the first byte to the last.
pub(crate) struct ImageReader<'a> {
    image: &'a Image,
    stop: &'a Cancel,
    /// The pieces that were fetched last, the first that is not read, and its first such byte.
    pieces: Vec<Piece>,
    piece: usize,
    offset: usize,
    /// Pieces that were fetched so far.
    fetched: usize,
}

impl<'a> ImageReader<'a> {
    pub(crate) fn new(image: &'a Image, stop: &'a Cancel) -> ImageReader<'a> {
        ImageReader {
            image,
            stop,
            pieces: Vec::new(),
            piece: 0,
            offset: 0,
            fetched: 0,
        }
    }

    /// Fetches more pieces. Whether there are any.
    fn fetch(&mut self) -> io::Result<bool> {
        if self.stop.is_cancelled() {
            // Not one that is tried again.
            return Err(io::Error::other("the cache ends"));
        }
        match self.image.next(self.fetched, CHUNK as u64, Duration::ZERO) {
            Next::Pieces(pieces) => {
                self.fetched += pieces.len();
                (self.pieces, self.piece, self.offset) = (pieces, 0, 0);
                Ok(true)
            }
            Next::End => Ok(false),
            Next::NotYet | Next::Failed => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Read for ImageReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(piece) = self.pieces.get(self.piece) else {
                if self.fetch()? {
                    continue;
                }
                return Ok(0);
            };
            let left = (piece.len() - self.offset as u64).min(buffer.len() as u64) as usize;
            let count = match piece.read()? {
                None => {
                    let count = left.min(ZEROS.len());
                    buffer[..count].copy_from_slice(&ZEROS[..count]);
                    count
                }
                Some(bytes) => {
                    buffer[..left].copy_from_slice(&bytes[self.offset..self.offset + left]);
                    left
                }
            };
            self.offset += count;
            if self.offset as u64 == piece.len() {
                (self.piece, self.offset) = (self.piece + 1, 0);
            }
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
        }
    }
}

#[cfg(test)]
mod tests;
