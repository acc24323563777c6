//! A userfaultfd of another process, made by that process on our behalf.
//!
//! A userfaultfd belongs to the address space of its maker. So one thread of the process is stopped
//! by ptrace, made to call `userfaultfd` with an instruction that is in its memory already, and goes
//! on where it was. The descriptor comes to us by `pidfd_getfd` and is closed in the process before
//! it goes on.
//!
//! The thread does not notice: its registers and its signal mask are what they were, signals that
//! come meanwhile wait, a blocking call is resumed by the kernel as after a stop that no handler saw,
//! and a stopped process stays stopped.
//!
//! If the *tracer* is killed in these some 0.1 ms, the thread goes on in the wrong place and the
//! process most likely dies, or a descriptor is left in it. So an agent, which may be killed at any
//! moment, has a small process of its own do this ([`apart`]), which brings it to its end whatever
//! becomes of the agent. [`leftover`] finds what a tracer that was killed has left all the same.

use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::panic;
use std::thread;
use std::time::{Duration, Instant};

use crate::pidfd::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

pub mod apart;
mod code;
mod held;
pub mod leftover;
mod ptrace;
mod threads;

use held::Held;
use leftover::Leftover;

/// `UFFD_USER_MODE_ONLY`: the flag with which every process may have one.
const USER_MODE_ONLY: u64 = 1;

/// What was taken from a process.
#[derive(Debug)]
pub struct Taken<T> {
    /// A new userfaultfd of the process, on which `UFFDIO_API` was not done yet. It only handles
    /// faults from user mode, which makes no difference for asynchronous write protection.
    pub userfaultfd: OwnedFd,
    /// What the caller did while the thread was held.
    pub beside: T,
    /// How long the thread did not run, and a little more.
    pub stopped: Duration,
}

/// Why a process could not be made to call for us. It runs as if nothing had happened.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The process has ended, or is ending, or has just become another by exec.
    #[error("the process has ended")]
    Gone,
    /// It has a tracer already, or we have no right to be one.
    #[error("the process may not be traced by us; has it a debugger?")]
    Traced(#[source] io::Error),
    /// It runs 32-bit code, whose calls have other numbers.
    #[error("the process runs 32-bit code")]
    Compat,
    /// It has a system call filter that we may not suspend.
    #[error("the process is under seccomp, which may not be suspended")]
    Seccomp(#[source] io::Error),
    /// It handles its own system calls (syscall user dispatch).
    #[error("the process intercepts its own system calls")]
    Dispatch,
    /// None of its threads could be stopped in time: all wait in the kernel, not to be disturbed.
    #[error("no thread of the process could be stopped in time")]
    Busy,
    /// There is no system call instruction where one was looked for.
    #[error("no system call instruction was found in the memory of the process")]
    NoInstruction,
    /// The process may not do, or cannot do, what we made it call.
    #[error("{call} fails in the process")]
    Refused {
        /// The system call.
        call: Cow<'static, str>,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {action}")]
    Io {
        /// What failed.
        action: Cow<'static, str>,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl RemoteError {
    fn io(action: &'static str) -> impl Fn(io::Error) -> RemoteError {
        move |source| match source.raw_os_error() {
            Some(libc::ESRCH) => RemoteError::Gone,
            _ => RemoteError::Io {
                action: action.into(),
                source,
            },
        }
    }

    fn refused(call: &'static str) -> impl Fn(io::Error) -> RemoteError {
        move |source| RemoteError::Refused {
            call: call.into(),
            source,
        }
    }
}

/// What of a process has to be got hold of while a thread is held: all of the address space of which
/// the userfaultfd is.
#[derive(Debug)]
pub struct Look {
    /// `/proc/<pid>/stat`, as it was then.
    pub stat: String,
    /// `/proc/<pid>/pagemap`, open.
    pub pagemap: OwnedFd,
    /// `/proc/<pid>/maps`, open.
    pub maps: OwnedFd,
}

impl Look {
    fn at(pid: i32) -> io::Result<Look> {
        let open =
            |name| Ok::<OwnedFd, io::Error>(File::open(format!("/proc/{pid}/{name}"))?.into());
        let stat = fs::read(format!("/proc/{pid}/stat"))?;
        Ok(Look {
            stat: String::from_utf8_lossy(&stat).into_owned(),
            pagemap: open("pagemap")?,
            maps: open("maps")?,
        })
    }
}

/// Whoever makes other processes call for us.
pub trait TakeUserfaultfd: fmt::Debug + Send {
    /// A userfaultfd of a process, and a look at that.
    ///
    /// # Errors
    /// [`RemoteError`].
    fn take(&mut self, pid: i32, timeout: Duration) -> Result<Taken<Look>, RemoteError>;

    /// As [`leftover::close`].
    ///
    /// # Errors
    /// [`RemoteError`].
    fn close(&mut self, pid: i32, timeout: Duration, what: Leftover) -> Result<(), RemoteError>;
}

/// By this process itself: right where it is not killed on the way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Directly;

impl TakeUserfaultfd for Directly {
    fn take(&mut self, pid: i32, timeout: Duration) -> Result<Taken<Look>, RemoteError> {
        take_userfaultfd(pid, timeout, || Look::at(pid))
    }

    fn close(&mut self, pid: i32, timeout: Duration, what: Leftover) -> Result<(), RemoteError> {
        leftover::close(pid, timeout, what)
    }
}

/// Makes process `pid` call `userfaultfd` and takes the descriptor. `beside` runs while the thread is
/// held, so that the process can neither exec nor get another address space between the two: what it
/// opens in `/proc/<pid>` is of the same address space as the userfaultfd.
///
/// # Errors
/// [`RemoteError`]; an error of `beside` is [`RemoteError::Io`].
pub fn take_userfaultfd<T: Send>(
    pid: i32,
    timeout: Duration,
    beside: impl FnOnce() -> io::Result<T> + Send,
) -> Result<Taken<T>, RemoteError> {
    let deadline = Instant::now() + timeout;
    let ((userfaultfd, beside), stopped) = as_tracer(|| take(pid, deadline, beside))?;
    Ok(Taken {
        userfaultfd,
        beside,
        stopped,
    })
}

/// Does the work on a thread of its own. ptrace knows threads, not processes; and if a thread of the
/// target cannot be stopped, the end of this one is what lets go of it.
fn as_tracer<T: Send>(
    work: impl FnOnce() -> Result<T, RemoteError> + Send,
) -> Result<T, RemoteError> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("tracer".to_owned())
            .spawn_scoped(scope, work)
            .map_err(RemoteError::io("start a thread"))?
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

fn take<T>(
    pid: i32,
    deadline: Instant,
    beside: impl FnOnce() -> io::Result<T>,
) -> Result<((OwnedFd, T), Duration), RemoteError> {
    with_thread(pid, deadline, |thread| {
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;
        let fd = thread
            .call(libc::SYS_userfaultfd, [flags, 0, 0])?
            .map_err(RemoteError::refused("userfaultfd"))?;
        let taken = duplicate(pid, thread.thread(), fd as RawFd);
        let beside = beside();
        thread
            .call_in_any_case(libc::SYS_close, [fd, 0, 0])?
            .map_err(RemoteError::refused("close"))?;
        Ok((
            taken.map_err(RemoteError::io("take the descriptor of the process"))?,
            beside.map_err(RemoteError::io("look at the process"))?,
        ))
    })
}

/// Has a thread of the process, held, do something; it goes on whatever came out. Returns how long it
/// was held.
fn with_thread<T>(
    pid: i32,
    deadline: Instant,
    work: impl FnOnce(&mut Held) -> Result<T, RemoteError>,
) -> Result<(T, Duration), RemoteError> {
    let instruction = code::find_syscall(pid)?;
    let mut held = threads::stop_one(pid, deadline)?;
    let outcome = held.prepare(instruction).and_then(|()| work(&mut held));
    let stopped = held.release()?;
    Ok((outcome?, stopped))
}

/// Our own copy of a descriptor of a thread.
fn duplicate(pid: i32, thread: i32, fd: RawFd) -> io::Result<OwnedFd> {
    let pidfd = if thread == pid {
        let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        pidfd_open(pid, PidfdFlags::empty())?
    } else {
        open_thread(thread, pid)?
    };
    Ok(pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())?)
}

/// A pidfd of a thread; of its process on kernels that have none of threads (before 6.9), which is
/// as good unless the leader has gone or the thread has unshared its descriptors.
fn open_thread(thread: i32, pid: i32) -> io::Result<OwnedFd> {
    // PIDFD_THREAD has the value of O_EXCL.
    let flags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
    let of = |raw| rustix::process::Pid::from_raw(raw).ok_or(io::ErrorKind::InvalidInput);
    match pidfd_open(of(thread)?, flags) {
        Err(rustix::io::Errno::INVAL) => Ok(pidfd_open(of(pid)?, PidfdFlags::empty())?),
        other => Ok(other?),
    }
}

/// Whether two processes have one address space.
///
/// # Errors
/// One of them is gone, or may not be looked at, or the kernel has no `kcmp`.
pub fn same_memory(one: i32, other: i32) -> io::Result<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: the call takes integers only and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0_usize, 0_usize) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result == 0)
}
