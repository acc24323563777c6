//! userfaultfd: descriptor, events, COPY, ZEROPAGE, WAKE, UNREGISTER.
//!
//! Numbers and layouts are those of `linux/userfaultfd.h`. A [`Userfaultfd`] usually belongs to
//! another process (CRIU passes it over its lazy-pages socket); [`Userfaultfd::create`] makes one
//! for our own, which is only of use with a [`Region`].

mod region;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::ioctl::{Opcode, opcode};

pub use region::Region;

/// Features CRIU asks for on the descriptors it hands to a lazy-pages daemon.
pub const CRIU_FEATURES: u64 =
    features::EVENT_FORK | features::EVENT_REMAP | features::EVENT_REMOVE | features::EVENT_UNMAP;

/// Feature bits of `UFFDIO_API` that this crate uses.
pub mod features {
    /// `fork` in the task is reported, with a descriptor for the child.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// `mremap` in the task is reported.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// `madvise(MADV_DONTNEED / MADV_FREE)` in the task is reported.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// `munmap` in the task is reported.
    pub const EVENT_UNMAP: u64 = 1 << 6;
    /// Writes to protected pages are noted, not reported: the kernel lets them through by itself.
    pub const WP_ASYNC: u64 = 1 << 15;
}

const API: u64 = 0xAA;
const USER_MODE_ONLY: libc::c_int = 1;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
/// Bytes of `struct uffd_msg`, the same on every architecture.
const MESSAGE: usize = 32;
/// Messages taken by one read.
const BATCH: usize = 64;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroArg {
    range: RangeArg,
    mode: u64,
    zeropage: i64,
}

const UFFDIO_API: Opcode = opcode::read_write::<ApiArg>(0xAA, 0x3F);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<RegisterArg>(0xAA, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<RangeArg>(0xAA, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<RangeArg>(0xAA, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<CopyArg>(0xAA, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<ZeroArg>(0xAA, 0x04);

/// What the kernel reports on a userfaultfd.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page that contains `address`.
    Pagefault {
        /// Faulting address, not rounded to a page on every kernel.
        address: u64,
        /// `UFFD_PAGEFAULT_FLAG_*`.
        flags: u64,
        /// Thread id, 0 unless `UFFD_FEATURE_THREAD_ID` was asked for.
        tid: u32,
    },
    /// The task forked; the descriptor serves the child's address space.
    Fork {
        /// The child's userfaultfd, already installed in our process.
        uffd: OwnedFd,
    },
    /// `mremap` moved `len` bytes.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes moved.
        len: u64,
    },
    /// The content of `[start, end)` is about to be dropped (`MADV_DONTNEED`, `MADV_FREE`).
    Remove {
        /// First byte.
        start: u64,
        /// First byte beyond.
        end: u64,
    },
    /// `[start, end)` was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// First byte beyond.
        end: u64,
    },
}

/// Why a COPY or ZEROPAGE stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// EEXIST: the page at the stop is present already.
    #[error("the page is present already")]
    Exists,
    /// EAGAIN: the task changes its mappings; read the events and try again. The kernel goes on
    /// saying so for a moment after the event was read, until the task has gone on.
    #[error("the mappings are changing")]
    Changing,
    /// ENOENT: no registered mapping at the address, or the range leaves the mapping.
    #[error("the address is not in a registered mapping")]
    NotRegistered,
    /// ESRCH: the address space is gone.
    #[error("the address space is gone")]
    Gone,
    /// ENOSPC: the address space is gone (older kernels) or its backing store is full.
    #[error("no space for the page")]
    NoSpace,
    /// Any other error number.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Errno(i32),
}

/// A COPY or ZEROPAGE that did not reach its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{obstacle} (after {done} bytes)")]
pub struct PlaceError {
    /// Bytes that were placed before the obstacle.
    pub done: usize,
    /// What stood in the way of the byte at `done`.
    pub obstacle: Obstacle,
}

/// A page at the end of the address space, where nobody registers anything.
const NOWHERE: u64 = 0x7fff_ffff_e000;

/// A userfaultfd, of another process or of our own.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    /// Takes a descriptor on which `UFFDIO_API` was done, as CRIU passes it. Makes it nonblocking:
    /// the kernel answers `poll` on a blocking userfaultfd with an error.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        Ok(Self { fd })
    }

    /// Makes a userfaultfd for our own process with the given [`features`]. Without
    /// `CAP_SYS_PTRACE` and with `vm.unprivileged_userfaultfd=0` it only sees faults from user mode.
    pub fn create(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match syscall_userfaultfd(flags) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                syscall_userfaultfd(flags | USER_MODE_ONLY)?
            }
            other => other?,
        };
        Self::begin(fd, features)
    }

    /// Takes a descriptor on which `UFFDIO_API` was not done yet, and does it with the given
    /// [`features`]. EINVAL: the kernel lacks one of them.
    pub fn begin(fd: OwnedFd, features: u64) -> io::Result<Self> {
        let this = Self { fd };
        let mut arg = ApiArg {
            api: API,
            features,
            ioctls: 0,
        };
        this.ioctl(UFFDIO_API, &mut arg)?;
        Ok(this)
    }

    /// Registers the mappings of a range for write protection, with [`features::WP_ASYNC`].
    /// Nothing is protected yet. Errors: EBUSY, another userfaultfd has a part of it;
    /// EINVAL, nothing is mapped there, or something that cannot be registered; ENOMEM, the address
    /// space is gone.
    pub fn register_write_protect(&self, start: u64, len: u64) -> io::Result<()> {
        let mut arg = RegisterArg {
            range: RangeArg { start, len },
            mode: MODE_WP,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    /// Registers the mappings of a range for write protection, beside missing pages, for which they are
    /// registered already. Nothing is protected: all that it does is to be seen in `smaps`, of the process
    /// whose memory this is for. Errors as of [`Self::register_write_protect`].
    pub fn mark(&self, start: u64, len: u64) -> io::Result<()> {
        let mut arg = RegisterArg {
            range: RangeArg { start, len },
            mode: MODE_MISSING | MODE_WP,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    /// Registers a whole [`Region`] of our own for faults on missing pages.
    pub fn register_missing(&self, region: &Region) -> io::Result<()> {
        let range = RangeArg {
            start: region.address(),
            len: region.len() as u64,
        };
        let mut arg = RegisterArg {
            range,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    /// Appends the pending events (at most 64 at a time) to `events` and returns how many came;
    /// 0 if there is none. Never blocks.
    pub fn read_events(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut raw = [0_u8; MESSAGE * BATCH];
        let len = match rustix::io::read(&self.fd, &mut raw) {
            Ok(len) => len,
            Err(rustix::io::Errno::AGAIN) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let mut count = 0;
        // Every descriptor of the batch must be owned before an error can be returned.
        let mut unknown = None;
        for message in raw[..len].chunks_exact(MESSAGE) {
            match parse(message) {
                Ok(event) => {
                    events.push(event);
                    count += 1;
                }
                Err(kind) => unknown = Some(kind),
            }
        }
        match unknown {
            Some(kind) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("userfaultfd reports an event of unknown kind {kind:#x}"),
            )),
            None => Ok(count),
        }
    }

    /// Places `data` (whole pages) at `dst` and wakes who waits there. The range must stay inside
    /// one mapping. Present pages are never overwritten.
    pub fn copy(&self, dst: u64, data: &[u8]) -> Result<(), PlaceError> {
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            let mut arg = CopyArg {
                dst: dst + done as u64,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copy: 0,
            };
            let outcome = self.ioctl(UFFDIO_COPY, &mut arg);
            done = advance(done, rest.len(), arg.copy, outcome)?;
        }
        Ok(())
    }

    /// Places zero pages over `len` bytes at `dst` and wakes who waits there. As [`Self::copy`].
    pub fn zero(&self, dst: u64, len: usize) -> Result<(), PlaceError> {
        let mut done = 0;
        while done < len {
            let rest = len - done;
            let range = RangeArg {
                start: dst + done as u64,
                len: rest as u64,
            };
            let mut arg = ZeroArg {
                range,
                mode: 0,
                zeropage: 0,
            };
            let outcome = self.ioctl(UFFDIO_ZEROPAGE, &mut arg);
            done = advance(done, rest, arg.zeropage, outcome)?;
        }
        Ok(())
    }

    /// Whether the memory that it was made for is still there: it goes with the last task that has it.
    pub fn has_memory(&self) -> bool {
        let range = RangeArg {
            start: NOWHERE,
            len: 4096,
        };
        let mut arg = ZeroArg {
            range,
            mode: 0,
            zeropage: 0,
        };
        let refused = self.ioctl(UFFDIO_ZEROPAGE, &mut arg);
        // Otherwise the kernel finds no registered mapping there, or has no time for it.
        refused.map_or_else(|error| error.raw_os_error() != Some(libc::ESRCH), |()| true)
    }

    /// Wakes the threads that wait for a page in the range; they fault again if it is missing.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut RangeArg { start, len })
    }

    /// Ends the registration of the range: what is missing there becomes zero on first touch.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut RangeArg { start, len })
    }

    /// Callers are this module's own: `request` and `T` belong together, and no request here makes
    /// the kernel write to our memory elsewhere than in `arg` and in missing pages of a [`Region`].
    fn ioctl<T>(&self, request: Opcode, arg: &mut T) -> io::Result<()> {
        // SAFETY: the descriptor is open and `arg` is a live exclusive reference to the structure
        // that `request` was computed from.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, ptr::from_mut(arg)) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

fn syscall_userfaultfd(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes one integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// How far a COPY or ZEROPAGE came: `moved` is the kernel's count, or a negative error number.
fn advance(
    done: usize,
    wanted: usize,
    moved: i64,
    outcome: io::Result<()>,
) -> Result<usize, PlaceError> {
    let Err(error) = outcome else {
        return Ok(done + wanted);
    };
    // A part was done: the kernel says EAGAIN whatever stopped it. The next call tells.
    if moved > 0 {
        return Ok(done + (moved as usize).min(wanted));
    }
    let obstacle = match error.raw_os_error().unwrap_or(0) {
        libc::EEXIST => Obstacle::Exists,
        libc::EAGAIN => Obstacle::Changing,
        libc::ENOENT => Obstacle::NotRegistered,
        libc::ESRCH => Obstacle::Gone,
        libc::ENOSPC => Obstacle::NoSpace,
        errno => Obstacle::Errno(errno),
    };
    Err(PlaceError { done, obstacle })
}

/// Decodes one `struct uffd_msg`; an unknown kind is returned as the error.
fn parse(message: &[u8]) -> Result<Event, u8> {
    let u64_at = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    let u32_at = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&message[at..at + 4]);
        u32::from_ne_bytes(bytes)
    };
    match message[0] {
        0x12 => Ok(Event::Pagefault {
            flags: u64_at(8),
            address: u64_at(16),
            tid: u32_at(24),
        }),
        0x13 => {
            // SAFETY: the kernel installed this descriptor in our table for the reader of the
            // message, which is us; every message is parsed once.
            let uffd = unsafe { OwnedFd::from_raw_fd(u32_at(8) as RawFd) };
            Ok(Event::Fork { uffd })
        }
        0x14 => Ok(Event::Remap {
            from: u64_at(8),
            to: u64_at(16),
            len: u64_at(24),
        }),
        0x15 => Ok(Event::Remove {
            start: u64_at(8),
            end: u64_at(16),
        }),
        0x16 => Ok(Event::Unmap {
            start: u64_at(8),
            end: u64_at(16),
        }),
        kind => Err(kind),
    }
}

#[cfg(test)]
mod tests;
