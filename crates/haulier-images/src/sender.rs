//! Sending images, with pages of theirs sent ahead.

use std::ops::AddAssign;
use std::path::Path;

use haulier_proto::frame::Kind;
use haulier_transport::channel::Channel;
use haulier_transport::wait::Wait;

use crate::bank::KnownPages;
use crate::directory::ImageCount;
use crate::error::ImagesError;
use crate::outgoing;
use crate::page::{self, PAGE};

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
        outgoing::send_all(directory, &mut self.known, &mut self.channel, wait)
    }

    /// [`ImageSender::send_directory`], begun while the dump still writes into the directory:
    /// images of pages are sent as they grow, the others once `complete` says that the dump is
    /// done. A dump that fails is ended by cancelling `wait`.
    ///
    /// # Errors
    /// See [`ImagesError`].
    pub fn send_growing(
        &mut self,
        directory: &Path,
        complete: impl Fn() -> bool,
        wait: &Wait,
    ) -> Result<ImageCount, ImagesError> {
        outgoing::send_growing(
            directory,
            complete,
            &mut self.known,
            &mut self.channel,
            wait,
        )
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
