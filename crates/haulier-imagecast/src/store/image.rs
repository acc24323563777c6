//! An image: pieces that come one after the other, and any number of readers that follow.

use std::borrow::Cow;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use haulier_images::page::PAGE;
use haulier_sys::pages::Pages;

use super::StoreError;
use super::pool::{Blob, Pool};

/// What a piece counts for in an image, beside its contents.
const PIECE_COST: u64 = size_of::<Piece>() as u64;

/// A part of an image.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    /// Pages of zeros.
    Zero {
        /// How many.
        pages: u32,
    },
    /// Contents, which other images may share.
    Data(Arc<Blob>),
    /// The same of whole pages in memory.
    Pages(Pages),
}

impl Piece {
    /// Its bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Piece::Zero { pages } => u64::from(*pages) * PAGE as u64,
            Piece::Data(blob) => blob.len() as u64,
            Piece::Pages(pages) => pages.len() as u64,
        }
    }

    /// Its contents; `None` for zeros.
    pub(crate) fn read(&self) -> io::Result<Option<Cow<'_, [u8]>>> {
        match self {
            Piece::Zero { .. } => Ok(None),
            Piece::Data(blob) => blob.read().map(Some),
            Piece::Pages(pages) => Ok(Some(Cow::Borrowed(pages))),
        }
    }

    /// Its contents, behind others.
    pub(crate) fn append_to(&self, bytes: &mut Vec<u8>) -> io::Result<()> {
        match self.read()? {
            None => bytes.resize(bytes.len() + self.len() as usize, 0),
            Some(contents) => bytes.extend_from_slice(&contents),
        }
        Ok(())
    }
}

/// An image that arrives or has arrived.
#[derive(Debug)]
pub(crate) struct Image {
    pool: Arc<Pool>,
    content: Mutex<Content>,
    more: Condvar,
}

#[derive(Debug)]
struct Content {
    pieces: Vec<Piece>,
    length: u64,
    end: End,
}

/// How an image stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// More may come.
    Open,
    /// It is all there, and is what was sent.
    Complete,
    /// It never will be.
    Failed,
}

/// What a reader gets.
#[derive(Debug)]
pub(crate) enum Next {
    /// The next pieces.
    Pieces(Vec<Piece>),
    /// There is no more.
    End,
    /// There will be no more, and the image is not complete.
    Failed,
    /// Nothing yet.
    NotYet,
}

impl Image {
    pub(crate) fn new(pool: &Arc<Pool>) -> Image {
        Image {
            pool: Arc::clone(pool),
            content: Mutex::new(Content {
                pieces: Vec::new(),
                length: 0,
                end: End::Open,
            }),
            more: Condvar::new(),
        }
    }

    /// Counts so many pieces that will be added.
    pub(crate) fn charge(&self, pieces: usize) -> Result<(), StoreError> {
        self.pool.charge(pieces as u64 * PIECE_COST)
    }

    /// Adds pieces, which were counted.
    pub(crate) fn add(&self, pieces: Vec<Piece>) {
        let mut content = self.content();
        content.length += pieces.iter().map(Piece::len).sum::<u64>();
        content.pieces.extend(pieces);
        drop(content);
        self.more.notify_all();
    }

    /// Says how it ended. The first word counts.
    pub(crate) fn finish(&self, end: End) {
        let mut content = self.content();
        if content.end == End::Open {
            content.end = end;
        }
        drop(content);
        self.more.notify_all();
    }

    /// Its length so far.
    pub(crate) fn length(&self) -> u64 {
        self.content().length
    }

    /// Up to `most` bytes of pieces (one at least) from the `index`-th on; waits for `time` if there
    /// are none. The last piece of an image that is not complete is held back, so that no reader
    /// takes one for whole that is not.
    pub(crate) fn next(&self, index: usize, most: u64, time: Duration) -> Next {
        let ready = |content: &Content| {
            content.end != End::Open || content.pieces.len() > index.saturating_add(1)
        };
        let content = self.content();
        let (content, _) = self
            .more
            .wait_timeout_while(content, time, |content| !ready(content))
            .unwrap_or_else(PoisonError::into_inner);
        let there = match content.end {
            End::Failed => return Next::Failed,
            End::Complete => content.pieces.len(),
            End::Open => content.pieces.len().saturating_sub(1),
        };
        if index >= there {
            return if content.end == End::Complete {
                Next::End
            } else {
                Next::NotYet
            };
        }
        let mut bytes = 0;
        let pieces = content.pieces[index..there]
            .iter()
            .take_while(|piece| {
                let fits = bytes < most;
                bytes += piece.len();
                fits
            })
            .cloned()
            .collect();
        Next::Pieces(pieces)
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // Whoever panicked left it as it was before or after a step.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let pieces = self.content().pieces.len() as u64;
        self.pool.release(pieces * PIECE_COST);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const NOW: Duration = Duration::ZERO;

    fn push(image: &Image, pieces: Vec<Piece>) {
        image.charge(pieces.len()).unwrap();
        image.add(pieces);
    }

    fn data(pool: &Arc<Pool>, bytes: &[u8]) -> Vec<Piece> {
        vec![Piece::Data(Arc::new(pool.put(bytes).unwrap()))]
    }

    fn all(image: &Image) -> Option<Vec<u8>> {
        let (mut index, mut bytes) = (0, Vec::new());
        loop {
            match image.next(index, 1, SOON) {
                Next::Pieces(pieces) => {
                    index += pieces.len();
                    for piece in pieces {
                        piece.append_to(&mut bytes).unwrap();
                    }
                }
                Next::End => return Some(bytes),
                Next::Failed => return None,
                Next::NotYet => panic!("nothing came"),
            }
        }
    }

    #[test]
    fn readers_follow_an_image_that_arrives() {
        let pool = Arc::new(Pool::new(1 << 20));
        let image = Image::new(&pool);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| all(&image))).collect();
            for part in [b"ab", b"cd", b"ef"] {
                push(&image, data(&pool, part));
            }
            push(&image, vec![Piece::Zero { pages: 2 }]);
            image.finish(End::Complete);
            let mut expected = b"abcdef".to_vec();
            expected.resize(6 + 2 * PAGE, 0);
            for reader in readers {
                assert_eq!(reader.join().unwrap().as_ref(), Some(&expected));
            }
        });
        assert_eq!(all(&image).map(|bytes| bytes.len()), Some(6 + 2 * PAGE));
        drop(image);
        assert_eq!(pool.used().0, 0);
    }

    #[test]
    fn the_last_piece_comes_with_the_proof() {
        let pool = Arc::new(Pool::new(1 << 20));
        let image = Image::new(&pool);
        push(&image, data(&pool, b"first"));
        assert!(matches!(image.next(0, 1, NOW), Next::NotYet));
        push(&image, data(&pool, b"second"));
        assert!(matches!(image.next(0, 9, NOW), Next::Pieces(pieces) if pieces.len() == 1));
        image.finish(End::Failed);
        image.finish(End::Complete);
        assert!(matches!(image.next(1, 9, NOW), Next::Failed));
    }

    #[test]
    fn an_empty_image_ends_at_once() {
        let image = Image::new(&Arc::new(Pool::new(1 << 20)));
        image.finish(End::Complete);
        assert_eq!(all(&image), Some(Vec::new()));
    }
}
