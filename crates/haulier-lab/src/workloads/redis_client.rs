//! A client that uses a Redis server without pause over one connection and checks every answer.

use super::random::Random;
use super::redis::{Answer, Connection};
use crate::{Error, Result};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

/// How long an answer may take before the client calls it an error and ends. Longer than TCP's
/// retransmission back-off makes of an outage of ten seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Keys in use at once.
const KEYS: usize = 4096;

/// Error texts kept; all are counted.
const TEXTS: usize = 100;

/// Gaps kept, the longest ones.
const GAPS: usize = 10;

/// A time without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gap {
    /// When it began, from the client's start.
    pub began: Duration,
    /// The same as a time of day.
    pub began_at: SystemTime,
    /// From one completed answer to the next.
    pub length: Duration,
}

/// What a client has seen.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report {
    /// Answers that came, right or wrong.
    pub operations: u64,
    /// Number of wrong answers, and the lost connection if it was lost.
    pub error_count: u64,
    /// The first 100 of them in words.
    pub errors: Vec<String>,
    /// The ten longest gaps, longest first. An answer that is still outstanding counts too.
    pub gaps: Vec<Gap>,
    /// How long the client has run.
    pub duration: Duration,
}

impl Report {
    /// The longest time between two answers; zero if there were none.
    pub fn longest_gap(&self) -> Duration {
        self.gaps.first().map_or(Duration::ZERO, |gap| gap.length)
    }

    /// The report, if there was no error and there were operations.
    ///
    /// # Panics
    /// Otherwise, with the errors: for tests.
    #[track_caller]
    pub fn clean(self) -> Report {
        assert!(
            self.error_count == 0,
            "{} errors: {:#?}",
            self.error_count,
            self.errors
        );
        assert!(self.operations > 0, "the client did nothing");
        self
    }
}

/// A running client.
///
/// In a closed loop it increments a counter (the answer must be exactly one more than the last),
/// sets a random key to a random value, and reads another key it has set (the answer must be what
/// it set). All over one TCP connection: a lost connection is an error and ends it, so that a
/// migration which breaks connections shows.
///
/// To make it a client on a host start it in the host's network:
/// `host.in_network(|| RedisClient::start(address))`.
#[derive(Debug)]
pub struct RedisClient {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    began: Instant,
    began_at: SystemTime,
    ended: Option<Instant>,
    last_answer: Instant,
    operations: u64,
    error_count: u64,
    errors: Vec<String>,
    gaps: Vec<Gap>,
}

impl RedisClient {
    /// Connects and starts.
    ///
    /// # Errors
    /// If the server cannot be reached or does not answer.
    pub fn start(server: SocketAddr) -> Result<RedisClient> {
        let connection = Connection::open(server, PATIENCE)?;
        let now = Instant::now();
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            seen: Mutex::new(Seen {
                began: now,
                began_at: SystemTime::now(),
                ended: None,
                last_answer: now,
                operations: 0,
                error_count: 0,
                errors: Vec::new(),
                gaps: Vec::new(),
            }),
        });
        let mut checker = Checker::new(connection, Arc::clone(&shared))?;
        let worker = thread::spawn(move || checker.run());
        Ok(RedisClient {
            shared,
            worker: Some(worker),
        })
    }

    /// What it has seen so far.
    pub fn snapshot(&self) -> Report {
        self.shared.seen().report()
    }

    /// Waits until it has done `count` more operations, for tests that need traffic before and
    /// after something.
    ///
    /// # Errors
    /// [`Error::Deadline`].
    pub fn wait_for_operations(&self, count: u64, deadline: Duration) -> Result<()> {
        let goal = self.shared.seen().operations + count;
        let what = || format!("{count} more operations of the Redis client");
        crate::host::wait_until(deadline, what, || {
            self.shared.seen().operations >= goal || self.has_ended()
        })?;
        if self.shared.seen().operations >= goal {
            return Ok(());
        }
        Err(Error::Deadline {
            what: format!("{}; it has ended", what()),
            deadline,
        })
    }

    /// Whether it has ended on its own, which is an error.
    pub fn has_ended(&self) -> bool {
        self.worker.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops it once the outstanding answer has come. One that does not come within 30 seconds is
    /// an error in the report.
    pub fn stop(mut self) -> Report {
        self.join();
        self.snapshot()
    }

    fn join(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            if worker.join().is_err() {
                self.shared.seen().error("the client panicked".into());
            }
        }
    }
}

impl Drop for RedisClient {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    /// A panic in a holder leaves nothing half done that matters here.
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn answered(&mut self) {
        let now = Instant::now();
        let length = now - self.last_answer;
        if self.gaps.len() < GAPS || self.gaps.last().is_some_and(|gap| length > gap.length) {
            self.keep(self.gap(length));
        }
        self.last_answer = now;
        self.operations += 1;
    }

    /// A gap that began at the last answer.
    fn gap(&self, length: Duration) -> Gap {
        let began = self.last_answer - self.began;
        Gap {
            began,
            began_at: self.began_at + began,
            length,
        }
    }

    fn keep(&mut self, gap: Gap) {
        let place = self.gaps.partition_point(|kept| kept.length >= gap.length);
        self.gaps.insert(place, gap);
        self.gaps.truncate(GAPS);
    }

    fn error(&mut self, text: String) {
        self.error_count += 1;
        if self.errors.len() < TEXTS {
            self.errors.push(text);
        }
    }

    fn report(&self) -> Report {
        let now = self.ended.unwrap_or_else(Instant::now);
        let mut gaps = self.gaps.clone();
        let outstanding = self.gap(now.saturating_duration_since(self.last_answer));
        let place = gaps.partition_point(|kept| kept.length >= outstanding.length);
        gaps.insert(place, outstanding);
        gaps.truncate(GAPS);
        Report {
            operations: self.operations,
            error_count: self.error_count,
            errors: self.errors.clone(),
            gaps,
            duration: now - self.began,
        }
    }
}

struct Checker {
    connection: Connection,
    shared: Arc<Shared>,
    random: Random,
    /// Part of every key, so that several clients share a server.
    id: u64,
    counter: i64,
    /// Seed of the value of each key that has been set.
    values: Vec<Option<u64>>,
}

impl Checker {
    fn new(mut connection: Connection, shared: Arc<Shared>) -> Result<Checker> {
        let clock = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |since| since.as_nanos() as u64);
        let mut random = Random::new(clock ^ u64::from(std::process::id()).rotate_left(40));
        let id = random.next();
        // Nobody else counts here, so zero is where it starts.
        let counter = match connection.ask(&[b"GET", counter_key(id).as_bytes()])? {
            Answer::Bulk(None) => 0,
            other => return Err(connection.wrong(format!("fresh counter is {other:?}"))),
        };
        Ok(Checker {
            connection,
            shared,
            random,
            id,
            counter,
            values: vec![None; KEYS],
        })
    }

    fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            if let Err(lost) = self.turn() {
                self.shared.seen().error(lost.to_string());
                break;
            }
        }
        self.shared.seen().ended = Some(Instant::now());
    }

    /// One of each operation. Wrong answers are noted; an error is the end.
    fn turn(&mut self) -> Result<()> {
        let key = counter_key(self.id);
        let expected = self.counter + 1;
        let answer = self.ask(&[b"INCR", key.as_bytes()])?;
        self.counter = match answer {
            Answer::Integer(number) => number,
            _ => expected,
        };
        self.check(&key, &Answer::Integer(expected), &answer);

        let slot = self.random.below(KEYS as u64);
        let (key, seed) = (self.key(slot), self.random.next());
        let answer = self.ask(&[b"SET", key.as_bytes(), &value(seed)])?;
        self.check(&key, &Answer::Simple("OK".into()), &answer);
        if let Some(kept) = self.values.get_mut(slot as usize) {
            *kept = Some(seed);
        }

        let slot = self.random.below(KEYS as u64);
        let key = self.key(slot);
        let answer = self.ask(&[b"GET", key.as_bytes()])?;
        let seed = self.values.get(slot as usize).copied().flatten();
        self.check(&key, &Answer::Bulk(seed.map(value)), &answer);
        Ok(())
    }

    fn key(&self, slot: u64) -> String {
        format!("client:{:x}:{slot}", self.id)
    }

    fn ask(&mut self, command: &[&[u8]]) -> Result<Answer> {
        let answer = self.connection.ask(command)?;
        self.shared.seen().answered();
        Ok(answer)
    }

    fn check(&self, key: &str, expected: &Answer, got: &Answer) {
        if expected != got {
            let text = format!("{key}: expected {}, got {}", brief(expected), brief(got));
            self.shared.seen().error(text);
        }
    }
}

fn counter_key(id: u64) -> String {
    format!("client:{id:x}:counter")
}

/// 16 to 527 random bytes, told by the seed.
fn value(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = vec![0; 16 + random.below(512) as usize];
    random.fill(&mut bytes);
    bytes
}

fn brief(answer: &Answer) -> String {
    match answer {
        Answer::Bulk(Some(bytes)) => {
            let start: Vec<u8> = bytes.iter().copied().take(8).collect();
            format!("{} bytes starting {start:02x?}", bytes.len())
        }
        other => format!("{other:?}"),
    }
}
