//! Figures as they are measured, kept in a file and printed as tables.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::analysis::{Spread, spread};

/// One run of one case.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Run {
    /// `section/link/contender`.
    pub(crate) case: String,
    /// From 1.
    pub(crate) run: u32,
    /// Why there are no figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failed: Option<String>,
    /// Name and value; the unit is at the end of the name.
    pub(crate) figures: BTreeMap<&'static str, f64>,
    /// haulier's own report.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub(crate) report: Value,
    /// Answers in each 50 ms from one second before the start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) answers: Vec<u64>,
}

impl Run {
    pub(crate) fn new(case: &str, run: u32) -> Run {
        Run {
            case: case.to_owned(),
            run,
            failed: None,
            figures: BTreeMap::new(),
            report: Value::Null,
            answers: Vec::new(),
        }
    }

    /// Notes a figure, unless it is unknown.
    pub(crate) fn put(&mut self, name: &'static str, value: impl Into<Option<f64>>) {
        if let Some(value) = value.into() {
            self.figures.insert(name, value);
        }
    }
}

/// All runs so far.
pub(crate) struct Record {
    file: PathBuf,
    machine: Value,
    runs: Vec<Run>,
}

impl Record {
    pub(crate) fn new(file: PathBuf, machine: Value) -> Record {
        Record {
            file,
            machine,
            runs: Vec::new(),
        }
    }

    /// Keeps a run, and all so far in the file: what was measured outlives an interrupt.
    pub(crate) fn add(&mut self, run: Run) -> Result<()> {
        self.runs.push(run);
        let all = serde_json::json!({ "machine": self.machine, "runs": self.runs });
        fs::write(&self.file, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", self.file.display()))
    }

    /// Cases whose name begins so, in the order they were first run.
    pub(crate) fn cases(&self, section: &str) -> Vec<&str> {
        let mut cases: Vec<&str> = Vec::new();
        for run in &self.runs {
            if run.case.starts_with(section) && !cases.contains(&run.case.as_str()) {
                cases.push(&run.case);
            }
        }
        cases
    }

    /// A figure of a case over its runs.
    pub(crate) fn spread(&self, case: &str, figure: &str) -> Option<Spread> {
        spread(
            self.of(case)
                .filter_map(|run| run.figures.get(figure).copied()),
        )
    }

    /// The runs of a case.
    pub(crate) fn of<'a>(&'a self, case: &'a str) -> impl Iterator<Item = &'a Run> {
        self.runs.iter().filter(move |run| run.case == case)
    }
}
