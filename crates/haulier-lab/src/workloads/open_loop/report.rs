//! What open-loop clients have seen.

use super::clock::Clock;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Errors kept as text, of each client.
const KEPT: usize = 4;

/// Buckets of the histogram of waiting times: 16 for each power of two of microseconds.
const BUCKETS: usize = 16 * 40;

/// What all clients have seen. Serialised it is JSON whose times end in their unit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpenLoopReport {
    /// From the start to the stop.
    pub seconds: f64,
    /// Over all TCP clients.
    pub tcp: Summary,
    /// Over all UDP clients.
    pub udp: Summary,
    /// Each client, TCP first.
    pub clients: Vec<ClientReport>,
}

impl OpenLoopReport {
    /// The errors of all clients.
    pub fn errors(&self) -> Vec<&str> {
        let all = self.clients.iter().flat_map(|client| &client.errors);
        all.map(String::as_str).collect()
    }
}

/// Transport of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One connection.
    Tcp,
    /// One socket.
    Udp,
}

/// Sums over the clients of one kind.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How many clients.
    pub clients: usize,
    /// Requests sent.
    pub sent: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests not answered by the end.
    pub lost: u64,
    /// Answers that came a second time.
    pub doubled: u64,
    /// Half of the answers took no longer, in milliseconds, within 6 %.
    pub median_ms: f64,
    /// 99 % of the answers took no longer.
    pub p99_ms: f64,
    /// 99.9 % of the answers took no longer.
    pub p999_ms: f64,
    /// The longest wait of any client: for an answer, or for one that has not come by the end.
    pub longest_ms: f64,
    /// When, since the start, the request of the longest wait was due.
    pub longest_at_ms: f64,
}

/// What one client has seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClientReport {
    /// TCP or UDP.
    pub kind: Kind,
    /// Requests sent.
    pub sent: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests not answered by the end.
    pub lost: u64,
    /// Answers that came a second time.
    pub doubled: u64,
    /// The longest wait, in milliseconds.
    pub longest_ms: f64,
    /// When, since the start, the request of the longest wait was due.
    pub longest_at_ms: f64,
    /// What went wrong beside losses: a wrong answer, the end of the connection.
    pub errors: Vec<String>,
}

/// The notes of all clients while they run.
#[derive(Debug)]
pub(super) struct Seen {
    clock: Clock,
    ended: Option<Instant>,
    clients: Vec<SeenByOne>,
}

impl Seen {
    pub(super) fn new(clock: Clock, kinds: impl Iterator<Item = Kind>) -> Seen {
        Seen {
            clock,
            ended: None,
            clients: kinds.map(SeenByOne::new).collect(),
        }
    }

    pub(super) fn client(&mut self, index: usize) -> Option<&mut SeenByOne> {
        self.clients.get_mut(index)
    }

    /// Whether everything sent is answered, by those who may still get answers.
    pub(super) fn is_complete(&self) -> bool {
        self.clients
            .iter()
            .all(|client| client.answered() == client.sent || client.broken)
    }

    pub(super) fn end(&mut self, now: Instant) {
        self.ended = Some(now);
    }

    pub(super) fn report(&self, now: Instant) -> OpenLoopReport {
        let now = self.ended.unwrap_or(now);
        let clients = self.clients.iter().enumerate();
        let clients: Vec<ClientReport> = clients
            .map(|(index, client)| client.report(index, &self.clock, now))
            .collect();
        OpenLoopReport {
            seconds: now
                .saturating_duration_since(self.clock.began)
                .as_secs_f64(),
            tcp: self.summary(Kind::Tcp, &clients),
            udp: self.summary(Kind::Udp, &clients),
            clients,
        }
    }

    fn summary(&self, kind: Kind, reports: &[ClientReport]) -> Summary {
        let mut waits = vec![0; BUCKETS];
        for client in self.clients.iter().filter(|client| client.kind == kind) {
            for (sum, count) in waits.iter_mut().zip(&client.waits) {
                *sum += u64::from(*count);
            }
        }
        let mut sum = Summary {
            median_ms: quantile(&waits, 0.5),
            p99_ms: quantile(&waits, 0.99),
            p999_ms: quantile(&waits, 0.999),
            ..Summary::default()
        };
        for client in reports.iter().filter(|client| client.kind == kind) {
            sum.clients += 1;
            sum.sent += client.sent;
            sum.answered += client.answered;
            sum.lost += client.lost;
            sum.doubled += client.doubled;
            if client.longest_ms > sum.longest_ms {
                sum.longest_ms = client.longest_ms;
                sum.longest_at_ms = client.longest_at_ms;
            }
        }
        sum
    }
}

/// The notes of one client.
#[derive(Debug)]
pub(super) struct SeenByOne {
    kind: Kind,
    pub(super) sent: u64,
    /// All requests before this one are answered.
    answered_below: u64,
    /// Whether those from there on are answered.
    later: std::collections::VecDeque<bool>,
    doubled: u64,
    longest: (Duration, u64),
    waits: Vec<u32>,
    errors: Vec<String>,
    broken: bool,
}

impl SeenByOne {
    fn new(kind: Kind) -> SeenByOne {
        SeenByOne {
            kind,
            sent: 0,
            answered_below: 0,
            later: std::collections::VecDeque::new(),
            doubled: 0,
            longest: (Duration::ZERO, 0),
            waits: vec![0; BUCKETS],
            errors: Vec::new(),
            broken: false,
        }
    }

    /// The first request without an answer.
    pub(super) fn next_unanswered(&self) -> u64 {
        self.answered_below
    }

    fn answered(&self) -> u64 {
        let later = self.later.iter().filter(|answered| **answered).count();
        self.answered_below + later as u64
    }

    /// The answer to request `number` came, `wait` after the request was due.
    pub(super) fn answer(&mut self, number: u64, wait: Duration) {
        if number >= self.sent {
            return self.error(format!("an answer to request {number}, which was not sent"));
        }
        let Some(place) = number.checked_sub(self.answered_below) else {
            self.doubled += 1;
            return;
        };
        let place = place as usize;
        if self.later.len() <= place {
            self.later.resize(place + 1, false);
        }
        if let Some(answered) = self.later.get_mut(place) {
            if *answered {
                self.doubled += 1;
                return;
            }
            *answered = true;
        }
        while self.later.front() == Some(&true) {
            self.later.pop_front();
            self.answered_below += 1;
        }
        if wait > self.longest.0 {
            self.longest = (wait, number);
        }
        if let Some(count) = self.waits.get_mut(bucket(wait)) {
            *count += 1;
        }
    }

    pub(super) fn error(&mut self, text: String) {
        if self.errors.len() < KEPT {
            self.errors.push(text);
        }
    }

    /// No more answers will come.
    pub(super) fn broken(&mut self, text: String) {
        self.error(text);
        self.broken = true;
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    fn report(&self, index: usize, clock: &Clock, now: Instant) -> ClientReport {
        let mut longest = self.longest;
        if self.answered_below < self.sent {
            let due = clock.due(index, self.answered_below);
            longest = longest.max((now.saturating_duration_since(due), self.answered_below));
        }
        let at = clock.due(index, longest.1) - clock.began;
        ClientReport {
            kind: self.kind,
            sent: self.sent,
            answered: self.answered(),
            lost: self.sent - self.answered(),
            doubled: self.doubled,
            longest_ms: longest.0.as_secs_f64() * 1e3,
            longest_at_ms: at.as_secs_f64() * 1e3,
            errors: self.errors.clone(),
        }
    }
}

fn bucket(wait: Duration) -> usize {
    let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX).max(16);
    let power = u64::from(micros.ilog2());
    // The four bits below the highest one.
    let index = (power - 4) * 16 + ((micros >> (power - 4)) & 15);
    (index as usize).min(BUCKETS - 1)
}

/// The upper end of the bucket that the quantile falls into, in milliseconds.
fn quantile(waits: &[u64], share: f64) -> f64 {
    let all: u64 = waits.iter().sum();
    let wanted = (all as f64 * share).ceil() as u64;
    let mut sum = 0;
    for (index, count) in waits.iter().enumerate() {
        sum += count;
        if sum >= wanted && *count > 0 {
            let (power, step) = (index / 16, index % 16);
            return (17 + step) as f64 * 2_f64.powi(power as i32) / 1e3;
        }
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_a_little_above_what_was_put_in() {
        for micros in [16, 17, 100, 999, 5_000, 123_456, 3_000_000] {
            let mut waits = vec![0; BUCKETS];
            waits[bucket(Duration::from_micros(micros))] = 7;
            let found = quantile(&waits, 0.5) * 1e3;
            let given = micros as f64;
            assert!(found > given && found <= given * 1.07, "{micros}: {found}");
        }
        assert_eq!(quantile(&[0; BUCKETS], 0.5), 0.0);
    }

    #[test]
    fn answers_in_any_order_are_counted_once() {
        let mut client = SeenByOne::new(Kind::Udp);
        client.sent = 6;
        for number in [0, 2, 2, 1, 1, 5, 9] {
            client.answer(number, Duration::from_millis(number + 1));
        }
        assert_eq!((client.answered(), client.doubled), (4, 2));
        assert_eq!(client.next_unanswered(), 3);
        assert_eq!(client.errors.len(), 1);
        assert_eq!(client.longest, (Duration::from_millis(6), 5));
    }
}
