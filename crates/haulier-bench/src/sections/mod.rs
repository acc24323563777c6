//! What is measured, a file each.

mod bulk;
mod clients;
mod growth;
mod images;
mod redis;

use anyhow::{Error, Result};
use serde_json::{Value, json};

use crate::contender::Contender;
use crate::record::{Record, Run};
use crate::report::Told;
use crate::settings::Settings;

/// The links between the hosts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) name: &'static str,
    /// For [`haulier_lab::Lab::shape`].
    pub(crate) rate: Option<&'static str>,
}

pub(crate) const LINKS: [Link; 2] = [
    Link {
        name: "unshaped",
        rate: None,
    },
    Link {
        name: "1gbit",
        rate: Some("1gbit"),
    },
];

/// What all sections need.
pub(crate) struct Bench {
    pub(crate) settings: Settings,
    pub(crate) record: Record,
}

impl Bench {
    /// Measures everything asked for.
    pub(crate) fn run(&mut self) -> Result<()> {
        redis::run(self)?;
        clients::run(self)?;
        bulk::run(self)?;
        growth::run(self)
    }

    /// As [`Bench::touched`], for images.
    pub(crate) fn touched_by_images(&self) -> u64 {
        images::touched(&self.settings)
    }

    /// Measures how CRIU's images travel.
    pub(crate) fn run_images(&mut self) -> Result<()> {
        images::run(self)
    }

    /// Memory that is in use at the same time, at most: at both hosts, and on its way.
    pub(crate) fn touched(&self) -> u64 {
        let growth = self
            .settings
            .wants(&format!("{}/pre-copy/4096-MiB", growth::NAME));
        if growth && !self.settings.quick {
            return 10 << 30;
        }
        5 * self.settings.memory
    }

    /// Cases of the two links and all contenders that are asked for and possible.
    fn cases(&self, section: &str) -> Vec<(String, Link, Contender)> {
        let all = LINKS
            .into_iter()
            .flat_map(|link| Contender::ALL.map(|contender| (link, contender)));
        all.map(|(link, contender)| {
            let case = format!("{section}/{}/{}", link.name, contender.name());
            (case, link, contender)
        })
        .filter(|(case, _, contender)| {
            self.settings.wants(case) && contender.is_available(&self.settings)
        })
        .collect()
    }

    /// Progress, beside the tables.
    pub(crate) fn say(&self, text: &str) {
        eprintln!("bench: {text}");
    }

    /// Notes why a run has no figures. The others go on.
    pub(crate) fn failed(&self, run: &mut Run, error: &Error) {
        let why = format!("{error:#}");
        self.say(&format!("{} FAILED: {why}", run.case));
        run.failed = Some(why);
    }
}

/// All runs of every case of a section on a stage `R`, there and back in turn; a new stage after a
/// failure, which takes the old one with it.
fn for_each_run<R>(
    bench: &mut Bench,
    section: &str,
    new: impl Fn(&Bench, Link, Contender) -> Result<R>,
    run: impl Fn(R, &Bench, Contender, &mut Run) -> Result<R>,
) -> Result<()> {
    for (case, link, contender) in bench.cases(section) {
        let mut ready = None;
        for number in 1..=bench.settings.runs {
            let mut record = Run::new(&case, number);
            bench.say(&format!("{case} {number}/{}", bench.settings.runs));
            let stage = match ready.take() {
                Some(stage) => stage,
                None => new(bench, link, contender)?,
            };
            match run(stage, bench, contender, &mut record) {
                Ok(stage) => ready = Some(stage),
                Err(error) => bench.failed(&mut record, &error),
            }
            bench.record.add(record)?;
        }
    }
    Ok(())
}

/// What the figures were measured on.
pub(crate) fn machine(settings: &Settings) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo").lines().find_map(|line| {
        Some(
            line.strip_prefix("model name")?
                .split_once(':')?
                .1
                .trim()
                .to_owned(),
        )
    });
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "processor": processor,
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "runs": settings.runs,
        "memory_mib": settings.memory >> 20,
        "criu": settings.criu,
        "haulier": settings.haulier,
    })
}

/// Source phases and destination steps that are part of the downtime, as haulier reports them.
const PHASES: [(&str, &str); 5] = [
    ("freeze", "freeze_ms"),
    ("dump", "dump_ms"),
    ("send", "send_ms"),
    ("restore", "restore_ms"),
    ("commit", "commit_ms"),
];

/// Notes where the downtime went.
fn put_phases(run: &mut Run, told: &Told<'_>) {
    for (name, time) in told.steps("phases") {
        if let Some((_, figure)) = PHASES.iter().find(|(phase, _)| *phase == name) {
            run.put(figure, time);
        }
    }
}
