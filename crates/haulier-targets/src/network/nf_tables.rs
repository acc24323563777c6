//! What the kernel itself says of nftables tables: which there are, and when one came or went.
//!
//! Message layout: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
};

use super::deadline::poll_until;

/// `1 << (NFNLGRP_NFTABLES - 1)`.
const GROUP: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = (SUBSYSTEM << 8) | 1;
const DELETE_TABLE: u16 = (SUBSYSTEM << 8) | 2;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// nlmsghdr, then nfgenmsg (family, version, resource id).
const HEADER: usize = 16;
pub(super) const ATTRIBUTES: usize = HEADER + 4;
/// `NFTA_TABLE_NAME`.
const TABLE_NAME: u16 = 1;
/// More than the kernel puts into one datagram.
const BUFFER: usize = 64 * 1024;

/// A family of nftables that the lock has a table in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Inet,
    Arp,
}

impl Family {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Arp => "arp",
        }
    }

    /// NFPROTO_*, include/uapi/linux/netfilter.h.
    fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Inet),
            3 => Some(Self::Arp),
            _ => None,
        }
    }
}

/// What happened to a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Created,
    Deleted,
}

/// The tables of the two families in this network namespace.
pub(super) fn tables(until: Instant) -> io::Result<Vec<(Family, String)>> {
    let socket = open(0)?;
    let mut request = [0; ATTRIBUTES];
    request[0..4].copy_from_slice(&(ATTRIBUTES as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&GET_TABLE.to_ne_bytes());
    request[6..8].copy_from_slice(&DUMP.to_ne_bytes());
    sendto(
        &socket,
        &request,
        SendFlags::empty(),
        &SocketAddrNetlink::new(0, 0),
    )?;
    let mut tables = Vec::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let datagram = match receive(&socket, &mut buffer) {
            Err(Errno::AGAIN) => {
                poll_until(&mut [PollFd::new(&socket, PollFlags::IN)], until)?;
                continue;
            }
            received => received?,
        };
        for message in Messages(datagram) {
            match message.kind {
                NEW_TABLE => tables.extend(table(message.bytes)),
                MESSAGE_DONE => return Ok(tables),
                MESSAGE_ERROR => {
                    return Err(io::Error::from_raw_os_error(error_code(message.bytes)));
                }
                _ => {}
            }
        }
    }
}

/// Notifications of tables that come and go, sent by the kernel once the transaction holds.
#[derive(Debug)]
pub(super) struct Events {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Events {
    pub(super) fn subscribe() -> io::Result<Self> {
        Ok(Self {
            socket: open(GROUP)?,
            buffer: vec![0; BUFFER],
        })
    }

    /// What has come since the last call; does not wait. Notifications that did not fit the
    /// socket are missing: the exit status of `nft` has the last word.
    pub(super) fn drain(&mut self) -> io::Result<Vec<(Family, String, Change)>> {
        let mut changes = Vec::new();
        loop {
            let datagram = match receive(&self.socket, &mut self.buffer) {
                Err(Errno::AGAIN) => return Ok(changes),
                Err(Errno::NOBUFS | Errno::MSGSIZE) => continue,
                received => received?,
            };
            for message in Messages(datagram) {
                let change = match message.kind {
                    NEW_TABLE => Change::Created,
                    DELETE_TABLE => Change::Deleted,
                    _ => continue,
                };
                let table = table(message.bytes);
                changes.extend(table.map(|(family, name)| (family, name, change)));
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket to netfilter, which does not block.
pub(super) fn open(groups: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(NETFILTER),
    )?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

pub(super) fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> rustix::io::Result<&'a [u8]> {
    let (_, length) = recv(socket, &mut buffer[..], RecvFlags::TRUNC)?;
    buffer.get(..length).ok_or(Errno::MSGSIZE)
}

/// The netlink messages of a datagram.
pub(super) struct Messages<'a>(pub(super) &'a [u8]);

pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) bytes: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(self.0.get(0..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.0.get(4..6)?.try_into().ok()?);
        let bytes = self.0.get(..length).filter(|bytes| bytes.len() >= HEADER)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, bytes })
    }
}

/// The error of an error message, 0 for an acknowledgement.
pub(super) fn error_code(message: &[u8]) -> i32 {
    let code = message.get(HEADER..HEADER + 4);
    let code = code.and_then(|bytes| bytes.try_into().ok());
    i32::from_ne_bytes(code.unwrap_or([0; 4])).wrapping_neg()
}

/// Kinds and values of the attributes that `bytes` consists of.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn table(message: &[u8]) -> Option<(Family, String)> {
    let family = Family::from_number(*message.get(HEADER)?)?;
    let mut attributes = attributes(message.get(ATTRIBUTES..)?);
    let (_, name) = attributes.find(|(kind, _)| *kind == TABLE_NAME)?;
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    Some((family, String::from_utf8_lossy(name).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, family: u8, attributes: &[u8]) -> Vec<u8> {
        let mut bytes = ((ATTRIBUTES + attributes.len()) as u32)
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([family, 0, 0, 0]);
        bytes.extend(attributes);
        bytes
    }

    #[test]
    fn a_table_is_named_by_its_attribute() {
        // Flags (attribute 2, 4 bytes) before the name.
        let attributes = [&[8, 0, 2, 0, 0, 0, 0, 0, 7, 0, 1, 0][..], b"ab\0"].concat();
        let bytes = message(NEW_TABLE, 3, &attributes);
        let messages: Vec<_> = Messages(&bytes).collect();
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].kind, NEW_TABLE);
        assert_eq!(table(messages[0].bytes), Some((Family::Arp, "ab".into())));
    }

    #[test]
    fn other_families_and_broken_messages_are_nothing() {
        let attributes = [&[7, 0, 1, 0][..], b"ab\0"].concat();
        assert_eq!(table(&message(NEW_TABLE, 2, &attributes)), None);
        for length in 0..message(NEW_TABLE, 1, &attributes).len() {
            let whole = message(NEW_TABLE, 1, &attributes);
            assert!(Messages(&whole[..length]).next().is_none());
            assert_eq!(table(&whole[..length]), None);
        }
        // An attribute of length 0 must not be read for ever.
        assert_eq!(table(&message(NEW_TABLE, 1, &[0, 0, 9, 0])), None);
    }
}
