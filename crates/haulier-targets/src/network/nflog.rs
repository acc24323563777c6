//! The kernel's packet log (`nfnetlink_log`): copies of the packets that a rule with
//! `log group N` has met.
//!
//! Layout: include/uapi/linux/netfilter/nfnetlink_log.h.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{SendFlags, sendto};

use super::nf_tables::{ATTRIBUTES, Messages, attributes, error_code, open, receive};

/// `NFNL_SUBSYS_ULOG`.
const SUBSYSTEM: u16 = 4;
const PACKET: u16 = SUBSYSTEM << 8;
const CONFIG: u16 = (SUBSYSTEM << 8) | 1;
const MESSAGE_ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 0x5;
// Attributes of a configuration, and what they are set to.
const CFG_CMD: u16 = 1;
const CFG_MODE: u16 = 2;
const CFG_NLBUFSIZ: u16 = 3;
const CFG_QTHRESH: u16 = 5;
const CFG_FLAGS: u16 = 6;
const CMD_BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const FLAG_SEQUENCE: u16 = 1;
// Attributes of a packet.
const IFINDEX_INDEV: u16 = 4;
const PAYLOAD: u16 = 9;
const SEQUENCE: u16 = 12;

/// Groups below are what people write into their rules by hand.
const FIRST_GROUP: u16 = 0x4000;
/// So many groups are tried.
const ATTEMPTS: u16 = 256;
/// What may wait for us to read. A sender at 1 Gbit/s fills it in a quarter of a second, of
/// which we should use none: we read all the time.
const SOCKET_BUFFER: usize = 32 << 20;
/// A packet, which the kernel cuts at 64 KiB less a header, and what is said about it.
const BUFFER: usize = 128 * 1024;

/// One group of the packet log, ours as long as the socket is open.
#[derive(Debug)]
pub(super) struct PacketLog {
    socket: OwnedFd,
    group: u16,
    buffer: Vec<u8>,
    expected: Option<u32>,
}

/// What the log says of a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Logged<'a> {
    /// From its IP header on.
    pub(super) packet: &'a [u8],
    /// Index of the interface it came in on; 0 if the log does not say.
    pub(super) interface: u32,
    /// Packets before it that the log had no room for.
    pub(super) missed: u32,
}

/// What came of reading the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read<'a> {
    Packet(Logged<'a>),
    /// Nothing to be told of.
    Nothing,
    /// Nothing there at the moment.
    Empty,
}

impl PacketLog {
    /// Takes a group that nobody has, the first from `seed` on.
    pub(super) fn open(seed: u16) -> io::Result<Self> {
        let socket = open(0)?;
        // Without CAP_NET_ADMIN in the first user namespace the usual size has to do.
        if let Err(error) = set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER) {
            tracing::debug!(%error, "the packet log has a small buffer");
        }
        let mut log = Self {
            socket,
            group: 0,
            buffer: vec![0; BUFFER],
            expected: None,
        };
        for attempt in 0..ATTEMPTS {
            let group = FIRST_GROUP | (seed.wrapping_add(attempt) & !FIRST_GROUP);
            match log.bind(group) {
                Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
                result => {
                    result?;
                    log.group = group;
                    return Ok(log);
                }
            }
        }
        Err(io::ErrorKind::AddrInUse.into())
    }

    pub(super) fn group(&self) -> u16 {
        self.group
    }

    /// The next packet, without waiting.
    ///
    /// # Errors
    /// What `recv(2)` says; `ENOBUFS` is told as packets missed, by those that follow.
    pub(super) fn read(&mut self) -> io::Result<Read<'_>> {
        let datagram = match receive(&self.socket, &mut self.buffer) {
            Err(Errno::AGAIN) => return Ok(Read::Empty),
            Err(Errno::NOBUFS | Errno::MSGSIZE | Errno::INTR) => return Ok(Read::Nothing),
            datagram => datagram?,
        };
        // One packet to a datagram: the threshold is 1.
        let Some(message) = Messages(datagram).find(|message| message.kind == PACKET) else {
            return Ok(Read::Nothing);
        };
        let mut logged = Logged {
            packet: &[],
            interface: 0,
            missed: 0,
        };
        for (kind, value) in attributes(message.bytes.get(ATTRIBUTES..).unwrap_or_default()) {
            match (kind, <[u8; 4]>::try_from(value)) {
                (PAYLOAD, _) => logged.packet = value,
                (IFINDEX_INDEV, Ok(index)) => logged.interface = u32::from_be_bytes(index),
                (SEQUENCE, Ok(sequence)) => {
                    let sequence = u32::from_be_bytes(sequence);
                    let expected = self.expected.unwrap_or(sequence);
                    logged.missed = sequence.wrapping_sub(expected);
                    self.expected = Some(sequence.wrapping_add(1));
                }
                _ => {}
            }
        }
        if logged.packet.is_empty() {
            return Ok(Read::Nothing);
        }
        Ok(Read::Packet(logged))
    }

    fn bind(&mut self, group: u16) -> io::Result<()> {
        let mut request = vec![0; ATTRIBUTES];
        let mut attribute = |kind: u16, value: &[u8]| {
            request.extend((4 + value.len() as u16).to_ne_bytes());
            request.extend(kind.to_ne_bytes());
            request.extend(value);
            request.resize(request.len().next_multiple_of(4), 0);
        };
        attribute(CFG_CMD, &[CMD_BIND]);
        // The range, all of it, then the mode and padding.
        attribute(CFG_MODE, &[0, 0, 0xff, 0xff, COPY_PACKET, 0]);
        // A buffer is made for each packet, as large as it is: what is charged to the socket
        // is what it holds.
        attribute(CFG_NLBUFSIZ, &256_u32.to_be_bytes());
        // Told of each at once.
        attribute(CFG_QTHRESH, &1_u32.to_be_bytes());
        attribute(CFG_FLAGS, &FLAG_SEQUENCE.to_be_bytes());
        let length = request.len() as u32;
        request[0..4].copy_from_slice(&length.to_ne_bytes());
        request[4..6].copy_from_slice(&CONFIG.to_ne_bytes());
        request[6..8].copy_from_slice(&REQUEST.to_ne_bytes());
        request[ATTRIBUTES - 2..ATTRIBUTES].copy_from_slice(&group.to_be_bytes());
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.socket, &request, SendFlags::empty(), &kernel)?;
        // The kernel answers within the call.
        let datagram = receive(&self.socket, &mut self.buffer)?;
        let answer = Messages(datagram).find(|message| message.kind == MESSAGE_ERROR);
        let answer = answer.ok_or(io::ErrorKind::InvalidData)?;
        match error_code(answer.bytes) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

impl AsFd for PacketLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
