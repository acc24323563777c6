//! An image of pages, sent by reference to the pages that the peer has.
//!
//! The target is frozen meanwhile: several threads read and hash, each every n-th chunk, and one
//! puts the chunks in order and sends them.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use haulier_proto::frame::Kind;
use haulier_transport::channel::Channel;
use haulier_transport::wait::Wait;

use crate::bank::KnownPages;
use crate::directory::ImageCount;
use crate::error::ImagesError;
use crate::outgoing::Image;
use crate::page::{self, PAGE, PageHash, PagesHasher, ZERO_HASH};
use crate::runs::{self, FRAME_PAGES, Run};

/// Bytes of an image that go into a frame.
pub(crate) const CHUNK: usize = FRAME_PAGES * PAGE;
/// More hashing threads than this outrun the copy out of the image.
const MOST_THREADS: usize = 8;

/// Where the pages of an image go.
pub(crate) struct Way<'a> {
    pub(crate) known: &'a mut KnownPages,
    pub(crate) count: &'a mut ImageCount,
    pub(crate) channel: &'a mut Channel,
    pub(crate) wait: &'a Wait,
}

/// As many hashing threads as are of use when nothing else runs.
pub(crate) fn all_threads() -> usize {
    // The kernel's answer takes longer than a small image, and there are hundreds.
    static THREADS: LazyLock<usize> =
        LazyLock::new(|| thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS)));
    *THREADS
}

/// Sends the whole pages of a part of an image.
pub(crate) fn send(
    image: &Image,
    number: u32,
    part: Range<u64>,
    hasher: &mut PagesHasher,
    threads: usize,
    way: &mut Way<'_>,
) -> Result<(), ImagesError> {
    let chunks = (part.end - part.start).div_ceil(CHUNK as u64);
    let threads = (threads as u64).min(chunks).max(1);
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for index in 0..threads {
            let (reader, worker) = pair();
            let first = part.start + index * CHUNK as u64;
            scope.spawn(move || worker.run(image, first..part.end, threads));
            readers.push(reader);
        }
        for index in 0..chunks {
            let reader = &readers[(index % threads) as usize];
            let chunk = reader.next(image)?;
            send_chunk(&chunk, number, hasher, way)?;
            // Fails if the thread has read its last chunk: nobody needs the buffer then.
            let _ = reader.spent.send(chunk.data);
        }
        Ok(())
    })
}

/// Some of an image's pages and their hashes (`None`: zero).
struct Chunk {
    data: Vec<u8>,
    hashes: Vec<Option<PageHash>>,
}

/// Our end of a reading thread.
struct Reader {
    chunks: Receiver<io::Result<Chunk>>,
    spent: Sender<Vec<u8>>,
}

/// The thread's end.
struct Worker {
    chunks: SyncSender<io::Result<Chunk>>,
    spent: Receiver<Vec<u8>>,
}

fn pair() -> (Reader, Worker) {
    let (chunks_in, chunks) = sync_channel(2);
    let (spent, spent_out) = channel();
    let worker = Worker {
        chunks: chunks_in,
        spent: spent_out,
    };
    (Reader { chunks, spent }, worker)
}

impl Reader {
    fn next(&self, image: &Image) -> Result<Chunk, ImagesError> {
        let gone = || Err(io::Error::other("the thread that reads it has ended"));
        self.chunks
            .recv()
            .unwrap_or_else(|_| gone())
            .map_err(|e| ImagesError::file("read", &image.path, e))
    }
}

impl Worker {
    fn run(self, image: &Image, part: Range<u64>, step: u64) {
        let mut offset = part.start;
        while offset < part.end {
            let buffer = self.spent.try_recv().unwrap_or_default();
            let length = (part.end - offset).min(CHUNK as u64);
            let chunk = read(image, offset, length as usize, buffer);
            let failed = chunk.is_err();
            if self.chunks.send(chunk).is_err() || failed {
                return;
            }
            offset += step * CHUNK as u64;
        }
    }
}

fn read(image: &Image, offset: u64, length: usize, mut data: Vec<u8>) -> io::Result<Chunk> {
    data.resize(length, 0);
    image.file.read_exact_at(&mut data, offset)?;
    let hashes = page::hash_all_unless_zero(&data);
    Ok(Chunk { data, hashes })
}

fn send_chunk(
    chunk: &Chunk,
    number: u32,
    hasher: &mut PagesHasher,
    way: &mut Way<'_>,
) -> Result<(), ImagesError> {
    let mut runs: Vec<Run> = Vec::new();
    let mut literal: Vec<(usize, usize)> = Vec::new();
    for (index, hash) in chunk.hashes.iter().enumerate() {
        hasher.update(hash.as_ref().unwrap_or(&ZERO_HASH));
        let run = match hash.map(|hash| way.known.refer(&hash)) {
            None => Run::Zero { pages: 1 },
            Some(Some(first)) => {
                way.count.referenced += 1;
                Run::Bank { first, pages: 1 }
            }
            Some(None) => {
                match literal.last_mut() {
                    Some((_, end)) if *end == index => *end += 1,
                    _ => literal.push((index, index + 1)),
                }
                Run::Literal { pages: 1 }
            }
        };
        if !runs.last_mut().is_some_and(|last| last.join(run)) {
            runs.push(run);
        }
    }
    let head = runs::encode(number, &runs);
    let mut parts: Vec<&[u8]> = vec![&head];
    parts.extend(
        literal
            .iter()
            .map(|(from, end)| &chunk.data[from * PAGE..end * PAGE]),
    );
    Ok(way.channel.send(Kind::ImageData, &parts, way.wait)?)
}
