//! The `threads` workload: threads that rewrite memory of their own and check what they read.
//!
//! Every page's contents are told by its number and by how often it was written, and that count is
//! kept elsewhere: a page that a migration lost, mixed up or brought back from an earlier round
//! shows at its next visit.

use super::random::Random;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 4096 / 8;

const REPORT_EVERY: Duration = Duration::from_millis(100);

/// What the workload should do.
#[derive(Debug, Clone)]
pub struct Config {
    /// How many threads.
    pub threads: usize,
    /// How much memory in all, in MiB.
    pub memory_mib: usize,
    /// How many pages all threads together rewrite each second; `None` for as many as they can.
    pub pages_per_second: Option<u64>,
    /// Where the status lines go.
    pub report: PathBuf,
}

/// A status line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Number of the line, from 1.
    pub line: u64,
    /// Pages rewritten so far.
    pub iterations: u64,
    /// Pages that did not hold what they should.
    pub errors: u64,
}

/// Runs until SIGTERM or SIGINT, or until a mismatch. Returns the last status.
///
/// Every 100 ms a [`Status`] goes to the report as a line of JSON. The file is opened once, and
/// not for appending: where the next line lands depends on the descriptor's offset, which is to
/// survive a migration.
///
/// # Errors
/// If the report cannot be written.
pub fn run(config: &Config) -> Result<Status> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(Error::system("handle a signal"))?;
    }
    let mut report = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&config.report)
        .map_err(Error::file("create", &config.report))?;
    let (iterations, errors) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = config.threads.max(1);
    let pages = (config.memory_mib * 256).div_ceil(threads).max(1);
    thread::scope(|scope| {
        for number in 0..threads {
            let pause = config.pages_per_second.map(|rate| {
                Duration::from_secs_f64(threads as f64 * BATCH as f64 / rate.max(1) as f64)
            });
            let mut part = Part::new(number as u64, pages);
            let (stop, iterations, errors) = (&stop, &iterations, &errors);
            scope.spawn(move || part.work(pause, stop, iterations, errors));
        }
        let mut line = 0;
        loop {
            // Looked at before the numbers are, so that the last line has them all.
            let last = stop.load(Ordering::Relaxed) || errors.load(Ordering::Relaxed) > 0;
            line += 1;
            let status = Status {
                line,
                iterations: iterations.load(Ordering::Relaxed),
                errors: errors.load(Ordering::Relaxed),
            };
            let written = write_status(&mut report, &status, &config.report);
            if last || written.is_err() {
                stop.store(true, Ordering::Relaxed);
                return written.map(|()| status);
            }
            thread::sleep(REPORT_EVERY);
        }
    })
}

/// Reads a report and returns its last status.
///
/// # Errors
/// [`Error::Message`] if a line is damaged, [`Error::System`] if lines are missing, doubled or out
/// of order: then the descriptor's offset was lost.
pub fn read_report(text: &[u8]) -> Result<Status> {
    let broken = |operation| Error::System {
        operation,
        source: std::io::ErrorKind::InvalidData.into(),
    };
    let mut last = None;
    // What follows the last line end is a line being written.
    let complete = text
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |end| end + 1);
    let lines = text
        .get(..complete)
        .unwrap_or_default()
        .split(|byte| *byte == b'\n');
    for (line, number) in lines.filter(|line| !line.is_empty()).zip(1..) {
        let status: Status = serde_json::from_slice(line)?;
        if status.line != number {
            return Err(broken("follow the numbering of the report"));
        }
        last = Some(status);
    }
    last.ok_or_else(|| broken("find a line in the report"))
}

fn write_status(report: &mut File, status: &Status, path: &Path) -> Result<()> {
    let mut line = serde_json::to_vec(status)?;
    line.push(b'\n');
    report.write_all(&line).map_err(Error::file("write", path))
}

/// Memory that a thread rewrites and checks beside something else that the process does.
#[derive(Debug)]
pub(super) struct Ballast {
    errors: Arc<AtomicU64>,
}

impl Ballast {
    /// Starts the thread, which ends with the process.
    pub(super) fn start(memory_mib: usize, pages_per_second: Option<u64>) -> Ballast {
        let errors = Arc::new(AtomicU64::new(0));
        let its_errors = Arc::clone(&errors);
        // Filled here: who is told that the server listens may count on the memory being there.
        let mut part = Part::new(0, (memory_mib * 256).max(1));
        thread::spawn(move || {
            let (never, iterations) = (AtomicBool::new(false), AtomicU64::new(0));
            let pause = pages_per_second
                .map(|rate| Duration::from_secs_f64(BATCH as f64 / rate.max(1) as f64));
            part.work(pause, &never, &iterations, &its_errors);
        });
        Ballast { errors }
    }

    /// Whether a page did not hold what it should.
    pub(super) fn is_wrong(&self) -> bool {
        self.errors.load(Ordering::Relaxed) > 0
    }
}

/// What there is to say about a wrong page.
pub(super) fn wrong_page() -> Error {
    Error::System {
        operation: "find in memory what was written there",
        source: std::io::ErrorKind::InvalidData.into(),
    }
}

/// Pages between two looks at the stop flag and at the clock.
const BATCH: u64 = 16;

/// The memory of one thread.
struct Part {
    number: u64,
    words: Vec<u64>,
    /// How often each page was written.
    counts: Vec<u64>,
    random: Random,
}

impl Part {
    fn new(number: u64, pages: usize) -> Part {
        let mut part = Part {
            number,
            words: vec![0; pages * PAGE_WORDS],
            counts: vec![0; pages],
            random: Random::nth(0x7468_7265_6164_7321, number),
        };
        for page in 0..pages {
            part.write(page);
        }
        part
    }

    fn work(
        &mut self,
        pause: Option<Duration>,
        stop: &AtomicBool,
        iterations: &AtomicU64,
        errors: &AtomicU64,
    ) {
        let mut due = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..BATCH {
                let page = self.random.below(self.counts.len() as u64) as usize;
                if !self.holds(page) {
                    errors.fetch_add(1, Ordering::Relaxed);
                }
                self.write(page);
            }
            iterations.fetch_add(BATCH, Ordering::Relaxed);
            if let Some(pause) = pause {
                // Time lost to a freeze is not made up for, or a burst would follow it.
                due = (due + pause).max(Instant::now());
                thread::sleep(due - Instant::now());
            }
        }
    }

    fn contents(&self, page: usize) -> Random {
        let count = self.counts.get(page).copied().unwrap_or_default();
        Random::nth((self.number << 40) | page as u64, count)
    }

    fn holds(&self, page: usize) -> bool {
        let mut expected = self.contents(page);
        let words = self
            .words
            .chunks_exact(PAGE_WORDS)
            .nth(page)
            .unwrap_or_default();
        !words.is_empty() && words.iter().all(|word| *word == expected.next())
    }

    fn write(&mut self, page: usize) {
        if let Some(count) = self.counts.get_mut(page) {
            *count += 1;
        }
        let mut contents = self.contents(page);
        for word in self
            .words
            .chunks_exact_mut(PAGE_WORDS)
            .nth(page)
            .unwrap_or_default()
        {
            *word = contents.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_the_past_is_noticed() {
        let mut part = Part::new(3, 8);
        assert!((0..8).all(|page| part.holds(page)));
        let before = part.words[..PAGE_WORDS].to_vec();
        part.write(0);
        assert!(part.holds(0));
        part.words[..PAGE_WORDS].copy_from_slice(&before);
        assert!(!part.holds(0));
    }

    #[test]
    fn one_wrong_word_is_noticed() {
        let mut part = Part::new(0, 4);
        part.words[2 * PAGE_WORDS + 511] ^= 1;
        assert!(part.holds(1) && !part.holds(2) && part.holds(3));
    }

    #[test]
    fn a_report_with_a_hole_or_a_step_back_is_refused() {
        let line = |number| format!("{{\"line\":{number},\"iterations\":9,\"errors\":0}}\n");
        let text = line(1) + &line(2) + "{\"li";
        assert_eq!(read_report(text.as_bytes()).unwrap().line, 2);
        assert!(read_report((line(1) + &line(3)).as_bytes()).is_err());
        assert!(read_report((line(1) + &line(1)).as_bytes()).is_err());
        assert!(read_report((line(1) + "\0\0\0" + &line(2)).as_bytes()).is_err());
        assert!(read_report(b"").is_err());
    }
}
