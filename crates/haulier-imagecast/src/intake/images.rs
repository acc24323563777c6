//! The images of a session that are under way: from frames into the store.

use std::sync::Arc;

use haulier_images::name::ImageName;
use haulier_images::page::{self, PAGE, PageHash, PagesHasher, ZERO_HASH};
use haulier_images::runs::{self, PAGED, RUN_BYTES, Run};
use haulier_proto::message::{ImageEnd, ImageHeader};
use haulier_sys::pages::{Pages, PagesMut};

use super::{Intake, Trouble, violation};
use crate::compress::{self, COMPRESSED};
use crate::history::{BANK_COST, Bank};
use crate::store::{End, Image, Key, Piece, Store, StoreError};

/// Most images of a session that are under way.
const MOST_OPEN: usize = 8192;
/// What an image under way counts for beside its contents: the state of its hash.
const OPEN_COST: u64 = 4096;
/// Most pages that a frame may stand for.
const MOST_PAGES: u64 = 1024;

/// What the beginning of a frame of image data tells of the pages at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PagesAhead {
    image: u32,
    /// How many.
    pub(crate) count: usize,
}

impl PagesAhead {
    /// What has to be known of a body.
    pub(crate) const HEAD: usize = 8;

    /// The pages at the end of a body of `length` bytes that begins so; `None` if there are none, or
    /// not as they are.
    pub(crate) fn of(head: [u8; PagesAhead::HEAD], length: usize) -> Option<PagesAhead> {
        let [a, b, c, d, e, f, g, h] = head;
        let number = u32::from_le_bytes([a, b, c, d]);
        let runs = u32::from_le_bytes([e, f, g, h]) as usize;
        let table = runs.checked_mul(RUN_BYTES)?;
        let bytes = length.checked_sub(PagesAhead::HEAD)?.checked_sub(table)?;
        let whole = bytes > 0 && bytes % PAGE == 0;
        let plain = number & PAGED != 0 && number & COMPRESSED == 0;
        (whole && plain).then_some(PagesAhead {
            image: number & !PAGED,
            count: bytes / PAGE,
        })
    }
}

/// An image under way.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) snapshot: u64,
    name: ImageName,
    /// `None` if the snapshot was refused: what still comes of it is passed over.
    pub(super) wanted: Option<Wanted>,
}

/// An image that is kept.
#[derive(Debug)]
pub(super) struct Wanted {
    store: Arc<Store>,
    image: Arc<Image>,
    length: u64,
    hasher: Hasher,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.store.pool().release(OPEN_COST);
    }
}

#[derive(Debug)]
enum Hasher {
    Plain(Box<blake3::Hasher>),
    Pages(Box<PagesHasher>),
}

impl Intake {
    pub(super) fn header(&mut self, header: &ImageHeader) -> Result<(), Trouble> {
        let name = ImageName::new(&header.name).map_err(|e| violation(e.to_string()))?;
        if header.number & (PAGED | COMPRESSED) != 0 || self.images.contains_key(&header.number) {
            return Err(violation(format!("image number {}", header.number)));
        }
        if self.images.len() >= MOST_OPEN {
            return Err(violation("too many images at once"));
        }
        let snapshot = self.unfinished(header.snapshot)?;
        snapshot.images += 1;
        snapshot.open += 1;
        let wanted = snapshot.said.is_none();
        let key = snapshot.key.clone();
        let mut open = Open {
            snapshot: header.snapshot,
            name,
            wanted: None,
        };
        if wanted {
            match self.want(&key, &open.name) {
                Ok(wanted) => open.wanted = Some(wanted),
                Err(error) => self.refuse(header.snapshot, &error.to_string()),
            }
        }
        self.images.insert(header.number, open);
        Ok(())
    }

    fn want(&self, key: &Key, name: &ImageName) -> Result<Wanted, StoreError> {
        self.store.pool().charge(OPEN_COST)?;
        let hasher = if name.is_of_pages() {
            Hasher::Pages(Box::default())
        } else {
            Hasher::Plain(Box::default())
        };
        // Made first: it gives the charge back.
        let mut wanted = Wanted {
            store: Arc::clone(&self.store),
            image: Arc::new(Image::new(self.store.pool())),
            length: 0,
            hasher,
        };
        wanted.image = self.store.add(key, name)?;
        Ok(wanted)
    }

    /// Room for so many pages of an image, that their contents can be received into; `None` if they
    /// are not wanted, or have to go elsewhere.
    pub(crate) fn room(&self, pages: &PagesAhead) -> Option<Vec<PagesMut>> {
        let wanted = self.images.get(&pages.image)?.wanted.as_ref()?;
        if !matches!(wanted.hasher, Hasher::Pages(_)) {
            return None;
        }
        // That there is none is found again when they are taken in.
        self.store.pages(pages.count).ok().flatten()
    }

    pub(super) fn data(&mut self, body: &[u8], pages: Vec<PagesMut>) -> Result<(), Trouble> {
        let Some((number, data)) = body.split_first_chunk::<4>() else {
            return Err(violation("image data without a number"));
        };
        let number = u32::from_le_bytes(*number);
        let Some(open) = self.images.get_mut(&(number & !(PAGED | COMPRESSED))) else {
            return Err(violation(format!("data for image {number:#x}")));
        };
        let snapshot = open.snapshot;
        let Some(wanted) = &mut open.wanted else {
            return Ok(());
        };
        let decompressed;
        let data = if number & COMPRESSED != 0 {
            decompressed = compress::decompress(data).map_err(violation)?;
            &decompressed[..]
        } else {
            data
        };
        let paged = number & PAGED != 0;
        let taken = match (paged, &mut wanted.hasher) {
            (false, Hasher::Plain(hasher)) => {
                hasher.update(data);
                plain(data, &self.store)
            }
            (true, Hasher::Pages(hasher)) => {
                let target = &self.snapshots[&snapshot].key.target;
                let bank = self.banks.entry(target.clone()).or_default();
                paged_data(data, pages, hasher, bank, &self.store)
            }
            _ => Err(violation(format!(
                "data of the wrong form for {}",
                open.name
            ))),
        };
        let taken = taken.and_then(|pieces| {
            wanted.length += pieces.iter().map(Piece::len).sum::<u64>();
            Ok(self.store.push(&wanted.image, pieces)?)
        });
        self.or_refuse(snapshot, taken)
    }

    pub(super) fn end(&mut self, end: &ImageEnd) -> Result<(), Trouble> {
        let Some(open) = self.images.remove(&end.number) else {
            return Err(violation(format!("end of image {}", end.number)));
        };
        let snapshot = self.snapshot(open.snapshot)?;
        snapshot.open -= 1;
        let Some(wanted) = &open.wanted else {
            return Ok(());
        };
        let hash = match &wanted.hasher {
            Hasher::Plain(hasher) => *hasher.finalize().as_bytes(),
            Hasher::Pages(hasher) => hasher.finalize(),
        };
        if wanted.length == end.length && hash[..] == end.blake3 {
            snapshot.bytes += wanted.length;
            wanted.image.finish(End::Complete);
        } else {
            wanted.image.finish(End::Failed);
            self.refuse(
                open.snapshot,
                &format!("{} was damaged on the way", open.name),
            );
        }
        Ok(())
    }
}

/// Takes in bytes.
fn plain(data: &[u8], store: &Store) -> Result<Vec<Piece>, Trouble> {
    let blob = store.put(data)?;
    Ok(if data.is_empty() {
        Vec::new()
    } else {
        vec![Piece::Data(blob)]
    })
}

/// Takes in the pages of a frame. The contents of literal ones are in `received` if not in the body.
fn paged_data(
    body: &[u8],
    received: Vec<PagesMut>,
    hasher: &mut PagesHasher,
    bank: &mut Bank,
    store: &Store,
) -> Result<Vec<Piece>, Trouble> {
    let (runs, literal) = runs::decode_table(body).map_err(violation)?;
    let bytes = received.iter().map(|run| run.len()).sum::<usize>() + literal.len();
    runs::check_literal(&runs, bytes).map_err(violation)?;
    let count: u64 = runs.iter().map(|run| u64::from(run.pages())).sum();
    if count > MOST_PAGES {
        return Err(violation(format!("{count} pages in a frame")));
    }
    let mut literal = Literal::new(received, literal, store)?;
    store.pool().charge((bytes / PAGE) as u64 * BANK_COST)?;
    let before = bank.len();
    let taken = take_runs(&runs, &mut literal, hasher, bank, store);
    let missing = bytes / PAGE - (bank.len() - before);
    store.pool().release(missing as u64 * BANK_COST);
    taken
}

fn take_runs(
    runs: &[Run],
    literal: &mut Literal<'_>,
    hasher: &mut PagesHasher,
    bank: &mut Bank,
    store: &Store,
) -> Result<Vec<Piece>, Trouble> {
    let mut pieces = Vec::with_capacity(runs.len());
    for run in runs {
        match *run {
            Run::Zero { pages } => {
                for _ in 0..pages {
                    hasher.update(&ZERO_HASH);
                }
                pieces.push(Piece::Zero { pages });
            }
            Run::Bank { first, pages } => {
                for index in 0..pages {
                    let known = first.checked_add(index).and_then(|n| bank.refer(n));
                    let Some((hash, page)) = known else {
                        return Err(violation(format!("page {first} of a run is not known")));
                    };
                    hasher.update(&hash);
                    push(&mut pieces, page);
                }
            }
            Run::Literal { mut pages } => {
                while pages > 0 {
                    let (piece, hashes) = literal.take(pages as usize, store)?;
                    for (index, hash) in hashes.iter().enumerate() {
                        hasher.update(hash);
                        bank.add(*hash, part_of(&piece, index));
                    }
                    pages -= hashes.len() as u32;
                    push(&mut pieces, piece);
                }
            }
        }
    }
    Ok(pieces)
}

/// A page of a piece.
fn part_of(piece: &Piece, index: usize) -> Piece {
    match piece {
        Piece::Pages(pages) => Piece::Pages(pages.share(index..index + 1)),
        // It has one.
        other => other.clone(),
    }
}

/// Adds a piece, to the last one if it goes on there.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    let apart = match (pieces.last_mut(), piece) {
        (Some(Piece::Pages(last)), Piece::Pages(next)) => last.join(next).map(Piece::Pages),
        (_, piece) => Some(piece),
    };
    pieces.extend(apart);
}

/// The contents of the literal pages of a frame.
struct Literal<'a> {
    hashes: std::vec::IntoIter<PageHash>,
    from: Source<'a>,
}

enum Source<'a> {
    /// They are where they stay. From the end.
    Pages(Vec<Pages>),
    /// They have to be put somewhere.
    Body(&'a [u8]),
}

impl<'a> Literal<'a> {
    fn new(
        received: Vec<PagesMut>,
        body: &'a [u8],
        store: &Store,
    ) -> Result<Literal<'a>, StoreError> {
        let room = if received.is_empty() && !body.is_empty() {
            store.pages(body.len() / PAGE)?.map(|mut room| {
                fill(&mut room, body);
                room
            })
        } else {
            Some(received)
        };
        let Some(pages) = room else {
            let hashes = page::hash_all(body).into_iter();
            let from = Source::Body(body);
            return Ok(Literal { hashes, from });
        };
        let single: Vec<_> = pages.iter().flat_map(|run| page::each(run)).collect();
        let mut hashes = Vec::with_capacity(single.len());
        page::hash_many(&single, &mut hashes);
        let pages = pages.into_iter().rev().map(PagesMut::freeze).collect();
        Ok(Literal {
            hashes: hashes.into_iter(),
            from: Source::Pages(pages),
        })
    }

    /// The next pages, at most so many, and their hashes. There is one at least.
    fn take(&mut self, most: usize, store: &Store) -> Result<(Piece, Vec<PageHash>), Trouble> {
        let missing = || violation("contents of pages are missing");
        let (piece, count) = match &mut self.from {
            Source::Pages(runs) => {
                let mut run = runs.pop().ok_or_else(missing)?;
                if run.count() > most {
                    runs.push(run.split_off(most));
                }
                let count = run.count();
                (Piece::Pages(run), count)
            }
            Source::Body(body) => {
                let (page, rest) = body.split_at_checked(PAGE).ok_or_else(missing)?;
                *body = rest;
                (Piece::Data(store.put(page)?), 1)
            }
        };
        let hashes: Vec<_> = self.hashes.by_ref().take(count).collect();
        if hashes.len() == count {
            Ok((piece, hashes))
        } else {
            Err(missing())
        }
    }
}

/// Copies contents of the same length in.
fn fill(room: &mut [PagesMut], mut contents: &[u8]) {
    for run in room {
        let (part, rest) = contents.split_at(run.len().min(contents.len()));
        run[..part.len()].copy_from_slice(part);
        contents = rest;
    }
}
