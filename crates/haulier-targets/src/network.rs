//! The network identity of a target: its addresses, its connections, and the silence around
//! them while nobody may answer for it.
//!
//! Everything acts on the network namespace of the calling thread. The order in a switchover:
//! the source engages its lock once the tasks are frozen; the destination engages its own, adds
//! the addresses, restores, and at commit lifts its lock, announces, and thaws; the source
//! removes the addresses and then lifts its lock, so that it never answers for them again.

mod addresses;
mod announce;
mod connections;
mod deadline;
mod error;
mod lock;
mod move_ip;
mod netlink;
mod nf_tables;
mod nft;
mod promote;
mod repair;
mod routes;
mod ruleset;

pub use addresses::{Address, Removal, add, addresses, remove};
pub use announce::{Announcement, Announcer, announce};
pub use connections::{
    Connection, OpenConnection, TcpState, connections_of, listeners_of, listening_here, stranded,
};
pub use error::Error;
pub use lock::{ArmedLock, EngagedLock, LockScope, id_of, lift_by_id, probe, tables_of_haulier};
pub use move_ip::{MoveIp, MoveIpError};
pub use repair::end_repair_of;
