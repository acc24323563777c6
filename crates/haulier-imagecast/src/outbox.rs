//! What the proxy has to send: fair between images, and kept until the cache has it. No IO.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use haulier_images::name::ImageName;
use haulier_images::runs;
use haulier_proto::frame::Kind;
use haulier_proto::message::{ImageEnd, ImageHeader, ImagesDone};

use crate::compress::COMPRESSED;
use crate::history::Known;
use crate::message::session::Body;
use crate::message::{self, Abort, Begin, Release};
use crate::pages::LazyPages;

mod frame;

pub(crate) use frame::{Frame, Item};

/// Frames of pages that nobody waits for that are made in advance.
const PUSHED: usize = 4;

/// Everything that has to be sent in a session.
#[derive(Debug)]
pub(crate) struct Outbox {
    limit: usize,
    window: usize,
    snapshots: HashMap<u64, Outgoing>,
    known: HashMap<ImageName, Known>,
    next_image: u32,
    images: HashMap<u32, Queue>,
    /// The images that have something to send, in turn.
    ring: VecDeque<u32>,
    /// Messages, which go before images.
    messages: VecDeque<(Frame, Option<u64>)>,
    /// Pages that tasks wait for, which go before everything.
    urgent: VecDeque<Frame>,
    urgent_bytes: usize,
    /// Some of the room is for those.
    lazy: bool,
    /// Pages that were left behind and that nobody waits for, in turn with images.
    pushed: VecDeque<Frame>,
    /// It was the turn of an image.
    image_was_next: bool,
    queued: usize,
    /// Frames that were sent, or are to be sent again, and that the cache may not have.
    unacknowledged: VecDeque<Arc<Frame>>,
    unacknowledged_bytes: usize,
    /// How many frames came before the first of those.
    acknowledged: u64,
    /// How many of those were sent over this connection.
    sent: usize,
    /// Snapshots whose release the cache may not have, by the number of its frame.
    releases: VecDeque<(u64, u64)>,
}

#[derive(Debug)]
struct Outgoing {
    target: ImageName,
    images: u32,
    open: usize,
    finished: bool,
    bytes: u64,
}

#[derive(Debug)]
struct Queue {
    snapshot: u64,
    items: VecDeque<Item>,
    header: Option<ImageHeader>,
}

impl Outbox {
    /// An outbox that takes `limit` bytes of parts of images, and keeps `window` bytes of frames until
    /// the cache has them.
    pub(crate) fn new(limit: usize, window: usize) -> Outbox {
        Outbox {
            limit,
            window,
            snapshots: HashMap::new(),
            known: HashMap::new(),
            next_image: 0,
            images: HashMap::new(),
            ring: VecDeque::new(),
            messages: VecDeque::new(),
            urgent: VecDeque::new(),
            urgent_bytes: 0,
            lazy: false,
            pushed: VecDeque::new(),
            image_was_next: false,
            queued: 0,
            unacknowledged: VecDeque::new(),
            unacknowledged_bytes: 0,
            acknowledged: 0,
            sent: 0,
            releases: VecDeque::new(),
        }
    }

    /// A snapshot begins.
    pub(crate) fn begin(&mut self, snapshot: u64, target: &ImageName) {
        let outgoing = Outgoing {
            target: target.clone(),
            images: 0,
            open: 0,
            finished: false,
            bytes: 0,
        };
        self.snapshots.insert(snapshot, outgoing);
        let begin = Begin {
            snapshot,
            target: target.as_str().to_owned(),
        };
        self.message(Body::Begin(begin), None);
    }

    /// An image of it begins. Its number; `None` if the snapshot does not go on.
    pub(crate) fn open(&mut self, snapshot: u64, name: &ImageName) -> Option<u32> {
        let outgoing = self.snapshots.get_mut(&snapshot)?;
        outgoing.images += 1;
        outgoing.open += 1;
        let number = self.next_image;
        // Far more images than any session has; the upper bits have meanings of their own.
        self.next_image = (number + 1) & !(runs::PAGED | COMPRESSED);
        let header = ImageHeader {
            number,
            name: name.as_str().to_owned(),
            size: None,
            snapshot,
        };
        let queue = Queue {
            snapshot,
            items: VecDeque::new(),
            header: Some(header),
        };
        self.images.insert(number, queue);
        self.ring.push_back(number);
        Some(number)
    }

    /// Whether there is room for a part of an image.
    pub(crate) fn has_room(&self) -> bool {
        let urgent = if self.lazy { self.urgent_limit() } else { 0 };
        self.queued < self.limit - urgent
    }

    /// A part of an image. What comes of an image that is no longer wanted is dropped.
    pub(crate) fn push(&mut self, image: u32, item: Item) {
        let Some(queue) = self.images.get_mut(&image) else {
            return;
        };
        self.queued += item.cost();
        if queue.items.is_empty() && queue.header.is_none() {
            self.ring.push_back(image);
        }
        queue.items.push_back(item);
    }

    /// No more images of a snapshot will begin.
    pub(crate) fn finish(&mut self, snapshot: u64) {
        if let Some(outgoing) = self.snapshots.get_mut(&snapshot) {
            outgoing.finished = true;
            self.done_if_all(snapshot);
        }
    }

    /// The cache may let it be restored.
    pub(crate) fn release(&mut self, snapshot: u64) {
        self.message(Body::Release(Release { snapshot }), Some(snapshot));
        self.snapshots.remove(&snapshot);
    }

    /// A snapshot is given up, with what is still to be sent of it. The next of its target begins
    /// from scratch.
    pub(crate) fn abort(&mut self, snapshot: u64, why: &str) {
        let Some(outgoing) = self.snapshots.remove(&snapshot) else {
            return;
        };
        let images = &mut self.images;
        let queued = &mut self.queued;
        images.retain(|_, queue| {
            let keep = queue.snapshot != snapshot;
            if !keep {
                *queued -= queue.items.iter().map(Item::cost).sum::<usize>();
            }
            keep
        });
        self.ring.retain(|number| images.contains_key(number));
        self.known.remove(&outgoing.target);
        let abort = Abort {
            snapshot,
            reason: message::reason(why),
        };
        self.message(Body::Abort(abort), None);
    }

    /// Says something beside the images.
    pub(crate) fn say(&mut self, body: Body) {
        self.message(body, None);
    }

    /// Whether there is room for pages that nobody waits for: few are made in advance, since others
    /// may be asked for.
    pub(crate) fn has_room_for_pages(&self) -> bool {
        self.pushed.len() < PUSHED
    }

    /// Whether there is room for pages that tasks wait for: a cache may ask for all there are and take
    /// none.
    pub(crate) fn has_room_for_urgent(&self) -> bool {
        self.urgent_bytes < self.urgent_limit()
    }

    fn urgent_limit(&self) -> usize {
        self.limit / 4
    }

    /// Pages that were left behind.
    pub(crate) fn pages(&mut self, pages: &LazyPages, contents: Vec<u8>, urgent: bool) {
        let frame = frame::lazy_pages(pages, contents);
        self.lazy = true;
        if urgent {
            self.urgent_bytes += frame.cost();
            self.urgent.push_back(frame);
        } else {
            self.pushed.push_back(frame);
        }
    }

    /// Bytes of frames that were made of a snapshot so far.
    pub(crate) fn bytes_of(&self, snapshot: u64) -> u64 {
        self.snapshots.get(&snapshot).map_or(0, |o| o.bytes)
    }

    /// The next frame to be sent.
    pub(crate) fn next(&mut self) -> Option<Arc<Frame>> {
        if self.sent == self.unacknowledged.len() {
            if self.unacknowledged_bytes >= self.window {
                return None;
            }
            let frame = self.make()?;
            self.unacknowledged_bytes += frame.cost();
            self.unacknowledged.push_back(Arc::new(frame));
        }
        let frame = self.unacknowledged.get(self.sent)?;
        self.sent += 1;
        Some(Arc::clone(frame))
    }

    /// The cache has taken in so many frames of the session. False if there were not as many.
    pub(crate) fn acknowledge(&mut self, received: u64) -> bool {
        let Some(more) = received.checked_sub(self.acknowledged) else {
            // An old answer.
            return true;
        };
        if more > self.sent as u64 {
            return false;
        }
        for frame in self.unacknowledged.drain(..more as usize) {
            self.unacknowledged_bytes -= frame.cost();
        }
        self.sent -= more as usize;
        self.acknowledged = received;
        while self.releases.front().is_some_and(|(n, _)| *n < received) {
            self.releases.pop_front();
        }
        true
    }

    /// Frames that the cache has said it has.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// A new connection goes on where the cache says. False if that cannot be.
    pub(crate) fn resume(&mut self, received: u64) -> bool {
        // All that was made may have arrived, whatever the connection before knew of it.
        self.sent = self.unacknowledged.len();
        let possible = received >= self.acknowledged && self.acknowledge(received);
        self.sent = 0;
        possible
    }

    /// Snapshots whose release the cache may not have heard.
    pub(crate) fn unheard_releases(&self) -> Vec<u64> {
        self.releases
            .iter()
            .map(|(_, snapshot)| *snapshot)
            .collect()
    }

    /// Bytes that it takes in all.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        let frames = self.urgent.iter().chain(&self.pushed);
        let messages = self.messages.iter().map(|(frame, _)| frame);
        let frames = frames.chain(messages).map(Frame::cost).sum::<usize>();
        self.queued + frames + self.unacknowledged_bytes
    }

    /// Whether a message is to be sent, now that no image will be.
    pub(crate) fn has_messages(&self) -> bool {
        !self.messages.is_empty()
    }

    fn message(&mut self, body: Body, release_of: Option<u64>) {
        self.messages.push_back((Frame::session(body), release_of));
    }

    fn make(&mut self) -> Option<Frame> {
        if let Some(frame) = self.urgent.pop_front() {
            self.urgent_bytes -= frame.cost();
            return Some(frame);
        }
        if let Some((frame, release_of)) = self.messages.pop_front() {
            if let Some(snapshot) = release_of {
                let number = self.acknowledged + self.unacknowledged.len() as u64;
                self.releases.push_back((number, snapshot));
            }
            return Some(frame);
        }
        if self.image_was_next || self.ring.is_empty() {
            self.image_was_next = false;
            if let Some(frame) = self.pushed.pop_front() {
                return Some(frame);
            }
        }
        let number = self.ring.pop_front()?;
        self.image_was_next = true;
        let queue = self.images.get_mut(&number)?;
        let snapshot = queue.snapshot;
        let mut ended = false;
        let frame = if let Some(header) = queue.header.take() {
            Frame::message(Kind::ImageHeader, &header)
        } else {
            let item = queue.items.pop_front()?;
            self.queued -= item.cost();
            match item {
                Item::Plain(data) => frame::plain(number, data),
                Item::Pages { data, hashes } => {
                    let target = &self.snapshots.get(&snapshot)?.target;
                    let known = self.known.entry(target.clone()).or_default();
                    frame::pages(number, data, &hashes, known)
                }
                Item::End { length, blake3 } => {
                    ended = true;
                    let end = ImageEnd {
                        number,
                        length,
                        blake3: blake3.to_vec(),
                    };
                    Frame::message(Kind::ImageEnd, &end)
                }
            }
        };
        if !queue.items.is_empty() {
            self.ring.push_back(number);
        }
        if let Some(outgoing) = self.snapshots.get_mut(&snapshot) {
            outgoing.bytes += frame.length() as u64;
            outgoing.open -= usize::from(ended);
        }
        if ended {
            self.images.remove(&number);
            self.done_if_all(snapshot);
        }
        Some(frame)
    }

    fn done_if_all(&mut self, snapshot: u64) {
        let Some(outgoing) = self.snapshots.get_mut(&snapshot) else {
            return;
        };
        if !outgoing.finished || outgoing.open > 0 {
            return;
        }
        if let Some(known) = self.known.get_mut(&outgoing.target) {
            known.finish();
        }
        let done = ImagesDone {
            images: outgoing.images,
            snapshot,
        };
        self.messages
            .push_back((Frame::message(Kind::ImagesDone, &done), None));
    }
}

#[cfg(test)]
mod tests;
