//! The cache's sessions: what came over which connection, and what happens when one breaks.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use haulier_proto::frame::Kind;
use haulier_sys::wait::{Cancel, Wait, WaitError};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::Identity;
use thiserror::Error;

use crate::intake::{Intake, PagesAhead, Violation};
use crate::link::{self, FRAME, Key, LinkError, SessionId};
use crate::message::Ack;
use crate::message::session::Body;
use crate::receive;
use crate::store::Store;

/// Most sessions at once.
const MOST: usize = 64;
/// A connection without a frame is given up after that; TCP notices a dead peer much earlier.
const IDLE: Duration = Duration::from_secs(24 * 3600);
/// Bytes, and frames, after which the proxy is told what came.
const ACK_BYTES: usize = 1 << 20;
const ACK_FRAMES: u64 = 1024;
/// How often the deadlines of lost sessions are looked at.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

/// How a connection ended.
#[derive(Debug, Error)]
pub(crate) enum SessionError {
    /// It broke, or never came about.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The proxy broke the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The same session came over another connection.
    #[error("the session went on over another connection")]
    Replaced,
}

impl From<TransportError> for SessionError {
    fn from(error: TransportError) -> SessionError {
        SessionError::Link(error.into())
    }
}

/// Every session.
#[derive(Debug)]
pub(crate) struct Sessions {
    store: Arc<Store>,
    me: Identity,
    key: Key,
    /// Whether pages may be left behind.
    lazy: bool,
    /// How long a session outlives its connection.
    patience: Duration,
    slots: Mutex<HashMap<SessionId, Arc<Slot>>>,
    greeting: AtomicU64,
}

/// What the cache says to a proxy: over the connection that there is, by whoever has something to say.
/// What is lost with a connection is said again over the next one ([`Intake::said`]).
#[derive(Debug, Default)]
pub(crate) struct Outgoing(Mutex<Option<Channel>>);

impl Outgoing {
    /// Says something, if there is a connection. Whether it breaks is for its reader to find out.
    pub(crate) fn say(&self, body: Body) {
        if let Some(channel) = &mut *self.channel() {
            if link::send(channel, body, &Wait::uncancellable(SAYING)).is_err() {
                channel.shutdown();
            }
        }
    }

    fn channel(&self) -> MutexGuard<'_, Option<Channel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a word of the cache may take: it is short.
const SAYING: Duration = Duration::from_secs(10);

/// A session.
#[derive(Debug)]
struct Slot {
    /// Empty, or what no two living sessions have.
    sender: Vec<u8>,
    outgoing: Arc<Outgoing>,
    /// Counts connections: only the newest may go on.
    turn: AtomicU64,
    state: Mutex<SlotState>,
}

#[derive(Debug)]
struct SlotState {
    intake: Intake,
    /// Wakes whoever reads the connection it has.
    connection: Option<Channel>,
    /// Since when it has none.
    lost: Option<Instant>,
}

/// A connection's place among those that have not greeted yet.
pub(crate) struct Greeting<'a>(&'a AtomicU64);

impl Drop for Greeting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Most connections that have not greeted yet.
const MOST_GREETING: u64 = 32;

impl Sessions {
    pub(crate) fn new(
        store: Arc<Store>,
        me: Identity,
        key: Key,
        lazy: bool,
        patience: Duration,
    ) -> Sessions {
        Sessions {
            store,
            me,
            key,
            lazy,
            patience,
            slots: Mutex::new(HashMap::new()),
            greeting: AtomicU64::new(0),
        }
    }

    /// Lets another connection greet, if there is room for one.
    pub(crate) fn admit(&self) -> Option<Greeting<'_>> {
        let before = self.greeting.fetch_add(1, Ordering::SeqCst);
        let greeting = Greeting(&self.greeting);
        (before < MOST_GREETING).then_some(greeting)
    }

    /// Serves a connection until it ends. Whether it ended the session.
    pub(crate) fn serve(
        &self,
        mut channel: Channel,
        greeting: Greeting<'_>,
        stop: &Cancel,
    ) -> Result<(), SessionError> {
        let greeted = self.greet(&mut channel, stop);
        drop(greeting);
        let (id, slot, turn) = greeted?;
        let peer = channel.peer().to_owned();
        let ended = take_in(&slot, turn, &mut channel, stop);
        {
            // Under its lock: a newer connection may come in any moment.
            let mut outgoing = slot.outgoing.channel();
            if slot.turn.load(Ordering::SeqCst) == turn {
                *outgoing = None;
            }
        }
        let mut state = slot.state();
        if slot.turn.load(Ordering::SeqCst) != turn {
            return Err(SessionError::Replaced);
        }
        state.connection = None;
        let over = match &ended {
            Ok(()) => Some("the image-proxy ended".to_owned()),
            // A peer that is confused is not waited for.
            Err(SessionError::Violation(error)) => Some(error.to_string()),
            Err(_) => None,
        };
        match over {
            Some(why) => {
                state.intake.lost(&why);
                drop(state);
                if ended.is_err() {
                    // It may be gone, or not listen.
                    let _ = link::deny(&mut channel, &why, true, &stop.wait(link::GREETING));
                }
                self.slots().remove(&id);
            }
            None => state.lost = Some(Instant::now()),
        }
        tracing::info!("the connection from {peer} has ended");
        ended
    }

    /// Ends sessions that have been without a connection for too long, or all of them.
    pub(crate) fn expire(&self, all: bool) {
        let mut gone = Vec::new();
        self.slots().retain(|_, slot| {
            let lost = slot.state().lost;
            let over = all || lost.is_some_and(|since| since.elapsed() >= self.patience);
            if over {
                gone.push(Arc::clone(slot));
            }
            !over
        });
        for slot in gone {
            slot.end(&format!(
                "the connection to the image-proxy was lost for {} s",
                self.patience.as_secs()
            ));
        }
    }

    fn greet(
        &self,
        channel: &mut Channel,
        stop: &Cancel,
    ) -> Result<(SessionId, Arc<Slot>, u64), SessionError> {
        let wait = stop.wait(link::GREETING);
        let opened = link::receive_open(channel, &self.me, &self.key, &wait)?;
        if !opened.resume && !opened.sender.is_empty() {
            self.end_others(&opened.session, &opened.sender);
        }
        let Some(slot) = self.slot(&opened.session, opened.resume, &opened.sender) else {
            let (reason, unknown) = if opened.resume {
                ("it does not know the session, or no longer", true)
            } else {
                ("it has too many sessions, or this one already", false)
            };
            link::deny(channel, reason, unknown, &wait)?;
            return Err(LinkError::Denied {
                peer: channel.peer().to_owned(),
                reason: reason.to_owned(),
                unknown,
            }
            .into());
        };
        let turn = slot.turn.fetch_add(1, Ordering::SeqCst) + 1;
        {
            let mut state = slot.state();
            let second = channel.try_clone().map_err(LinkError::Accept)?;
            if let Some(before) = state.connection.replace(second) {
                before.shutdown();
            }
            state.lost = None;
        }
        tracing::info!("{} at {} sends images", opened.host, channel.peer());
        let welcomed = welcome(&slot, channel, &wait);
        if let Err(error) = welcomed {
            let mut state = slot.state();
            if slot.turn.load(Ordering::SeqCst) == turn {
                state.connection = None;
                state.lost = Some(Instant::now());
            }
            return Err(error.into());
        }
        Ok((opened.session, slot, turn))
    }

    /// Ends the sessions that a sender had before this one.
    fn end_others(&self, id: &SessionId, sender: &[u8]) {
        let mut others = Vec::new();
        self.slots().retain(|other, slot| {
            let is_other = other != id && slot.sender == sender;
            if is_other {
                others.push(Arc::clone(slot));
            }
            !is_other
        });
        for slot in others {
            slot.end("the image-proxy has begun anew");
        }
    }

    fn slot(&self, id: &SessionId, resume: bool, sender: &[u8]) -> Option<Arc<Slot>> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(id) {
            // A proxy that did not hear the welcome opens the session again.
            let fresh = slot.state().intake.received() == 0;
            return (resume || fresh).then(|| Arc::clone(slot));
        }
        if resume || slots.len() >= MOST {
            return None;
        }
        let outgoing = Arc::<Outgoing>::default();
        let state = SlotState {
            intake: Intake::new(Arc::clone(&self.store), Arc::clone(&outgoing), self.lazy),
            connection: None,
            lost: None,
        };
        let slot = Arc::new(Slot {
            sender: sender.to_vec(),
            outgoing,
            turn: AtomicU64::new(0),
            state: Mutex::new(state),
        });
        slots.insert(*id, Arc::clone(&slot));
        Some(slot)
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Ends the session: what is not complete will never be.
    fn end(&self, why: &str) {
        // Whoever still reads for it may not go on.
        self.turn.fetch_add(1, Ordering::SeqCst);
        let mut state = self.state();
        state.intake.lost(why);
        if let Some(connection) = &state.connection {
            connection.shutdown();
        }
    }

    fn state(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last word of the greeting, and what the proxy may not have heard. From then on others may speak.
fn welcome(slot: &Slot, channel: &mut Channel, wait: &Wait) -> Result<(), LinkError> {
    let second = channel.try_clone().map_err(LinkError::Accept)?;
    let mut outgoing = slot.outgoing.channel();
    *outgoing = None;
    let (received, said) = {
        let state = slot.state();
        (state.intake.received(), state.intake.said())
    };
    link::welcome(channel, received, wait)?;
    for body in said {
        link::send(channel, body, wait)?;
    }
    *outgoing = Some(second);
    Ok(())
}

/// Takes in what comes until the proxy ends the session or the connection breaks.
fn take_in(
    slot: &Slot,
    turn: u64,
    channel: &mut Channel,
    stop: &Cancel,
) -> Result<(), SessionError> {
    let mut buffer = Vec::new();
    let (mut bytes_since, mut acknowledged) = (0, slot.state().intake.received());
    let mut received = acknowledged;
    loop {
        // Before it waits, whatever its window is, the proxy is told.
        let nothing = stop
            .wait(Duration::ZERO)
            .readable(channel.socket())
            .is_err();
        if nothing && received > acknowledged {
            (bytes_since, acknowledged) = (0, received);
            slot.outgoing.say(Body::Ack(Ack { received }));
        }
        stop.wait(IDLE)
            .readable(channel.socket())
            .map_err(|error| waiting(channel, error))?;
        // A frame that has begun may not drip.
        let wait = stop.wait(FRAME);
        let header = channel.receive_header(&wait)?;
        if !is_ours(header.kind) {
            // Before there is room for its body: other kinds may be longer.
            return Err(Violation::kind(header.kind).into());
        }
        let length = header.length as usize;
        let room = |pages: &PagesAhead| slot.state().intake.room(pages);
        let (body, pages) = receive::body(channel, &header, &mut buffer, room, &wait)?;
        let (answers, over);
        if header.kind == Kind::LazyPages {
            let lazy = slot.state().intake.lazy_of(body);
            // Nobody else is kept from anything meanwhile.
            lazy.map_or(Ok(()), |lazy| lazy.await_room(&wait))
                .map_err(|error| waiting(channel, error))?;
        }
        {
            let mut state = slot.state();
            if slot.turn.load(Ordering::SeqCst) != turn {
                return Err(SessionError::Replaced);
            }
            state.intake.frame(header.kind, body, pages)?;
            answers = state.intake.answers();
            received = state.intake.received();
            over = state.intake.is_over();
        }
        for answer in answers {
            slot.outgoing.say(answer);
        }
        if over {
            return Ok(());
        }
        bytes_since += length;
        if bytes_since >= ACK_BYTES || received - acknowledged >= ACK_FRAMES {
            (bytes_since, acknowledged) = (0, received);
            slot.outgoing.say(Body::Ack(Ack { received }));
        }
    }
}

/// The kinds that a session is made of.
fn is_ours(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::ImageHeader
            | Kind::ImageData
            | Kind::ImageEnd
            | Kind::ImagesDone
            | Kind::ImageSession
            | Kind::LazyPages
    )
}

fn waiting(channel: &Channel, error: WaitError) -> TransportError {
    let doing = "waiting for its next message";
    let peer = channel.peer().to_owned();
    match error {
        WaitError::Deadline => TransportError::Deadline { peer, doing },
        WaitError::Cancelled => TransportError::Cancelled { doing },
        WaitError::Io(source) => TransportError::Broken {
            peer,
            doing,
            source,
        },
    }
}
