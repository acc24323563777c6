//! The images of a directory on their way out.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use haulier_proto::frame::Kind;
use haulier_proto::message::{ImageEnd, ImageHeader, ImagesDone};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::wait::Wait;

use crate::bank::KnownPages;
use crate::directory::ImageCount;
use crate::error::ImagesError;
use crate::name::ImageName;
use crate::page::{PAGE, PagesHasher};
use crate::pages::{self, Way};

/// Bytes of plain image data in a frame.
const CHUNK: usize = 1 << 20;
/// Images that are followed at a time while they grow; both sides keep them open.
const MOST_FOLLOWED: usize = 64;
/// How often a growing directory is looked at when nothing happens in it.
const LOOK: Duration = Duration::from_millis(1);

/// Sends the images of a directory, by reference to known pages, and that there are no more.
pub(crate) fn send_all(
    directory: &Path,
    known: &mut KnownPages,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    send_growing(directory, || true, known, channel, wait)
}

/// [`send_all`] while images of pages still grow, until `complete`.
pub(crate) fn send_growing(
    directory: &Path,
    complete: impl Fn() -> bool,
    known: &mut KnownPages,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    let mut count = ImageCount::default();
    let mut way = Way {
        known,
        count: &mut count,
        channel,
        wait,
    };
    let mut followed: Vec<Outgoing> = Vec::new();
    // Asked before each look: what is there when it is complete is all.
    while !complete() {
        let mut idle = true;
        for path in images_in(directory)? {
            let begun = followed.iter().any(|image| image.image.path == path);
            if begun || followed.len() == MOST_FOLLOWED {
                continue;
            }
            let image = Image::open(path)?;
            // Most stay small, and are not worth an open file on both sides.
            if image.name.is_of_pages() && image.size()? >= pages::CHUNK as u64 {
                followed.push(Outgoing::begin(image, None, &mut way)?);
            }
        }
        for image in &mut followed {
            let chunk = pages::CHUNK as u64;
            let end = image.image.size()? / chunk * chunk;
            idle &= end <= image.sent;
            // The dump has a use for the other processors.
            image.send_up_to(end, 1, &mut way)?;
        }
        if idle {
            pause(way.channel, wait)?;
        }
    }
    for path in images_in(directory)? {
        let begun = followed.iter().position(|image| image.image.path == path);
        let image = match begun {
            Some(index) => followed.swap_remove(index),
            None => {
                let image = Image::open(path)?;
                let size = image.size()?;
                Outgoing::begin(image, Some(size), &mut way)?
            }
        };
        image.finish(&mut way)?;
    }
    if let Some(lost) = followed.first() {
        return Err(lost.image.failed(io::ErrorKind::NotFound.into()));
    }
    let done = ImagesDone {
        images: count.images,
        snapshot: 0,
    };
    channel.send_message(Kind::ImagesDone, &done, wait)?;
    count.bank_pages = known.len();
    count.bank_unused = known.unused();
    Ok(count)
}

/// An image in the directory.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    name: ImageName,
}

impl Image {
    fn open(path: PathBuf) -> Result<Image, ImagesError> {
        let file = File::open(&path).map_err(|e| ImagesError::file("read", &path, e))?;
        let name = ImageName::new(&path.file_name().unwrap_or_default().to_string_lossy())?;
        Ok(Image { path, file, name })
    }

    fn size(&self) -> Result<u64, ImagesError> {
        Ok(self.file.metadata().map_err(|e| self.failed(e))?.len())
    }

    fn failed(&self, source: io::Error) -> ImagesError {
        ImagesError::file("read", &self.path, source)
    }
}

/// An image of which some was sent.
struct Outgoing {
    image: Image,
    number: u32,
    form: Form,
    sent: u64,
}

enum Form {
    Plain(Box<blake3::Hasher>),
    Pages(Box<PagesHasher>),
}

impl Outgoing {
    /// `size` is that of an image that is complete.
    fn begin(image: Image, size: Option<u64>, way: &mut Way<'_>) -> Result<Outgoing, ImagesError> {
        let number = way.count.images;
        way.count.images += 1;
        let header = ImageHeader {
            number,
            name: image.name.as_str().to_owned(),
            size,
            snapshot: 0,
        };
        way.channel
            .send_message(Kind::ImageHeader, &header, way.wait)?;
        let of_pages =
            image.name.is_of_pages() && size.is_none_or(|size| size > 0 && size % PAGE as u64 == 0);
        // Without anything to refer to, it is hashed faster as a whole.
        let form = if of_pages && way.known.len() > 0 {
            Form::Pages(Box::default())
        } else {
            Form::Plain(Box::default())
        };
        Ok(Outgoing {
            image,
            number,
            form,
            sent: 0,
        })
    }

    fn send_up_to(
        &mut self,
        end: u64,
        threads: usize,
        way: &mut Way<'_>,
    ) -> Result<(), ImagesError> {
        if end <= self.sent {
            return Ok(());
        }
        let part = self.sent..end;
        match &mut self.form {
            Form::Pages(hasher) => {
                pages::send(&self.image, self.number, part, hasher, threads, way)?;
            }
            Form::Plain(hasher) => {
                let mut buffer = vec![0; CHUNK.min((end - self.sent) as usize)];
                let mut at = self.sent;
                while at < end {
                    let buffer = &mut buffer[..CHUNK.min((end - at) as usize)];
                    self.image
                        .file
                        .read_exact_at(buffer, at)
                        .map_err(|e| self.image.failed(e))?;
                    hasher.update(buffer);
                    at += buffer.len() as u64;
                    let number = self.number.to_le_bytes();
                    way.channel
                        .send(Kind::ImageData, &[&number, buffer], way.wait)?;
                }
            }
        }
        self.sent = end;
        Ok(())
    }

    /// Sends the rest, and that the image is complete.
    fn finish(mut self, way: &mut Way<'_>) -> Result<(), ImagesError> {
        let size = self.image.size()?;
        if size < self.sent || (matches!(self.form, Form::Pages(_)) && size % PAGE as u64 != 0) {
            let what = "it is an image of pages of which parts are missing";
            return Err(self
                .image
                .failed(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        self.send_up_to(size, pages::all_threads(), way)?;
        way.count.bytes += size;
        let blake3 = match &self.form {
            Form::Plain(hasher) => hasher.finalize().as_bytes().to_vec(),
            Form::Pages(hasher) => hasher.finalize().to_vec(),
        };
        let end = ImageEnd {
            number: self.number,
            length: size,
            blake3,
        };
        Ok(way.channel.send_message(Kind::ImageEnd, &end, way.wait)?)
    }
}

fn images_in(directory: &Path) -> Result<Vec<PathBuf>, ImagesError> {
    let failed = |source| ImagesError::file("list", directory, source);
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "img") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Lets a moment pass.
fn pause(channel: &Channel, wait: &Wait) -> Result<(), ImagesError> {
    let doing = "waiting for the dump to write its images";
    if wait.is_cancelled() {
        return Err(TransportError::Cancelled { doing }.into());
    }
    if wait.remaining().is_zero() {
        let peer = channel.peer().to_owned();
        return Err(TransportError::Deadline { peer, doing }.into());
    }
    thread::sleep(LOOK);
    Ok(())
}
