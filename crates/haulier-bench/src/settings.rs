//! What is measured, and with which programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use haulier_targets::network::MoveIp;

use crate::criu;

/// Measures haulier on simulated hosts
#[derive(Debug, Parser)]
#[command(name = "haulier-bench", max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Measure,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Measure {
    Memory(Options),
    /// How CRIU's images travel: by image-proxy and image-cache, by tar over TCP, and by
    /// criu-image-streamer if it is in the path
    Images(Options),
    /// Tell the network that an address is here: a part of CRIU's migration
    #[command(hide = true)]
    Announce {
        /// As ADDRESS/PREFIX@INTERFACE
        address: MoveIp,
    },
}

/// How long a target in use is away while its memory moves, with haulier and with CRIU alone
///
/// Nothing here passes or fails: figures are medians of several runs, and what counts are their
/// ratios within one call, on hosts and links that are the same for all.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often each case is run
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// One run with 256 MiB: for a look, not for figures
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains this; repeatable. Names are as in the table, such as
    /// redis/unshaped/pre-copy, or a part of one
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Memory of Redis, in MiB [default: 1024, with --quick 256]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// All raw figures go here [default: bench-memory.json in the folder above this program's]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep idle processors awake, as on a machine that is used to the full: normal service is then
    /// faster, and what a migration takes from it more
    #[arg(long)]
    pub(crate) awake: bool,
    /// haulier to measure [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    haulier: Option<PathBuf>,
}

/// The options, settled.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) runs: u32,
    pub(crate) quick: bool,
    only: Vec<String>,
    /// Bytes of values in Redis.
    pub(crate) memory: u64,
    pub(crate) json: PathBuf,
    pub(crate) haulier: PathBuf,
    pub(crate) criu: PathBuf,
    /// Whether `haulier migrate` knows `--mode`.
    pub(crate) has_modes: bool,
    /// Whether it knows `--compress`.
    pub(crate) has_compress: bool,
}

impl Settings {
    pub(crate) fn new(options: Options) -> Result<Settings> {
        let this = std::env::current_exe()?;
        let haulier = options
            .haulier
            .unwrap_or_else(|| this.with_file_name("haulier"));
        let json = options.json.unwrap_or_else(|| {
            let folder = this.parent().and_then(Path::parent).unwrap_or(&this);
            folder.join("bench-memory.json")
        });
        let help = Command::new(&haulier)
            .args(["migrate", "--help"])
            .output()
            .with_context(|| format!("cannot run {}", haulier.display()))?;
        ensure!(
            help.status.success(),
            "{} is not haulier",
            haulier.display()
        );
        let help = String::from_utf8_lossy(&help.stdout);
        let mib = options
            .memory
            .unwrap_or(if options.quick { 256 } else { 1024 });
        Ok(Settings {
            runs: if options.quick { 1 } else { options.runs },
            quick: options.quick,
            only: options.only,
            memory: mib << 20,
            json,
            has_modes: help.contains("--mode"),
            has_compress: help.contains("--compress"),
            haulier,
            criu: criu::find(),
        })
    }

    /// Whether a case is asked for.
    pub(crate) fn wants(&self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| case.contains(part.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
