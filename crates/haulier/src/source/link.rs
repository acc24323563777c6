//! The source's connections to the destination.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use haulier_proto::id::{MigrationId, Secret};
use haulier_proto::message::{Role, control};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::{self, Agreed, Identity, Purpose};
use haulier_transport::tcp::{self, LinkTime};
use haulier_transport::wait::{Cancel, Wait};

use crate::commands::{self, Incoming, MOST_WAITING};

/// Who connects, and where to.
#[derive(Debug, Clone)]
pub(crate) struct Dialer {
    pub(crate) address: String,
    pub(crate) me: Identity,
    pub(crate) migration: MigrationId,
    pub(crate) secret: Secret,
    pub(crate) link_time: LinkTime,
}

/// The command connection: messages are taken in by a thread, so that a failure over there, or the
/// loss of the link, ends whatever this side is waiting for.
#[derive(Debug)]
pub(crate) struct Link {
    channel: Channel,
    incoming: Receiver<Incoming>,
    pub(crate) agreed: Agreed,
}

impl Dialer {
    /// Opens a connection of the given role.
    pub(crate) fn open(
        &self,
        role: Role,
        index: u32,
        wait: &Wait,
    ) -> Result<(Channel, Agreed), TransportError> {
        let mut channel = tcp::connect(&self.address, wait)?;
        let set = self.link_time.apply(&channel);
        set.map_err(|source| self.broken(source))?;
        let purpose = Purpose {
            migration: self.migration,
            secret: self.secret.clone(),
            role,
            index,
        };
        let agreed = greeting::introduce(&mut channel, &self.me, &purpose, wait)?;
        Ok((channel, agreed))
    }

    /// Opens the command connection. A message of failure, or its end, cancels `stop`.
    pub(crate) fn command(
        &self,
        stop: Option<&Cancel>,
        wait: &Wait,
    ) -> Result<Link, TransportError> {
        let (channel, agreed) = self.open(Role::Command, 0, wait)?;
        let reader = channel.try_clone().map_err(|source| self.broken(source))?;
        let incoming = commands::listen(reader, None, stop.cloned());
        Ok(Link {
            channel,
            incoming,
            agreed,
        })
    }

    fn broken(&self, source: io::Error) -> TransportError {
        TransportError::Broken {
            peer: self.address.clone(),
            doing: "setting it up",
            source,
        }
    }
}

impl Link {
    /// Sends a message.
    pub(crate) fn send(&mut self, body: control::Body, wait: &Wait) -> Result<(), TransportError> {
        self.channel.send_control(body, wait)
    }

    /// The next message or the end of the connection; `None` when the time is over.
    pub(crate) fn receive(&self, time: Duration) -> Option<Incoming> {
        match self.incoming.recv_timeout(time) {
            Ok(incoming) => Some(incoming),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Incoming::Lost(TransportError::Closed {
                peer: self.channel.peer().to_owned(),
                doing: "waiting for its next message",
            })),
        }
    }

    /// The first failure or end among what waits to be heard, once nothing else matters any more.
    pub(crate) fn last_word(&self, time: Duration) -> Option<Incoming> {
        for _ in 0..=MOST_WAITING {
            match self.receive(time)? {
                Incoming::Message(body) if !matches!(body, control::Body::Failed(_)) => {}
                word => return Some(word),
            }
        }
        None
    }

    /// The connection.
    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.channel.shutdown();
    }
}
