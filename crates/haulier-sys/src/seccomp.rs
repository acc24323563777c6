//! Another program's `PAGEMAP_SCAN` requests, answered by us: seccomp's user notification.
//!
//! A filter in the program has the kernel hold each such request until this process has answered it
//! or let it through. Everything else the program does is none of the filter's business. If this
//! process ends, the requests fail with ENOSYS.

use std::fs::{File, read_link};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

use libc::{seccomp_data, seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::pagemap::{PAGEMAP_SCAN, Region, ScanArg};

/// The program's own copy of the socket has a number from here on: lower ones may be meant for what
/// it inherits.
const HIGH_FD: i32 = 64;

const RECEIVE: Opcode = opcode::read_write::<seccomp_notif>(b'!', 0);
const SEND: Opcode = opcode::read_write::<seccomp_notif_resp>(b'!', 1);
const SET_FLAGS: Opcode = opcode::write::<u64>(b'!', 4);
/// The answer wakes the one who waits on this processor, at once.
const SYNC_WAKE_UP: u64 = 1;
/// Once we have a request only a deadly signal interrupts it (Linux 5.19).
const WAIT_KILLABLE: libc::c_ulong = 1 << 5;

/// A command that will have the filter, if the kernel and this process's rights permit.
#[derive(Debug)]
pub struct Arming(OwnedFd);

/// Has the command's `PAGEMAP_SCAN` requests wait for answers, its descendants' too. To be called
/// behind whatever else prepares the command.
///
/// The program starts without the filter where that is not permitted. Tasks that it attaches to are
/// not concerned; tasks that it makes are, so it must not be one that restores.
///
/// # Errors
/// If no pair of sockets can be had.
pub fn hold_scans(command: &mut Command) -> io::Result<Arming> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let theirs = rustix::io::fcntl_dupfd_cloexec(&theirs, HIGH_FD)?;
    let filter = filter();
    let install = move || {
        if let Some(listener) = filter.as_ref().and_then(|filter| install(filter)) {
            hand_over(&theirs, listener.as_fd())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls and touches nothing but its
    // captures and its stack; it takes no lock and does not allocate.
    unsafe { command.pre_exec(install) };
    Ok(Arming(ours))
}

impl Arming {
    /// To be called once the command has started: where its requests arrive, if the filter is in
    /// place.
    pub fn listener(self) -> Option<Listener> {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // It was sent before the program began, or never will be.
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut parts = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(&self.0, &mut parts, &mut control, flags).ok()?;
        let listener = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        })?;
        // SAFETY: the request takes its flags by value and touches no memory. That a kernel before
        // 6.6 does not know it does no harm.
        unsafe { libc::ioctl(listener.as_raw_fd(), SET_FLAGS as _, SYNC_WAKE_UP) };
        Some(Listener(listener))
    }
}

/// Where the requests of one program arrive. Readable when there is one; hung up when the program
/// and its descendants have ended. Requests fail once it is closed.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Held {
    id: u64,
    /// The task that made it.
    pid: i32,
    descriptor: i32,
    argument: u64,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// The next request; blocks unless the listener is readable.
    ///
    /// # Errors
    /// The kernel's; ENOENT if the task that made the request was killed meanwhile.
    pub fn receive(&self) -> io::Result<Held> {
        // SAFETY: all of its fields are integers, for which zero is a value.
        let mut notice: seccomp_notif = unsafe { mem::zeroed() };
        // SAFETY: the descriptor is open, and `notice` is a live exclusive reference to the zeroed
        // structure that the request fills in.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), RECEIVE as _, ptr::from_mut(&mut notice)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Held {
            id: notice.id,
            pid: notice.pid as i32,
            descriptor: notice.data.args[0] as i32,
            argument: notice.data.args[2],
        })
    }

    /// Has the kernel do what was requested.
    ///
    /// # Errors
    /// The kernel's; ENOENT if the task was killed meanwhile.
    pub fn let_through(&self, held: &Held) -> io::Result<()> {
        self.send(seccomp_notif_resp {
            id: held.id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        })
    }

    /// Answers with these regions, ascending. Those for which the answer has no room are left to a
    /// request from there on, as the kernel leaves them.
    ///
    /// # Errors
    /// The kernel's; ENOENT if the task was killed meanwhile.
    pub fn answer(&self, held: &Held, request: &Request, found: &[Region]) -> io::Result<()> {
        let room = request.0.vec_len as usize;
        let (told, walk_end) = match found.get(..room) {
            Some([told @ .., last]) if found.len() > room => (&found[..=told.len()], last.end),
            _ => (found, request.0.end),
        };
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{}/mem", held.pid))?;
        let words = told
            .iter()
            .flat_map(|region| [region.start, region.end, region.categories]);
        let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        memory.write_all_at(&bytes, request.0.vec)?;
        let walked = held.argument + mem::offset_of!(ScanArg, walk_end) as u64;
        memory.write_all_at(&walk_end.to_ne_bytes(), walked)?;
        self.send(seccomp_notif_resp {
            id: held.id,
            val: told.len() as i64,
            error: 0,
            flags: 0,
        })
    }

    fn send(&self, mut response: seccomp_notif_resp) -> io::Result<()> {
        // SAFETY: the descriptor is open, and `response` is a live exclusive reference to the
        // structure of the request.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), SEND as _, ptr::from_mut(&mut response)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Held {
    /// The process whose pages are asked for, by its number in our procfs, if the descriptor is a
    /// pagemap.
    pub fn subject(&self) -> Option<i32> {
        let path = read_link(format!("/proc/{}/fd/{}", self.pid, self.descriptor)).ok()?;
        let path = path.to_str()?.strip_prefix("/proc/")?;
        path.strip_suffix("/pagemap")?.parse().ok()
    }

    /// What is asked for.
    ///
    /// # Errors
    /// If the memory of the program cannot be read.
    pub fn request(&self) -> io::Result<Request> {
        let memory = File::open(format!("/proc/{}/mem", self.pid))?;
        let mut words = [0; mem::size_of::<ScanArg>() / 8];
        let mut bytes = [0; mem::size_of::<ScanArg>()];
        memory.read_exact_at(&mut bytes, self.argument)?;
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            *word = u64::from_ne_bytes(value);
        }
        let [size, flags, start, end, walk_end, vec, rest @ ..] = words;
        let [
            vec_len,
            max_pages,
            category_inverted,
            category_mask,
            category_anyof_mask,
            return_mask,
        ] = rest;
        Ok(Request(ScanArg {
            size,
            flags,
            start,
            end,
            walk_end,
            vec,
            vec_len,
            max_pages,
            category_inverted,
            category_mask,
            category_anyof_mask,
            return_mask,
        }))
    }
}

/// What a request asks for.
#[derive(Debug)]
pub struct Request(ScanArg);

impl Request {
    /// The addresses that are looked at.
    pub fn addresses(&self) -> (u64, u64) {
        (self.0.start, self.0.end)
    }

    /// Categories of [`crate::pagemap::category`] of which a page must be in one, and in none of
    /// which it must be, if that is all that is asked.
    pub fn any_but_none(&self) -> Option<(u64, u64)> {
        let plain = self.0.size == mem::size_of::<ScanArg>() as u64
            && self.0.flags == 0
            && self.0.max_pages == 0
            && self.0.vec_len > 0
            && self.0.category_mask == self.0.category_inverted;
        plain.then_some((self.0.category_anyof_mask, self.0.category_mask))
    }
}

/// The BPF program: of this machine's calls, ioctl with this very number is held.
fn filter() -> Option<[sock_filter; 8]> {
    let machine = match () {
        () if cfg!(target_arch = "x86_64") => 0xc000_003e_u32,
        () if cfg!(target_arch = "aarch64") => 0xc000_00b7,
        () => return None,
    };
    let load = |offset: usize| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset as u32);
    // On to the next step if equal, else over so many.
    let equal =
        |value: u32, over: u8| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, over, value);
    let end = |verdict: u32| step(libc::BPF_RET | libc::BPF_K, 0, verdict);
    Some([
        load(mem::offset_of!(seccomp_data, arch)),
        equal(machine, 5),
        load(mem::offset_of!(seccomp_data, nr)),
        equal(libc::SYS_ioctl as u32, 3),
        // The lower half of the second argument: both machines are little-endian.
        load(mem::offset_of!(seccomp_data, args) + 8),
        equal(PAGEMAP_SCAN, 1),
        end(libc::SECCOMP_RET_USER_NOTIF),
        end(libc::SECCOMP_RET_ALLOW),
    ])
}

fn step(code: u32, otherwise: u8, value: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: otherwise,
        k: value,
    }
}

/// Puts the filter into this process.
fn install(filter: &[sock_filter]) -> Option<OwnedFd> {
    let program = sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE;
    // SAFETY: `program` names a live array and its length, which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            ptr::from_ref(&program),
        )
    };
    if result < 0 {
        return None;
    }
    // SAFETY: with this flag a call that succeeds returns a descriptor, which nobody else owns.
    Some(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// A program whose listener nobody has must not start: its requests would fail.
fn hand_over(socket: &OwnedFd, listener: BorrowedFd<'_>) -> Result<(), Errno> {
    let rights = [listener];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&rights));
    let parts = [IoSlice::new(b"l")];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).map(drop)
}

#[cfg(test)]
mod tests;
