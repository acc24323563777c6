//! Sending images, with pages of theirs sent ahead.

use std::fs::{self, File};
use std::io::Read;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};

use haulier_proto::frame::Kind;
use haulier_proto::message::{ImageEnd, ImageHeader, ImagesDone};
use haulier_transport::channel::Channel;
use haulier_transport::wait::Wait;

use crate::bank::KnownPages;
use crate::directory::ImageCount;
use crate::error::ImagesError;
use crate::name::ImageName;
use crate::page::{self, PAGE};
use crate::pages;

/// Bytes of image data in a frame.
const CHUNK: usize = 1 << 20;
/// Most pages of a frame sent ahead; as many pieces go to the socket in one call.
const AHEAD_PAGES: usize = 512;

/// The source's side of the images channel, through all rounds and the final transfer.
///
/// Pages that a dump will contain are sent ahead while the target runs, by content: what is known
/// already is not sent again. Once the target is frozen and dumped, images of pages are sent as
/// references to them, plus the pages that nobody has seen yet.
#[derive(Debug)]
pub struct ImageSender {
    channel: Channel,
    known: KnownPages,
    bank_limit: u64,
    full: bool,
}

/// What became of pages that were to be sent ahead. All are numbers of pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AheadStats {
    /// Looked at: the sum of the others.
    pub pages: u64,
    /// All zero, never sent.
    pub zero: u64,
    /// Known already.
    pub known: u64,
    /// Sent.
    pub sent: u64,
    /// New, but not sent because the limit is reached.
    pub left: u64,
}

impl AddAssign for AheadStats {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.known += other.known;
        self.sent += other.sent;
        self.left += other.left;
    }
}

impl ImageSender {
    /// A sender on a channel on which nothing was sent yet. At most `bank_limit` bytes of page
    /// contents are sent ahead; the destination holds them in memory until the images are there.
    pub fn new(channel: Channel, bank_limit: u64) -> ImageSender {
        ImageSender {
            channel,
            known: KnownPages::default(),
            bank_limit,
            full: false,
        }
    }

    /// Sends those of some pages that are neither zero nor known, and remembers them. Better a MiB
    /// at once than a page; what is not a whole page at the end is ignored.
    ///
    /// # Errors
    /// [`ImagesError::Transport`]; the channel is of no use then.
    pub fn send_ahead(&mut self, pages: &[u8], wait: &Wait) -> Result<AheadStats, ImagesError> {
        let mut stats = AheadStats::default();
        let mut batch = Batch::new(self.known.len());
        for (index, page) in pages.chunks_exact(PAGE).enumerate() {
            stats.pages += 1;
            let Some(hash) = page::hash_unless_zero(page) else {
                stats.zero += 1;
                continue;
            };
            if self.known.contains(&hash) {
                stats.known += 1;
                continue;
            }
            let fits = (self.known.len() + 1).saturating_mul(PAGE as u64) <= self.bank_limit;
            if !fits || self.known.add(hash).is_none() {
                self.full = true;
                stats.left += 1;
                continue;
            }
            stats.sent += 1;
            batch.add(index);
            if batch.pages == AHEAD_PAGES {
                batch.send(pages, &mut self.channel, wait)?;
                batch = Batch::new(self.known.len());
            }
        }
        batch.send(pages, &mut self.channel, wait)?;
        Ok(stats)
    }

    /// Sends every image (`*.img`) of a directory, and that there are no more. Images of pages are
    /// sent by reference where anything was sent ahead.
    ///
    /// # Errors
    /// See [`ImagesError`].
    pub fn send_directory(
        &mut self,
        directory: &Path,
        wait: &Wait,
    ) -> Result<ImageCount, ImagesError> {
        send_all(directory, &mut self.known, &mut self.channel, wait)
    }

    /// Bytes of page contents sent ahead so far.
    pub fn bank_bytes(&self) -> u64 {
        self.known.len() * PAGE as u64
    }

    /// Whether a page was not sent ahead because the limit is reached: further rounds are of
    /// little use.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Bytes sent over the channel so far, all included.
    pub fn wire_bytes(&self) -> u64 {
        self.channel.sent()
    }

    /// The channel, for what else it can do.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The channel, for an owner that keeps it after the images.
    pub fn into_channel(self) -> Channel {
        self.channel
    }
}

/// An image to be sent.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) size: u64,
    name: ImageName,
}

impl Image {
    fn open(path: PathBuf) -> Result<Image, ImagesError> {
        let failed = |source| ImagesError::file("read", &path, source);
        let file = File::open(&path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let name = ImageName::new(&path.file_name().unwrap_or_default().to_string_lossy())?;
        Ok(Image {
            path,
            file,
            size,
            name,
        })
    }

    fn header(&self, number: u32) -> ImageHeader {
        ImageHeader {
            number,
            name: self.name.as_str().to_owned(),
            size: Some(self.size),
            snapshot: 0,
        }
    }

    fn is_of_pages(&self) -> bool {
        self.name.is_of_pages() && self.size > 0 && self.size % PAGE as u64 == 0
    }
}

/// New pages out of a larger buffer, in runs of neighbours.
struct Batch {
    first: u64,
    pages: usize,
    runs: Vec<(usize, usize)>,
}

impl Batch {
    fn new(first: u64) -> Batch {
        Batch {
            first,
            pages: 0,
            runs: Vec::new(),
        }
    }

    fn add(&mut self, index: usize) {
        self.pages += 1;
        match self.runs.last_mut() {
            Some((_, end)) if *end == index => *end += 1,
            _ => self.runs.push((index, index + 1)),
        }
    }

    fn send(&self, buffer: &[u8], channel: &mut Channel, wait: &Wait) -> Result<(), ImagesError> {
        if self.pages == 0 {
            return Ok(());
        }
        // Neither is ever larger: a number that does not fit is not added.
        let (first, count) = (self.first as u32, self.pages as u32);
        let head = [first.to_le_bytes(), count.to_le_bytes()].concat();
        let mut parts: Vec<&[u8]> = vec![&head];
        parts.extend(
            self.runs
                .iter()
                .map(|(from, end)| &buffer[from * PAGE..end * PAGE]),
        );
        Ok(channel.send(Kind::BankPages, &parts, wait)?)
    }
}

/// Sends the images of a directory, by reference to known pages, and that there are no more.
pub(crate) fn send_all(
    directory: &Path,
    known: &mut KnownPages,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    let mut count = ImageCount::default();
    let mut buffer = vec![0; CHUNK];
    for path in images_in(directory)? {
        let image = Image::open(path)?;
        let number = count.images;
        channel.send_message(Kind::ImageHeader, &image.header(number), wait)?;
        let end = if known.len() > 0 && image.is_of_pages() {
            pages::send(&image, number, known, &mut count, channel, wait)?
        } else {
            send_plain(&image, number, &mut buffer, channel, wait)?
        };
        count.images += 1;
        count.bytes += end.length;
        channel.send_message(Kind::ImageEnd, &end, wait)?;
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

fn send_plain(
    image: &Image,
    number: u32,
    buffer: &mut [u8],
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageEnd, ImagesError> {
    let mut hasher = blake3::Hasher::new();
    let mut length = 0;
    loop {
        let count = (&image.file)
            .read(buffer)
            .map_err(|e| ImagesError::file("read", &image.path, e))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        length += count as u64;
        channel.send(
            Kind::ImageData,
            &[&number.to_le_bytes(), &buffer[..count]],
            wait,
        )?;
    }
    Ok(ImageEnd {
        number,
        length,
        blake3: hasher.finalize().as_bytes().to_vec(),
    })
}
