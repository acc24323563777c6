use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use haulier_sys::datagram::{
    peek, peek_offset, set_peek_offset, set_tells_destination, tells_destination,
};
use haulier_sys::pidfd::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_protocol, socket_type};
use rustix::net::{AddressFamily, SocketType, getsockname, ipproto};
use rustix::process::Pid;

use super::Error;
use super::connections::{descriptors, unless_ended};
use super::ip_packet::datagram;

/// The longest datagram, or as many merged ones as the kernel puts together.
const LONGEST: usize = 64 * 1024;
/// Errors that a socket has pending are in the way of its queue, one at a time.
const PENDING_ERRORS: usize = 16;

/// Datagrams that wait in the sockets of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Queued {
    /// IP packets, each with a datagram; those of one socket in the order of its queue.
    pub packets: Vec<Vec<u8>>,
    /// Datagrams that cannot be delivered elsewhere: to a group, to all hosts, or to an address
    /// that stays.
    pub left: u64,
}

/// The datagrams that the UDP sockets of the processes have received and not read, which CRIU
/// does not dump. They stay in the sockets: a target that goes on here finds them.
///
/// `addresses` are those that move along; datagrams over loopback addresses are taken as well.
/// The processes must be frozen and the network locked, or the queues would change. Socket
/// options are changed for the time of the call: CRIU must not be dumping sockets just then.
///
/// # Errors
/// [`Error::Proc`] if a process may not be looked at, [`Error::Queue`] if one of its sockets
/// may not. A process that has ended has none.
pub fn queued_datagrams_of(pids: &[i32], addresses: &[IpAddr]) -> Result<Queued, Error> {
    let mut queued = Queued::default();
    let mut seen = HashSet::new();
    let mut buffer = vec![0; LONGEST];
    for &pid in pids {
        let Some(sockets) = unless_ended(pid, descriptors(pid))? else {
            continue;
        };
        let failed = |source: io::Error| Error::Queue { pid, source };
        let process =
            Pid::from_raw(pid).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let process = match pidfd_open(process, PidfdFlags::empty()) {
            Err(Errno::SRCH) => continue,
            process => process.map_err(|errno| failed(errno.into()))?,
        };
        for (number, inode) in sockets {
            if !seen.insert(inode) {
                continue;
            }
            let socket = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
                // Closed since.
                Err(Errno::BADF) => continue,
                socket => socket.map_err(|errno| failed(errno.into()))?,
            };
            read_queue(&socket, addresses, &mut buffer, &mut queued).map_err(failed)?;
        }
    }
    Ok(queued)
}

fn read_queue(
    socket: &OwnedFd,
    addresses: &[IpAddr],
    buffer: &mut [u8],
    queued: &mut Queued,
) -> io::Result<()> {
    let domain = socket_domain(socket)?;
    let internet = matches!(domain, AddressFamily::INET | AddressFamily::INET6);
    if !internet
        || socket_type(socket)? != SocketType::DGRAM
        || socket_protocol(socket)? != Some(ipproto::UDP)
    {
        return Ok(());
    }
    let local = SocketAddr::try_from(getsockname(socket)?)?;
    if local.port() == 0 {
        return Ok(());
    }
    let looking = Looking::at(socket, domain == AddressFamily::INET6)?;
    let mut pending = 0;
    loop {
        let peeked = match peek(looking.socket, buffer) {
            Ok(peeked) => peeked,
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(()),
                io::ErrorKind::InvalidData => return Err(error),
                _ if pending < PENDING_ERRORS => {
                    pending += 1;
                    continue;
                }
                _ => return Err(error),
            },
        };
        let to = peeked.to.unwrap_or_else(|| local.ip().to_canonical());
        let among_ourselves = to.is_loopback() && peeked.from.ip().is_loopback();
        let data = &buffer[..peeked.length];
        let size = peeked.merged_from.map_or(LONGEST, usize::from);
        // Of no bytes there are no chunks, but there is a datagram.
        let chunks = if data.is_empty() {
            vec![data]
        } else {
            data.chunks(size).collect()
        };
        for data in chunks {
            let to = SocketAddr::new(to, local.port());
            let packet = datagram(peeked.from, to, data)
                .filter(|_| among_ourselves || addresses.contains(&to.ip()));
            match packet {
                Some(packet) => queued.packets.push(packet),
                None => queued.left += 1,
            }
        }
    }
}

/// A socket whose options are such that its queue can be gone through. Dropped, they are what
/// they were.
struct Looking<'a> {
    socket: &'a OwnedFd,
    ipv6: bool,
    offset: i32,
    told: bool,
}

impl<'a> Looking<'a> {
    fn at(socket: &'a OwnedFd, ipv6: bool) -> io::Result<Self> {
        let looking = Self {
            socket,
            ipv6,
            offset: peek_offset(socket)?,
            told: tells_destination(socket, ipv6)?,
        };
        set_tells_destination(socket, ipv6, true)?;
        set_peek_offset(socket, 0)?;
        Ok(looking)
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        let offset = set_peek_offset(self.socket, self.offset);
        let told = set_tells_destination(self.socket, self.ipv6, self.told);
        if let Err(error) = offset.and(told) {
            tracing::warn!(%error, "a socket of the target keeps an option it did not have");
        }
    }
}
