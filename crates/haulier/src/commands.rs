//! Taking in the messages of a command connection on a thread, so that whatever else a side is
//! waiting for ends when its peer gives up or is gone.

use std::sync::mpsc::{self, Receiver, TrySendError};
use std::thread;
use std::time::Duration;

use haulier_proto::message::control;
use haulier_sys::wait::{Cancel, Wait};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use tracing::warn;

/// Most messages that wait to be heard. A peer that follows the protocol never has more than a few
/// under way.
pub(crate) const MOST_WAITING: usize = 8;
/// How long an idle connection is listened to. It is shut down by its owner long before.
const LISTEN: Duration = Duration::from_secs(24 * 3600);

/// Something that came over the command connection.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A message.
    Message(control::Body),
    /// Its end; nothing follows.
    Lost(TransportError),
}

/// Listens until the connection ends, or the peer says that the migration failed, or says more than
/// there is to say; each cancels `stop`. `first` has been heard already.
pub(crate) fn listen(
    mut channel: Channel,
    first: Option<control::Body>,
    stop: Option<Cancel>,
) -> Receiver<Incoming> {
    let (sender, incoming) = mpsc::sync_channel(MOST_WAITING);
    if let Some(first) = first {
        // There is room for one.
        let _ = sender.try_send(Incoming::Message(first));
    }
    thread::spawn(move || {
        loop {
            let got = channel.receive_control("a message", &Wait::uncancellable(LISTEN));
            let (event, mut over) = match got {
                Ok(message) => {
                    let over = matches!(message, control::Body::Failed(_));
                    (Incoming::Message(message), over)
                }
                Err(error) => (Incoming::Lost(error), true),
            };
            // Sent before the cancellation, whose reason it is.
            let unheard = match sender.try_send(event) {
                Ok(()) => false,
                Err(TrySendError::Full(_)) => {
                    warn!(peer = channel.peer(), "says more than there is to say");
                    channel.shutdown();
                    over = true;
                    true
                }
                Err(TrySendError::Disconnected(_)) => true,
            };
            if let Some(stop) = stop.as_ref().filter(|_| over) {
                stop.cancel();
            }
            if over || unheard {
                return;
            }
        }
    });
    incoming
}
