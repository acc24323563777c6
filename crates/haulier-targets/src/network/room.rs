//! How full the receive buffer of the UDP socket is that a datagram would be delivered to.
//!
//! Layout: include/uapi/linux/inet_diag.h, sock_diag.h.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, bind, sendto, socket_with};

use super::ip_packet::UDP;
use super::nf_tables::{Messages, attributes, error_code, receive};

const BY_FAMILY: u16 = 20;
const MESSAGE_ERROR: u16 = 2;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
const HEADER: usize = 16;
/// struct inet_diag_req_v2 without the socket's identity, and with it.
const REQUEST_HEAD: usize = 8;
const REQUEST_LENGTH: usize = HEADER + REQUEST_HEAD + 48;
/// struct inet_diag_msg.
const ANSWER_LENGTH: usize = HEADER + 72;
/// `INET_DIAG_SKMEMINFO`, an array of which the first two are what the queued datagrams hold
/// and what they may hold.
const MEMORY: u16 = 7;

/// A socket to ask the kernel with.
#[derive(Debug)]
pub(super) struct Room {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// Of a receive buffer, in bytes as the kernel counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fill {
    pub(super) used: u32,
    pub(super) limit: u32,
}

impl Room {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(SOCK_DIAG),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self {
            socket,
            buffer: vec![0; 8192],
        })
    }

    /// The buffer of the socket that a datagram with these ends is delivered to; none if there
    /// is no such socket, or the kernel cannot tell of UDP sockets (CONFIG_INET_UDP_DIAG).
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn of(&mut self, from: SocketAddr, to: SocketAddr) -> io::Result<Option<Fill>> {
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(
            &self.socket,
            &request(from, to),
            SendFlags::empty(),
            &kernel,
        )?;
        // The kernel answers within the call.
        let datagram = receive(&self.socket, &mut self.buffer)?;
        for message in Messages(datagram) {
            match message.kind {
                MESSAGE_ERROR => {
                    let code = error_code(message.bytes);
                    if code == Errno::NOENT.raw_os_error() {
                        return Ok(None);
                    }
                    return Err(io::Error::from_raw_os_error(code));
                }
                BY_FAMILY => {
                    let rest = message.bytes.get(ANSWER_LENGTH..).unwrap_or_default();
                    let memory = attributes(rest).find(|(kind, _)| *kind == MEMORY);
                    return Ok(memory.and_then(|(_, value)| fill(value)));
                }
                _ => {}
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// Asks by both ends. "Source" is the remote end here, unlike in the answer: the kernel looks
/// the socket up as for a packet that comes in (udp_dump_one(), net/ipv4/udp_diag.c).
fn request(from: SocketAddr, to: SocketAddr) -> [u8; REQUEST_LENGTH] {
    let mut request = [0; REQUEST_LENGTH];
    request[0..4].copy_from_slice(&(REQUEST_LENGTH as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&REQUEST.to_ne_bytes());
    let body = &mut request[HEADER..];
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    body[0] = family.as_raw() as u8;
    body[1] = UDP;
    body[2] = 1 << (MEMORY - 1);
    // Sockets of any state.
    body[4..8].fill(0xff);
    let identity = &mut body[REQUEST_HEAD..];
    identity[0..2].copy_from_slice(&from.port().to_be_bytes());
    identity[2..4].copy_from_slice(&to.port().to_be_bytes());
    for (at, ip) in [(4, from.ip()), (20, to.ip())] {
        match ip {
            IpAddr::V4(ip) => identity[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => identity[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    // Any interface; INET_DIAG_NOCOOKIE.
    identity[40..48].fill(0xff);
    request
}

fn fill(memory: &[u8]) -> Option<Fill> {
    let number = |at: usize| {
        let bytes = memory.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    Some(Fill {
        used: number(0)?,
        limit: number(4)?,
    })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn the_buffer_of_the_receiving_socket_is_told() {
        for ip in ["127.0.0.1", "::1"] {
            let any = SocketAddr::new(ip.parse().unwrap(), 0);
            let server = UdpSocket::bind(any).unwrap();
            let client = UdpSocket::bind(any).unwrap();
            let (from, to) = (client.local_addr().unwrap(), server.local_addr().unwrap());
            let mut room = Room::open().unwrap();
            let empty = room.of(from, to).unwrap().unwrap();
            assert_eq!(empty.used, 0);
            assert!(empty.limit > 0);
            client.send_to(&[1; 100], to).unwrap();
            let one = room.of(from, to).unwrap().unwrap();
            assert!(one.used > 100, "{one:?}");
            drop(server);
            assert_eq!(room.of(from, to).unwrap(), None);
        }
    }
}
