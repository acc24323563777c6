//! Looking into the receive queue of a UDP socket without taking anything out of it: the socket
//! options and the control messages for which rustix has no names.

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use crate::option;

/// `UDP_GRO`, include/uapi/linux/udp.h: at level `SOL_UDP`, an int, the size of the datagrams
/// that were merged into one.
const UDP_GRO: libc::c_int = 104;
const SOL_UDP: libc::c_int = 17;
/// Room for the control messages of one datagram; a socket may have asked for several others.
const CONTROL: usize = 1024;

/// A datagram that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peeked {
    /// Bytes of it in the buffer.
    pub length: usize,
    /// Who sent it.
    pub from: SocketAddr,
    /// The address it was sent to, if the socket was asked for it
    /// ([`set_tells_destination`]). IPv4-mapped addresses are written as IPv4.
    pub to: Option<IpAddr>,
    /// It is several datagrams of this size (the last may be shorter) that the kernel merged.
    pub merged_from: Option<u16>,
}

/// `SO_PEEK_OFF`: where in its queue a socket looks with `MSG_PEEK`; negative: always at the
/// front.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn peek_offset(socket: impl AsFd) -> io::Result<i32> {
    option::get(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)
}

/// Sets `SO_PEEK_OFF`. At 0 or more, each look moves it on by what was seen.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn set_peek_offset(socket: impl AsFd, offset: i32) -> io::Result<()> {
    option::set(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
}

/// Whether a UDP socket tells the address that a datagram was sent to (`IP_PKTINFO`,
/// `IPV6_RECVPKTINFO`).
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn tells_destination(socket: impl AsFd, ipv6: bool) -> io::Result<bool> {
    let (level, name) = destination_option(ipv6);
    Ok(option::get(socket, level, name)? != 0)
}

/// Has a UDP socket tell the address that a datagram was sent to, also of those in its queue.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn set_tells_destination(socket: impl AsFd, ipv6: bool, on: bool) -> io::Result<()> {
    let (level, name) = destination_option(ipv6);
    option::set(socket, level, name, libc::c_int::from(on))
}

/// Looks at the next datagram of a UDP socket, without taking it and without waiting.
///
/// # Errors
/// What `recvmsg(2)` says: `WouldBlock` if there is none, or the error that the socket had
/// pending, which it then has no more. `InvalidData` if the buffer is too short.
pub fn peek(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Peeked> {
    // SAFETY: both are plain data for which zero is a valid value.
    let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // In words: control messages are aligned as `size_t`.
    let mut control = [0_u64; CONTROL / 8];
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL as _;
    // SAFETY: the descriptor is borrowed for the call; name, buffer and control are live and
    // as long as the message header says.
    let received = unsafe {
        libc::recvmsg(
            socket.as_fd().as_raw_fd(),
            &raw mut message,
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    let length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    if message.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut peeked = Peeked {
        length,
        from: sender(&name)?,
        to: None,
        merged_from: None,
    };
    // SAFETY: the kernel has filled the header and the control buffer in.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: a pointer that is not null is to a whole header inside of the control buffer.
    while let Some(header) = unsafe { next.as_ref() } {
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(next) };
        read_control(header, data, &mut peeked);
        // SAFETY: the header is one of the message.
        next = unsafe { libc::CMSG_NXTHDR(&raw const message, next) };
    }
    Ok(peeked)
}

fn read_control(header: &libc::cmsghdr, data: *const u8, peeked: &mut Peeked) {
    let head = data as usize - ptr::from_ref(header) as usize;
    // `cmsg_len` has another type with other C libraries.
    #[allow(clippy::unnecessary_cast)]
    let length = (header.cmsg_len as usize).saturating_sub(head);
    match (header.cmsg_level, header.cmsg_type) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) if length >= size_of::<libc::in_pktinfo>() => {
            // SAFETY: so many bytes are there, and any are an in_pktinfo.
            let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
            let ip = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
            peeked.to = Some(ip.into());
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if length >= size_of::<libc::in6_pktinfo>() => {
            // SAFETY: so many bytes are there, and any are an in6_pktinfo.
            let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
            peeked.to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
        }
        (SOL_UDP, UDP_GRO) if length >= size_of::<libc::c_int>() => {
            // SAFETY: so many bytes are there, and any are an int.
            let size = unsafe { data.cast::<libc::c_int>().read_unaligned() };
            peeked.merged_from = u16::try_from(size).ok().filter(|size| *size > 0);
        }
        _ => {}
    }
}

fn sender(name: &libc::sockaddr_storage) -> io::Result<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that it is one, and the storage is larger and aligned.
            let name = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Ok((ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that it is one, and the storage is larger and aligned.
            let name = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            let port = u16::from_be(name.sin6_port);
            Ok(match ip.to_ipv4_mapped() {
                Some(ip) => (ip, port).into(),
                None => SocketAddrV6::new(ip, port, 0, name.sin6_scope_id).into(),
            })
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn destination_option(ipv6: bool) -> (libc::c_int, libc::c_int) {
    if ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        (libc::IPPROTO_IP, libc::IP_PKTINFO)
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    fn peek_soon(socket: &UdpSocket, buffer: &mut [u8]) -> Peeked {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match peek(socket, buffer) {
                Ok(peeked) => return peeked,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    assert!(Instant::now() < deadline);
                    thread::yield_now();
                }
            }
        }
    }

    #[test]
    fn every_datagram_is_seen_and_stays() {
        for (server, host) in [("127.0.0.1:0", "127.0.0.1"), ("[::]:0", "127.0.0.1")] {
            let socket = UdpSocket::bind(server).unwrap();
            let ipv6 = server.starts_with('[');
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            let to = (host, socket.local_addr().unwrap().port());
            let sent: [&[u8]; 5] = [b"one", b"", b"", b"four", b""];
            for datagram in sent {
                client.send_to(datagram, to).unwrap();
            }
            assert_eq!(peek_offset(&socket).unwrap(), -1);
            assert!(!tells_destination(&socket, ipv6).unwrap());
            set_peek_offset(&socket, 0).unwrap();
            set_tells_destination(&socket, ipv6, true).unwrap();
            let mut buffer = [0; 64];
            for datagram in sent {
                let peeked = peek_soon(&socket, &mut buffer);
                assert_eq!(&buffer[..peeked.length], datagram);
                assert_eq!(peeked.from, client.local_addr().unwrap());
                assert_eq!(peeked.to, Some(host.parse().unwrap()));
                assert_eq!(peeked.merged_from, None);
            }
            let error = peek(&socket, &mut buffer).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            set_peek_offset(&socket, -1).unwrap();
            set_tells_destination(&socket, ipv6, false).unwrap();
            for datagram in sent {
                let (length, _) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], datagram);
            }
        }
    }
}
