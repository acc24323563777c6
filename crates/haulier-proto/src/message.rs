//! The protobuf bodies, defined by field numbers.
//!
//! Numbers are never reused. Unknown fields are ignored by prost, so a field may be added within a
//! version; a message that a peer does not know decodes to `body: None` and is refused by name.

use prost::Message;

use crate::frame::{FrameError, Kind};

/// What a connection is for, told in its [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Role {
    /// Never sent; what an unset field decodes to.
    Unset = 0,
    /// Checks, hand-over, failures: one per migration.
    Command = 1,
    /// CRIU's images, from the source to the destination: one per migration.
    Images = 2,
    /// Pages, from the source to the destination: one or more.
    Memory = 3,
    /// Faults of the restored target and the pages that answer them: one, if pages are left behind.
    Faults = 4,
    /// Packets that reach the source after its lock, to be delivered at the destination: one.
    Packets = 5,
}

/// Number of the round in which pages that were left behind are sent: beyond that of any round before
/// the freeze. After each break of the link it is one more.
pub const PUSH_ROUND: u32 = 1 << 30;

/// The first frame of a connection, from the side that connected.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// Oldest protocol version the sender speaks.
    #[prost(uint32, tag = "1")]
    pub oldest_version: u32,
    /// Newest protocol version the sender speaks.
    #[prost(uint32, tag = "2")]
    pub newest_version: u32,
    /// The connection's role.
    #[prost(enumeration = "Role", tag = "3")]
    pub role: i32,
    /// [`crate::id::MigrationId`].
    #[prost(bytes = "vec", tag = "4")]
    pub migration: Vec<u8>,
    /// [`crate::id::Secret`]: the command connection's sets it, the others must show the same.
    #[prost(bytes = "vec", tag = "5")]
    pub secret: Vec<u8>,
    /// Which of the connections of its role this is, from zero.
    #[prost(uint32, tag = "6")]
    pub index: u32,
    /// The sender's program and version, for the log.
    #[prost(string, tag = "7")]
    pub software: String,
    /// The sender's host name, for messages to people.
    #[prost(string, tag = "8")]
    pub host: String,
}

/// The answer to a [`Hello`].
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The version both will speak; zero if there is none or the connection is refused.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Why the connection is refused; empty if it is not.
    #[prost(string, tag = "2")]
    pub refusal: String,
    /// The destination's program and version.
    #[prost(string, tag = "3")]
    pub software: String,
    /// The destination's host name.
    #[prost(string, tag = "4")]
    pub host: String,
}

/// A message of the command connection.
#[derive(Clone, PartialEq, Message)]
pub struct Control {
    /// Which one. `None` is a message of a later version.
    #[prost(
        oneof = "control::Body",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14"
    )]
    pub body: Option<control::Body>,
}

/// The bodies of [`Control`].
pub mod control {
    /// What a command message says, and who sends it.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Body {
        /// Source: what the target needs of the destination. Nothing has been touched yet.
        #[prost(message, tag = "1")]
        Check(super::Requirements),
        /// Destination: what stands in the way; an empty list means that it is ready.
        #[prost(message, tag = "2")]
        Findings(super::Findings),
        /// Source: the target is about to be frozen; prepare to restore it.
        #[prost(message, tag = "3")]
        Begin(super::Begin),
        /// Destination: prepared, connections may be opened.
        #[prost(message, tag = "4")]
        Prepared(super::Prepared),
        /// Source: everything has been sent. The target is held frozen.
        #[prost(message, tag = "5")]
        Offer(super::Offer),
        /// Destination: restored, complete, and held frozen.
        #[prost(message, tag = "6")]
        Held(super::Held),
        /// Source: the right to run is the destination's. Sent again after a reconnection.
        #[prost(message, tag = "7")]
        Commit(super::Commit),
        /// Destination: the target runs here.
        #[prost(message, tag = "8")]
        Resumed(super::Resumed),
        /// Either: it will not be. From the destination it is final and recorded.
        #[prost(message, tag = "9")]
        Failed(super::Failure),
        /// Destination: every page is here; the source may release the target.
        #[prost(message, tag = "10")]
        Complete(super::Complete),
        /// Source, over a new command connection after a break: which pages are still missing?
        #[prost(message, tag = "11")]
        Rejoin(super::Rejoin),
        /// Destination: these, and the connections for them may be opened.
        #[prost(message, tag = "12")]
        Missing(super::Missing),
        /// Destination: it was to run here, is gone, and will not run here. Final and recorded; what
        /// stands on the source is the last copy.
        #[prost(message, tag = "13")]
        Lost(super::Failure),
        /// Source: the target stands and is silent, and its images follow. Until the images come the
        /// destination can do what nobody may do while the target runs elsewhere.
        #[prost(message, tag = "14")]
        Frozen(super::Frozen),
    }
}

/// What the target needs of the destination, gathered without stopping it.
#[derive(Clone, PartialEq, Message)]
pub struct Requirements {
    /// Machine architecture, as `uname -m` prints it.
    #[prost(string, tag = "1")]
    pub architecture: String,
    /// Kernel release of the source.
    #[prost(string, tag = "2")]
    pub kernel: String,
    /// CRIU's version on the source: major × 10000 + minor × 100 + sublevel.
    #[prost(uint32, tag = "3")]
    pub criu_version: u32,
    /// Numbers that must be free: processes, threads, sessions, process groups.
    #[prost(int32, repeated, tag = "4")]
    pub pids: Vec<i32>,
    /// Files that must be there.
    #[prost(message, repeated, tag = "5")]
    pub files: Vec<FileNeeded>,
    /// Private memory of the target in bytes, at the time of the check.
    #[prost(uint64, tag = "6")]
    pub memory_bytes: u64,
    /// Addresses that will move, as `10.0.0.5/24@eth0`.
    #[prost(string, repeated, tag = "7")]
    pub move_addresses: Vec<String>,
    /// CPU flags of the source, for the comparison on the destination.
    #[prost(string, repeated, tag = "8")]
    pub cpu_flags: Vec<String>,
    /// The target's program, for messages to people.
    #[prost(string, tag = "9")]
    pub program: String,
    /// The target's root task.
    #[prost(int32, tag = "10")]
    pub root_pid: i32,
    /// Local addresses its sockets are bound to, which must exist on the destination or move.
    #[prost(string, repeated, tag = "11")]
    pub bound_addresses: Vec<String>,
    /// Local addresses and ports it listens on, as `10.0.0.5:6379`, which must be free.
    #[prost(string, repeated, tag = "12")]
    pub listening: Vec<String>,
    /// Whether the tree's session lies outside of it, as CRIU has to be told.
    #[prost(bool, tag = "13")]
    pub shell_job: bool,
}

/// A file the target has open, mapped, or as its directory.
#[derive(Clone, PartialEq, Message)]
pub struct FileNeeded {
    /// Absolute path. Bytes, since Linux paths are.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// `st_mode`: type and permissions.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// Size in bytes, for a regular file whose size must agree.
    #[prost(uint64, optional, tag = "3")]
    pub size: Option<u64>,
    /// BLAKE3 of the contents, for a file whose contents must agree (mapped code and data).
    #[prost(bytes = "vec", tag = "4")]
    pub blake3: Vec<u8>,
    /// Why it is needed: `program`, `mapped`, `open`, `directory`.
    #[prost(string, tag = "5")]
    pub purpose: String,
    /// Device number, for a device node.
    #[prost(uint64, tag = "6")]
    pub device: u64,
    /// Whether the target holds a lock on it, which has to be free for the restore to take.
    #[prost(bool, tag = "7")]
    pub locked: bool,
}

/// What stands in the way, seen by the destination before anything is touched.
#[derive(Clone, PartialEq, Message)]
pub struct Findings {
    /// Each problem with its remedy; empty if there is none.
    #[prost(message, repeated, tag = "1")]
    pub problems: Vec<Problem>,
    /// CRIU's version on the destination, as in [`Requirements`]; zero if there is none.
    #[prost(uint32, tag = "2")]
    pub criu_version: u32,
    /// Kernel release of the destination.
    #[prost(string, tag = "3")]
    pub kernel: String,
}

/// One thing that stands in the way.
#[derive(Clone, PartialEq, Message)]
pub struct Problem {
    /// What is wrong, in one sentence.
    #[prost(string, tag = "1")]
    pub what: String,
    /// What to do about it, in one sentence.
    #[prost(string, tag = "2")]
    pub remedy: String,
}

/// The migration begins.
#[derive(Clone, PartialEq, Message)]
pub struct Begin {
    /// How many memory connections will be opened.
    #[prost(uint32, tag = "1")]
    pub memory_streams: u32,
    /// Whether a connection for faults will be opened.
    #[prost(bool, tag = "2")]
    pub faults: bool,
    /// Whether a connection for packets will be opened.
    #[prost(bool, tag = "3")]
    pub packets: bool,
}

/// The destination is prepared.
#[derive(Clone, PartialEq, Message)]
pub struct Prepared {}

/// The target stands.
#[derive(Clone, PartialEq, Message)]
pub struct Frozen {}

/// Everything has been sent.
#[derive(Clone, PartialEq, Message)]
pub struct Offer {
    /// Pages sent, so that the destination can tell that it has them all.
    #[prost(uint64, tag = "1")]
    pub pages: u64,
    /// Images sent.
    #[prost(uint32, tag = "2")]
    pub images: u32,
    /// Pages that are left at the source, to be fetched and pushed after the commit.
    #[prost(uint64, tag = "3")]
    pub left_behind: u64,
    /// Rounds sent over each memory connection.
    #[prost(uint32, tag = "4")]
    pub rounds: u32,
}

/// Every page is at the destination.
#[derive(Clone, PartialEq, Message)]
pub struct Complete {
    /// What the destination saw of faults.
    #[prost(message, optional, tag = "1")]
    pub faults: Option<Faults>,
}

/// How tasks waited for pages.
#[derive(Clone, PartialEq, Message)]
pub struct Faults {
    /// Faults answered from the destination's page store.
    #[prost(uint64, tag = "1")]
    pub local: u64,
    /// Faults that waited for the source.
    #[prost(uint64, tag = "2")]
    pub remote: u64,
    /// Faults on pages that have no contents.
    #[prost(uint64, tag = "3")]
    pub zero: u64,
    /// Faults by their latency: entry n counts those of less than 2 to the n microseconds that are in
    /// no entry before.
    #[prost(uint64, repeated, tag = "4")]
    pub latency: Vec<u64>,
    /// The same of those that waited for the source.
    #[prost(uint64, repeated, tag = "5")]
    pub remote_latency: Vec<u64>,
}

/// The source has come back.
#[derive(Clone, PartialEq, Message)]
pub struct Rejoin {
    /// How many memory connections it is going to open.
    #[prost(uint32, tag = "1")]
    pub memory_streams: u32,
}

/// Pages that the destination lacks.
#[derive(Clone, PartialEq, Message)]
pub struct Missing {
    /// By task.
    #[prost(message, repeated, tag = "1")]
    pub tasks: Vec<MissingPages>,
    /// Number of the round in which they are to be sent.
    #[prost(uint32, tag = "2")]
    pub round: u32,
}

/// Pages of one task.
#[derive(Clone, PartialEq, Message)]
pub struct MissingPages {
    /// The task's number in its own PID namespace.
    #[prost(uint32, tag = "1")]
    pub task: u32,
    /// Starts of the ranges, as page numbers (address divided by 4096), ascending.
    #[prost(uint64, repeated, tag = "2")]
    pub starts: Vec<u64>,
    /// Their lengths in pages.
    #[prost(uint64, repeated, tag = "3")]
    pub lengths: Vec<u64>,
}

/// Restored and held frozen.
#[derive(Clone, PartialEq, Message)]
pub struct Held {
    /// Phases of the destination so far.
    #[prost(message, repeated, tag = "1")]
    pub phases: Vec<PhaseTime>,
}

/// The right to run passes to the destination.
#[derive(Clone, PartialEq, Message)]
pub struct Commit {}

/// The target runs on the destination.
#[derive(Clone, PartialEq, Message)]
pub struct Resumed {
    /// Root task on the destination.
    #[prost(int32, tag = "1")]
    pub pid: i32,
    /// Phases of the destination after the commit.
    #[prost(message, repeated, tag = "2")]
    pub phases: Vec<PhaseTime>,
}

/// How long a phase of the destination took.
#[derive(Clone, PartialEq, Message)]
pub struct PhaseTime {
    /// The phase's name as people see it.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Microseconds.
    #[prost(uint64, tag = "2")]
    pub micros: u64,
}

/// What failed, where, why and what to do.
#[derive(Clone, PartialEq, Message)]
pub struct Failure {
    /// Host name of the side that failed.
    #[prost(string, tag = "1")]
    pub host: String,
    /// The phase in which it failed, as people see it.
    #[prost(string, tag = "2")]
    pub phase: String,
    /// What failed, in one sentence.
    #[prost(string, tag = "3")]
    pub what: String,
    /// CRIU's or the kernel's own reason; empty if `what` says it all.
    #[prost(string, tag = "4")]
    pub reason: String,
    /// What to do about it.
    #[prost(string, tag = "5")]
    pub remedy: String,
}

/// An image begins.
#[derive(Clone, PartialEq, Message)]
pub struct ImageHeader {
    /// Number of the image on this connection; its data and end carry the same.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// File name within the image directory: one path component.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Size in bytes, if it is known.
    #[prost(uint64, optional, tag = "3")]
    pub size: Option<u64>,
    /// Which dump of the target this image belongs to.
    #[prost(uint64, tag = "4")]
    pub snapshot: u64,
}

/// An image is complete.
#[derive(Clone, PartialEq, Message)]
pub struct ImageEnd {
    /// Number of the image.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// Its length in bytes.
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// BLAKE3 of its contents.
    #[prost(bytes = "vec", tag = "3")]
    pub blake3: Vec<u8>,
}

/// No further image will come for a snapshot.
#[derive(Clone, PartialEq, Message)]
pub struct ImagesDone {
    /// How many images were sent.
    #[prost(uint32, tag = "1")]
    pub images: u32,
    /// Which dump they belong to.
    #[prost(uint64, tag = "2")]
    pub snapshot: u64,
}

/// A memory stream has sent its part of a round.
#[derive(Clone, PartialEq, Message)]
pub struct RoundEnd {
    /// The round, from zero.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Pages this stream sent in the round, zero pages included.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Whether no round follows.
    #[prost(bool, tag = "3")]
    pub last: bool,
}

/// Decodes the body of a frame of the given kind.
///
/// # Errors
/// [`FrameError::Body`] if it is not such a message.
pub fn decode<M: Message + Default>(kind: Kind, body: &[u8]) -> Result<M, FrameError> {
    M::decode(body).map_err(|error| FrameError::Body {
        kind,
        reason: error.to_string(),
    })
}

impl control::Body {
    /// The message's name in errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            control::Body::Check(_) => "check",
            control::Body::Findings(_) => "findings",
            control::Body::Begin(_) => "begin",
            control::Body::Prepared(_) => "prepared",
            control::Body::Offer(_) => "offer",
            control::Body::Held(_) => "held",
            control::Body::Commit(_) => "commit",
            control::Body::Resumed(_) => "resumed",
            control::Body::Failed(_) => "failed",
            control::Body::Complete(_) => "complete",
            control::Body::Rejoin(_) => "rejoin",
            control::Body::Missing(_) => "missing",
            control::Body::Lost(_) => "lost",
            control::Body::Frozen(_) => "frozen",
        }
    }
}

impl From<control::Body> for Control {
    fn from(body: control::Body) -> Control {
        Control { body: Some(body) }
    }
}

#[cfg(test)]
mod tests;
