//! Where the images of a dump are, and how much of them is read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::InspectError;
use crate::image::{Image, ImageError, ImageKind, LARGEST};

/// Most bytes that are read of a dump.
const MOST_BYTES: u64 = 4 << 30;
/// Most images of a dump.
const MOST_IMAGES: usize = 1 << 20;
/// Most tasks, threads, files and descriptors together.
const MOST_ITEMS: u64 = 1 << 20;

/// Where the images of a dump are.
pub trait ImageSource {
    /// The images.
    ///
    /// # Errors
    /// If they cannot be found out.
    fn images(&mut self) -> io::Result<Vec<ImageSize>>;

    /// The contents of one of them.
    ///
    /// # Errors
    /// If it cannot be read, or is longer than it was said to be.
    fn read(&mut self, image: &ImageSize) -> io::Result<Vec<u8>>;
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSize {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// The images of a plain directory.
#[derive(Debug)]
pub struct ImageDirectory(PathBuf);

impl ImageDirectory {
    /// Those in this directory.
    pub fn new(path: &Path) -> ImageDirectory {
        ImageDirectory(path.to_owned())
    }
}

impl ImageSource for ImageDirectory {
    fn images(&mut self) -> io::Result<Vec<ImageSize>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            // Beside the images there are CRIU's log, statistics and sockets.
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if !name.ends_with(".img") {
                continue;
            }
            let found = fs::metadata(entry.path())?;
            if found.is_file() {
                let bytes = found.len();
                images.push(ImageSize { name, bytes });
            }
            if images.len() > MOST_IMAGES {
                break;
            }
        }
        Ok(images)
    }

    fn read(&mut self, image: &ImageSize) -> io::Result<Vec<u8>> {
        let file = File::open(self.0.join(&image.name))?;
        let mut contents = Vec::new();
        file.take(image.bytes + 1).read_to_end(&mut contents)?;
        if contents.len() as u64 > image.bytes {
            return Err(io::Error::other("it grows"));
        }
        Ok(contents)
    }
}

/// The images of a dump while they are read.
pub(super) struct Images<'a> {
    source: &'a mut dyn ImageSource,
    sizes: BTreeMap<String, u64>,
    bytes: u64,
    items: u64,
}

impl<'a> Images<'a> {
    pub(super) fn new(source: &'a mut dyn ImageSource) -> Result<Images<'a>, InspectError> {
        let all = source.images().map_err(InspectError::List)?;
        if all.len() > MOST_IMAGES {
            return Err(InspectError::TooMuch {
                what: "images",
                most: MOST_IMAGES as u64,
            });
        }
        let sizes = all.into_iter().map(|image| (image.name, image.bytes));
        Ok(Images {
            source,
            sizes: sizes.collect(),
            bytes: 0,
            items: 0,
        })
    }

    /// Reads an image, if there is one of that name.
    pub(super) fn open(
        &mut self,
        name: &str,
        kind: ImageKind,
    ) -> Result<Option<Image>, InspectError> {
        let Some(bytes) = self.sizes.get(name).copied() else {
            return Ok(None);
        };
        if bytes > LARGEST {
            let path = name.into();
            let reason = format!("{bytes} bytes are over the limit of {LARGEST}");
            return Err(ImageError::Invalid { path, reason }.into());
        }
        self.bytes += bytes;
        if self.bytes > MOST_BYTES {
            return Err(InspectError::TooMuch {
                what: "bytes in its images",
                most: MOST_BYTES,
            });
        }
        let name = name.to_owned();
        let contents = self.source.read(&ImageSize {
            name: name.clone(),
            bytes,
        });
        let contents = contents.map_err(|source| ImageError::Read {
            path: PathBuf::from(&name),
            source,
        })?;
        Ok(Some(Image::of(Path::new(&name), contents, kind)?))
    }

    /// The names that are this prefix and a number, and the numbers.
    pub(super) fn numbered(&self, prefix: &str) -> Vec<(String, u64)> {
        let with_prefix = self.sizes.range(prefix.to_owned()..);
        let with_prefix = with_prefix.take_while(|(name, _)| name.starts_with(prefix));
        with_prefix
            .filter_map(|(name, _)| {
                let number = name.strip_prefix(prefix)?.strip_suffix(".img")?;
                Some((name.clone(), number.parse().ok()?))
            })
            .collect()
    }

    /// Counts what is kept of them.
    pub(super) fn count(&mut self, items: usize) -> Result<(), InspectError> {
        self.items = self.items.saturating_add(items as u64);
        if self.items > MOST_ITEMS {
            return Err(InspectError::TooMuch {
                what: "tasks, threads, open files and descriptors",
                most: MOST_ITEMS,
            });
        }
        Ok(())
    }

    /// What to say of an image that has to be there.
    pub(super) fn missing(&self, name: &str) -> ImageError {
        ImageError::Read {
            path: name.into(),
            source: io::ErrorKind::NotFound.into(),
        }
    }

    pub(super) fn into_sizes(self) -> Vec<ImageSize> {
        let sizes = self.sizes.into_iter();
        sizes
            .map(|(name, bytes)| ImageSize { name, bytes })
            .collect()
    }
}
