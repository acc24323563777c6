//! haulier-bench: figures of haulier beside those of CRIU alone. See `scripts/bench`.

mod analysis;
mod contender;
mod criu;
mod record;
mod report;
mod sections;
mod settings;
mod stage;
mod tables;
mod writer;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::record::Record;
use crate::sections::Bench;
use crate::settings::{Cli, Measure, Options, Settings};

fn main() -> ExitCode {
    let Measure::Memory(options) = Cli::parse().command;
    match measure(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: Options) -> Result<()> {
    let settings = Settings::new(options)?;
    let record = Record::new(settings.json.clone(), sections::machine(&settings));
    let mut bench = Bench { settings, record };
    bench.run()?;
    print!("{}", tables::all(&bench.record));
    Ok(())
}
