//! Shared memory as the file that it is to the kernel.

use std::fs::{self, File};
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;

use super::{Batch, Stop};
use crate::mappings::Origin;
use crate::page::{PAGE, PAGE_BYTES, PageRange};

/// The kernel's own tmpfs, which nobody can mount: anonymous shared memory, memfds and System V
/// segments are files on it, and nothing else is. A file of any other filesystem (also of
/// `/dev/shm`) is dumped as a file or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KernelMount {
    device: u64,
}

/// Tells objects apart. A System V segment has its identifier for an inode number, which another
/// object may have too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    inode: u64,
    system_v: bool,
}

/// A piece of shared memory, whoever maps it.
#[derive(Debug)]
pub(super) struct Object {
    /// A link below `/proc/<pid>`, which may lead elsewhere by the time it is used again.
    path: PathBuf,
    mount: KernelMount,
    inode: u64,
    bytes: u64,
    key: Key,
}

impl KernelMount {
    pub(super) fn find() -> io::Result<KernelMount> {
        let probe = rustix::fs::memfd_create("haulier-probe", MemfdFlags::CLOEXEC)?;
        let device = rustix::fs::fstat(&probe)?.st_dev;
        Ok(KernelMount { device })
    }

    /// Whether a mapping is of this filesystem.
    pub(super) fn holds(self, (major, minor): (u32, u32)) -> bool {
        rustix::fs::makedev(major, minor) == self.device
    }
}

impl Key {
    pub(super) fn of_mapping(origin: Origin, path: &Path) -> Key {
        Key {
            inode: origin.inode,
            // The kernel's own name for it; a memfd's begins otherwise, whatever it is called.
            system_v: path.as_os_str().as_bytes().starts_with(b"/SYSV"),
        }
    }
}

impl Object {
    /// The object that a process has mapped at exactly `range`.
    pub(super) fn mapped(pid: i32, range: PageRange, mount: KernelMount) -> io::Result<Object> {
        let (start, end) = (range.start, range.end());
        let path = PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
        Object::open(path, mount)
    }

    /// The object behind a link.
    pub(super) fn open(path: PathBuf, mount: KernelMount) -> io::Result<Object> {
        let name = fs::read_link(&path)?;
        let file = open(&path, mount, None)?;
        let inode = file.metadata()?.ino();
        let key = Key::of_mapping(
            Origin {
                device: (0, 0),
                inode,
                offset: 0,
            },
            &name,
        );
        let mut bytes = 0;
        let mut next = 0;
        while let Some(extent) = data_from(&file, next)? {
            bytes += extent.end - extent.start;
            next = extent.end;
        }
        Ok(Object {
            path,
            mount,
            inode,
            bytes,
            key,
        })
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// Bytes of the pages that it had.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads what is not a hole.
    pub(super) fn read<E, F>(&self, batch: &mut Batch<F>) -> Result<(), Stop<E>>
    where
        F: FnMut(&[u8]) -> Result<ControlFlow<()>, E>,
    {
        let Ok(file) = open(&self.path, self.mount, Some(self.inode)) else {
            batch.vanished(self.bytes / PAGE);
            return Ok(());
        };
        let mut next = 0;
        // An object may shrink or be punched at any time: what cannot be read is not there.
        while let Ok(Some(extent)) = data_from(&file, next) {
            let mut at = extent.start;
            while at < extent.end {
                let room = batch.room()?;
                let wanted = room.len().min((extent.end - at) as usize);
                let read = match file.read_at(&mut room[..wanted], at) {
                    Ok(read) if read > 0 => read,
                    _ => break,
                };
                let count = read.next_multiple_of(PAGE_BYTES);
                // The object's last page, which goes on with zeros.
                room[read..count].fill(0);
                batch.filled(count);
                at += count as u64;
            }
            batch.vanished((extent.end - at) / PAGE);
            next = extent.end;
        }
        Ok(())
    }
}

/// The links to the memfds that a process has open.
pub(super) fn memfds(pid: i32) -> io::Result<Vec<PathBuf>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // One that was closed meanwhile is none.
        let name = fs::read_link(&path).unwrap_or_default();
        if name.as_os_str().as_bytes().starts_with(b"/memfd:") {
            links.push(path);
        }
    }
    Ok(links)
}

/// Opens a link if it leads to an object of the mount, and to the same as before.
fn open(path: &Path, mount: KernelMount, inode: Option<u64>) -> io::Result<File> {
    let right = |found: fs::Metadata| {
        found.dev() == mount.device && inode.is_none_or(|inode| inode == found.ino())
    };
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    // Asked before the open too: to open a device or a pipe would have effects.
    if !right(fs::metadata(path)?) {
        return Err(gone());
    }
    let file = File::open(path)?;
    if right(file.metadata()?) {
        Ok(file)
    } else {
        Err(gone())
    }
}

/// The next extent that is not a hole, in whole pages; `None` at the end.
fn data_from(file: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start / PAGE * PAGE,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        // The last page of an object counts whole: so it is mapped and so it is dumped.
        Ok(end) => end.next_multiple_of(PAGE),
        // Cut off in between.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // A hole may have come where the data was; the walk goes on all the same.
    Ok(Some(start..end.max(start + PAGE)))
}
