//! The destination's end of the fault channel.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use haulier_proto::frame::Kind;
use haulier_sys::priority;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::KEEPALIVE;
use super::lending::{Helpers, Helping};
use super::receive::Receiver;
use super::request::{self, Entry, MAX_ENTRIES};
use crate::lazy::FaultSink;
use crate::store::PageStore;
use crate::stream::{ReceiveStats, StreamError};
use crate::wait::{Wait, WaitError};

/// How long to wait for the socket to take requests again, and for answers, before a look around.
const BUSY: Duration = Duration::from_millis(5);
const IDLE: Duration = Duration::from_millis(250);

/// How long one request may take to send, of which the socket has said that it takes it.
const SEND_TIME: Duration = Duration::from_secs(2);

const DOING: &str = "waiting for pages that were asked for";

/// Asks the source for pages that tasks wait for, each once, and receives them into the store.
///
/// The thread that meets a fault sends the request itself. While there is no connection, or it takes
/// no more, requests wait, and with them the tasks; over a new connection all that are outstanding
/// are sent again.
#[derive(Debug)]
pub struct FaultClient {
    store: Arc<PageStore>,
    state: Mutex<State>,
    /// Threads that receive what the source pushes.
    helpers: Helpers,
}

#[derive(Debug, Default)]
struct State {
    /// Asked for and not settled.
    asked: HashSet<Entry>,
    /// Those of them that are to be sent.
    queue: Vec<Entry>,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    channel: Channel,
    wait: Wait,
    /// When something was sent last.
    said: Instant,
}

impl FaultClient {
    /// A client without a connection, which puts what it gets into the store.
    pub fn new(store: Arc<PageStore>) -> Arc<Self> {
        Arc::new(Self {
            store,
            state: Mutex::default(),
            helpers: Helpers::default(),
        })
    }

    /// Where the pages come to.
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// Number of pages that were asked for and that tasks still wait for.
    pub fn outstanding(&self) -> usize {
        self.state().asked.len()
    }

    /// Asks over this channel, again for what is outstanding, and receives the answers, until the
    /// source says that the round has ended. In a thread of its own, which runs ahead of others
    /// meanwhile; one at a time. After an error faults wait until it is called again.
    ///
    /// # Errors
    /// [`StreamError`]; what came before it is in the store.
    pub fn run(
        &self,
        channel: &mut Channel,
        round: u32,
        wait: &Wait,
    ) -> Result<ReceiveStats, StreamError> {
        self.attach(channel, wait)?;
        // Tasks stand still while this thread waits for its turn.
        if let Err(error) = priority::urgent() {
            tracing::debug!(%error, "pages that were asked for come at the usual priority");
        }
        let result = self.receive(channel, round, wait);
        let _ = priority::usual();
        self.state().connection = None;
        result
    }

    /// The calling thread receives what is pushed, and runs ahead of others whenever a task waits for a
    /// page: that page may have been pushed already, and lie behind what this thread has not taken yet.
    pub(super) fn helps(&self) -> Helping<'_> {
        self.helpers.join()
    }

    fn attach(&self, channel: &Channel, wait: &Wait) -> Result<(), StreamError> {
        let clone = channel.try_clone();
        let channel = clone.map_err(|source| TransportError::Broken {
            peer: channel.peer().to_owned(),
            doing: "starting to ask for pages",
            source,
        })?;
        let mut state = self.state();
        state.queue = state.asked.iter().copied().collect();
        state.connection = Some(Connection {
            channel,
            wait: wait.clone(),
            said: Instant::now(),
        });
        state.flush();
        Ok(())
    }

    fn receive(
        &self,
        channel: &mut Channel,
        round: u32,
        wait: &Wait,
    ) -> Result<ReceiveStats, StreamError> {
        let mut receiver = Receiver::new(round);
        let mut heard = Instant::now();
        loop {
            let pause = self.state().tend();
            match wait.at_most(pause).readable(channel.socket()) {
                Ok(()) => {}
                Err(WaitError::Deadline) if heard.elapsed() < wait.remaining() => continue,
                Err(error) => return Err(wait_error(channel, error).into()),
            }
            let header = channel.receive_header(wait)?;
            heard = Instant::now();
            if header.kind == request::KIND {
                let mut body = vec![0; header.length as usize];
                channel.receive_body(&header, &mut [&mut body], wait)?;
                continue;
            }
            let last = receiver.receive(channel, &header, &self.store, wait)?;
            if let Some(stats) = last {
                return Ok(stats);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FaultSink for FaultClient {
    fn missing(&self, task: u32, pages: &[u64]) {
        let mut state = self.state();
        for page in pages {
            if state.asked.insert((task, *page)) {
                state.queue.push((task, *page));
            }
        }
        state.flush();
        drop(state);
        self.helpers.lend();
    }

    fn settled(&self, task: u32, page: u64) {
        self.state().asked.remove(&(task, page));
    }
}

impl State {
    /// Sends what waits to be sent, as far as the socket takes it.
    fn flush(&mut self) {
        self.queue.retain(|entry| self.asked.contains(entry));
        while let Some(connection) = &mut self.connection {
            if self.queue.is_empty() || !takes_more(&connection.channel) {
                return;
            }
            let count = self.queue.len().min(MAX_ENTRIES);
            let body = request::encode(&self.queue[..count]);
            if connection.say(&body) {
                self.queue.drain(..count);
            } else {
                // It is asked again over the next one.
                self.connection = None;
            }
        }
    }

    /// Does what is due. Returns for how long nothing else is.
    fn tend(&mut self) -> Duration {
        self.flush();
        if let Some(connection) = &mut self.connection {
            let silent = connection.said.elapsed() >= KEEPALIVE;
            if silent && takes_more(&connection.channel) && !connection.say(&[]) {
                self.connection = None;
            }
        }
        if self.queue.is_empty() { IDLE } else { BUSY }
    }
}

impl Connection {
    /// False if the connection is of no more use; whoever receives from it hears of it.
    fn say(&mut self, body: &[u8]) -> bool {
        let wait = self.wait.at_most(SEND_TIME);
        let sent = self.channel.send(Kind::FaultRequest, &[body], &wait);
        self.said = Instant::now();
        if let Err(error) = &sent {
            tracing::debug!(%error, "asking for pages");
            self.channel.shutdown();
        }
        sent.is_ok()
    }
}

/// Whether the socket takes a request at once.
fn takes_more(channel: &Channel) -> bool {
    let socket = channel.socket();
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // An error is for the sending to find.
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
}

fn wait_error(channel: &Channel, error: WaitError) -> TransportError {
    let peer = channel.peer().to_owned();
    match error {
        WaitError::Deadline => TransportError::Deadline { peer, doing: DOING },
        WaitError::Cancelled => TransportError::Cancelled { doing: DOING },
        WaitError::Io(source) => TransportError::Broken {
            peer,
            doing: DOING,
            source,
        },
    }
}
