//! The haulier command.

mod cli;
mod images_cli;
mod inspect_cli;
mod settling;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use haulier::interrupt::cancel_on_signals;
use haulier::report::Lines;
use haulier::source::Outcome;
use haulier::{destination, guard, source, tracer};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{Cli, Command, Migrate, Serve};

/// Exit codes of `haulier migrate`; 2 is bad usage, and clap's.
const MOVED: u8 = 0;
const NOT_STARTED: u8 = 1;
const NOTHING_TOUCHED: u8 = 3;
const ROLLED_BACK: u8 = 4;
const NEEDS_YOU: u8 = 5;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let default = match (&cli.command, cli.verbose) {
        // A server's log is its only output.
        (Command::Serve(_), 0) => "haulier=info",
        (Command::ImageProxy(_) | Command::ImageCache(_), 0) => "haulier_imagecast=info",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    match &cli.command {
        Command::Guard(arguments) => {
            let log = guard::Log::beside(&arguments.verdict);
            log_to(move || log.clone(), false, default);
        }
        _ => {
            // By itself it colours log files and the journal too.
            let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            log_to(io::stderr, colours, default);
        }
    }
    let result = match &cli.command {
        Command::Migrate(arguments) => migrate(arguments),
        Command::Serve(arguments) => serve(arguments).map(|()| MOVED),
        Command::ImageProxy(arguments) => images_cli::image_proxy(arguments).map(|()| MOVED),
        Command::ImageCache(arguments) => images_cli::image_cache(arguments).map(|()| MOVED),
        Command::Inspect(arguments) => inspect_cli::run(arguments).map(|()| MOVED),
        Command::Status(arguments) => settling::status(arguments),
        Command::Recover(arguments) => settling::recover(arguments),
        Command::Cancel(arguments) => settling::cancel(arguments),
        Command::Resolve(arguments) => settling::resolve(arguments),
        Command::Guard(arguments) => {
            guard::run(&arguments.cgroup, &arguments.verdict).map(|()| MOVED)
        }
        Command::Tracer => tracer::run().map(|()| MOVED),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("haulier: {error:#}");
            ExitCode::from(NOT_STARTED)
        }
    }
}

/// Where the log goes, filtered by `RUST_LOG` (such as `haulier_memory=debug,info`) or the default.
fn log_to<W>(writer: W, colours: bool, default: &str)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let text = if wanted.is_empty() { default } else { &wanted };
    let filter: Targets = text.parse().unwrap_or_else(|error| {
        eprintln!("haulier: RUST_LOG is ignored: {error}");
        Targets::new().with_default(LevelFilter::WARN)
    });
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(colours)
        .with_writer(writer);
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .init();
}

fn migrate(arguments: &Migrate) -> anyhow::Result<u8> {
    let stop = cancel_on_signals()?;
    let options = arguments.options();
    let mut progress = Lines::new(io::stderr());
    let code = match source::migrate(&options, &stop, &mut progress) {
        Outcome::Moved(report) => {
            let mut out = io::stdout().lock();
            if arguments.json {
                writeln!(out, "{}", serde_json::to_string(&*report)?)?;
            } else {
                report.write(&mut out)?;
            }
            MOVED
        }
        Outcome::NothingTouched(failure) => {
            eprintln!(
                "haulier: nothing was touched, process {} was not stopped\n  {failure}",
                options.pid
            );
            NOTHING_TOUCHED
        }
        Outcome::RolledBack { failure, left } => {
            eprintln!(
                "haulier: rolled back, process {} runs here\n  {failure}",
                options.pid
            );
            for left in left {
                eprintln!("  left behind: {left}");
            }
            ROLLED_BACK
        }
        Outcome::Stranded { id, failure } => {
            eprintln!(
                "{}",
                stranded(&id.to_string(), options.pid, &failure.to_string())
            );
            NEEDS_YOU
        }
        Outcome::InDoubt { id, failure } => {
            eprintln!(
                "{}",
                in_doubt(&id.to_string(), &options, &failure.to_string())
            );
            NEEDS_YOU
        }
    };
    Ok(code)
}

/// What a person has to know and do when the destination lost the target after the commit.
fn stranded(id: &str, pid: i32, failure: &str) -> String {
    format!(
        "haulier: process {pid} is lost at the destination; as it was frozen it stands here\n  \
         {failure}\n  \
         what to do: let it run on here from where it was frozen: haulier resolve {id} --run-here\n  \
         What it did at the destination since then is lost; its clients may have been told of it.\n  \
         Or give it up: haulier resolve {id} --discard"
    )
}

/// What a person has to know and do when the destination fell silent after the commit.
fn in_doubt(id: &str, options: &source::Options, failure: &str) -> String {
    let pid = options.pid;
    let destination = &options.destination;
    format!(
        "haulier: process {pid} stands frozen here, and may be running at {destination}\n  \
         {failure}\n  \
         what to do: start haulier serve here, which goes on asking, or ask once: haulier recover\n  \
         If the destination will never answer, find out whether it runs there: haulier status {id} \
         there says so.\n  \
         If it does, remove it here: haulier resolve {id} --discard\n  \
         If it surely does not and never will, let it run on here: haulier resolve {id} --run-here"
    )
}

fn serve(arguments: &Serve) -> anyhow::Result<()> {
    let stop = cancel_on_signals()?;
    destination::serve(arguments.options(), &stop, |address| {
        // For whoever started it and waits until it can be used.
        println!("listening on {address}");
        let _ = io::stdout().flush();
    })
}
