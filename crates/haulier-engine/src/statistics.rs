//! What there is to tell of a migration: per round and in total, plain data for reports.
//!
//! Sizes are in bytes and pages, durations in seconds once they are serialized.

use std::time::Duration;

use serde::Serialize;

pub use histogram::{Bucket, Histogram};

use crate::convergence::{Mode, PAGE, PolicyKind, Reason, Round};

mod histogram;

/// Everything about one migration.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Statistics {
    /// When pages were sent.
    pub mode: Mode,
    /// What ended the rounds.
    pub policy: PolicyKind,
    /// Its reason. `None` as long as there are rounds.
    pub ended: Option<Reason>,
    /// How writes were tracked; `None` if they were not.
    pub tracker: Option<String>,
    /// Bytes of memory the target had at its last scan.
    pub memory: u64,
    /// From the first question to the destination until the first round.
    #[serde(serialize_with = "as_seconds")]
    pub setup: Duration,
    /// From the beginning until the source let go of the last page.
    #[serde(serialize_with = "as_seconds")]
    pub total: Duration,
    /// The rounds, the oldest first.
    pub rounds: Vec<RoundStatistics>,
    /// The pages sent while it stood.
    pub frozen: Traffic,
    /// The pages sent while it ran at the destination.
    pub after: Traffic,
    /// How long its users waited.
    pub downtime: Downtime,
    /// Page faults at the destination.
    pub faults: FaultStatistics,
    /// The most CPU time that was taken from it, in per cent; 0 if none was.
    pub throttle: u8,
    /// How often a broken link was made anew after the commit.
    pub reconnects: u32,
}

/// Pages that went over, by what they took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Pages sent with their content.
    pub normal: u64,
    /// Pages that were all zero, sent as ranges.
    pub zero: u64,
    /// Pages with the content of another, sent as a reference to it.
    pub duplicate: u64,
    /// Bytes of the normal pages before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire, framing included.
    pub wire_bytes: u64,
}

/// One round: what `Round` says for the stop rule, and more for people.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RoundStatistics {
    /// 0 for the one that sends everything.
    pub number: u32,
    /// What it sent.
    pub sent: Traffic,
    /// From the first page's reading until the destination had the last one.
    #[serde(serialize_with = "as_seconds")]
    pub send_time: Duration,
    /// From the scan that began it to the scan after it.
    #[serde(serialize_with = "as_seconds")]
    pub length: Duration,
    /// What the scans after it took in all.
    #[serde(serialize_with = "as_seconds")]
    pub scan: Duration,
    /// Pages found written after it.
    pub found: u64,
    /// Tasks that were alive after it.
    pub tasks: u32,
    /// Per cent of the CPU that were taken from the target.
    pub throttle: u8,
    /// How long the target would have stood, had it been frozen after it.
    #[serde(serialize_with = "as_seconds_or_none")]
    pub predicted: Option<Duration>,
}

/// The switchover, and its parts in order. They add up to less than `total`, which also has what
/// is between them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Downtime {
    /// What the stop rule expected.
    #[serde(serialize_with = "as_seconds_or_none")]
    pub predicted: Option<Duration>,
    /// From the freeze at the source to the word that it runs at the destination.
    #[serde(serialize_with = "as_seconds")]
    pub total: Duration,
    /// Until the tasks stood.
    #[serde(serialize_with = "as_seconds")]
    pub freeze: Duration,
    /// The last scan for written pages.
    #[serde(serialize_with = "as_seconds")]
    pub scan: Duration,
    /// CRIU writing the skeleton.
    #[serde(serialize_with = "as_seconds")]
    pub dump: Duration,
    /// Sending the skeleton and the last pages.
    #[serde(serialize_with = "as_seconds")]
    pub send: Duration,
    /// From the last byte until the destination held the target, complete.
    #[serde(serialize_with = "as_seconds")]
    pub restore: Duration,
    /// The hand-over.
    #[serde(serialize_with = "as_seconds")]
    pub commit: Duration,
}

/// Page faults at the destination, and how they were met.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FaultStatistics {
    /// Faults answered from the destination's own store.
    pub local: u64,
    /// Faults that asked the source.
    pub remote: u64,
    /// Faults on a page that was under way already.
    pub awaited: u64,
    /// Pages that came because of a fault, neighbours included.
    pub pulled: u64,
    /// Pages that the source pushed.
    pub pushed: u64,
    /// Pages that came twice. More than none is worth a look.
    pub twice: u64,
    /// From the fault's event to the page being in place, for the remote and the awaited ones.
    pub latency: Histogram,
}

impl Traffic {
    /// Pages of any kind.
    pub fn pages(&self) -> u64 {
        self.normal + self.zero + self.duplicate
    }

    /// Adds another's.
    pub fn add(&mut self, other: &Traffic) {
        self.normal += other.normal;
        self.zero += other.zero;
        self.duplicate += other.duplicate;
        self.raw_bytes += other.raw_bytes;
        self.wire_bytes += other.wire_bytes;
    }
}

impl RoundStatistics {
    /// What the stop rule has to know of it. Duplicates count as content: what is written next
    /// need not be the same again.
    pub fn as_round(&self) -> Round {
        Round {
            pages: self.sent.pages(),
            zero: self.sent.zero,
            send_time: self.send_time,
            length: self.length,
            found: self.found,
            throttle: self.throttle,
        }
    }

    /// Bytes of memory per second that it sent, zero pages left out.
    pub fn rate(&self) -> f64 {
        let content = (self.sent.normal + self.sent.duplicate) * PAGE;
        content as f64 / self.send_time.as_secs_f64().max(1e-6)
    }

    /// Pages per second that the target wrote during it.
    pub fn dirty_rate(&self) -> f64 {
        self.found as f64 / self.length.as_secs_f64().max(1e-6)
    }
}

impl Statistics {
    /// What all the rounds sent.
    pub fn in_rounds(&self) -> Traffic {
        let mut sum = Traffic::default();
        for round in &self.rounds {
            sum.add(&round.sent);
        }
        sum
    }

    /// What was sent at all.
    pub fn in_all(&self) -> Traffic {
        let mut sum = self.in_rounds();
        sum.add(&self.frozen);
        sum.add(&self.after);
        sum
    }

    /// Bytes of memory per second over all rounds, zero pages left out; `None` without rounds.
    pub fn rate(&self) -> Option<f64> {
        let time: Duration = self.rounds.iter().map(|round| round.send_time).sum();
        let sent = self.in_rounds();
        let content = (sent.normal + sent.duplicate) * PAGE;
        (!self.rounds.is_empty()).then(|| content as f64 / time.as_secs_f64().max(1e-6))
    }
}

fn as_seconds<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64())
}

fn as_seconds_or_none<S: serde::Serializer>(
    time: &Option<Duration>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => to.serialize_some(&time.as_secs_f64()),
        None => to.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(number: u32, normal: u64, zero: u64) -> RoundStatistics {
        RoundStatistics {
            number,
            sent: Traffic {
                normal,
                zero,
                duplicate: 1,
                raw_bytes: normal * PAGE,
                wire_bytes: normal * PAGE / 2,
            },
            send_time: Duration::from_millis(100),
            length: Duration::from_millis(200),
            found: 50,
            ..RoundStatistics::default()
        }
    }

    #[test]
    fn the_totals_are_the_sums_of_the_parts() {
        let statistics = Statistics {
            rounds: vec![round(0, 1000, 500), round(1, 50, 0)],
            frozen: Traffic {
                normal: 10,
                raw_bytes: 10 * PAGE,
                wire_bytes: 99,
                ..Traffic::default()
            },
            after: Traffic {
                zero: 3,
                ..Traffic::default()
            },
            ..Statistics::default()
        };
        let all = statistics.in_all();
        assert_eq!(all.normal, 1060);
        assert_eq!(all.zero, 503);
        assert_eq!(all.duplicate, 2);
        assert_eq!(all.pages(), 1565);
        assert_eq!(all.wire_bytes, 1050 * PAGE / 2 + 99);
        assert_eq!(statistics.in_rounds().normal, 1050);
    }

    #[test]
    fn rates_leave_zero_pages_out() {
        let one = round(0, 999, 500_000);
        assert!((one.rate() - 10_000.0 * PAGE as f64).abs() < 1.0);
        assert!((one.dirty_rate() - 250.0).abs() < 1e-6);
        let statistics = Statistics {
            rounds: vec![one],
            ..Statistics::default()
        };
        assert!((statistics.rate().unwrap() - 10_000.0 * PAGE as f64).abs() < 1.0);
        assert_eq!(Statistics::default().rate(), None);
    }

    #[test]
    fn the_stop_rule_gets_every_page() {
        let one = round(3, 70, 20).as_round();
        assert_eq!((one.pages, one.zero, one.found), (91, 20, 50));
    }

    #[test]
    fn serialized_times_are_seconds_and_words_are_those_of_the_command_line() {
        let mut statistics = Statistics {
            rounds: vec![round(0, 10, 0)],
            ended: Some(Reason::Converged),
            ..Statistics::default()
        };
        statistics.downtime.predicted = Some(Duration::from_millis(250));
        statistics.faults.latency.record(Duration::from_micros(70));
        let json = serde_json::to_value(&statistics).unwrap();
        assert_eq!(json["mode"], "pre-copy");
        assert_eq!(json["policy"], "downtime");
        assert_eq!(json["ended"], "converged");
        assert_eq!(json["rounds"][0]["length"], 0.2);
        assert_eq!(json["rounds"][0]["predicted"], serde_json::Value::Null);
        assert_eq!(json["downtime"]["predicted"], 0.25);
        assert_eq!(json["faults"]["latency"][0]["from_us"], 64);
        assert_eq!(json["faults"]["latency"][0]["below_us"], 128);
        assert_eq!(json["faults"]["latency"][0]["count"], 1);
    }
}
