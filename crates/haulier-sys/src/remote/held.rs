//! One thread of another process, held between two instructions of its own.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::RemoteError;
use super::ptrace::{self, Options, Registers, Stop};

/// Selector of 64-bit code.
const CODE_64: u64 = 0x33;
/// "Not in a system call": the kernel does not resume anything for this thread.
const NO_CALL: u64 = u64::MAX;
/// Patience with a thread that is to be put back to where it was.
const RELEASE: Duration = Duration::from_secs(5);
/// What the kernel returns inwardly for a call to be done again unless a handler runs, which then
/// makes it EINTR.
const RESTART_NO_HANDLER: i64 = -514;

/// A thread stopped by us. Dropped without [`Held::release`], it goes on when our own thread ends.
#[derive(Debug)]
pub(super) struct Held {
    thread: i32,
    deadline: Instant,
    since: Instant,
    /// As they are to be when the thread goes on.
    registers: Registers,
    /// Set by [`Held::prepare`].
    prepared: Option<Prepared>,
}

#[derive(Debug, Clone, Copy)]
struct Prepared {
    /// Address of a system call instruction.
    instruction: u64,
    /// The thread's own.
    mask: u64,
}

impl Held {
    /// Stops a thread at the border of the kernel, until `stopped` at the latest. What it is made to do
    /// has until `deadline`.
    pub(super) fn stop(
        pid: i32,
        thread: i32,
        stopped: Instant,
        deadline: Instant,
    ) -> Result<Held, RemoteError> {
        let filtered = has_seccomp(pid, thread);
        seize(thread, filtered)?;
        let since = Instant::now();
        ptrace::interrupt(thread).map_err(RemoteError::io("interrupt the thread"))?;
        loop {
            match wait(thread, stopped)? {
                Stop::Event => break,
                // Delivered as it would have been without us.
                Stop::Signal(signal) => resume(thread, signal)?,
                Stop::Syscall | Stop::Other => resume(thread, 0)?,
            }
        }
        let registers = ptrace::registers(thread).map_err(RemoteError::io("read the registers"))?;
        let mut held = Held {
            thread,
            deadline,
            since,
            registers,
            prepared: None,
        };
        if let Err(error) = held.check(pid) {
            held.release()?;
            return Err(error);
        }
        Ok(held)
    }

    pub(super) fn thread(&self) -> i32 {
        self.thread
    }

    fn check(&mut self, pid: i32) -> Result<(), RemoteError> {
        if self.registers.cs != CODE_64 {
            return Err(RemoteError::Compat);
        }
        if ptrace::dispatches(self.thread) {
            return Err(RemoteError::Dispatch);
        }
        let (number, result) = (self.registers.orig_rax as i64, self.registers.rax as i64);
        if number >= 0 && result == -i64::from(libc::EINTR) && is_interruptible(number) {
            self.registers.rax = RESTART_NO_HANDLER as u64;
        }
        if number < 0 {
            if let Some(abort) = ptrace::restartable_sequence(pid, self.thread, self.registers.rip)
            {
                self.registers.rip = abort;
            }
        }
        Ok(())
    }

    /// From here on signals wait, and the thread can be made to call.
    pub(super) fn prepare(&mut self, instruction: u64) -> Result<(), RemoteError> {
        let mask =
            ptrace::signal_mask(self.thread).map_err(RemoteError::io("read the signal mask"))?;
        ptrace::set_signal_mask(self.thread, u64::MAX)
            .map_err(RemoteError::io("set the signal mask"))?;
        self.prepared = Some(Prepared { instruction, mask });
        Ok(())
    }

    /// Has the thread do a system call; the inner result is the call's own. With an error of ours the
    /// call was not done.
    pub(super) fn call(
        &mut self,
        number: libc::c_long,
        arguments: [u64; 3],
    ) -> Result<io::Result<u64>, RemoteError> {
        self.call_until(self.deadline, number, arguments)
    }

    /// The same, for what has to be done whatever time is left.
    pub(super) fn call_in_any_case(
        &mut self,
        number: libc::c_long,
        arguments: [u64; 3],
    ) -> Result<io::Result<u64>, RemoteError> {
        let deadline = self.deadline.max(Instant::now() + RELEASE);
        self.call_until(deadline, number, arguments)
    }

    fn call_until(
        &mut self,
        mut deadline: Instant,
        number: libc::c_long,
        arguments: [u64; 3],
    ) -> Result<io::Result<u64>, RemoteError> {
        let Some(prepared) = self.prepared else {
            return Err(RemoteError::NoInstruction);
        };
        let mut registers = self.registers;
        registers.rip = prepared.instruction;
        registers.rax = number as u64;
        registers.orig_rax = NO_CALL;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        ptrace::set_registers(self.thread, &registers)
            .map_err(RemoteError::io("set the registers"))?;
        let mut signal = 0;
        let (mut late, mut entered) = (false, false);
        loop {
            ptrace::to_system_call(self.thread, signal)
                .map_err(RemoteError::io("let the thread call"))?;
            signal = 0;
            let stop = match wait(self.thread, deadline) {
                // It has not come to the call, or just does.
                Err(RemoteError::Busy) if !late => {
                    late = true;
                    deadline = Instant::now() + RELEASE;
                    ptrace::interrupt(self.thread)
                        .map_err(RemoteError::io("interrupt the thread"))?;
                    wait(self.thread, deadline)?
                }
                other => other?,
            };
            match stop {
                // The first stop is at the entry of the call, the second at its end.
                Stop::Syscall if entered => break,
                // From here on the call is done: to leave it now would leave what it makes.
                Stop::Syscall => {
                    entered = true;
                    late = true;
                    deadline = deadline.max(Instant::now() + RELEASE);
                }
                Stop::Event if late && !entered => return Err(RemoteError::Busy),
                // The process is being stopped or continued. A thread that is traced runs all the
                // same, and stands with the others once it is let go.
                Stop::Event | Stop::Other => {}
                Stop::Signal(libc::SIGSTOP) => signal = libc::SIGSTOP,
                // The mask holds back all that are sent. This is one that the call itself raised:
                // the instruction has gone, or a filter that could not be seen.
                Stop::Signal(_) => return Err(RemoteError::NoInstruction),
            }
        }
        let after =
            ptrace::registers(self.thread).map_err(RemoteError::io("read the registers"))?;
        let result = after.rax as i64;
        Ok(if (-4095..0).contains(&result) {
            Err(io::Error::from_raw_os_error(-result as i32))
        } else {
            Ok(result as u64)
        })
    }

    /// Lets the thread go on as if nothing had been; returns how long it was held.
    pub(super) fn release(self) -> Result<Duration, RemoteError> {
        // Whatever time was left: a thread that goes on with registers of ours does harm.
        let deadline = Instant::now() + RELEASE;
        if let Err(error) = ptrace::set_registers(self.thread, &self.registers) {
            // It did not come to the end of a call in time, as when it was frozen on the way. It can
            // be stopped where it is.
            if error.raw_os_error() != Some(libc::ESRCH) {
                return Err(RemoteError::io("restore the registers")(error));
            }
            ptrace::interrupt(self.thread).map_err(RemoteError::io("interrupt the thread"))?;
            wait(self.thread, deadline)?;
            ptrace::set_registers(self.thread, &self.registers)
                .map_err(RemoteError::io("restore the registers"))?;
        }
        if let Some(prepared) = self.prepared {
            // The kernel resumes an interrupted call only on the way on which it delivers signals.
            // Where we stand, at the end of a call, it is already past that; a second interruption
            // takes the thread there again.
            ptrace::interrupt(self.thread).map_err(RemoteError::io("interrupt the thread"))?;
            let mut signal = 0;
            loop {
                resume(self.thread, signal)?;
                signal = 0;
                match wait(self.thread, deadline)? {
                    Stop::Event => break,
                    Stop::Signal(libc::SIGSTOP) => signal = libc::SIGSTOP,
                    Stop::Signal(_) | Stop::Syscall | Stop::Other => {}
                }
            }
            ptrace::set_signal_mask(self.thread, prepared.mask)
                .map_err(RemoteError::io("restore the signal mask"))?;
        }
        ptrace::detach(self.thread).map_err(RemoteError::io("let go of the thread"))?;
        Ok(self.since.elapsed())
    }
}

/// Calls that end with EINTR when the thread is stopped, though no handler runs. Done again they go
/// on waiting, a timeout from its start; those that the kernel resumes by itself are not here.
pub(super) fn is_interruptible(number: i64) -> bool {
    const IO_PGETEVENTS: libc::c_long = 333;
    const CALLS: [libc::c_long; 21] = [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_semop,
        libc::SYS_semtimedop,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_io_getevents,
        IO_PGETEVENTS,
        libc::SYS_io_uring_enter,
        // Of a socket with a timeout (SO_RCVTIMEO, SO_SNDTIMEO).
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_connect,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_recvmmsg,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
    ];
    CALLS.contains(&number)
}

fn has_seccomp(pid: i32, thread: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"));
    let mode = |line: &str| Some(line.strip_prefix("Seccomp:")?.trim() != "0");
    status.is_ok_and(|status| status.lines().find_map(mode).unwrap_or(false))
}

fn seize(thread: i32, filtered: bool) -> Result<(), RemoteError> {
    let options = if filtered {
        Options::SuspendSeccomp
    } else {
        Options::Plain
    };
    let Err(error) = ptrace::seize(thread, options) else {
        return Ok(());
    };
    if error.raw_os_error() == Some(libc::ESRCH) {
        return Err(RemoteError::Gone);
    }
    // The same error for a tracer that is there already and for a filter that has to stay.
    if filtered && ptrace::seize(thread, Options::Plain).is_ok() {
        return Err(RemoteError::Seccomp(error));
    }
    Err(RemoteError::Traced(error))
}

fn resume(thread: i32, signal: i32) -> Result<(), RemoteError> {
    ptrace::resume(thread, signal).map_err(RemoteError::io("resume the thread"))
}

/// The next stop of the thread. It mostly comes within microseconds; nothing that could be polled
/// reports it.
fn wait(thread: i32, deadline: Instant) -> Result<Stop, RemoteError> {
    let begin = Instant::now();
    loop {
        match ptrace::next_stop(thread).map_err(RemoteError::io("wait for the thread"))? {
            Some(stop) => return Ok(stop),
            None if Instant::now() >= deadline => return Err(RemoteError::Busy),
            None if begin.elapsed() < Duration::from_micros(500) => std::thread::yield_now(),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}
