//! The network identity of a target: its addresses, its connections, and the silence around
//! them while nobody may answer for it.
//!
//! Everything acts on the network namespace of the calling thread. The order in a switchover:
//! the source engages its lock once the tasks are frozen; the destination engages its own, adds
//! the addresses, restores, and at commit lifts its lock, announces, and thaws; the source
//! removes the addresses and then lifts its lock, so that it never answers for them again.
//!
//! No packet is lost in it: what a lock drops of what comes in is captured ([`Capture`]), at the
//! source until nothing comes any more, and only then are the addresses removed; what the target
//! has received and not read is found in its sockets ([`queued_datagrams_of`]; CRIU takes along
//! what TCP has received, and nothing of UDP). All of it is delivered at the destination
//! ([`Injector`]) once its lock is lifted.

mod addresses;
mod announce;
mod capture;
mod connections;
mod deadline;
mod error;
mod inject;
mod ip_packet;
mod lock;
mod move_ip;
mod netlink;
mod nf_tables;
mod nflog;
mod nft;
mod promote;
mod queued;
mod repair;
mod room;
mod routes;
mod ruleset;

pub use addresses::{Address, Removal, add, addresses, remove};
pub use announce::{Announcement, Announcer, announce};
pub use capture::{Capture, CaptureStats};
pub use connections::{
    Connection, OpenConnection, TcpState, connections_of, listeners_of, listening_here, stranded,
};
pub use error::Error;
pub use inject::{Delivery, Injector};
pub use lock::{
    ArmedLock, EngagedLock, LockScope, id_of, lift_by_id, probe, silence, tables_of_haulier,
};
pub use move_ip::{MoveIp, MoveIpError};
pub use queued::{Queued, queued_datagrams_of};
pub use repair::{begin_repair_of, end_repair_of};
