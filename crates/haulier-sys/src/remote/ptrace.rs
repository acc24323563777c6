//! The ptrace requests that are needed, one function each.
//!
//! All but [`seize`] and [`next_stop`] want the thread to be traced by the calling thread, and to be
//! stopped (not [`interrupt`]); otherwise they fail with ESRCH.

use std::fs::File;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::unix::fs::FileExt;
use std::ptr;

/// General registers of a 64-bit thread.
pub(super) type Registers = libc::user_regs_struct;

const GETSIGMASK: u32 = 0x420A;
const SETSIGMASK: u32 = 0x420B;
const GET_RSEQ_CONFIGURATION: u32 = 0x420F;
const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const EVENT_STOP: i32 = 128;
const O_TRACESYSGOOD: usize = 1;
const O_SUSPEND_SECCOMP: usize = 1 << 21;
/// Bytes of the kernel's signal set.
const SIGSET: usize = 8;

/// What to ask for at the seizure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Options {
    /// Nothing but what tells stops apart.
    Plain,
    /// Also that no system call filter applies until the end. Needs `CAP_SYS_ADMIN`.
    SuspendSeccomp,
}

/// Why a thread stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// By our interruption, or by a stop of its whole process.
    Event,
    /// At the entry or the end of a system call.
    Syscall,
    /// Before this signal is delivered.
    Signal(i32),
    /// For another reason that concerns nobody here.
    Other,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct DispatchConfiguration {
    mode: u64,
    selector: u64,
    offset: u64,
    len: u64,
}

/// Callers are this module's own: what `data` points to, if it is an address, is what `request`
/// reads or writes.
fn request(request: u32, thread: i32, address: usize, data: usize) -> io::Result<libc::c_long> {
    // SAFETY: no request used here reads or writes memory of ours but at `data`, where the callers
    // pass a live object of the right kind.
    let result = unsafe { libc::ptrace(request as _, thread, address, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Becomes the tracer of a thread, without stopping it.
pub(super) fn seize(thread: i32, options: Options) -> io::Result<()> {
    let options = match options {
        Options::Plain => O_TRACESYSGOOD,
        Options::SuspendSeccomp => O_TRACESYSGOOD | O_SUSPEND_SECCOMP,
    };
    request(libc::PTRACE_SEIZE, thread, 0, options).map(drop)
}

/// Has a thread stop as soon as it can ([`Stop::Event`]).
pub(super) fn interrupt(thread: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, thread, 0, 0).map(drop)
}

/// Lets a stopped thread run, with a signal if it is not 0.
pub(super) fn resume(thread: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, thread, 0, signal as usize).map(drop)
}

/// As [`resume`], until the entry or end of its next system call.
pub(super) fn to_system_call(thread: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, thread, 0, signal as usize).map(drop)
}

/// Ends tracing; the thread runs, or stands with the rest of its process.
pub(super) fn detach(thread: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, thread, 0, 0).map(drop)
}

/// The thread's registers.
pub(super) fn registers(thread: i32) -> io::Result<Registers> {
    let mut registers = MaybeUninit::<Registers>::zeroed();
    request(
        libc::PTRACE_GETREGS,
        thread,
        0,
        registers.as_mut_ptr() as usize,
    )?;
    // SAFETY: plain integers, zeroed before and written by the kernel now.
    Ok(unsafe { registers.assume_init() })
}

/// Sets the thread's registers.
pub(super) fn set_registers(thread: i32, registers: &Registers) -> io::Result<()> {
    request(
        libc::PTRACE_SETREGS,
        thread,
        0,
        ptr::from_ref(registers) as usize,
    )
    .map(drop)
}

/// The signals that the thread blocks, one bit each.
pub(super) fn signal_mask(thread: i32) -> io::Result<u64> {
    let mut mask = 0_u64;
    request(
        GETSIGMASK,
        thread,
        SIGSET,
        ptr::from_mut(&mut mask) as usize,
    )?;
    Ok(mask)
}

/// Sets the signals that the thread blocks.
pub(super) fn set_signal_mask(thread: i32, mask: u64) -> io::Result<()> {
    request(SETSIGMASK, thread, SIGSET, ptr::from_ref(&mask) as usize).map(drop)
}

/// Whether the thread has its own system calls come back to it as signals. Kernels before 6.4 do
/// not tell.
pub(super) fn dispatches(thread: i32) -> bool {
    let mut configuration = DispatchConfiguration::default();
    let size = mem::size_of::<DispatchConfiguration>();
    let at = ptr::from_mut(&mut configuration) as usize;
    let known = request(GET_SYSCALL_USER_DISPATCH_CONFIG, thread, size, at).is_ok();
    known && configuration.mode != 0
}

/// Where the thread has to go on if `rip` is in a restartable sequence: the kernel aborts one when
/// its thread did not run for a while, but does not see that once other code ran in between.
pub(super) fn restartable_sequence(pid: i32, thread: i32, rip: u64) -> Option<u64> {
    let mut configuration = RseqConfiguration::default();
    let size = mem::size_of::<RseqConfiguration>();
    let at = ptr::from_mut(&mut configuration) as usize;
    request(GET_RSEQ_CONFIGURATION, thread, size, at).ok()?;
    if configuration.pointer == 0 {
        return None;
    }
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let u64_at = |address: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, address).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    // struct rseq: the address of the sequence at 8. struct rseq_cs: start, length and where to go
    // on from 8 on.
    let sequence = u64_at(configuration.pointer + 8)?;
    if sequence == 0 {
        return None;
    }
    let (start, len) = (u64_at(sequence + 8)?, u64_at(sequence + 16)?);
    let inside = rip.checked_sub(start)? < len;
    if inside { u64_at(sequence + 24) } else { None }
}

/// The stop at which the thread stands, if it has not been told yet. Never blocks. A thread that
/// ended is ESRCH, and is left for whose child it is.
pub(super) fn next_stop(thread: i32) -> io::Result<Option<Stop>> {
    let all = libc::WSTOPPED | libc::WEXITED;
    let Some((code, status)) = wait(thread, all | libc::WNOWAIT)? else {
        return Ok(None);
    };
    if matches!(code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // Now for good; it may have been killed in between, and then this finds nothing.
    if wait(thread, libc::WSTOPPED)?.is_none() {
        return Ok(None);
    }
    Ok(Some(match (status >> 8, status & 0xFF) {
        (EVENT_STOP, _) => Stop::Event,
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        (0, signal) => Stop::Signal(signal),
        _ => Stop::Other,
    }))
}

/// Code and status of what happened to a thread that this thread traces.
fn wait(thread: i32, options: libc::c_int) -> io::Result<Option<(i32, i32)>> {
    let options = options | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `info` is a live object of the kind that the call writes.
    let result = unsafe {
        libc::waitid(
            libc::P_PID,
            thread as libc::id_t,
            info.as_mut_ptr(),
            options,
        )
    };
    if result < 0 {
        let error = io::Error::last_os_error();
        // Not our tracee any more: it ended, or was replaced by an exec of another thread.
        return Err(if error.raw_os_error() == Some(libc::ECHILD) {
            io::Error::from_raw_os_error(libc::ESRCH)
        } else {
            error
        });
    }
    // SAFETY: plain integers, zeroed before and perhaps written by the kernel.
    let info = unsafe { info.assume_init() };
    // SAFETY: the field is meaningful for what `waitid` fills in, and is zero if it did not.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    Ok(Some((info.si_code, status)))
}
