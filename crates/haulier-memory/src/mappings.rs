//! The mappings of a task, told apart by what CRIU does with their pages.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::page::{ADDRESS_END, PageRange};
use crate::ranges::RangeSet;

/// What a mapping is, for CRIU and so for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingKind {
    /// Private and anonymous (heap, stack, bss, thread stacks): CRIU can dump it lazily.
    Lazy,
    /// Private and anonymous, but locked or of huge pages: always dumped with contents.
    Eager,
    /// A private mapping of a file: pages that were written are dumped with contents.
    PrivateFile(Origin),
    /// A shared mapping: of a file, of a memfd, of System V or anonymous shared memory. What is
    /// mapped twice, also in two tasks, has the same device and inode.
    Shared(Origin),
    /// vdso, vvar, vsyscall, rings of the kernel, device memory: nothing of it is pre-copied.
    Special,
}

/// The part of a file or of shared memory that a mapping shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// Device, major and minor number, as `/proc/<pid>/maps` has them.
    pub device: (u32, u32),
    /// Inode on it.
    pub inode: u64,
    /// Byte of the file that the first byte of the mapping is.
    pub offset: u64,
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its pages.
    pub range: PageRange,
    /// What it is.
    pub kind: MappingKind,
    /// May be read.
    pub readable: bool,
    /// May be written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
    /// As the kernel shows it: a file, perhaps with ` (deleted)`, a name in brackets, or nothing.
    /// It may be hostile, and may be out of the task's mount namespace: never open it.
    pub path: PathBuf,
}

/// The mappings of process `pid`, ascending.
///
/// A running process may change them meanwhile; what was there all the time is in the answer. Locked
/// memory is looked for only if the process has any, since that is slow. A zombie has no mappings.
///
/// # Errors
/// The process is gone, or may not be looked at; `InvalidData` if the kernel's answer is not
/// understood.
pub fn read(pid: i32) -> io::Result<Vec<Mapping>> {
    Source::open(pid)?.read()
}

/// The pages of all [`MappingKind::Lazy`] mappings.
pub fn lazy(mappings: &[Mapping]) -> RangeSet {
    mappings
        .iter()
        .filter(|mapping| mapping.kind == MappingKind::Lazy)
        .map(|mapping| mapping.range)
        .collect()
}

/// The open list of mappings of one address space. It stays with that address space: after an exec
/// or an exit the list is empty, whatever the process has then.
#[derive(Debug)]
pub(crate) struct Source {
    pid: i32,
    maps: File,
    buffer: Vec<u8>,
}

impl Source {
    pub(crate) fn open(pid: i32) -> io::Result<Source> {
        Ok(Source::from_file(
            pid,
            File::open(format!("/proc/{pid}/maps"))?,
        ))
    }

    /// The same, opened by somebody else.
    pub(crate) fn from_file(pid: i32, maps: File) -> Source {
        Source {
            pid,
            maps,
            buffer: Vec::new(),
        }
    }

    /// As [`read`], at this moment. The answer is empty if the address space is gone.
    pub(crate) fn read(&mut self) -> io::Result<Vec<Mapping>> {
        if has_locked(self.pid)? {
            // Has the same lines as the list, and the flags of each mapping behind them.
            let mut smaps = File::open(format!("/proc/{}/smaps", self.pid))?;
            self.buffer.clear();
            smaps.read_to_end(&mut self.buffer)?;
            // The process may have another address space than the one we have open.
            if self.is_gone()? {
                return Ok(Vec::new());
            }
        } else {
            self.buffer.clear();
            self.maps.seek(SeekFrom::Start(0))?;
            self.maps.read_to_end(&mut self.buffer)?;
        }
        parse(&self.buffer).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the list of mappings of process {} is not understood",
                    self.pid
                ),
            )
        })
    }

    fn is_gone(&mut self) -> io::Result<bool> {
        self.maps.seek(SeekFrom::Start(0))?;
        let mut byte = [0];
        Ok(self.maps.read(&mut byte)? == 0)
    }
}

/// Whether the process has locked memory. A task without an address space has no such line.
fn has_locked(pid: i32) -> io::Result<bool> {
    let status = std::fs::read(format!("/proc/{pid}/status"))?;
    let line = status
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"VmLck:"));
    Ok(line.is_some_and(|value| value.iter().any(|byte| (b'1'..=b'9').contains(byte))))
}

/// Understands both `maps` and `smaps`.
fn parse(text: &[u8]) -> Option<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let mapping = mappings.last_mut()?;
            let has = |name: &[u8]| flags.split(|byte| *byte == b' ').any(|flag| flag == name);
            if mapping.kind == MappingKind::Lazy && (has(b"lo") || has(b"ht")) {
                mapping.kind = MappingKind::Eager;
            } else if has(b"io") || has(b"pf") {
                mapping.kind = MappingKind::Special;
            }
        } else if line.first().is_some_and(|byte| is_header(*byte)) {
            let mapping = parse_line(line)?;
            // The gate at the top of the address space is no mapping of the task.
            if mapping.range.start < ADDRESS_END {
                mappings.push(mapping);
            }
        }
    }
    Some(mappings)
}

/// The other lines of `smaps` begin with a capital letter.
fn is_header(byte: u8) -> bool {
    byte.is_ascii_digit() || byte.is_ascii_lowercase()
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut next = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = next()?.split_once('-')?;
    let permissions = next()?.as_bytes();
    let offset = next()?;
    let (major, minor) = next()?.split_once(':')?;
    let inode = next()?;
    let path = fields.next().unwrap_or_default().trim_ascii_start();

    let hex = |text| u64::from_str_radix(text, 16).ok();
    let origin = Origin {
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode: inode.parse().ok()?,
        offset: hex(offset)?,
    };
    let is = |at: usize, letter| permissions.get(at) == Some(&letter);
    Some(Mapping {
        range: PageRange::between(hex(start)?, hex(end)?),
        kind: classify(is(3, b'p'), origin, path),
        readable: is(0, b'r'),
        writable: is(1, b'w'),
        executable: is(2, b'x'),
        path: PathBuf::from(OsString::from_vec(path.to_vec())),
    })
}

fn classify(private: bool, origin: Origin, path: &[u8]) -> MappingKind {
    if is_special(path) {
        return MappingKind::Special;
    }
    match (private, origin.inode) {
        (true, 0) => MappingKind::Lazy,
        (true, _) if path.starts_with(b"/anon_hugepage") => MappingKind::Eager,
        (true, _) => MappingKind::PrivateFile(origin),
        // System V identifiers are inode numbers, and the first one is 0.
        (false, _) => MappingKind::Shared(origin),
    }
}

fn is_special(path: &[u8]) -> bool {
    const KERNEL: [&[u8]; 6] = [
        b"[vdso]",
        b"[vvar",
        b"[vsyscall]",
        b"[uprobes]",
        b"/[aio]",
        b"anon_inode:",
    ];
    // Shared memory has its files here, and anonymous shared memory is shown as the first one.
    const NO_DEVICE: [&[u8]; 4] = [b"zero", b"shm/", b"hugepages/", b"mqueue/"];
    if let Some(name) = path.strip_prefix(b"/dev/") {
        return !NO_DEVICE.iter().any(|prefix| name.starts_with(prefix));
    }
    KERNEL.iter().any(|prefix| path.starts_with(prefix))
}

#[cfg(test)]
mod tests;
