//! What the kernel has measured of a TCP connection.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::option;

/// `struct tcp_info` of include/uapi/linux/tcp.h, as far as it is of use here. The kernel fills as
/// much of it as it knows and has room for.
#[repr(C)]
#[derive(Default)]
struct TcpInfo {
    bytes: [u8; 8],
    words: [u32; 24],
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    notsent_bytes: u32,
    min_rtt: u32,
    data_segs_in: u32,
    data_segs_out: u32,
    delivery_rate: u64,
}

/// Where `tcpi_rtt` is among the words.
const RTT: usize = 15;

/// A connection as its own end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The shortest round trip seen: the way without queues.
    pub round_trip: Duration,
    /// The round trip as it is of late, with what it waits in queues.
    pub smoothed: Duration,
    /// Bytes that the peer has acknowledged.
    pub acknowledged: u64,
    /// Bytes per second that were delivered of late; 0 before anything was.
    pub rate: u64,
}

/// What is known of the way to the peer.
///
/// # Errors
/// What `getsockopt(2)` says, for instance of a socket that is no TCP connection; `Unsupported` from
/// a kernel before 4.9, which does not measure this.
pub fn path(socket: impl AsFd) -> io::Result<Path> {
    let mut info = TcpInfo::default();
    let mut length = size_of::<TcpInfo>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call; info and length are live, length says how
    // large info is, and any bytes are a value of its fields.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < size_of::<TcpInfo>() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(Path {
        round_trip: Duration::from_micros(info.min_rtt.into()),
        smoothed: Duration::from_micros(info.words[RTT].into()),
        acknowledged: info.bytes_acked,
        rate: info.delivery_rate,
    })
}

/// Has the socket say that it takes more only while fewer than so many bytes wait in it that were not
/// sent: what is written later, and is more urgent, is not far behind.
///
/// # Errors
/// What `setsockopt(2)` says, for instance of a socket that is no TCP connection.
pub fn keep_unsent_short(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    // The kernel takes the bits of an int for a number without a sign.
    let value = bytes as libc::c_int;
    option::set(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, value)
}

/// Has the kernel send no more than so many bytes per second, evenly; `None` ends that.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn pace(socket: impl AsFd, rate: Option<u64>) -> io::Result<()> {
    // All ones is what a socket begins with. Kernels since 4.20 take 64 bits.
    option::set(
        socket,
        libc::SOL_SOCKET,
        libc::SO_MAX_PACING_RATE,
        rate.unwrap_or(u64::MAX),
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_connection_that_has_carried_something_has_a_round_trip_and_a_rate() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        for _ in 0..20 {
            near.write_all(&[7; 30_000]).unwrap();
            far.read_exact(&mut [0; 30_000]).unwrap();
            far.write_all(&[1]).unwrap();
            near.read_exact(&mut [0]).unwrap();
        }
        let path = path(&near).unwrap();
        assert!(path.round_trip < Duration::from_secs(5), "{path:?}");
        assert!(path.round_trip <= path.smoothed, "{path:?}");
        assert!(path.rate > 0, "{path:?}");
        // The handshake counts as one.
        let sent = 20 * 30_000;
        assert!((sent..=sent + 1).contains(&path.acknowledged), "{path:?}");
    }

    #[test]
    fn what_is_paced_is_slower_until_it_is_not_any_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let kept = || {
            let mut value: u64 = 0;
            let mut length = size_of::<u64>() as libc::socklen_t;
            // SAFETY: the descriptor is open; value and length are live, and length says how large
            // value is.
            let result = unsafe {
                libc::getsockopt(
                    near.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_MAX_PACING_RATE,
                    (&raw mut value).cast(),
                    &raw mut length,
                )
            };
            assert_eq!(result, 0);
            value
        };
        assert_eq!(kept(), u64::MAX);
        for rate in [1024, 1 << 40] {
            pace(&near, Some(rate)).unwrap();
            assert_eq!(kept(), rate);
        }
        pace(&near, None).unwrap();
        assert_eq!(kept(), u64::MAX);
    }

    #[test]
    fn another_kind_of_socket_is_an_error() {
        let (near, _far) = UnixStream::pair().unwrap();
        assert!(path(&near).is_err());
    }
}
