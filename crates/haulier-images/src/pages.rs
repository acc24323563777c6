//! An image of pages, sent by reference to the pages that the peer has.
//!
//! The target is frozen meanwhile: several threads read and hash, each every n-th chunk, and one
//! puts the chunks in order and sends them.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use haulier_proto::frame::Kind;
use haulier_proto::message::ImageEnd;
use haulier_transport::channel::Channel;
use haulier_transport::wait::Wait;

use crate::bank::KnownPages;
use crate::directory::ImageCount;
use crate::error::ImagesError;
use crate::page::{self, PAGE, PageHash, PagesHasher, ZERO_HASH};
use crate::runs::{self, FRAME_PAGES, Run};
use crate::sender::Image;

const CHUNK: usize = FRAME_PAGES * PAGE;
/// More hashing threads than this outrun the copy out of the image.
const MOST_THREADS: usize = 8;

/// Sends the data of an image that consists of whole pages; `count` learns what was referred to.
pub(crate) fn send(
    image: &Image,
    number: u32,
    known: &mut KnownPages,
    count: &mut ImageCount,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageEnd, ImagesError> {
    let chunks = image.size.div_ceil(CHUNK as u64);
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS)) as u64;
    let threads = threads.min(chunks).max(1);
    let mut hasher = PagesHasher::new();
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for index in 0..threads {
            let (reader, worker) = pair();
            scope.spawn(move || worker.run(image, index, threads));
            readers.push(reader);
        }
        for index in 0..chunks {
            let reader = &readers[(index % threads) as usize];
            let chunk = reader.next(image)?;
            send_chunk(&chunk, number, known, count, &mut hasher, channel, wait)?;
            // Fails if the thread has read its last chunk: nobody needs the buffer then.
            let _ = reader.spent.send(chunk.data);
        }
        Ok(ImageEnd {
            number,
            length: image.size,
            blake3: hasher.finalize().to_vec(),
        })
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
    fn run(self, image: &Image, first: u64, step: u64) {
        let mut offset = first * CHUNK as u64;
        while offset < image.size {
            let buffer = self.spent.try_recv().unwrap_or_default();
            let chunk = read(image, offset, buffer);
            let failed = chunk.is_err();
            if self.chunks.send(chunk).is_err() || failed {
                return;
            }
            offset += step * CHUNK as u64;
        }
    }
}

fn read(image: &Image, offset: u64, mut data: Vec<u8>) -> io::Result<Chunk> {
    let length = (image.size - offset).min(CHUNK as u64) as usize;
    data.resize(length, 0);
    image.file.read_exact_at(&mut data, offset)?;
    let hashes = data
        .chunks_exact(PAGE)
        .map(page::hash_unless_zero)
        .collect();
    Ok(Chunk { data, hashes })
}

fn send_chunk(
    chunk: &Chunk,
    number: u32,
    known: &mut KnownPages,
    count: &mut ImageCount,
    hasher: &mut PagesHasher,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<(), ImagesError> {
    let mut runs: Vec<Run> = Vec::new();
    let mut literal: Vec<(usize, usize)> = Vec::new();
    for (index, hash) in chunk.hashes.iter().enumerate() {
        hasher.update(hash.as_ref().unwrap_or(&ZERO_HASH));
        let run = match hash.map(|hash| known.refer(&hash)) {
            None => Run::Zero { pages: 1 },
            Some(Some(first)) => {
                count.referenced += 1;
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
    Ok(channel.send(Kind::ImageData, &parts, wait)?)
}
