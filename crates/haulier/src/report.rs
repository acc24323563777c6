//! What a migration did, for people and programs.

use std::io::{self, Write};
use std::time::Duration;

use bytesize::ByteSize;
use haulier_criu::Criu;
use haulier_criu::find::Version;
use haulier_engine::convergence::{Decision, Mode, Reason, Round};
use haulier_memory::stream::RoundStats;
use haulier_proto::message::{Faults, Findings, PhaseTime};
use haulier_targets::process::ProcessTree;
use serde::Serialize;

use crate::failure::Failure;
use crate::timeline::Timeline;

/// Told of a migration's progress.
pub trait Progress {
    /// The target has been looked at.
    fn examined(&mut self, tree: &ProcessTree, memory: u64, criu: &Criu, destination: &str);
    /// The destination can take it.
    fn checked(&mut self, peer: &str, findings: &Findings);
    /// A round has been sent.
    fn round(&mut self, round: &RoundReport);
    /// The stop rule has said something else than "another round".
    fn decided(&mut self, decision: &Decision);
    /// The connection broke after the commit.
    fn in_doubt(&mut self, peer: &str);
}

/// Progress as lines of text.
#[derive(Debug)]
pub struct Lines<W> {
    out: W,
    doubted: bool,
}

impl<W: Write> Lines<W> {
    /// Lines to `out`.
    pub fn new(out: W) -> Lines<W> {
        Lines {
            out,
            doubted: false,
        }
    }
}

impl<W: Write> Progress for Lines<W> {
    fn examined(&mut self, tree: &ProcessTree, memory: u64, criu: &Criu, destination: &str) {
        let processes = count(tree.processes.len(), "process", "processes");
        let _ = writeln!(
            self.out,
            "moving {} (pid {}, {processes}, {}) to {destination}, with {criu}",
            tree.name(),
            tree.root(),
            ByteSize(memory).display().iec(),
        );
    }

    fn checked(&mut self, peer: &str, findings: &Findings) {
        let criu = Version::from_number(findings.criu_version);
        let _ = writeln!(
            self.out,
            "{peer} can take it: CRIU {criu}, kernel {}",
            findings.kernel
        );
    }

    fn round(&mut self, round: &RoundReport) {
        let _ = writeln!(self.out, "round {}", round.line());
    }

    fn decided(&mut self, decision: &Decision) {
        let _ = match decision {
            Decision::Another => Ok(()),
            Decision::TakeLine => {
                writeln!(self.out, "taking all of the line: rounds hardly shrink")
            }
            Decision::Throttle { percent, why } => {
                writeln!(self.out, "taking {percent} % of the CPU from it: {why}")
            }
            Decision::Freeze {
                left_behind,
                why,
                predicted,
            } => {
                let what = match left_behind {
                    true => "switching over, the rest follows",
                    false => "switching over",
                };
                let expected = predicted.map_or_else(String::new, |time| {
                    format!(", expected downtime {:.0} ms", milliseconds(time))
                });
                writeln!(self.out, "{what}: {why}{expected}")
            }
            Decision::GiveUp { why } => writeln!(self.out, "giving up: {why}"),
        };
    }

    fn in_doubt(&mut self, peer: &str) {
        if !self.doubted {
            self.doubted = true;
            let _ = writeln!(
                self.out,
                "the connection to {peer} broke after the commit: the target stays frozen here \
                 while haulier asks {peer} whether it runs there"
            );
        }
    }
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// Images of the skeleton.
    pub images: u32,
    /// Their bytes.
    pub image_bytes: u64,
    /// Bytes over the images connection, with what was sent ahead.
    pub images_wire_bytes: u64,
    /// Pages of memory that CRIU dumps into its images, sent ahead by content.
    pub ahead_pages: u64,
    /// Pages of lazy memory, over all rounds, zero and duplicate pages included.
    pub pages: u64,
    /// Pages that hold only zeros, of which only the place is sent.
    pub zero_pages: u64,
    /// Pages of which only a reference to an equal one is sent.
    pub duplicates: u64,
    /// Pages of which only what changed since they were sent last is sent.
    pub changed_pages: u64,
    /// Bytes over the memory connections.
    pub memory_wire_bytes: u64,
    /// Bytes per second that the line carried when the rounds found it full. From then on they used
    /// `line_share` percent of it.
    pub line_bytes_per_second: Option<u64>,
    /// Percent of a full line that were used, until rounds hardly shrank.
    pub line_share: u8,
}

/// A round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoundReport {
    /// Its number, from zero.
    pub number: u32,
    /// Pages it sent.
    pub pages: u64,
    /// Pages with their contents.
    pub normal: u64,
    /// Pages that hold only zeros.
    pub zero: u64,
    /// Pages that are equal to one that was sent.
    pub duplicates: u64,
    /// Pages of which only what changed since they were sent last was sent.
    pub changed: u64,
    /// Pages that were gone when they were to be read.
    pub vanished: u64,
    /// What all of them measure.
    pub raw_bytes: u64,
    /// What went over the network.
    pub wire_bytes: u64,
    /// Milliseconds of sending.
    pub send_ms: f64,
    /// Milliseconds from the look before it to the look after it.
    pub length_ms: f64,
    /// Pages that were written in that time.
    pub found: u64,
    /// Per cent of the CPU taken from the target.
    pub throttle: u8,
    /// How most contents were compressed.
    pub compression: String,
    /// Memory sent per second.
    pub mib_per_second: f64,
    /// Memory written per second.
    pub dirty_mib_per_second: f64,
}

impl RoundReport {
    pub(crate) fn new(round: &Round, stats: &RoundStats) -> RoundReport {
        RoundReport {
            number: stats.round,
            pages: stats.pages,
            normal: stats.normal,
            zero: stats.zero_pages,
            duplicates: stats.duplicates,
            changed: stats.changed,
            vanished: stats.vanished,
            raw_bytes: stats.raw_bytes,
            wire_bytes: stats.wire_bytes,
            send_ms: milliseconds(round.send_time),
            length_ms: milliseconds(round.length),
            found: round.found,
            throttle: round.throttle,
            compression: stats.compression().to_string(),
            mib_per_second: rate(stats.raw_bytes, round.send_time),
            dirty_mib_per_second: rate(round.found * 4096, round.length),
        }
    }

    /// The round in a line.
    fn line(&self) -> String {
        let wire = size(self.wire_bytes);
        let compressed = match (self.compression.as_str(), self.changed) {
            ("none", 0) => String::new(),
            ("none", _) => format!(" (changes only: {wire})"),
            (codec, 0) => format!(" ({codec}: {wire})"),
            (codec, _) => format!(" (changes only, {codec}: {wire})"),
        };
        let throttled = match self.throttle {
            0 => String::new(),
            percent => format!(", {percent} % of its CPU time taken"),
        };
        format!(
            "{}: {} in {:.0} ms, {:.0} MiB/s{compressed}; {} written meanwhile{throttled}",
            self.number,
            size(self.raw_bytes),
            self.send_ms,
            self.mib_per_second,
            size(self.found * 4096),
        )
    }
}

/// How the pages that were left behind came.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PostCopy {
    /// Pages that were left behind.
    pub pages: u64,
    /// Those that were pushed.
    pub pushed: u64,
    /// Those that were sent because tasks waited for them, and their neighbours.
    pub on_demand: u64,
    /// Bytes over the network.
    pub wire_bytes: u64,
    /// How often the link broke and was made anew.
    pub reconnects: u32,
}

/// How tasks waited for pages at the destination.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct FaultReport {
    /// Faults answered from the destination's page store.
    pub local: u64,
    /// Faults that waited for the source.
    pub remote: u64,
    /// Faults on pages that have no contents.
    pub zero: u64,
    /// Of all, in microseconds: upper bounds, by a histogram of powers of two.
    pub median_us: u64,
    /// As above.
    pub p99_us: u64,
    /// As above.
    pub longest_us: u64,
    /// Of those that waited for the source.
    pub remote_median_us: u64,
    /// As above.
    pub remote_p99_us: u64,
    /// As above.
    pub remote_longest_us: u64,
    /// All: entry n counts those of less than 2 to the n microseconds that are in no entry before.
    pub histogram: Vec<u64>,
    /// The same of those that waited for the source.
    pub remote_histogram: Vec<u64>,
}

impl From<&Faults> for FaultReport {
    fn from(faults: &Faults) -> FaultReport {
        let (all, remote) = (&faults.latency[..], &faults.remote_latency[..]);
        FaultReport {
            local: faults.local,
            remote: faults.remote,
            zero: faults.zero,
            median_us: quantile(all, 0.5),
            p99_us: quantile(all, 0.99),
            longest_us: quantile(all, 1.0),
            remote_median_us: quantile(remote, 0.5),
            remote_p99_us: quantile(remote, 0.99),
            remote_longest_us: quantile(remote, 1.0),
            histogram: all.to_vec(),
            remote_histogram: remote.to_vec(),
        }
    }
}

/// Upper bound of the entry that holds the quantile, in microseconds.
fn quantile(histogram: &[u64], part: f64) -> u64 {
    let count: u64 = histogram.iter().sum();
    let due = ((count as f64 * part).ceil() as u64).max(1);
    let mut seen = 0;
    let found = histogram.iter().position(|entry| {
        seen += entry;
        seen >= due
    });
    found.map_or(0, |power| 1 << power.min(63))
}

/// How long something took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// What.
    pub name: String,
    /// Milliseconds.
    pub milliseconds: f64,
}

impl From<&PhaseTime> for Step {
    fn from(time: &PhaseTime) -> Step {
        Step {
            name: time.name.clone(),
            milliseconds: (time.micros as f64 / 100.0).round() / 10.0,
        }
    }
}

/// A migration that succeeded.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The target's program.
    pub program: String,
    /// Where it was.
    pub source: String,
    /// Where it is.
    pub destination: String,
    /// Its root task there.
    pub pid: i32,
    /// Processes moved.
    pub processes: usize,
    /// Threads moved.
    pub threads: usize,
    /// When pages were sent, after what the kernel allows.
    pub mode: Mode,
    /// How written pages were found.
    pub tracker: Option<String>,
    /// The rounds before the freeze.
    pub rounds: Vec<RoundReport>,
    /// What ended them.
    pub ended: Option<String>,
    /// The downtime that was expected then.
    pub predicted_ms: Option<f64>,
    /// Pages sent while the target was frozen.
    pub frozen_pages: u64,
    /// Pages that were left at the source.
    pub left_behind: u64,
    /// How those came.
    pub post_copy: Option<PostCopy>,
    /// How tasks waited for pages.
    pub faults: Option<FaultReport>,
    /// Packets that reached the source too late and were forwarded.
    pub packets: u64,
    /// What was sent.
    pub sent: Sent,
    /// From the freeze to the source's knowing that the target runs.
    pub downtime_ms: f64,
    /// From the first look at the target to the end.
    pub total_ms: f64,
    /// The source's phases.
    pub phases: Vec<Step>,
    /// The source's steps, within its phases.
    pub source_steps: Vec<Step>,
    /// The destination's steps, within the source's.
    pub destination_steps: Vec<Step>,
    /// What could not be removed or undone.
    pub left: Vec<String>,
    #[serde(skip)]
    pub(crate) failure: Option<Failure>,
}

impl Report {
    pub(crate) fn new(tree: &ProcessTree, source: &str, destination: &str) -> Report {
        Report {
            program: tree.name().to_owned(),
            source: source.to_owned(),
            destination: destination.to_owned(),
            pid: tree.root(),
            processes: tree.processes.len(),
            threads: 0,
            mode: Mode::default(),
            tracker: None,
            rounds: Vec::new(),
            ended: None,
            predicted_ms: None,
            frozen_pages: 0,
            left_behind: 0,
            post_copy: None,
            faults: None,
            packets: 0,
            sent: Sent::default(),
            downtime_ms: 0.0,
            total_ms: 0.0,
            phases: Vec::new(),
            source_steps: Vec::new(),
            destination_steps: Vec::new(),
            left: Vec::new(),
            failure: None,
        }
    }

    pub(crate) fn here(&mut self, steps: &[PhaseTime]) {
        self.source_steps.extend(steps.iter().map(Step::from));
    }

    pub(crate) fn there(&mut self, steps: &[PhaseTime]) {
        self.destination_steps.extend(steps.iter().map(Step::from));
    }

    pub(crate) fn frozen_because(&mut self, why: Reason, predicted: Option<Duration>) {
        self.ended = Some(why.to_string());
        self.predicted_ms = predicted.map(milliseconds);
    }

    /// Adds what a round sent; one while the target is frozen also counts as such.
    pub(crate) fn sent_round(&mut self, stats: &RoundStats, frozen: bool) {
        self.sent.pages += stats.pages;
        self.sent.zero_pages += stats.zero_pages;
        self.sent.duplicates += stats.duplicates;
        self.sent.changed_pages += stats.changed;
        self.sent.memory_wire_bytes += stats.wire_bytes;
        if frozen {
            self.frozen_pages += stats.pages;
        }
    }

    pub(crate) fn post_copy(&mut self, after: PostCopy) {
        self.sent.memory_wire_bytes += after.wire_bytes;
        self.post_copy = Some(after);
    }

    pub(crate) fn faults(&mut self, faults: Option<&Faults>) {
        self.faults = faults.map(FaultReport::from).or(self.faults.take());
    }

    pub(crate) fn close(&mut self, timeline: &Timeline) {
        let step = |(phase, time): &(haulier_engine::phase::Phase, Duration)| Step {
            name: phase.name().to_owned(),
            milliseconds: milliseconds(*time),
        };
        self.phases = timeline.phases().iter().map(step).collect();
        self.downtime_ms = timeline.downtime().map_or(0.0, milliseconds);
        self.total_ms = milliseconds(timeline.total());
    }

    /// Writes the report for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let sent = self.sent;
        writeln!(
            out,
            "moved: {} runs on {} (pid {}, {}, {})",
            self.program,
            self.destination,
            self.pid,
            count(self.processes, "process", "processes"),
            count(self.threads, "thread", "threads"),
        )?;
        let predicted = self.predicted_ms.map_or_else(String::new, |predicted| {
            format!(" ({predicted:.0} expected)")
        });
        let wire = sent.memory_wire_bytes + sent.images_wire_bytes;
        writeln!(
            out,
            "  downtime {:.1} ms{predicted}, {:.1} ms in all; {} over the network",
            self.downtime_ms,
            self.total_ms,
            size(wire)
        )?;
        let tracker = self.tracker.as_ref().map_or_else(String::new, |tracker| {
            format!(
                " by {tracker}, {}",
                count(self.rounds.len(), "round", "rounds")
            )
        });
        let changed = match sent.changed_pages {
            0 => String::new(),
            pages => format!(", {pages} changed"),
        };
        writeln!(
            out,
            "  memory   {}{tracker}; {} pages ({}), {} zero, {} duplicate{changed}; {} frozen, {} left \
             behind",
            self.mode,
            sent.pages,
            size(sent.pages * 4096),
            sent.zero_pages,
            sent.duplicates,
            self.frozen_pages,
            self.left_behind,
        )?;
        writeln!(
            out,
            "  skeleton {} images ({}), {} pages sent ahead; {} forwarded",
            sent.images,
            size(sent.image_bytes),
            sent.ahead_pages,
            count(self.packets as usize, "packet", "packets"),
        )?;
        for round in &self.rounds {
            writeln!(out, "  round    {}", round.line())?;
        }
        if let Some(rate) = sent.line_bytes_per_second {
            let share = sent.line_share;
            let rate = size(rate);
            writeln!(
                out,
                "  line     full at {rate}/s; {share} % of that used beside others"
            )?;
        }
        if let Some(after) = &self.post_copy {
            writeln!(
                out,
                "  after    {} pages pushed, {} on demand, {} over the network, {}",
                after.pushed,
                after.on_demand,
                size(after.wire_bytes),
                count(after.reconnects as usize, "reconnection", "reconnections"),
            )?;
        }
        if let Some(faults) = self.faults.as_ref().filter(|f| f.local + f.remote > 0) {
            writeln!(
                out,
                "  faults   {} local, {} from the source; median below {} us, 99 % below {} us, \
                 longest below {} us",
                faults.local, faults.remote, faults.median_us, faults.p99_us, faults.longest_us,
            )?;
        }
        write_steps(out, &self.source, &self.phases)?;
        write_steps(out, "", &self.source_steps)?;
        write_steps(out, &self.destination, &self.destination_steps)?;
        for left in &self.left {
            writeln!(out, "  left behind: {left}")?;
        }
        Ok(())
    }
}

fn write_steps(out: &mut impl Write, host: &str, steps: &[Step]) -> io::Result<()> {
    let steps: Vec<String> = steps
        .iter()
        .map(|step| format!("{} {:.1}", step.name, step.milliseconds))
        .collect();
    writeln!(out, "  {host:<8} {} (ms)", steps.join(", "))
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// MiB per second.
fn rate(bytes: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds == 0.0 {
        return 0.0;
    }
    (bytes as f64 / seconds / f64::from(1 << 20) * 10.0).round() / 10.0
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}
