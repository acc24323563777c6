//! What a migration did, for people and programs.

use std::io::{self, Write};
use std::time::Duration;

use bytesize::ByteSize;
use haulier_criu::Criu;
use haulier_criu::find::Version;
use haulier_proto::message::{Findings, PhaseTime};
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
    /// Pages, zero pages included.
    pub pages: u64,
    /// Pages that hold only zeros, of which only the place is sent.
    pub zero_pages: u64,
    /// Bytes over the memory connections.
    pub memory_wire_bytes: u64,
}

/// How long something took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// What.
    pub name: String,
    /// Milliseconds.
    pub milliseconds: f64,
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
    /// What was sent.
    pub sent: Sent,
    /// From the freeze to the source's knowing that the target runs.
    pub downtime_ms: f64,
    /// From the first look at the target to the end.
    pub total_ms: f64,
    /// The source's phases.
    pub phases: Vec<Step>,
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
            sent: Sent::default(),
            downtime_ms: 0.0,
            total_ms: 0.0,
            phases: Vec::new(),
            destination_steps: Vec::new(),
            left: Vec::new(),
            failure: None,
        }
    }

    pub(crate) fn there(&mut self, phases: &[PhaseTime]) {
        let step = |phase: &PhaseTime| Step {
            name: phase.name.clone(),
            milliseconds: phase.micros as f64 / 1000.0,
        };
        self.destination_steps.extend(phases.iter().map(step));
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
        let Sent {
            images,
            image_bytes,
            pages,
            zero_pages,
            memory_wire_bytes,
        } = self.sent;
        let size = |bytes: u64| ByteSize(bytes).display().iec().to_string();
        writeln!(
            out,
            "moved: {} runs on {} (pid {}, {}, {})",
            self.program,
            self.destination,
            self.pid,
            count(self.processes, "process", "processes"),
            count(self.threads, "thread", "threads"),
        )?;
        writeln!(
            out,
            "  downtime {:.1} ms, {:.1} ms in all; {} over the network",
            self.downtime_ms,
            self.total_ms,
            size(memory_wire_bytes + image_bytes)
        )?;
        writeln!(
            out,
            "  memory   {pages} pages ({}), {zero_pages} of them zero; skeleton {images} images ({})",
            size(pages * 4096),
            size(image_bytes)
        )?;
        write_steps(out, &self.source, &self.phases)?;
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

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}
