//! The connection between proxy and cache: how it comes about, and how each side proves that it is
//! meant. Either side may be the one that connects; the proxy speaks first.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use haulier_proto::frame::Kind;
use haulier_proto::id::{MigrationId, Secret};
use haulier_proto::message::Role;
pub(crate) use haulier_sys::random::bytes as random;
use haulier_sys::wait::{Wait, WaitError};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::{self, Identity, Purpose};
use haulier_transport::tcp;
use thiserror::Error;

use crate::message::session::Body;
use crate::message::{self, Challenge, Denied, Open, Proof, Session, State};

/// Longest time for a whole greeting.
pub(crate) const GREETING: Duration = Duration::from_secs(10);
/// Longest time for the rest of a frame once its first byte is there, and for a frame to be taken.
pub(crate) const FRAME: Duration = Duration::from_secs(60);
/// Bytes of a session's name.
const SESSION: usize = 16;
/// Most bytes of a sender's name.
const SENDER: usize = 32;
/// Bytes of nonces and proofs.
const PROOF: usize = 32;

/// How a connection to the other side comes about.
#[derive(Debug)]
pub enum Way {
    /// By connecting to `host:port`.
    To(String),
    /// By listening on `address:port`.
    Listen(String),
    /// It exists: a connected stream socket.
    Given(OwnedFd),
}

/// What both sides know and nobody else does. It keeps strangers out; it does not encrypt.
#[derive(Clone)]
pub struct Key(Secret);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// The key from a secret that both sides were given: any bytes. Nothing means that anyone may
    /// connect.
    pub fn from_secret(secret: &[u8]) -> Key {
        let key = blake3::derive_key("haulier 2026 image connection, shared secret", secret);
        Key(Secret::from_random(key))
    }

    fn proof(&self, side: Side, session: &SessionId, proxy: &[u8], cache: &[u8]) -> Secret {
        let mut hasher = blake3::Hasher::new_keyed(self.0.bytes());
        hasher.update(&[side as u8]);
        hasher.update(session);
        hasher.update(proxy);
        hasher.update(cache);
        Secret::from_random(*hasher.finalize().as_bytes())
    }
}

/// Whose proof it is: none can be sent back as the other's.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Side {
    Proxy = 1,
    Cache = 2,
}

/// Names a session on both sides.
pub(crate) type SessionId = [u8; SESSION];

/// A connection could not be had, or the greeting failed.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The connection failed.
    #[error("there is no connection to the other side")]
    Transport(#[from] TransportError),
    /// The wait for it ended.
    #[error("nobody connected")]
    Nobody,
    /// The system refused.
    #[error("cannot wait for connections")]
    Accept(#[source] io::Error),
    /// The peer does not know the secret.
    #[error("{0} does not know the shared secret")]
    Secret(String),
    /// The peer will have nothing of the session.
    #[error("{peer} refused: {reason}")]
    Denied {
        /// The peer.
        peer: String,
        /// Its reason.
        reason: String,
        /// Whether another session may do.
        unknown: bool,
    },
    /// The peer says something else than the protocol asks for.
    #[error("{peer} broke the protocol: {what}")]
    Protocol {
        /// The peer.
        peer: String,
        /// What it did.
        what: String,
    },
}

/// Makes connections.
#[derive(Debug)]
pub(crate) enum Connector {
    To(String),
    Listen(tcp::Listener),
    /// Once.
    Given(Option<OwnedFd>),
}

impl Connector {
    pub(crate) fn new(way: Way) -> Result<Connector, TransportError> {
        Ok(match way {
            Way::To(address) => Connector::To(address),
            Way::Listen(address) => Connector::Listen(tcp::Listener::bind(&address)?),
            Way::Given(socket) => Connector::Given(Some(socket)),
        })
    }

    /// Where it listens, if it does.
    pub(crate) fn listens_on(&self) -> Option<String> {
        match self {
            Connector::Listen(listener) => listener.local_address().ok().map(|a| a.to_string()),
            _ => None,
        }
    }

    /// Whether there can be a connection after the first.
    pub(crate) fn can_reconnect(&self) -> bool {
        !matches!(self, Connector::Given(_))
    }

    /// The next connection.
    pub(crate) fn next(&mut self, wait: &Wait) -> Result<Channel, LinkError> {
        match self {
            Connector::To(address) => Ok(tcp::connect(address, wait)?),
            Connector::Listen(listener) => listener.accept(wait).map_err(|error| match error {
                WaitError::Deadline | WaitError::Cancelled => LinkError::Nobody,
                WaitError::Io(error) => LinkError::Accept(error),
            }),
            Connector::Given(socket) => {
                let socket = socket.take().ok_or(LinkError::Nobody)?;
                Channel::new(socket, "the given connection").map_err(LinkError::Accept)
            }
        }
    }
}

/// The proxy's greeting. How many frames of the session the cache has.
pub(crate) fn open(
    channel: &mut Channel,
    me: &Identity,
    key: &Key,
    (session, sender): (&SessionId, &[u8]),
    resume: bool,
    wait: &Wait,
) -> Result<u64, LinkError> {
    let wait = wait.at_most(GREETING);
    let purpose = Purpose {
        migration: MigrationId::from_random([0; 8]),
        // Nothing secret is shown to a peer that has proved nothing.
        secret: Secret::from_random([0; 32]),
        role: Role::Images,
        index: 0,
    };
    greeting::introduce(channel, me, &purpose, &wait)?;
    let mine = random::<PROOF>();
    let open = Open {
        session: session.to_vec(),
        resume,
        nonce: mine.to_vec(),
        sender: sender.to_vec(),
    };
    send(channel, Body::Open(open), &wait)?;
    let challenge = match receive(channel, &wait)? {
        Body::Challenge(challenge) => challenge,
        other => return Err(unexpected(channel, other)),
    };
    let theirs = nonce(channel, &challenge.nonce)?;
    let expected = key.proof(Side::Cache, session, &mine, &theirs);
    if !expected.matches(&challenge.proof) {
        return Err(LinkError::Secret(channel.peer().to_owned()));
    }
    let proof = key.proof(Side::Proxy, session, &mine, &theirs);
    let proof = Proof {
        proof: proof.bytes().to_vec(),
    };
    send(channel, Body::Proof(proof), &wait)?;
    match receive(channel, &wait)? {
        Body::State(state) => Ok(state.received),
        other => Err(unexpected(channel, other)),
    }
}

/// What a proxy wants that has proved itself.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) session: SessionId,
    pub(crate) resume: bool,
    pub(crate) sender: Vec<u8>,
    pub(crate) host: String,
}

/// The cache's greeting, up to its last word: [`welcome`] or [`deny`].
pub(crate) fn receive_open(
    channel: &mut Channel,
    me: &Identity,
    key: &Key,
    wait: &Wait,
) -> Result<Opened, LinkError> {
    let wait = wait.at_most(GREETING);
    let (hello, purpose, version) = greeting::receive_hello(channel, me, &wait)?;
    if purpose.role != Role::Images {
        let reason = "this is an image-cache, not a haulier serve";
        greeting::refuse(channel, me, reason, &wait)?;
        return Err(protocol(channel, "it takes this for a haulier serve"));
    }
    greeting::accept(channel, me, version, &wait)?;
    let open = match receive(channel, &wait)? {
        Body::Open(open) => open,
        other => return Err(unexpected(channel, other)),
    };
    let session = SessionId::try_from(&open.session[..])
        .map_err(|_| protocol(channel, "a session without a name"))?;
    if open.sender.len() > SENDER {
        return Err(protocol(channel, "a sender with too long a name"));
    }
    let theirs = nonce(channel, &open.nonce)?;
    let mine = random::<PROOF>();
    let proof = key.proof(Side::Cache, &session, &theirs, &mine);
    let challenge = Challenge {
        nonce: mine.to_vec(),
        proof: proof.bytes().to_vec(),
    };
    send(channel, Body::Challenge(challenge), &wait)?;
    let proof = match receive(channel, &wait)? {
        Body::Proof(proof) => proof,
        other => return Err(unexpected(channel, other)),
    };
    let expected = key.proof(Side::Proxy, &session, &theirs, &mine);
    if !expected.matches(&proof.proof) {
        deny(channel, "the shared secret is another", false, &wait)?;
        return Err(LinkError::Secret(channel.peer().to_owned()));
    }
    Ok(Opened {
        session,
        resume: open.resume,
        sender: open.sender,
        host: hello.host,
    })
}

/// The session goes on from there.
pub(crate) fn welcome(channel: &mut Channel, received: u64, wait: &Wait) -> Result<(), LinkError> {
    send(channel, Body::State(State { received }), wait)
}

/// The session cannot be had.
pub(crate) fn deny(
    channel: &mut Channel,
    reason: &str,
    unknown: bool,
    wait: &Wait,
) -> Result<(), LinkError> {
    let denied = Denied {
        reason: message::reason(reason),
        unknown,
    };
    send(channel, Body::Denied(denied), wait)
}

/// Sends a message.
pub(crate) fn send(channel: &mut Channel, body: Body, wait: &Wait) -> Result<(), LinkError> {
    Ok(channel.send_message(Kind::ImageSession, &Session::from(body), wait)?)
}

/// Receives a message, where only one may come.
pub(crate) fn receive(channel: &mut Channel, wait: &Wait) -> Result<Body, LinkError> {
    let message: Session = channel.receive_message(Kind::ImageSession, wait)?;
    match message.body {
        Some(Body::Denied(Denied { reason, unknown })) => Err(LinkError::Denied {
            peer: channel.peer().to_owned(),
            reason,
            unknown,
        }),
        Some(body) => Ok(body),
        None => Err(protocol(channel, "a message unknown to this version")),
    }
}

/// The error for a message that is not due.
pub(crate) fn unexpected(channel: &Channel, body: Body) -> LinkError {
    protocol(channel, &format!("out of order: {body:?}"))
}

fn protocol(channel: &Channel, what: &str) -> LinkError {
    LinkError::Protocol {
        peer: channel.peer().to_owned(),
        what: what.to_owned(),
    }
}

fn nonce(channel: &Channel, bytes: &[u8]) -> Result<[u8; PROOF], LinkError> {
    bytes
        .try_into()
        .map_err(|_| protocol(channel, "a nonce of the wrong length"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    fn me() -> Identity {
        Identity {
            software: "haulier test".to_owned(),
            host: "here".to_owned(),
        }
    }

    fn greet(proxy: &'static [u8], cache: &'static [u8]) -> (Result<u64, LinkError>, bool) {
        let (a, b) = UnixStream::pair().unwrap();
        let mut a = Channel::new(a, "the cache").unwrap();
        let mut b = Channel::new(b, "the proxy").unwrap();
        let wait = Wait::uncancellable(GREETING);
        let server = thread::spawn(move || {
            let wait = Wait::uncancellable(GREETING);
            let opened = receive_open(&mut b, &me(), &Key::from_secret(cache), &wait);
            match opened {
                Ok(opened) => {
                    assert_eq!((opened.session, opened.resume), ([7; 16], true));
                    welcome(&mut b, 5, &wait).unwrap();
                    true
                }
                Err(_) => false,
            }
        });
        let key = Key::from_secret(proxy);
        let got = open(&mut a, &me(), &key, (&[7; 16], b"s"), true, &wait);
        drop(a);
        (got, server.join().unwrap())
    }

    #[test]
    fn both_sides_prove_that_they_know_the_secret() {
        assert!(matches!(greet(b"s", b"s"), (Ok(5), true)));
        assert!(matches!(greet(b"", b""), (Ok(5), true)));
        let (got, accepted) = greet(b"s", b"t");
        assert!(matches!(got, Err(LinkError::Secret(_))));
        assert!(!accepted);
    }

    #[test]
    fn a_proof_is_good_for_one_side_and_one_pair_of_nonces() {
        let key = Key::from_secret(b"s");
        let proof = |side, a: u8, b: u8| *key.proof(side, &[0; 16], &[a; 32], &[b; 32]).bytes();
        let one = proof(Side::Proxy, 1, 2);
        assert_ne!(one, proof(Side::Cache, 1, 2));
        assert_ne!(one, proof(Side::Proxy, 1, 3));
        assert_ne!(one, proof(Side::Proxy, 3, 2));
    }
}
