//! haulier-bench: figures of haulier beside those of CRIU alone. See `scripts/bench`.

mod analysis;
mod awake;
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
use haulier_targets::network;

use crate::awake::Awake;
use crate::record::Record;
use crate::sections::Bench;
use crate::settings::{Cli, Measure, Options, Settings};

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Measure::Memory(options) => measure(options, Bench::touched, Bench::run),
        Measure::Images(options) => measure(options, Bench::touched_by_images, Bench::run_images),
        Measure::Announce { address } => network::announce(&address).map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(
    options: Options,
    touched: fn(&Bench) -> u64,
    run: fn(&mut Bench) -> Result<()>,
) -> Result<()> {
    let _awake = options.awake.then(Awake::keep);
    let settings = Settings::new(options)?;
    let record = Record::new(settings.json.clone(), sections::machine(&settings));
    let mut bench = Bench { settings, record };
    stage::touch(touched(&bench))?;
    run(&mut bench)?;
    print!("{}", tables::all(&bench.record));
    println!("\nRaw figures: {}", bench.settings.json.display());
    Ok(())
}
