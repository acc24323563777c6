//! Requests to the kernel's routing tables, one at a time, each with a deadline.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with};

use super::Error;

/// The kernel answers in microseconds, but holds the RTNL lock for others: a container engine
/// at work can delay us by some seconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// The kernel puts at most 32 KiB of a dump into one datagram.
const BUFFER: usize = 64 * 1024;
/// A dump that a change interrupted is asked for again, so many times.
const DUMP_ATTEMPTS: usize = 20;

/// A route netlink socket, of the network namespace of the thread that opens it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// An interface as far as an announcement needs it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) message: LinkMessage,
}

impl Netlink {
    pub(super) fn open() -> Result<Self, Error> {
        let open = || -> io::Result<OwnedFd> {
            let socket = socket_with(
                rustix::net::AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC,
                None,
            )?;
            bind(&socket, &SocketAddrNetlink::new(0, 0))?;
            set_socket_timeout(&socket, Timeout::Send, Some(DEADLINE))?;
            Ok(socket)
        };
        match open() {
            Ok(socket) => Ok(Self {
                socket,
                sequence: 0,
            }),
            Err(source) => Err(Error::Netlink {
                operation: "open a socket to",
                subject: "the routing tables".to_owned(),
                source,
            }),
        }
    }

    /// One request that the kernel acknowledges, and what it said before it did.
    pub(super) fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut answers = Vec::new();
        self.exchange(message, flags | NLM_F_ACK, &mut |answer| {
            answers.push(answer)
        })?;
        Ok(answers)
    }

    /// A consistent list of everything `request` covers, as far as `keep` wants it.
    pub(super) fn dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut kept = Vec::new();
            let consistent =
                self.exchange(request.clone(), NLM_F_DUMP, &mut |m| kept.extend(keep(m)))?;
            if consistent {
                return Ok(kept);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the list changed each time it was read",
        ))
    }

    /// The interface `name`.
    pub(super) fn link(&mut self, name: &str) -> Result<Link, Error> {
        let mut request = LinkMessage::default();
        request
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        let answers = match self.ask(RouteNetlinkMessage::GetLink(request), 0) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
                return Err(Error::NoSuchInterface(name.to_owned()));
            }
            answers => answers.map_err(|source| Error::Netlink {
                operation: "look up interface",
                subject: name.to_owned(),
                source,
            })?,
        };
        answers
            .into_iter()
            .find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(Link {
                    index: message.header.index,
                    message,
                }),
                _ => None,
            })
            .ok_or_else(|| Error::NoSuchInterface(name.to_owned()))
    }

    /// What the interface of an index is called.
    pub(super) fn interface_name(&self, index: u32) -> rustix::io::Result<String> {
        rustix::net::netdevice::index_to_name(&self.socket, index)
    }

    /// Sends, and reads to the acknowledgement or the end of the dump. False: what was read
    /// changed while it was.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> io::Result<bool> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        sendto(
            &self.socket,
            &bytes,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;

        let deadline = Instant::now() + DEADLINE;
        let mut consistent = true;
        let mut buffer = vec![0; BUFFER];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            set_socket_timeout(&self.socket, Timeout::Recv, Some(left))?;
            let (_, length) = match recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                received => received?,
            };
            let mut rest = buffer.get(..length).ok_or(io::ErrorKind::FileTooLarge)?;
            while !rest.is_empty() {
                let frame = NetlinkBuffer::new_checked(rest).map_err(invalid)?;
                let length = (frame.length() as usize)
                    .next_multiple_of(4)
                    .min(rest.len());
                let (one, following) = rest.split_at(length);
                rest = following;
                if frame.sequence_number() != self.sequence {
                    continue;
                }
                consistent &= frame.flags() & NLM_F_DUMP_INTR == 0;
                let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(one) {
                    Ok(message) => message,
                    // A kind of link or route the crate does not know is not one we look for.
                    Err(error) => {
                        tracing::debug!(%error, "skipped a netlink message");
                        continue;
                    }
                };
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(consistent),
                    NetlinkPayload::Overrun(_) => consistent = false,
                    _ => {}
                }
            }
        }
    }
}

/// The netlink family of an address.
pub(super) fn family(ip: std::net::IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn invalid(error: netlink_packet_core::DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
