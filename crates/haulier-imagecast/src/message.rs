//! What image-proxy and image-cache tell each other beside the images.
//!
//! Bodies of [`haulier_proto::frame::Kind::ImageSession`] frames. `docs/image-protocol.md` says
//! when each may come.

use haulier_proto::frame::{FrameError, Kind};
use haulier_proto::message::decode;
use prost::Message;

use session::Body;

/// A message of either side.
#[derive(Clone, PartialEq, Message)]
pub struct Session {
    /// Which one; `None` for one that this version does not know.
    #[prost(
        oneof = "Body",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20"
    )]
    pub body: Option<Body>,
}

/// The messages by field number.
pub mod session {
    /// One of them.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Body {
        /// The proxy opens or resumes a session.
        #[prost(message, tag = "1")]
        Open(super::Open),
        /// The cache proves that it knows the secret, and asks for the same.
        #[prost(message, tag = "2")]
        Challenge(super::Challenge),
        /// The proxy proves that it knows the secret.
        #[prost(message, tag = "3")]
        Proof(super::Proof),
        /// The cache says how far the session got.
        #[prost(message, tag = "4")]
        State(super::State),
        /// The cache will have nothing of this session.
        #[prost(message, tag = "5")]
        Denied(super::Denied),
        /// The cache has taken in frames.
        #[prost(message, tag = "6")]
        Ack(super::Ack),
        /// The cache holds a snapshot.
        #[prost(message, tag = "7")]
        Held(super::Held),
        /// The cache gives a snapshot up.
        #[prost(message, tag = "8")]
        Refused(super::Refused),
        /// A snapshot begins.
        #[prost(message, tag = "9")]
        Begin(super::Begin),
        /// A held snapshot may be restored.
        #[prost(message, tag = "10")]
        Release(super::Release),
        /// The proxy gives a snapshot up.
        #[prost(message, tag = "11")]
        Abort(super::Abort),
        /// The proxy ends the session.
        #[prost(message, tag = "12")]
        Bye(super::Bye),
        /// Pages of a snapshot stay with its dump.
        #[prost(message, tag = "13")]
        Left(super::Left),
        /// A restore of such a snapshot may begin.
        #[prost(message, tag = "14")]
        Go(super::Go),
        /// A restore of such a snapshot wants to begin.
        #[prost(message, tag = "15")]
        Wanted(super::Wanted),
        /// CRIU has restored it: the rest of its pages may come.
        #[prost(message, tag = "16")]
        Restored(super::Restored),
        /// Tasks wait for pages.
        #[prost(message, tag = "17")]
        Fault(super::Fault),
        /// Every page is in its place.
        #[prost(message, tag = "18")]
        Placed(super::Placed),
        /// The restore failed.
        #[prost(message, tag = "19")]
        GaveUp(super::GaveUp),
        /// No further page can be had.
        #[prost(message, tag = "20")]
        Over(super::Over),
    }
}

/// The proxy's first message.
#[derive(Clone, PartialEq, Message)]
pub struct Open {
    /// 16 random bytes, which name the session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Whether the cache is to know it already.
    #[prost(bool, tag = "2")]
    pub resume: bool,
    /// 32 random bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub nonce: Vec<u8>,
    /// What is the same for all sessions of which only the newest can be alive; empty if not known.
    #[prost(bytes = "vec", tag = "4")]
    pub sender: Vec<u8>,
}

/// The cache's answer to [`Open`].
#[derive(Clone, PartialEq, Message)]
pub struct Challenge {
    /// 32 random bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub nonce: Vec<u8>,
    /// The cache's proof, 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub proof: Vec<u8>,
}

/// The proxy's answer to [`Challenge`].
#[derive(Clone, PartialEq, Message)]
pub struct Proof {
    /// 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub proof: Vec<u8>,
}

/// The cache's answer to [`Proof`].
#[derive(Clone, PartialEq, Message)]
pub struct State {
    /// Frames of the session that it has taken in.
    #[prost(uint64, tag = "1")]
    pub received: u64,
}

/// The cache's other answer to [`Open`] or [`Proof`].
#[derive(Clone, PartialEq, Message)]
pub struct Denied {
    /// Why, for people.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// Whether it does not know the session: the proxy may open another.
    #[prost(bool, tag = "2")]
    pub unknown: bool,
}

/// Frames of the session need not be kept any longer.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    /// Frames of the session that the cache has taken in.
    #[prost(uint64, tag = "1")]
    pub received: u64,
}

/// Every byte of a snapshot is there and its checksums agree.
#[derive(Clone, PartialEq, Message)]
pub struct Held {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Its number among those of its target, as the cache presents it.
    #[prost(uint64, tag = "2")]
    pub number: u64,
    /// Its images.
    #[prost(uint32, tag = "3")]
    pub images: u32,
    /// Their bytes.
    #[prost(uint64, tag = "4")]
    pub bytes: u64,
}

/// A snapshot cannot be had, or is no longer wanted.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// The images of a dump follow.
#[derive(Clone, PartialEq, Message)]
pub struct Begin {
    /// The snapshot: any number that no snapshot under way has.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Whose dump it is: a name that both sides were given.
    #[prost(string, tag = "2")]
    pub target: String,
}

/// The dump succeeded: a restore may begin.
#[derive(Clone, PartialEq, Message)]
pub struct Release {
    /// The snapshot.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
}

/// The dump failed, or its images cannot be delivered.
#[derive(Clone, PartialEq, Message)]
pub struct Abort {
    /// The snapshot.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Nothing follows, and the session need not be kept.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Bye {}

/// Pages of a snapshot are not in its images. They stay with its dump, which waits.
#[derive(Clone, PartialEq, Message)]
pub struct Left {
    /// The snapshot.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
}

/// The answer to [`Wanted`]: from here on the proxy counts on it that the tasks may run.
#[derive(Clone, PartialEq, Message)]
pub struct Go {
    /// The snapshot.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
}

/// A restore waits for the inventory of a snapshot with pages left behind.
#[derive(Clone, PartialEq, Message)]
pub struct Wanted {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
}

/// CRIU is done, the tasks run or will in a moment.
#[derive(Clone, PartialEq, Message)]
pub struct Restored {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
}

/// Pages that go before all others.
#[derive(Clone, PartialEq, Message)]
pub struct Fault {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Whose they are, by the pid in the images.
    #[prost(uint32, tag = "2")]
    pub task: u32,
    /// Their addresses at the time of the dump.
    #[prost(uint64, repeated, tag = "3")]
    pub pages: Vec<u64>,
}

/// The dump may end: nothing of it is needed any more.
#[derive(Clone, PartialEq, Message)]
pub struct Placed {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
}

/// What was restored is no more.
#[derive(Clone, PartialEq, Message)]
pub struct GaveUp {
    /// The snapshot, as the proxy numbers them.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Whether it may have run. If not, the tasks may run on at their source.
    #[prost(bool, tag = "3")]
    pub ran: bool,
}

/// The pages that were left behind are lost, or are no longer given.
#[derive(Clone, PartialEq, Message)]
pub struct Over {
    /// The snapshot.
    #[prost(uint64, tag = "1")]
    pub snapshot: u64,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub reason: String,
}

impl From<Body> for Session {
    fn from(body: Body) -> Session {
        Session { body: Some(body) }
    }
}

/// The message in a frame's body.
///
/// # Errors
/// [`FrameError::Body`] for one that does not decode or that this version does not know.
pub fn read(body: &[u8]) -> Result<Body, FrameError> {
    let message: Session = decode(Kind::ImageSession, body)?;
    message.body.ok_or_else(|| FrameError::Body {
        kind: Kind::ImageSession,
        reason: "a message unknown to this version".to_owned(),
    })
}

/// A reason as it may travel: long ones are cut, so that a message stays below its limit.
pub(crate) fn reason(text: &str) -> String {
    text.chars().take(2000).collect()
}
