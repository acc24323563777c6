//! The framing of CRIU's image files, and the entries that haulier reads.
//!
//! A file is a magic (two for most files), then entries: u32 length, protobuf. Numbers from
//! CRIU 4.0 to 4.2; `haulier`'s reference says which changed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use prost::Message;
use thiserror::Error;

/// First word of every image but the inventory.
const COMMON: u32 = 0x5456_4319;
/// Largest image that is read into memory here. The ones with page data are not.
pub(crate) const LARGEST: u64 = 256 << 20;

/// An image haulier reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// `pstree.img`: [`PstreeEntry`] each.
    Pstree,
    /// `pagemap-PID.img`: a [`PagemapHead`], then [`PagemapEntry`] each.
    Pagemap,
    /// `mm-PID.img`: one [`MmEntry`].
    Mm,
    /// `inventory.img`: one entry, behind one magic.
    Inventory,
    /// `core-TID.img`: one entry for a thread.
    Core,
    /// `ids-PID.img`: which kernel objects a task has.
    Ids,
    /// `fdinfo-ID.img`: the descriptors of a task.
    Fdinfo,
    /// `files.img`: everything that descriptors and mappings are of.
    Files,
    /// `remap-fpath.img`: files whose names are gone.
    RemapPaths,
}

impl ImageKind {
    fn magic(self) -> u32 {
        match self {
            ImageKind::Pstree => 0x5027_3030,
            ImageKind::Pagemap => 0x5608_4025,
            ImageKind::Mm => 0x5749_2820,
            ImageKind::Inventory => 0x5831_3116,
            ImageKind::Core => 0x5505_3847,
            ImageKind::Ids => 0x5443_2030,
            ImageKind::Fdinfo => 0x5621_3732,
            ImageKind::Files => 0x5630_3138,
            ImageKind::RemapPaths => 0x5913_3954,
        }
    }

    /// The first bytes of such a file.
    pub(crate) fn header(self) -> Vec<u8> {
        let common = (self != ImageKind::Inventory).then_some(COMMON);
        let words = common.into_iter().chain([self.magic()]);
        words.flat_map(u32::to_le_bytes).collect()
    }
}

/// An image that cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read the image {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the image {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file is not what its name says, or is damaged.
    #[error("the image {path} is not valid: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A task of the tree.
#[derive(Clone, PartialEq, Message)]
pub struct PstreeEntry {
    /// Process number.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// Its parent's.
    #[prost(uint32, required, tag = "2")]
    pub parent: u32,
    /// Its process group.
    #[prost(uint32, required, tag = "3")]
    pub group: u32,
    /// Its session.
    #[prost(uint32, required, tag = "4")]
    pub session: u32,
    /// Its threads, itself included.
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

/// The first entry of a pagemap.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct PagemapHead {
    /// Number of the image with the page data.
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// A run of pages.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct PagemapEntry {
    /// Address of the first page.
    #[prost(uint64, required, tag = "1")]
    pub address: u64,
    /// Pages, as written up to CRIU 4.1.1; zero from 4.2 on.
    #[prost(uint32, required, tag = "2")]
    pub compat_pages: u32,
    /// Whether an earlier dump has them, as it was written before there were flags.
    #[prost(bool, optional, tag = "3")]
    pub in_parent: Option<bool>,
    /// What is known of them, see [`PagemapEntry::is_lazy`].
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// Pages, as written from CRIU 4.2 on.
    #[prost(uint64, optional, tag = "5")]
    pub pages: Option<u64>,
}

impl PagemapEntry {
    const LAZY: u32 = 2;
    const PRESENT: u32 = 4;

    /// A run of pages that are left to the lazy-pages daemon, as every version reads it.
    pub fn lazy(address: u64, pages: u64) -> PagemapEntry {
        PagemapEntry {
            address,
            compat_pages: pages.try_into().unwrap_or(u32::MAX),
            in_parent: None,
            flags: Some(Self::LAZY),
            pages: Some(pages),
        }
    }

    /// Number of pages, whichever version wrote it.
    pub fn page_count(&self) -> u64 {
        self.pages.unwrap_or_else(|| self.compat_pages.into())
    }

    /// Whether the pages are left to the lazy-pages daemon. That their contents may be in the
    /// images as well changes nothing: a lazy restore skips them there (CRIU 4.0 to 4.2).
    pub fn is_lazy(&self) -> bool {
        self.flags.unwrap_or(0) & Self::LAZY != 0
    }

    /// Whether the contents are not in the images, but with the dump, which waits to hand them out.
    pub fn is_left_behind(&self) -> bool {
        self.flags.unwrap_or(Self::PRESENT) & (Self::LAZY | Self::PRESENT) == Self::LAZY
    }
}

/// Memory of a task.
#[derive(Clone, PartialEq, Message)]
pub struct MmEntry {
    /// Its mappings, by address.
    #[prost(message, repeated, tag = "14")]
    pub mappings: Vec<Mapping>,
}

/// A mapping of a task.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Mapping {
    /// First address.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// Address after the last.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// As of mmap(2).
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// What it is to CRIU.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
}

impl Mapping {
    const PRIVATE: u32 = 0x2;
    const ANONYMOUS: u32 = 0x20;
    const LOCKED: u32 = 0x2000;
    const HUGE_PAGES: u32 = 0x4_0000;
    /// Parts of the vDSO and the like.
    const SPECIAL: u32 = (1 << 2) | (1 << 3) | (1 << 12);
    const DROPPABLE: u32 = 0x8;
    const GUARD: u32 = 1 << 16;

    /// Whether CRIU leaves its pages to the lazy-pages daemon when it is told to.
    pub fn can_be_lazy(&self) -> bool {
        let wanted = Self::PRIVATE | Self::ANONYMOUS;
        let unwanted = Self::LOCKED | Self::HUGE_PAGES;
        self.flags & (wanted | unwanted) == wanted && self.status & Self::SPECIAL == 0
    }

    /// Whether it is memory of the task alone, and no file's.
    pub fn is_private_anonymous(&self) -> bool {
        let wanted = Self::PRIVATE | Self::ANONYMOUS;
        self.flags & wanted == wanted && self.status & Self::SPECIAL == 0
    }

    /// Whether the kernel may drop its pages at any time, so that they are not dumped.
    pub fn is_droppable(&self) -> bool {
        self.flags & Self::DROPPABLE != 0
    }

    /// Whether it is no mapping, but pages inside of one that are not to be touched.
    pub fn is_guard(&self) -> bool {
        self.status & Self::GUARD != 0
    }
}

/// An image file in memory.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    bytes: Vec<u8>,
    offset: usize,
}

impl Image {
    /// Reads a file and checks its magic.
    pub(crate) fn open(path: &Path, kind: ImageKind) -> Result<Image, ImageError> {
        let failed = |source| ImageError::Read {
            path: path.to_owned(),
            source,
        };
        let size = fs::metadata(path).map_err(failed)?.len();
        let bytes = if size <= LARGEST {
            fs::read(path).map_err(failed)?
        } else {
            Vec::new()
        };
        if size > LARGEST {
            return Err(ImageError::Invalid {
                path: path.to_owned(),
                reason: format!("{size} bytes are over the limit of {LARGEST}"),
            });
        }
        Image::of(path, bytes, kind)
    }

    /// An image that is in memory, under the name that errors are to give. Checks its magic.
    pub(crate) fn of(path: &Path, bytes: Vec<u8>, kind: ImageKind) -> Result<Image, ImageError> {
        let mut image = Image {
            path: path.to_owned(),
            bytes,
            offset: 0,
        };
        let header = kind.header();
        if !image.bytes.starts_with(&header) {
            return Err(image.invalid(format!("it is no {kind:?} image")));
        }
        image.offset = header.len();
        Ok(image)
    }

    /// The next entry; `None` at the end.
    pub(crate) fn next<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let Some(entry) = self.next_bytes()? else {
            return Ok(None);
        };
        let entry = M::decode(entry).map_err(|error| error.to_string());
        entry.map(Some).map_err(|why| self.invalid(why))
    }

    /// The next entry as it is; `None` at the end.
    pub(crate) fn next_bytes(&mut self) -> Result<Option<&[u8]>, ImageError> {
        let Some(length) = self.word()? else {
            return Ok(None);
        };
        let start = self.offset;
        let end = start.saturating_add(length as usize);
        if end > self.bytes.len() {
            return Err(self.invalid("it ends in the middle of an entry".to_owned()));
        }
        self.offset = end;
        Ok(Some(&self.bytes[start..end]))
    }

    /// The next entry, which has to be there.
    pub(crate) fn expect<M: Message + Default>(&mut self) -> Result<M, ImageError> {
        self.next()?
            .ok_or_else(|| self.invalid("it is empty".to_owned()))
    }

    pub(crate) fn invalid(&self, reason: String) -> ImageError {
        ImageError::Invalid {
            path: self.path.clone(),
            reason,
        }
    }

    fn word(&mut self) -> Result<Option<u32>, ImageError> {
        match self.bytes[self.offset..] {
            [] => Ok(None),
            [a, b, c, d, ..] => {
                self.offset += 4;
                Ok(Some(u32::from_le_bytes([a, b, c, d])))
            }
            _ => Err(self.invalid("it ends in the middle of a number".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(words: &[u32], entries: &[Vec<u8>]) -> tempfile::NamedTempFile {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for entry in entries {
            bytes.extend((entry.len() as u32).to_le_bytes());
            bytes.extend(entry);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn entries_come_in_order() {
        let entry = PstreeEntry {
            pid: 7,
            threads: vec![7, 8],
            ..Default::default()
        };
        let file = file(
            &[COMMON, ImageKind::Pstree.magic()],
            &[entry.encode_to_vec()],
        );
        let mut image = Image::open(file.path(), ImageKind::Pstree).unwrap();
        assert_eq!(image.next().unwrap(), Some(entry));
        assert_eq!(image.next::<PstreeEntry>().unwrap(), None);
    }

    #[test]
    fn other_and_cut_files_are_refused() {
        let other = file(&[COMMON, ImageKind::Mm.magic()], &[]);
        assert!(Image::open(other.path(), ImageKind::Pstree).is_err());
        let cut = file(&[COMMON, ImageKind::Mm.magic(), 99], &[]);
        assert!(
            Image::open(cut.path(), ImageKind::Mm)
                .unwrap()
                .next::<MmEntry>()
                .is_err()
        );
    }

    #[test]
    fn both_spellings_of_a_page_count_are_read() {
        let old = PagemapEntry {
            compat_pages: 3,
            ..Default::default()
        };
        let new = PagemapEntry {
            pages: Some(5),
            flags: Some(2),
            ..Default::default()
        };
        assert_eq!((old.page_count(), old.is_lazy()), (3, false));
        assert_eq!((new.page_count(), new.is_lazy()), (5, true));
    }
}
