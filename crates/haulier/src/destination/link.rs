//! The connections to the source: the command connection and the memory connections beside it. When
//! one breaks all are void, and after the commit the source may come back with new ones.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use haulier_proto::message::control;
use haulier_sys::wait::{Cancel, Wait};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

use crate::commands::{self, Incoming};
use crate::destination::receivers::Receivers;

/// How long a memory connection may be silent. A source that is gone is noticed by the kernel long
/// before; one that is alive may spend this on a large dump.
const SILENCE: Duration = Duration::from_secs(3600);

/// The connections of a migration, from one meeting with the source on.
#[derive(Debug)]
pub(crate) struct Link {
    channel: Channel,
    /// What the source says.
    pub(crate) incoming: Receiver<Incoming>,
    /// Cancelled when the source fails, leaves, or a memory connection breaks.
    pub(crate) stop: Cancel,
    /// The memory connections.
    pub(crate) receivers: Receivers,
}

impl Link {
    /// Listens on a command connection, over which `first` has come already.
    pub(crate) fn new(channel: Channel, first: Option<control::Body>) -> std::io::Result<Link> {
        let stop = Cancel::new()?;
        let incoming = commands::listen(channel.try_clone()?, first, Some(stop.clone()));
        Ok(Link {
            channel,
            incoming,
            receivers: Receivers::new(stop.clone(), SILENCE),
            stop,
        })
    }

    /// Sends a message.
    pub(crate) fn send(&mut self, body: control::Body, wait: &Wait) -> Result<(), TransportError> {
        self.channel.send_control(body, wait)
    }

    /// A wait for a transfer that takes as long as it takes.
    pub(crate) fn transfer(&self) -> Wait {
        self.stop.wait_idle(SILENCE)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.cancel();
        self.channel.shutdown();
    }
}
