//! PID 1 of a host: builds the host's mounts, starts programs on request, reaps everything.

use crate::wire::{Received, Reply, Request, SpawnRequest, receive, send};
use crate::{Error, Result, mounts, network};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    socketpair,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, umask, wait};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Each host's PIDs start at its number times this, so that those of two hosts do not meet by
/// accident; ten hosts fit below the usual pid_max of 32768.
const PIDS_PER_HOST: i32 = 3000;

/// How long a starter may take to execute its program.
const START: Duration = Duration::from_secs(10);

/// Another process may take a PID between our asking for it and our fork.
const PID_ATTEMPTS: usize = 20;

const NS_LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// What the supervisor tells PID 1.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InitConfig {
    /// From 1.
    pub(crate) number: usize,
    /// How many hosts the lab has.
    pub(crate) hosts: usize,
    /// Where to listen, in the machine's file system.
    pub(crate) socket: PathBuf,
}

/// Runs as PID 1 until stdin reaches its end, which is when the supervisor ends. Writes one line to
/// stdout when the host is ready.
pub(crate) fn run(config: &InitConfig) -> Result<()> {
    let listener = listen_on(&config.socket)?;
    std::env::set_current_dir("/").map_err(Error::file("enter", "/"))?;
    umask(rustix::fs::Mode::from_raw_mode(0o022));
    rustix::system::sethostname(format!("host{}", config.number).as_bytes())
        .map_err(Error::system("set the host name"))?;
    mounts::build(&network::hosts_file(config.hosts))?;
    // Not "exe", which is what executing /proc/self/exe makes of it.
    fs::write("/proc/self/comm", "haulier-lab").map_err(Error::file("write", "/proc/self/comm"))?;
    no_address_detection()?;
    let mut init = Init {
        lowest_pid: i32::try_from(config.number).unwrap_or(1) * PIDS_PER_HOST,
        connections: Vec::new(),
        reaped: HashMap::new(),
    };
    let (mut children, alarm) =
        UnixStream::pair().map_err(Error::system("create a socket pair"))?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGCHLD, alarm)
        .map_err(Error::system("handle SIGCHLD"))?;
    children
        .set_nonblocking(true)
        .map_err(Error::system("set a socket non-blocking"))?;
    report_ready()?;
    init.serve(&listener, &mut children)
}

fn listen_on(path: &PathBuf) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(Error::system("create a unix socket"))?;
    let address = SocketAddrUnix::new(path).map_err(Error::file_errno("address", path))?;
    // 0600: whoever can connect is root on the host.
    umask(rustix::fs::Mode::from_raw_mode(0o177));
    bind(&listener, &address).map_err(Error::file_errno("bind", path))?;
    listen(&listener, 128).map_err(Error::file_errno("listen on", path))?;
    Ok(listener)
}

/// Duplicate address detection keeps an IPv6 address unusable for a second or more.
fn no_address_detection() -> Result<()> {
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad");
        fs::write(&path, "0").map_err(Error::file("write", &path))?;
    }
    Ok(())
}

fn report_ready() -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(b"ready\n")
        .and_then(|()| stdout.flush())
        .map_err(Error::system("report to the supervisor"))?;
    let null = fs::File::create("/dev/null").map_err(Error::file("open", "/dev/null"))?;
    rustix::stdio::dup2_stdout(&null).map_err(Error::system("replace stdout"))
}

struct Connection {
    socket: OwnedFd,
    /// The process whose end is to be reported.
    waits_for: Option<i32>,
}

struct Init {
    lowest_pid: i32,
    connections: Vec<Connection>,
    /// Wait status by PID, of all that ever ended here; PIDs are bounded, so this is too.
    reaped: HashMap<i32, i32>,
}

impl Init {
    fn serve(&mut self, listener: &OwnedFd, children: &mut UnixStream) -> Result<()> {
        let stdin = std::io::stdin();
        loop {
            let mut watched = vec![
                PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(children.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            ];
            watched.extend(
                self.connections
                    .iter()
                    .map(|c| PollFd::new(&c.socket, PollFlags::IN)),
            );
            match poll(&mut watched, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(other) => return Err(Error::system("poll")(other)),
            }
            let ready: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(watched);
            let [lifeline, _, knock, connections @ ..] = ready.as_slice() else {
                continue;
            };
            if *lifeline {
                return Ok(());
            }
            self.reap(children);
            self.answer(connections);
            if *knock {
                self.accept(listener);
            }
        }
    }

    fn accept(&mut self, listener: &OwnedFd) {
        while let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC) {
            self.connections.push(Connection {
                socket,
                waits_for: None,
            });
        }
    }

    /// Answers those that are ready and drops those that have closed.
    fn answer(&mut self, ready: &[bool]) {
        let all = std::mem::take(&mut self.connections);
        for (index, mut connection) in all.into_iter().enumerate() {
            let keep = match ready.get(index) {
                Some(true) => self.answer_one(&mut connection),
                _ => true,
            };
            if keep {
                self.connections.push(connection);
            }
        }
    }

    fn answer_one(&mut self, connection: &mut Connection) -> bool {
        let (request, descriptors) = match receive(&connection.socket, Duration::ZERO) {
            Ok(Received::Message(request, descriptors)) => (request, descriptors),
            Ok(Received::Nothing) => return true,
            Ok(Received::Closed) => return false,
            Err(error) => {
                let reply = Reply::Failed {
                    message: error.chain(),
                };
                return send(&connection.socket, &reply, &[]).is_ok();
            }
        };
        let reply = match self.perform(request, &descriptors) {
            Ok(reply) => reply,
            Err(error) => Reply::Failed {
                message: error.chain(),
            },
        };
        if let Reply::Spawned { pid } = reply {
            connection.waits_for = Some(pid);
        }
        send(&connection.socket, &reply, &[]).is_ok()
    }

    fn perform(&mut self, request: Request, descriptors: &[OwnedFd]) -> Result<Reply> {
        match request {
            Request::Spawn(spawn) => self.spawn(&spawn, descriptors),
            Request::Signal { pid, group, signal } => {
                let (Some(target), Some(signal)) = (pid_from(pid), Signal::from_named_raw(signal))
                else {
                    return Ok(Reply::Failed {
                        message: format!("no signal {signal} for {pid}"),
                    });
                };
                let sent = if group {
                    kill_process_group(target, signal)
                } else {
                    kill_process(target, signal)
                };
                match sent {
                    Ok(()) => Ok(Reply::Signalled),
                    Err(error) => Ok(Reply::Failed {
                        message: format!("signal {pid}: {error}"),
                    }),
                }
            }
            Request::Reaped { pid } => Ok(Reply::Reaped {
                status: self.reaped.get(&pid).copied(),
            }),
        }
    }

    fn spawn(&mut self, request: &SpawnRequest, descriptors: &[OwnedFd]) -> Result<Reply> {
        let (pid, socket) = self.start_starter(request.pid)?;
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        send(&socket, request, &borrowed)?;
        match receive::<Reply>(&socket, START)? {
            // Closed on exec: it runs.
            Received::Closed => {
                // An earlier process of that PID is no longer the one meant.
                self.reaped.remove(&pid);
                Ok(Reply::Spawned { pid })
            }
            Received::Message(failed, _) => Ok(failed),
            Received::Nothing => Err(Error::Deadline {
                what: format!("start {:?}", request.argv),
                deadline: START,
            }),
        }
    }

    /// A starter that waits for its request, with the PID wanted if one is.
    fn start_starter(&mut self, wanted: Option<i32>) -> Result<(i32, OwnedFd)> {
        for _ in 0..PID_ATTEMPTS {
            if wanted.is_some_and(|pid| fs::exists(format!("/proc/{pid}")).unwrap_or(false)) {
                break;
            }
            self.steer_next_pid(wanted)?;
            let (ours, theirs) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
            .map_err(Error::system("create a socket pair"))?;
            let mut starter = Command::new("/proc/self/exe")
                .arg0("haulier-lab")
                .arg("host-exec")
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .spawn()
                .map_err(Error::file("execute", "/proc/self/exe"))?;
            let pid = i32::try_from(starter.id()).unwrap_or(i32::MAX);
            if wanted.is_none_or(|wanted| wanted == pid) {
                return Ok((pid, ours));
            }
            // It ends when it sees the socket close.
            drop(ours);
            starter
                .wait()
                .map_err(Error::system("wait for a starter"))?;
        }
        Err(Error::System {
            operation: "get the PID asked for: it is in use",
            source: Errno::EXIST.into(),
        })
    }

    fn steer_next_pid(&self, wanted: Option<i32>) -> Result<()> {
        let write = |last: i32| {
            fs::write(NS_LAST_PID, last.to_string()).map_err(Error::file("write", NS_LAST_PID))
        };
        if let Some(wanted) = wanted {
            return write(wanted - 1);
        }
        let text = fs::read_to_string(NS_LAST_PID).map_err(Error::file("read", NS_LAST_PID))?;
        match text.trim().parse::<i32>() {
            Ok(last) if last >= self.lowest_pid => Ok(()),
            _ => write(self.lowest_pid),
        }
    }

    fn reap(&mut self, children: &mut UnixStream) {
        // One byte per signal; all of them are answered by the loop below. Reading a non-blocking
        // socket ends with WouldBlock.
        let mut bytes = [0; 64];
        while matches!(children.read(&mut bytes), Ok(1..)) {}
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let (pid, status) = (pid.as_raw_nonzero().get(), status.as_raw());
            self.reaped.insert(pid, status);
            self.connections.retain(|connection| {
                if connection.waits_for == Some(pid) {
                    // A client that has gone does not want to know.
                    let _ = send(&connection.socket, &Reply::Exited { status }, &[]);
                    return false;
                }
                true
            });
        }
    }
}

fn pid_from(raw: i32) -> Option<Pid> {
    if raw > 0 { Pid::from_raw(raw) } else { None }
}
