//! What is measured, a file each.

mod redis;

use anyhow::{Error, Result};
use serde_json::{Value, json};

use crate::record::{Record, Run};
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
        redis::run(self)
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

/// What the figures were measured on.
pub(crate) fn machine(settings: &Settings) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim().to_owned()));
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
