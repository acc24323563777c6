//! What comes over the images channel, written into a directory.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use haulier_proto::frame::{FrameError, Header, Kind};
use haulier_proto::message::{self, ImageEnd, ImageHeader, ImagesDone};
use haulier_transport::channel::Channel;
use haulier_transport::wait::Wait;

use crate::account::Account;
use crate::bank::{self, Bank};
use crate::directory::ImageCount;
use crate::error::ImagesError;
use crate::name::ImageName;
use crate::page::{self, PAGE, PagesHasher, ZERO_HASH};
use crate::runs::{self, PAGED, Run};

/// Most images of one dump: CRIU writes some six per task and one per namespace.
const MOST_IMAGES: u32 = 1 << 20;

/// Receives until the peer says that there are no more images. The memory of the pages sent ahead
/// is given back at the end, the bytes of the images stay charged: they are in the directory.
pub(crate) fn receive(
    directory: &Path,
    account: &Account,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    let mut receiver = Receiver {
        directory,
        account,
        bank: Bank::new(account),
        open: HashMap::new(),
        count: ImageCount::default(),
        peer: channel.peer().to_owned(),
    };
    let mut buffer = Vec::new();
    loop {
        let header = channel.receive_header(wait)?;
        if header.kind == Kind::BankPages {
            receiver.pages_ahead(&header, channel, wait)?;
            continue;
        }
        let length = header.length as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let body = &mut buffer[..length];
        channel.receive_body(&header, &mut [&mut *body], wait)?;
        let unwell = |source: FrameError| ImagesError::from(channel.frame_error(source));
        match header.kind {
            Kind::ImageHeader => {
                receiver.begin(message::decode(header.kind, body).map_err(unwell)?)?;
            }
            Kind::ImageData => receiver.data(body)?,
            Kind::ImageEnd => {
                receiver.end(&message::decode(header.kind, body).map_err(unwell)?)?;
            }
            Kind::ImagesDone => {
                return receiver.done(message::decode(header.kind, body).map_err(unwell)?);
            }
            got => {
                return Err(unwell(FrameError::UnexpectedKind {
                    expected: Kind::ImageData,
                    got,
                }));
            }
        }
    }
}

struct Receiver<'a> {
    directory: &'a Path,
    account: &'a Account,
    bank: Bank<'a>,
    open: HashMap<u32, Incoming>,
    count: ImageCount,
    peer: String,
}

struct Incoming {
    path: PathBuf,
    file: File,
    length: u64,
    /// Whether the image may be sent by its pages.
    of_pages: bool,
    hasher: Hasher,
}

/// The form of an image, which its first data decides.
enum Hasher {
    Plain(Box<blake3::Hasher>),
    Pages(Box<PagesHasher>),
}

impl Receiver<'_> {
    fn pages_ahead(
        &mut self,
        header: &Header,
        channel: &mut Channel,
        wait: &Wait,
    ) -> Result<(), ImagesError> {
        if self.count.images > 0 {
            return Err(self.wrong("pages sent ahead came after an image".to_owned()));
        }
        let length = header.length as usize;
        let mut head = [0; bank::HEAD];
        if length < head.len() {
            return Err(self.wrong("pages sent ahead without a head".to_owned()));
        }
        channel.receive_part(&mut [&mut head], wait)?;
        let [a, b, c, d, e, f, g, h] = head;
        let first = u32::from_le_bytes([a, b, c, d]);
        let pages = u32::from_le_bytes([e, f, g, h]) as usize;
        let contents = length - head.len();
        if pages == 0 || pages > bank::FRAME_PAGES || contents != pages * PAGE {
            return Err(self.wrong(format!("{contents} bytes for {pages} pages sent ahead")));
        }
        if u64::from(first) != self.bank.len() {
            return Err(self.wrong(format!("page {first} was sent ahead out of order")));
        }
        let (one, two) = self.bank.room(pages)?;
        channel.receive_part(&mut [&mut *one, &mut *two], wait)?;
        header
            .verify(&[&head, one, two])
            .map_err(|e| channel.frame_error(e))?;
        self.bank.added(pages);
        Ok(())
    }

    fn begin(&mut self, header: ImageHeader) -> Result<(), ImagesError> {
        let name = ImageName::new(&header.name)?;
        // Numbers count up from zero, so an image can neither be begun twice nor reopened.
        if header.number != self.count.images || header.number >= MOST_IMAGES {
            return Err(self.wrong(format!("image number {} is out of order", header.number)));
        }
        let path = self.directory.join(name.as_str());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| ImagesError::file("create", &path, source))?;
        let incoming = Incoming {
            path,
            file,
            length: 0,
            of_pages: name.is_of_pages(),
            hasher: Hasher::Plain(Box::default()),
        };
        self.open.insert(header.number, incoming);
        self.count.images += 1;
        Ok(())
    }

    fn data(&mut self, body: &[u8]) -> Result<(), ImagesError> {
        let Some((number, data)) = body.split_first_chunk::<4>() else {
            return Err(self.wrong("image data without a number".to_owned()));
        };
        let number = u32::from_le_bytes(*number);
        let Some(image) = self.open.get_mut(&(number & !PAGED)) else {
            return Err(self.wrong(format!("data for image {number:#x}, which is not open")));
        };
        let paged = number & PAGED != 0;
        if paged && image.length == 0 && image.of_pages {
            image.hasher = Hasher::Pages(Box::default());
        }
        let result = match (paged, &mut image.hasher) {
            (false, Hasher::Plain(hasher)) => {
                hasher.update(data);
                self.account.charge(data.len() as u64)?;
                self.count.bytes += data.len() as u64;
                image.write(data)?;
                Ok(())
            }
            (true, Hasher::Pages(_)) => {
                image.pages(data, &mut self.bank, self.account, &mut self.count)?
            }
            _ => Err(format!(
                "data of the wrong form for {}",
                image.path.display()
            )),
        };
        result.map_err(|what| self.wrong(what))
    }

    fn end(&mut self, end: &ImageEnd) -> Result<(), ImagesError> {
        let Some(image) = self.open.remove(&end.number) else {
            return Err(self.wrong(format!("end of image {}, which is not open", end.number)));
        };
        let hash = match &image.hasher {
            Hasher::Plain(hasher) => *hasher.finalize().as_bytes(),
            Hasher::Pages(hasher) => hasher.finalize(),
        };
        if image.length != end.length || hash[..] != end.blake3 {
            return Err(self.wrong(format!("{} was damaged on the way", image.path.display())));
        }
        // Zero pages at its end were not written.
        image
            .file
            .set_len(image.length)
            .map_err(|e| ImagesError::file("extend", &image.path, e))
    }

    fn done(mut self, done: ImagesDone) -> Result<ImageCount, ImagesError> {
        if !self.open.is_empty() || done.images != self.count.images {
            return Err(self.wrong(format!(
                "{} of {} images came, {} of them cut",
                self.count.images,
                done.images,
                self.open.len()
            )));
        }
        self.count.bank_pages = self.bank.len();
        self.count.bank_unused = self.bank.unused();
        Ok(self.count)
    }

    fn wrong(&self, what: String) -> ImagesError {
        ImagesError::Wrong {
            peer: self.peer.clone(),
            what,
        }
    }
}

impl Incoming {
    fn write(&mut self, data: &[u8]) -> Result<(), ImagesError> {
        self.file
            .write_all_at(data, self.length)
            .map_err(|e| ImagesError::file("write", &self.path, e))?;
        self.length += data.len() as u64;
        Ok(())
    }

    /// Writes the pages of a frame. The inner error is what the peer did wrong.
    fn pages(
        &mut self,
        body: &[u8],
        bank: &mut Bank<'_>,
        account: &Account,
        count: &mut ImageCount,
    ) -> Result<Result<(), String>, ImagesError> {
        let (runs, mut literal) = match runs::decode(body) {
            Ok(decoded) => decoded,
            Err(what) => return Ok(Err(what)),
        };
        for run in runs {
            let bytes = u64::from(run.pages()) * PAGE as u64;
            // Zero pages count too: they take no room in the file, but in the restored task.
            account.charge(bytes)?;
            count.bytes += bytes;
            match run {
                Run::Zero { pages } => {
                    for _ in 0..pages {
                        self.hash(&ZERO_HASH);
                    }
                    self.length += bytes;
                }
                Run::Bank { first, pages } => {
                    let Some((hashes, pieces)) = bank.refer(first, pages) else {
                        let what = format!("{pages} pages from {first} were not sent ahead");
                        return Ok(Err(what));
                    };
                    for hash in hashes {
                        self.hash(hash);
                    }
                    for piece in pieces {
                        self.write(piece)?;
                    }
                    count.referenced += u64::from(pages);
                }
                Run::Literal { .. } => {
                    // The decoder has checked that they are there.
                    let (data, rest) = literal.split_at(bytes as usize);
                    for hash in page::hash_all(data) {
                        self.hash(&hash);
                    }
                    self.write(data)?;
                    literal = rest;
                }
            }
        }
        Ok(Ok(()))
    }

    fn hash(&mut self, page: &page::PageHash) {
        if let Hasher::Pages(hasher) = &mut self.hasher {
            hasher.update(page);
        }
    }
}
