//! The commands about migrations that have begun: status, recover, cancel, resolve.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use haulier::cancel::{self, Cancelled};
use haulier::interrupt::cancel_on_signals;
use haulier::recovery::{self, Verdict};
use haulier::source::again::Asking;
use haulier::status::{self, Status};
use haulier_proto::id::MigrationId;
use haulier_targets::cgroup::CgroupFs;
use haulier_targets::host;
use haulier_transport::tcp::LinkTime;

use crate::NEEDS_YOU;
use crate::cli::seconds;

const OVER: u8 = 0;
const UNKNOWN: u8 = 1;
const NOTHING_CHANGED: u8 = 3;

/// Tell how the migrations of this host stand
///
/// Those under way, those that wait for something, and those that have ended here within a week. Exit
/// code 5 means that one of them waits for you, and the text says for what; 1 that there is none with
/// that id.
#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    /// Only this migration
    id: Option<MigrationId>,
    /// Print it as JSON, a list
    #[arg(long)]
    json: bool,
}

/// Finish or undo what a killed haulier left on this host
///
/// "haulier serve" and "haulier migrate" do the same by themselves. Where only the destination
/// knows how it goes on, it is asked; memory that it lacks is brought. Can be repeated, and
/// interrupted, at any time. Exit code 5 means that something still waits for you.
#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// How long to ask a destination that does not answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = seconds::<0>)]
    wait: u64,
    /// How long a connection may be dead before it counts as broken; more for a WAN
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = seconds::<4>)]
    link_time: u64,
}

/// Bring a process back whose migration is under way on this host
///
/// Has the same effect as Ctrl-C of "haulier migrate", and waits until the process runs here again. Once
/// the commit has been sent, only the destination decides: then this changes nothing, says so, and ends
/// with exit code 3.
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// The migration, as "haulier status" names it
    id: MigrationId,
    /// Longest time to wait until the process runs here again
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = seconds::<1>)]
    wait: u64,
}

/// Settle a migration that only a person can settle, on its source
///
/// For a process that stands frozen on this host because its destination will never answer, or has lost
/// it. haulier never lets it run here while it may be running there, unless you say that it does not: be
/// sure of it.
#[derive(Debug, Args)]
#[group(skip)]
pub(crate) struct Resolve {
    /// The migration, as "haulier status" names it
    id: MigrationId,
    #[command(flatten)]
    word: Word,
}

/// How it goes on.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Word {
    /// Let it run on here, from where it was frozen. You say by this that it does not run at the
    /// destination and never will, whatever happens to that host. If it does, two of it run, both
    /// with the same addresses and files
    #[arg(long)]
    run_here: bool,
    /// Kill what stands frozen here. You say by this that it runs at the destination, with all of its
    /// memory, or is not needed any more. If it does not run there, it is gone
    #[arg(long)]
    discard: bool,
}

pub(crate) fn status(arguments: &StatusArguments) -> anyhow::Result<u8> {
    ensure_root()?;
    let all = match arguments.id {
        Some(id) => status::of(id),
        None => status::all(),
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&all)?)?;
    } else {
        write(&mut out, &all)?;
        if all.is_empty() {
            match arguments.id {
                Some(id) => writeln!(out, "there is no migration {id} on this host")?,
                None => writeln!(out, "there are no migrations on this host")?,
            }
        }
    }
    Ok(match all.is_empty() && arguments.id.is_some() {
        true => UNKNOWN,
        false => code(&all),
    })
}

fn write(out: &mut dyn Write, all: &[Status]) -> io::Result<()> {
    all.iter().try_for_each(|status| status.write(out))
}

fn code(all: &[Status]) -> u8 {
    match all.iter().any(|status| status.needs_you) {
        true => NEEDS_YOU,
        false => OVER,
    }
}

pub(crate) fn recover(arguments: &Recover) -> anyhow::Result<u8> {
    ensure_root()?;
    let stop = cancel_on_signals()?;
    let cgroups = CgroupFs::find()?;
    let asking = Asking {
        patience: Duration::from_secs(arguments.wait),
        bring: true,
        link_time: LinkTime::new(Duration::from_secs(arguments.link_time)),
    };
    for unsettled in recovery::recover_all(&cgroups) {
        recovery::ask(unsettled, &cgroups, &asking, &stop);
    }
    let mut left = status::all();
    left.retain(|status| status.needs_you);
    let mut out = io::stdout().lock();
    write(&mut out, &left)?;
    if left.is_empty() {
        writeln!(out, "nothing is left to be done on this host")?;
    }
    Ok(code(&left))
}

pub(crate) fn cancel(arguments: &Cancel) -> anyhow::Result<u8> {
    ensure_root()?;
    let id = arguments.id;
    Ok(
        match cancel::cancel(id, Duration::from_secs(arguments.wait))? {
            Cancelled::RunsHere => {
                println!("cancelled: it runs here");
                OVER
            }
            Cancelled::TooLate => {
                println!(
                    "too late: the commit has been sent, and only the destination knows how it goes \
                 on; nothing was changed\n  \
                 what to do: haulier status {id}"
                );
                NOTHING_CHANGED
            }
        },
    )
}

pub(crate) fn resolve(arguments: &Resolve) -> anyhow::Result<u8> {
    ensure_root()?;
    let verdict = match arguments.word.run_here {
        true => Verdict::RunHere,
        false => Verdict::Discard,
    };
    recovery::resolve(arguments.id, verdict, &CgroupFs::find()?)?;
    match verdict {
        Verdict::RunHere => println!(
            "settled, on your word that it runs nowhere else and never will: it runs on here"
        ),
        Verdict::Discard => println!(
            "settled, on your word that it runs at the destination or is not needed: it is removed \
             here"
        ),
    }
    Ok(OVER)
}

/// Journals are root's: others would be told that there are none.
fn ensure_root() -> anyhow::Result<()> {
    ensure!(
        host::is_root(),
        "journals can be read by root only: run it with sudo"
    );
    Ok(())
}
