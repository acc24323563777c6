//! Frames straight to the link layer (`AF_PACKET`), for announcing an address.
//!
//! rustix has no `sockaddr_ll`; that is all the `unsafe` here is for. What the frames hold
//! is the business of `haulier_targets::network`.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A socket that sends frames of one Ethernet protocol on one interface.
///
/// It receives nothing, passes by netfilter (an nftables `arp` or `inet` table does not see
/// what it sends), and never blocks. It belongs to the network namespace of the thread that
/// opened it. Needs `CAP_NET_RAW`.
#[derive(Debug)]
pub struct LinkSocket {
    socket: OwnedFd,
    interface: i32,
    ethertype: u16,
}

impl LinkSocket {
    /// Opens a socket for `ethertype` (host order: 0x0806 is ARP, 0x86dd IPv6) on the
    /// interface of index `interface`.
    ///
    /// # Errors
    /// What `socket(2)` says; `InvalidInput` for an index that no interface can have.
    pub fn open(interface: u32, ethertype: u16) -> io::Result<Self> {
        let interface = i32::try_from(interface)
            .ok()
            .filter(|index| *index > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SOCK_DGRAM: the kernel writes the link header and with it the interface's own
        // address. Protocol 0: nothing is delivered to us (packet(7)).
        let socket = socket_with(
            AddressFamily::PACKET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok(Self {
            socket,
            interface,
            ethertype,
        })
    }

    /// Sends `payload` (what follows the Ethernet header) to the link address `to`.
    ///
    /// # Errors
    /// What `sendto(2)` says: `NetworkDown` if the interface is down, `WouldBlock` if its
    /// queue is full.
    pub fn send(&self, to: [u8; 6], payload: &[u8]) -> io::Result<()> {
        let mut hardware_address = [0; 8];
        hardware_address[..6].copy_from_slice(&to);
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: self.ethertype.to_be(),
            sll_ifindex: self.interface,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: hardware_address,
        };
        // SAFETY: the descriptor is open as long as self; payload and address are live for
        // the call, and their lengths are those of the objects pointed to.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                payload.as_ptr().cast(),
                payload.len(),
                libc::MSG_NOSIGNAL,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        match usize::try_from(sent) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(sent) if sent != payload.len() => Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_index_is_refused() {
        for index in [0, u32::MAX] {
            let error = LinkSocket::open(index, 0x0806).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
