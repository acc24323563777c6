//! How the downtime grows with memory that is mostly clean, and where it goes.

use anyhow::{Context, Result};

use crate::contender::{Agents, Contender, migrate};
use crate::record::Run;
use crate::report::Told;
use crate::sections::{Bench, put_phases};
use crate::stage::{Stage, start_threads};

pub(crate) const NAME: &str = "growth";

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let sizes: &[u64] = if bench.settings.quick {
        &[64, 256]
    } else {
        &[64, 1024, 4096]
    };
    for mode in ["pre-copy", "hybrid"] {
        let contender = Contender::Haulier(mode);
        if !contender.is_available(&bench.settings) {
            continue;
        }
        for mib in sizes {
            let case = format!("{NAME}/{mode}/{mib}-MiB");
            if bench.settings.wants(&case) {
                case_runs(bench, &case, contender, mib << 20)?;
            }
        }
    }
    Ok(())
}

/// All runs of a case, there and back in turn.
fn case_runs(bench: &mut Bench, case: &str, contender: Contender, memory: u64) -> Result<()> {
    let mut stage = Stage::build(None)?;
    let agents = Agents::start(&stage, contender, &bench.settings)?;
    let pid = start_threads(&stage, memory)?;
    for number in 1..=bench.settings.runs {
        bench.say(&format!("{case} {number}/{}", bench.settings.runs));
        let mut run = Run::new(case, number);
        let moved = migrate(&mut stage, contender, &bench.settings, pid, &[])
            .with_context(|| agents.logs());
        match moved {
            Ok(moved) => {
                let told = Told(&moved.report);
                run.put("downtime_ms", told.number("downtime_ms"));
                run.put("total_ms", told.number("total_ms"));
                put_phases(&mut run, &told);
                run.report = moved.report;
            }
            Err(error) => {
                bench.failed(&mut run, &error);
                return bench.record.add(run);
            }
        }
        bench.record.add(run)?;
    }
    Ok(())
}
