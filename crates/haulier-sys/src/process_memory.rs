//! Memory of other processes: `process_vm_readv`, gathered.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// Pieces in one `process_vm_readv` call (IOV_MAX).
const PIECES: usize = 1024;

/// A piece of memory: address and length in bytes.
pub type Piece = (u64, usize);

/// Reads the memory of one process. Needs ptrace access to it (root, or the same user).
#[derive(Debug)]
pub struct ProcessMemory {
    pid: i32,
    /// `/proc/<pid>/mem`, opened when first needed.
    mem: OnceLock<File>,
}

impl ProcessMemory {
    /// For the process `pid` of our PID namespace. Nothing is opened or checked yet.
    pub fn new(pid: i32) -> Self {
        Self {
            pid,
            mem: OnceLock::new(),
        }
    }

    /// Reads the pieces one behind the other into `buf` and returns the number of bytes read.
    ///
    /// Less than the whole means: the byte at exactly that position cannot be read by any means
    /// (not mapped). Pages without read permission, which `process_vm_readv` refuses, are read
    /// through `/proc/<pid>/mem`, which does not. Errors: the process is gone, or may not be read;
    /// `InvalidInput` if `buf` is shorter than the pieces together.
    pub fn read(&self, pieces: &[Piece], buf: &mut [u8]) -> io::Result<usize> {
        let total = pieces
            .iter()
            .try_fold(0_usize, |sum, piece| sum.checked_add(piece.1));
        if total.is_none_or(|total| total > buf.len()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the buffer is shorter than the pieces to read",
            ));
        }
        let mut place = Place::default();
        let mut filled = 0;
        while place.skip_empty(pieces) {
            match read_gathered(self.pid, pieces, place, &mut buf[filled..]) {
                Ok(len) if len > 0 => {
                    filled += len;
                    place.advance(pieces, len);
                }
                // Also a 0, which no kernel returns for a piece with bytes: the other way decides.
                Err(error) if error.raw_os_error() != Some(libc::EFAULT) => return Err(error),
                _ => {
                    let (address, len) = place.rest(pieces);
                    let len = self.read_forced(address, &mut buf[filled..filled + len])?;
                    if len == 0 {
                        break;
                    }
                    filled += len;
                    place.advance(pieces, len);
                }
            }
        }
        Ok(filled)
    }

    /// Reads through `/proc/<pid>/mem`; 0 if the first byte is not mapped.
    fn read_forced(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        // A file offset is signed; the kernel's half of the address space is not the task's anyway.
        if i64::try_from(address).is_err() {
            return Ok(0);
        }
        let mem = match self.mem.get() {
            Some(mem) => mem,
            None => {
                let mem = File::open(format!("/proc/{}/mem", self.pid))?;
                self.mem.get_or_init(|| mem)
            }
        };
        match mem.read_at(buf, address) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            other => other,
        }
    }
}

/// [`ProcessMemory::read`] for a single use.
pub fn read(pid: i32, pieces: &[Piece], buf: &mut [u8]) -> io::Result<usize> {
    ProcessMemory::new(pid).read(pieces, buf)
}

/// Where the next byte comes from: piece and offset in it.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    piece: usize,
    offset: usize,
}

impl Place {
    fn rest(self, pieces: &[Piece]) -> Piece {
        let (address, len) = pieces[self.piece];
        (address + self.offset as u64, len - self.offset)
    }

    /// Steps over pieces without bytes left; false at the end.
    fn skip_empty(&mut self, pieces: &[Piece]) -> bool {
        while self.piece < pieces.len() && self.offset == pieces[self.piece].1 {
            *self = Self {
                piece: self.piece + 1,
                offset: 0,
            };
        }
        self.piece < pieces.len()
    }

    fn advance(&mut self, pieces: &[Piece], mut len: usize) {
        while len > 0 {
            let step = len.min(pieces[self.piece].1 - self.offset);
            self.offset += step;
            len -= step;
            if len > 0 {
                *self = Self {
                    piece: self.piece + 1,
                    offset: 0,
                };
            }
        }
    }
}

fn read_gathered(pid: i32, pieces: &[Piece], from: Place, buf: &mut [u8]) -> io::Result<usize> {
    let mut remote = Vec::with_capacity((pieces.len() - from.piece).min(PIECES));
    let mut len = 0;
    for (index, &(address, size)) in pieces.iter().enumerate().skip(from.piece).take(PIECES) {
        let skip = if index == from.piece { from.offset } else { 0 };
        // The addresses mean something in the other process only.
        let base = (address + skip as u64) as *mut libc::c_void;
        remote.push(libc::iovec {
            iov_base: base,
            iov_len: size - skip,
        });
        len += size - skip;
    }
    let buf = &mut buf[..len];
    let local = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the kernel writes at most `buf.len()` bytes to `buf`, which we hold exclusively; the
    // remote vector is only read, and its addresses are checked against the other address space.
    let read = unsafe {
        libc::process_vm_readv(
            pid,
            &local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    if read < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(read as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::userfaultfd::Region;

    const PAGE: usize = 4096;

    fn pattern(pages: usize) -> Region {
        let region = Region::map(pages * PAGE).unwrap();
        for page in 0..pages {
            region.write(page * PAGE, page as u8 + 1);
            region.write(page * PAGE + PAGE - 1, page as u8 ^ 0xFF);
        }
        region
    }

    fn own_pid() -> i32 {
        std::process::id() as i32
    }

    #[test]
    fn more_pieces_than_one_call_takes() {
        let region = pattern(200);
        let pieces: Vec<Piece> = (0..3000)
            .map(|i| {
                (
                    region.address() + (i % 200 * PAGE) as u64,
                    usize::from(i % 3 != 0),
                )
            })
            .collect();
        let wanted: Vec<u8> = (0..3000)
            .filter(|i| i % 3 != 0)
            .map(|i| (i % 200) as u8 + 1)
            .collect();
        let mut buf = vec![0; wanted.len()];
        assert_eq!(read(own_pid(), &pieces, &mut buf).unwrap(), wanted.len());
        assert_eq!(buf, wanted);
    }

    #[test]
    fn pages_without_permission_are_read_all_the_same() {
        let region = pattern(6);
        region.forbid(2 * PAGE..4 * PAGE).unwrap();
        let mut buf = vec![0; 6 * PAGE];
        let pieces = [(region.address(), 6 * PAGE)];
        assert_eq!(read(own_pid(), &pieces, &mut buf).unwrap(), buf.len());
        for page in 0..6 {
            assert_eq!(buf[page * PAGE], page as u8 + 1);
            assert_eq!(buf[page * PAGE + PAGE - 1], page as u8 ^ 0xFF);
        }
    }

    #[test]
    fn a_read_ends_exactly_at_what_is_not_mapped() {
        let region = pattern(4);
        let mut buf = vec![0; 5 * PAGE];
        let last_page_of_memory = !0xFFF_u64 - 0xFFF;
        let pieces = [
            (region.address(), 2 * PAGE),
            (region.address() + 3 * PAGE as u64 + 1, 10),
            (last_page_of_memory, PAGE),
            (region.address(), PAGE),
        ];
        assert_eq!(read(own_pid(), &pieces, &mut buf).unwrap(), 2 * PAGE + 10);
        assert_eq!(read(own_pid(), &pieces[2..], &mut buf).unwrap(), 0);
    }

    #[test]
    fn a_dead_process_and_a_short_buffer_are_errors() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let mut buf = [0; 16];
        let error = read(child.id() as i32, &[(4096, 16)], &mut buf).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
        let error = read(own_pid(), &[(4096, 17)], &mut buf).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
