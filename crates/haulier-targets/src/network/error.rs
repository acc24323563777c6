use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::MoveIp;

/// What goes wrong with addresses, the lock and announcements.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A netlink request failed.
    #[error("cannot {operation} {subject} over netlink: {source}")]
    Netlink {
        /// What was asked for.
        operation: &'static str,
        /// Address, interface or table it was asked for.
        subject: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The interface of a [`MoveIp`] does not exist in this network namespace.
    #[error("no network interface {0:?} here; `ip link` lists those there are")]
    NoSuchInterface(String),
    /// The address is there, but not as described.
    #[error("{wanted}: the address is configured as {found}; name it that way")]
    ConfiguredDifferently {
        /// What was asked for.
        wanted: MoveIp,
        /// What the interface has.
        found: String,
    },
    /// The kernel took the address and does not deliver to it.
    #[error(
        "{address} was added, but the kernel delivers nothing to it after {waited:?}; \
         is the interface up?"
    )]
    NotUsable {
        /// The address.
        address: MoveIp,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A file of /proc/sys could not be read or written.
    #[error("cannot {operation} {}: {source}", path.display())]
    Sysctl {
        /// `read`, `write` or `lock`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A migration id that cannot name a table.
    #[error("{0:?} cannot name a network lock: expected 1 to 64 hexadecimal digits in lower case")]
    BadLockId(String),
    /// There is no `nft` to run.
    #[error("cannot run nft, which sets the network lock ({0}); install the package nftables")]
    NftMissing(io::Error),
    /// A pipe, poll or wait on an `nft` process failed.
    #[error("cannot {operation} with nft: {source}")]
    NftProcess {
        /// What the process was for.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// `nft` or the kernel refused a batch.
    #[error("nft could not {operation}: {message}")]
    Nft {
        /// What the batch was for.
        operation: &'static str,
        /// What nft wrote, or how it ended.
        message: String,
    },
    /// `nft` was killed at its deadline; whether the batch took effect is not known.
    #[error("nft did not {operation} within {deadline:?} and was killed")]
    NftTimeout {
        /// What the batch was for.
        operation: &'static str,
        /// The deadline.
        deadline: Duration,
    },
    /// The kernel or nft lacks what the lock is made of.
    #[error(
        "this host cannot have a network lock: nftables family {family} is refused ({message}); \
         the kernel needs CONFIG_NF_TABLES{} (module nf_tables)",
        if *family == "arp" { "_ARP" } else { "_INET" }
    )]
    LockUnsupported {
        /// `inet` or `arp`.
        family: &'static str,
        /// What nft wrote.
        message: String,
    },
    /// The interface has a link layer on which haulier cannot announce an address.
    #[error(
        "cannot announce {address} on {interface}: its link layer ({kind}) is not Ethernet; \
         neighbours will notice the move only when they ask again"
    )]
    CannotAnnounce {
        /// The address.
        address: IpAddr,
        /// The interface.
        interface: String,
        /// What the kernel calls its link layer.
        kind: String,
    },
    /// Sending an announcement failed.
    #[error("cannot {operation} to announce {address}: {source}")]
    Announce {
        /// What failed.
        operation: &'static str,
        /// The address.
        address: MoveIp,
        /// Why.
        source: io::Error,
    },
    /// The kernel has no packet log that the lock could copy packets to.
    #[error(
        "this host cannot capture packets ({0}); the kernel needs CONFIG_NFT_LOG and \
         CONFIG_NETFILTER_NETLINK_LOG (modules nft_log, nfnetlink_log)"
    )]
    CaptureUnsupported(#[source] io::Error),
    /// Reading captured packets failed.
    #[error("cannot read the packets that the network lock drops: {0}")]
    Capture(#[source] io::Error),
    /// A packet is not one that may be delivered here.
    #[error("a packet from the other host is not delivered: {0}")]
    PacketRefused(&'static str),
    /// Delivering a packet failed.
    #[error("cannot {operation} to deliver packets for {address}: {source}")]
    Inject {
        /// What failed.
        operation: &'static str,
        /// The address they are for.
        address: IpAddr,
        /// Why.
        source: io::Error,
    },
    /// Looking into the queue of a process's socket failed.
    #[error("cannot read the queued datagrams of process {pid}: {source}")]
    Queue {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// A file of /proc about a process could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Proc {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of /proc/PID/net/tcp that is not as the kernel documents it.
    #[error("cannot make sense of {}: {line:?}", path.display())]
    ProcFormat {
        /// The file.
        path: PathBuf,
        /// The line.
        line: String,
    },
}
