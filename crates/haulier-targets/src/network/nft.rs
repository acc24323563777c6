//! `nft -f -`, started ahead of time so that a batch holds within two milliseconds.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Error;
use super::deadline::poll_until;
use super::nf_tables::{Change, Events, Family};

/// Where to look besides `PATH`, which for users other than root lacks the sbin folders.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];
/// As much of nft's complaint as is kept.
const MAX_COMPLAINT: usize = 4096;
/// A process that has done its work has this long to end before it is killed.
const REAP_WITHIN: Duration = Duration::from_secs(1);

/// What to hand to an `nft`, and how to know that it holds.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    /// For errors: "nft could not ...".
    pub(super) operation: &'static str,
    /// The commands.
    pub(super) text: &'a str,
    /// The table they are about.
    pub(super) table: &'a str,
    /// What the kernel tells of that table once they hold.
    pub(super) expected: Vec<(Family, Change)>,
}

/// An `nft` that waits for its batch: starting a process and loading its libraries is over.
///
/// Dropped without a batch, it reads an empty one and ends; so it does if we die.
#[derive(Debug)]
pub(super) struct ArmedNft {
    // In this order: the end of its input is what nft ends by, and it is waited for last.
    stdin: ChildStdin,
    stderr: ChildStderr,
    process: Reaped,
}

impl ArmedNft {
    pub(super) fn spawn() -> Result<Self, Error> {
        let mut missing = io::Error::from(io::ErrorKind::NotFound);
        for program in PROGRAMS {
            let mut command = Command::new(program);
            command.args(["-f", "-"]).env("LC_ALL", "C");
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            // A Ctrl-C meant for us must not take away the way to lift the lock.
            command.process_group(0);
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    missing = error;
                    continue;
                }
                Err(source) => {
                    return Err(Error::NftProcess {
                        operation: "start",
                        source,
                    });
                }
            };
            let (Some(stdin), Some(stderr)) = (child.stdin.take(), child.stderr.take()) else {
                unreachable!("both were asked to be pipes");
            };
            return Ok(Self {
                process: Reaped(child),
                stdin,
                stderr,
            });
        }
        Err(Error::NftMissing(missing))
    }

    /// Hands over the batch, and returns once the kernel told of all that is expected, or
    /// once nft has ended well. Drop what is returned when there is time.
    pub(super) fn run(self, batch: Batch<'_>, deadline: Duration) -> Result<Ending, Error> {
        let operation = batch.operation;
        let Self {
            mut process,
            stdin,
            stderr,
        } = self;
        let until = Instant::now() + deadline;
        let mut events = match Events::subscribe() {
            Ok(events) => events,
            Err(source) => return Err(Error::NftProcess { operation, source }),
        };
        match feed(&mut process, stdin, stderr, batch, &mut events, until) {
            Ok(Outcome::Notified) => Ok(Ending {
                _process: process,
                _events: events,
            }),
            Ok(Outcome::Ended { status, .. }) if status.success() => Ok(Ending {
                _process: process,
                _events: events,
            }),
            Ok(Outcome::Ended { status, complaint }) => {
                let text = String::from_utf8_lossy(&complaint);
                let text = text.trim();
                let message = if text.is_empty() {
                    status.to_string()
                } else {
                    text.to_owned()
                };
                Err(Error::Nft { operation, message })
            }
            Err(error) => {
                process.kill();
                Err(match error.kind() {
                    io::ErrorKind::TimedOut => Error::NftTimeout {
                        operation,
                        deadline,
                    },
                    _ => Error::NftProcess {
                        operation,
                        source: error,
                    },
                })
            }
        }
    }
}

/// What is left of a batch that holds.
///
/// Closing any netfilter netlink socket, nft's or ours, waits for the kernel to free what the
/// batch deleted (nft_rcv_nl_event(), net/netfilter/nf_tables_api.c): 5 to 20 ms. That is what
/// dropping this waits for.
#[derive(Debug)]
pub(super) struct Ending {
    _process: Reaped,
    _events: Events,
}

/// A process that is waited for when dropped, and killed if it does not end.
#[derive(Debug)]
struct Reaped(Child);

impl Reaped {
    fn kill(&mut self) {
        // Both fail only for a process that has been waited for already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    fn wait(&mut self, until: Instant) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            let process = pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty())?;
            poll_until(&mut [PollFd::new(&process, PollFlags::IN)], until)?;
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if self.wait(Instant::now() + REAP_WITHIN).is_err() {
            self.kill();
        }
    }
}

enum Outcome {
    Notified,
    Ended {
        status: ExitStatus,
        complaint: Vec<u8>,
    },
}

fn feed(
    process: &mut Reaped,
    stdin: ChildStdin,
    mut stderr: ChildStderr,
    batch: Batch<'_>,
    events: &mut Events,
    until: Instant,
) -> io::Result<Outcome> {
    let mut expected = batch.expected;
    nonblocking(&stdin)?;
    nonblocking(&stderr)?;
    let mut rest = batch.text.as_bytes();
    let mut stdin = Some(stdin);
    let mut complaint = Vec::new();
    loop {
        if let Some(mut pipe) = stdin.take() {
            // Dropping the pipe closes it, and the end of its input sets nft to work.
            if !write(&mut pipe, &mut rest)? {
                stdin = Some(pipe);
            }
        }
        for (family, name, change) in events.drain()? {
            if name == batch.table {
                expected.retain(|waited| *waited != (family, change));
            }
        }
        if expected.is_empty() && stdin.is_none() {
            return Ok(Outcome::Notified);
        }
        if read(&mut stderr, &mut complaint)? {
            let status = process.wait(until)?;
            return Ok(Outcome::Ended { status, complaint });
        }
        let mut fds = vec![
            PollFd::new(&stderr, PollFlags::IN),
            PollFd::new(events, PollFlags::IN),
        ];
        if let Some(pipe) = &stdin {
            fds.push(PollFd::new(pipe, PollFlags::OUT));
        }
        poll_until(&mut fds, until)?;
    }
}

/// True once nothing more can be written, because all is or because the reader is gone (its
/// exit status will say why).
fn write(pipe: &mut ChildStdin, rest: &mut &[u8]) -> io::Result<bool> {
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(written) => *rest = &rest[written..],
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(false),
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::BrokenPipe => return Ok(true),
                _ => return Err(error),
            },
        }
    }
    Ok(true)
}

/// True at the end of the pipe, when the process ends. What is over the limit is dropped.
fn read(pipe: &mut ChildStderr, complaint: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 1024];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(length) => {
                let room = MAX_COMPLAINT.saturating_sub(complaint.len());
                complaint.extend(&buffer[..length.min(room)]);
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(false),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
        }
    }
}

fn nonblocking(pipe: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&pipe)?;
    Ok(fcntl_setfl(&pipe, flags | OFlags::NONBLOCK)?)
}
