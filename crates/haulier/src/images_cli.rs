//! `haulier image-proxy` and `haulier image-cache`.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use haulier::SOFTWARE;
use haulier::interrupt::cancel_on_signals;
use haulier_imagecast::compress::Compression;
use haulier_imagecast::control::{Delivered, Listing};
use haulier_imagecast::link::{Key, Way};
use haulier_imagecast::settle::{self, Standing, Verdict};
use haulier_imagecast::{cache, proxy};
use haulier_images::name::ImageName;
use haulier_memory::lazy::guard;
use haulier_sys::inherited;
use haulier_sys::wait::Cancel;
use haulier_targets::host::{self, Host};
use haulier_transport::greeting::Identity;

use crate::cli::{host_and_port, time};

/// The target of a directory that was given without a name.
const DEFAULT_TARGET: &str = "main";
/// How long a dump may take to end once it is settled.
const SETTLING: Duration = Duration::from_secs(90);
/// How long an image-cache may pause while a tar file goes to it or comes from it.
const PAUSE: Duration = Duration::from_secs(600);
/// The action at which CRIU's dump can still be undone.
const VOTE: &str = "post-dump";

/// Take images from "criu dump --stream" and send them to an image-cache
///
/// Every dump into one of the directories is taken, as plain CRIU runs it: criu dump --stream -D DIR.
/// Later dumps of the same target send only the pages that have changed: that is what "criu pre-dump" would be for,
/// which is refused.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = PROXY_HELP)]
pub(crate) struct ImageProxy {
    #[command(subcommand)]
    command: Option<ProxyCommand>,
    #[command(flatten)]
    connection: Connection,
    /// Most memory for images that are under way, 8 MiB at least
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    max_memory: ByteSize,
    /// How images, and memory that follows, are compressed on their way: none, lz4 or zstd
    #[arg(long, value_name = "HOW", default_value_t)]
    compress: Compression,
    /// Take dumps that leave memory behind (criu dump --lazy-pages): it follows the restore
    #[arg(long)]
    lazy_pages: bool,
    /// Where such a dump gives its memory out: what CRIU is told with --address and --port
    /// [default: it is given a connection to DIR/page-server.sock with --ps-socket]; repeatable
    #[arg(long, value_name = "[NAME=]HOST:PORT", requires = "lazy_pages", value_parser = page_server)]
    page_server: Vec<(ImageName, String)>,
}

#[derive(Debug, Subcommand)]
enum ProxyCommand {
    Wait(WaitArguments),
    /// Show the dumps of a directory whose memory follows their restore, and those that stand frozen
    /// until somebody settles them
    ///
    /// The image-proxy need not run for it.
    List {
        /// The dumps' directory
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    Settle(SettleArguments),
    /// Hold the end of a dump whose memory follows: started by haulier itself
    #[command(hide = true)]
    Keep,
}

const PROXY_HELP: &str = "\
CRIU's own exit code does not tell whether the images were delivered. A script for its
--action-script that runs \"haulier image-proxy wait\" does, in time for CRIU to let the process live
otherwise:
  #!/bin/sh
  exec haulier image-proxy wait
With --leave-running it is needed even if nobody cares for the delivery (then with --taken): CRIU lets the
process go on, and write, while its last pages are still being read.

With --lazy-pages a dump's memory stays where it is until the restored processes want it, and the rest
follows them. It is not part of the delivery: when the restore begins, the processes depend on both
hosts and the connection until everything has moved; then the dump ends. Until a restore begins, whatever
fails has the processes run on at the source; so does a restore that fails before they ran. If the
connection is lost for longer than --reconnect after that, or either side is killed, the restored
processes are killed and those at the source stay as they are, frozen, until a person decides: haulier
image-proxy list shows them, haulier image-proxy settle ends that. A dump can be restored once.
  web1# criu dump --stream -D /run/dump -t PID --lazy-pages --address 127.0.0.1 --port 9100
  web1# haulier image-proxy --to 10.0.0.2:7001 --dir /run/dump --lazy-pages --page-server 127.0.0.1:9100
  web2# haulier image-cache --listen 10.0.0.2:7001 --dir /run/restore --lazy-pages
  web2# criu restore --stream -D /run/restore --lazy-pages

Example: a restore that waits for its dump
  web2# haulier image-cache --listen 10.0.0.2:7001 --dir /run/restore
  web2# criu restore --stream -D /run/restore
  web1# haulier image-proxy --to 10.0.0.2:7001 --dir /run/dump
  web1# criu dump --stream -D /run/dump -t PID --action-script ./vote.sh";

/// Wait until the images of the newest dump are delivered, and fail if they will not be
///
/// As an action script of CRIU it does its work after the dump and nothing at other times.
#[derive(Debug, Args)]
struct WaitArguments {
    /// The dump's directory [default: the one that CRIU names to its scripts]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Wait only until the proxy has every byte: for dumps that leave the process running
    #[arg(long)]
    taken: bool,
    /// Longest time to wait
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    timeout: Duration,
}

/// Settle a dump that only a person can settle: its memory could not follow its restore
///
/// Its processes stand frozen on this host. haulier never lets them run here while they may be running at the
/// destination; who says that they do not had better know. "haulier image-cache list" says there how the restore
/// ended: of one that is "released, restored" everything runs there. One that is "failed" is killed, as the
/// image-cache's log says when it is done; look for the processes all the same, and where the image-cache does
/// not run. The image-proxy need not run for it.
#[derive(Debug, Args)]
#[group(skip)]
struct SettleArguments {
    /// The dump's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Which, as "haulier image-proxy list" names it [default: the only one]
    name: Option<String>,
    #[command(flatten)]
    word: Word,
}

/// How it goes on.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Word {
    /// Let them run on here, from where they were frozen: criu dump fails. With this you say: they do
    /// not run at the destination, and never will, whatever happens to that host. If they do, two of each
    /// run, with the same addresses and files. What they did at the destination is lost
    #[arg(long)]
    run_here: bool,
    /// Kill them here: criu dump succeeds. With this you say: they run at the destination, with all of
    /// their memory, or are not needed any more. If they do not, they are gone
    #[arg(long)]
    discard: bool,
}

/// Keep images that an image-proxy sends, and serve "criu restore --stream"
///
/// A restore may be the first command of all: criu restore --stream -D DIR waits for the dump. It gets
/// the newest dump of its target; criu restore --stream -D DIR/N gets the Nth.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct ImageCache {
    #[command(subcommand)]
    command: Option<CacheCommand>,
    #[command(flatten)]
    connection: Connection,
    /// Most memory for images, e.g. 8GiB [default: half of what is free at the start]
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<ByteSize>,
    /// Directory for images that memory has no room for [default: they are refused]
    #[arg(long, value_name = "DIR")]
    spill: Option<PathBuf>,
    /// Most bytes there
    #[arg(long, value_name = "SIZE", default_value = "16GiB", requires = "spill")]
    max_spill: ByteSize,
    /// Dumps of each target that are kept; older ones go, as they do when memory is short
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    keep: u32,
    /// Take dumps that leave memory behind, and be the lazy-pages daemon of their restores: "criu
    /// restore --stream -D DIR --lazy-pages". Such a dump can be restored once. The restored processes
    /// are killed if this ends before all their memory has come, with whatever they have forked since
    #[arg(long)]
    lazy_pages: bool,
}

#[derive(Debug, Subcommand)]
enum CacheCommand {
    /// Show the dumps that a running image-cache has of a target
    List {
        #[command(flatten)]
        of: Of,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a dump into a directory, as plain CRIU writes and reads it, or into a tar file
    Save {
        #[command(flatten)]
        of: Of,
        /// Which dump [default: the newest]
        #[arg(long, value_name = "N")]
        snapshot: Option<u64>,
        /// A directory, empty or made; or a tar file, if it ends with .tar and is no directory. The cache
        /// writes it. Or -: a tar file to standard output, which has no end if it is not whole
        to: PathBuf,
    },
    /// Read a dump from a directory that CRIU, or "save", has written, or from a tar file of its images
    Load {
        #[command(flatten)]
        of: Of,
        /// The directory or the file, which the cache reads. Or -: a tar file from standard input
        from: PathBuf,
    },
    /// Let a dump be restored whose image-proxy was lost before it said that the dump succeeded
    ///
    /// Only who knows that the process does not run on at its source can say so.
    Release {
        #[command(flatten)]
        of: Of,
        /// Which dump
        snapshot: u64,
    },
    /// Forget a dump
    Drop {
        #[command(flatten)]
        of: Of,
        /// Which dump
        snapshot: u64,
    },
    /// Kill restored processes that lack memory when the image-cache dies: started by haulier itself
    #[command(hide = true)]
    Guard,
}

#[derive(Debug, Args)]
struct Of {
    /// The target's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Debug, Args)]
struct Connection {
    #[command(flatten)]
    way: WayArguments,
    /// Directory that CRIU is told with -D, with the target's name, which has to be the same on the
    /// other side [default name: main]; repeatable
    #[arg(long, value_name = "[NAME=]DIR", required = true, value_parser = target)]
    dir: Vec<(ImageName, PathBuf)>,
    /// How long the other side may be out of reach before what is not complete is given up
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    reconnect: Duration,
    /// File with a secret that both sides have: others are turned away. Nothing is encrypted
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct WayArguments {
    /// Connect to the other side
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    to: Option<String>,
    /// Wait for the other side to connect; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = host_and_port)]
    listen: Option<String>,
    /// Use this descriptor, a connected stream socket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..))]
    connection_fd: Option<RawFd>,
}

impl WayArguments {
    fn way(&self) -> anyhow::Result<Way> {
        Ok(match (&self.to, &self.listen, self.connection_fd) {
            (Some(address), _, _) => Way::To(address.clone()),
            (_, Some(address), _) => Way::Listen(address.clone()),
            (_, _, Some(number)) => Way::Given(
                inherited::take(number)
                    .with_context(|| format!("descriptor {number} cannot be used"))?,
            ),
            _ => bail!("--to, --listen or --connection-fd is needed"),
        })
    }
}

impl Connection {
    fn key(&self) -> anyhow::Result<Key> {
        let Some(file) = &self.secret_file else {
            return Ok(Key::from_secret(&[]));
        };
        let secret = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        if secret.is_empty() {
            bail!("{} is empty, which is no secret", file.display());
        }
        Ok(Key::from_secret(&secret))
    }
}

fn me() -> Identity {
    Identity {
        software: SOFTWARE.to_owned(),
        host: Host::this().name,
    }
}

/// `haulier image-proxy`.
pub(crate) fn image_proxy(arguments: &ImageProxy) -> anyhow::Result<()> {
    match &arguments.command {
        Some(ProxyCommand::Wait(arguments)) => return wait_for_delivery(arguments),
        Some(ProxyCommand::List { dir, json }) => return list_standing(dir, *json),
        Some(ProxyCommand::Settle(arguments)) => return settle_dump(arguments),
        Some(ProxyCommand::Keep) => return Ok(proxy::keep()?),
        None => {}
    }
    // First of all, before anything else can have that number.
    let way = arguments.connection.way.way()?;
    let options = proxy::Options {
        way,
        targets: arguments.connection.dir.clone(),
        max_memory: usize::try_from(arguments.max_memory.as_u64())?,
        compression: arguments.compress,
        lazy_pages: arguments.lazy_pages.then(|| proxy::LazyPages {
            servers: arguments.page_server.clone(),
            keeper: Some(|| myself(&["image-proxy", "keep"])),
        }),
        reconnect: arguments.connection.reconnect,
        key: arguments.connection.key()?,
        me: me(),
    };
    let stop = cancel_on_signals()?;
    Ok(proxy::run(options, &stop, |address| {
        ready("taking dumps", address);
    })?)
}

fn wait_for_delivery(arguments: &WaitArguments) -> anyhow::Result<()> {
    let action = std::env::var("CRTOOLS_SCRIPT_ACTION").ok();
    if action.is_some_and(|action| action != VOTE) {
        return Ok(());
    }
    let named = std::env::var_os("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
    let directory = arguments
        .dir
        .clone()
        .or(named)
        .context("--dir is needed: this is not an action script of CRIU")?;
    let stop = cancel_on_signals()?;
    let wait = stop.wait(arguments.timeout);
    let delivered =
        proxy::wait(&directory, arguments.taken, &wait).context("the images were not delivered")?;
    if arguments.taken {
        println!(
            "taken: {} images, {} bytes",
            delivered.images, delivered.bytes
        );
    } else {
        println!(
            "delivered as dump {}: {} images, {} bytes, of which {} had to be sent",
            delivered.snapshot, delivered.images, delivered.bytes, delivered.sent
        );
    }
    Ok(())
}

fn list_standing(directory: &Path, json: bool) -> anyhow::Result<()> {
    let all = settle::list(directory)?;
    if json {
        println!("{}", serde_json::to_string(&all)?);
        return Ok(());
    }
    for standing in all {
        let Standing {
            name,
            target,
            snapshot,
            seconds,
            doubt,
        } = standing;
        let how = match doubt {
            None => "its memory follows".to_owned(),
            Some(why) => format!(
                "it stands frozen until somebody settles it ({why}): haulier image-proxy settle \
                 --dir {} {name} --run-here, or --discard",
                directory.display()
            ),
        };
        println!("{name}  dump {snapshot} of {target}, restored since {seconds} s: {how}");
    }
    Ok(())
}

fn settle_dump(arguments: &SettleArguments) -> anyhow::Result<()> {
    let verdict = match arguments.word.run_here {
        true => Verdict::RunHere,
        false => Verdict::Discard,
    };
    let stop = cancel_on_signals()?;
    let wait = stop.wait(SETTLING);
    let name = arguments.name.as_deref();
    let settled =
        settle::settle(&arguments.dir, name, verdict, &wait).context("the dump is not settled")?;
    let (snapshot, target) = (settled.snapshot, settled.target);
    match verdict {
        Verdict::RunHere => println!(
            "dump {snapshot} of {target} is settled, on your word that its processes run nowhere else \
             and never will: they run on here"
        ),
        Verdict::Discard => println!(
            "dump {snapshot} of {target} is settled, on your word that its processes run at the \
             destination or are not needed: they are removed here"
        ),
    }
    Ok(())
}

/// `haulier image-cache`.
pub(crate) fn image_cache(arguments: &ImageCache) -> anyhow::Result<()> {
    if let Some(command) = &arguments.command {
        return ask_cache(command);
    }
    // First of all, before anything else can have that number.
    let way = arguments.connection.way.way()?;
    let spill = arguments.spill.clone();
    let options = cache::Options {
        way,
        targets: arguments.connection.dir.clone(),
        max_memory: arguments
            .max_memory
            .map_or_else(|| host::available_memory() / 2, |size| size.as_u64()),
        spill: spill.map(|directory| (directory, arguments.max_spill.as_u64())),
        keep: arguments.keep as usize,
        lazy_pages: arguments.lazy_pages.then_some(cache::LazyPages {
            guard: Some(|| myself(&["image-cache", "guard"])),
        }),
        reconnect: arguments.connection.reconnect,
        key: arguments.connection.key()?,
        me: me(),
    };
    let stop = cancel_on_signals()?;
    Ok(cache::run(options, &stop, |address| {
        ready("serving restores", address);
    })?)
}

/// For whoever started it and waits until it can be used.
fn ready(what: &str, address: Option<&str>) {
    match address {
        Some(address) => println!("{what}, listening on {address}"),
        None => println!("{what}"),
    }
    let _ = io::stdout().flush();
}

/// This program, to do something else.
fn myself(arguments: &[&str]) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments);
    Ok(command)
}

fn ask_cache(command: &CacheCommand) -> anyhow::Result<()> {
    // Whatever ends these has the cache give up too: signals need not be waited for.
    match command {
        CacheCommand::Save { of, snapshot, to } if is_stream(to) => {
            return save_to_stdout(&of.dir, *snapshot);
        }
        CacheCommand::Load { of, from } if is_stream(from) => {
            return load_from_stdin(&of.dir);
        }
        _ => {}
    }
    let stop = cancel_on_signals()?;
    let wait = stop.wait(Duration::from_secs(3600));
    match command {
        CacheCommand::List { of, json } => {
            let listing = cache::list(&of.dir, &wait)?;
            if *json {
                println!("{}", serde_json::to_string(&listing)?);
            } else {
                print_listing(&listing);
            }
        }
        CacheCommand::Save { of, snapshot, to } => {
            let to = std::path::absolute(to)?;
            let saved = cache::save(&of.dir, *snapshot, &to, &wait)?;
            println!("{}", describe_saved(&saved));
        }
        CacheCommand::Load { of, from } => {
            let from = std::path::absolute(from)?;
            let loaded = cache::load(&of.dir, &from, &wait)?;
            println!("{}", describe_loaded(&loaded));
        }
        CacheCommand::Release { of, snapshot } => {
            cache::release(&of.dir, *snapshot, &wait)?;
            println!("dump {snapshot} can be restored");
        }
        CacheCommand::Drop { of, snapshot } => {
            cache::forget(&of.dir, *snapshot, &wait)?;
            println!("dump {snapshot} is forgotten");
        }
        CacheCommand::Guard => guard::run_for_tasks()?,
    }
    Ok(())
}

/// Whether standard input or output is meant.
fn is_stream(path: &Path) -> bool {
    path == Path::new("-")
}

fn save_to_stdout(directory: &Path, snapshot: Option<u64>) -> anyhow::Result<()> {
    let out = io::stdout();
    if out.is_terminal() {
        bail!("standard output is a terminal, and a tar file of memory is nothing to look at");
    }
    // By itself it looks for the ends of lines.
    let mut out = File::from(out.as_fd().try_clone_to_owned()?);
    let wait = Cancel::new()?.wait_idle(PAUSE);
    let saved = cache::save_to(directory, snapshot, &mut out, &wait)?;
    eprintln!("{}", describe_saved(&saved));
    Ok(())
}

fn load_from_stdin(directory: &Path) -> anyhow::Result<()> {
    let mut from = io::stdin().lock();
    if from.is_terminal() {
        bail!("standard input is a terminal, not a tar file");
    }
    let wait = Cancel::new()?.wait_idle(PAUSE);
    let loaded = cache::load_from(directory, &mut from, &wait)?;
    println!("{}", describe_loaded(&loaded));
    Ok(())
}

fn describe_saved(saved: &Delivered) -> String {
    format!(
        "dump {} saved: {} images, {} bytes",
        saved.snapshot, saved.images, saved.bytes
    )
}

fn describe_loaded(loaded: &Delivered) -> String {
    format!(
        "loaded as dump {}: {} images, {} bytes",
        loaded.snapshot, loaded.images, loaded.bytes
    )
}

fn print_listing(listing: &Listing) {
    println!(
        "memory {} (at most {}), on disk {}",
        ByteSize(listing.memory),
        ByteSize(listing.peak),
        ByteSize(listing.spilled)
    );
    for listed in &listing.snapshots {
        println!(
            "{:>6}  {:>6} images  {:>12}  {}",
            listed.snapshot,
            listed.images,
            ByteSize(listed.bytes).to_string(),
            listed.state
        );
    }
}

/// `DIR` or `NAME=DIR`.
fn target(text: &str) -> Result<(ImageName, PathBuf), String> {
    let (name, directory) = text.split_once('=').unwrap_or((DEFAULT_TARGET, text));
    let name = ImageName::new(name).map_err(|_| format!("{name:?} cannot be a target's name"))?;
    if directory.is_empty() {
        return Err("the directory is missing".to_owned());
    }
    Ok((name, Path::new(directory).to_owned()))
}

/// `HOST:PORT` or `NAME=HOST:PORT`.
fn page_server(text: &str) -> Result<(ImageName, String), String> {
    let (name, address) = text.split_once('=').unwrap_or((DEFAULT_TARGET, text));
    let name = ImageName::new(name).map_err(|_| format!("{name:?} cannot be a target's name"))?;
    Ok((name, host_and_port(address)?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::Cli;

    #[test]
    fn image_commands_are_understood() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(drop);
        for good in [
            "haulier image-proxy --to web2:7001 --dir /run/dump",
            "haulier image-proxy --listen 0.0.0.0:7001 --dir a=/x --dir b=/y --max-memory 1GiB --compress lz4",
            "haulier image-proxy --connection-fd 3 --dir /run/dump --reconnect 5s",
            "haulier image-proxy --to web2:7001 --dir a=/x --dir b=/y --lazy-pages --page-server a=127.0.0.1:9100",
            "haulier image-proxy wait --dir /run/dump --taken",
            "haulier image-proxy list --dir /run/dump --json",
            "haulier image-proxy settle --dir /run/dump --run-here",
            "haulier image-proxy settle --dir /run/dump 4711 --discard",
            "haulier image-cache --listen [::]:7001 --dir /run/restore --lazy-pages",
            "haulier image-cache --listen [::]:7001 --dir /run/restore --spill /var/tmp",
            "haulier image-cache save --dir /run/restore /tmp/images",
            "haulier image-cache save --dir /run/restore --snapshot 2 -",
            "haulier image-cache load --dir /run/restore -",
            "haulier image-cache list --dir /run/restore --json",
            "haulier image-cache drop --dir /run/restore 3",
        ] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good));
        }
        for bad in [
            "haulier image-proxy --dir /run/dump",
            "haulier image-proxy --to web2:7001",
            "haulier image-proxy --to web2:7001 --dir /x --page-server 127.0.0.1:9100",
            "haulier image-proxy --to web2:7001 --listen :1 --dir /x",
            "haulier image-proxy --connection-fd 1 --dir /x",
            "haulier image-proxy settle --dir /x",
            "haulier image-proxy settle --dir /x --run-here --discard",
            "haulier image-proxy settle --run-here",
            "haulier image-cache --listen 0.0.0.0:7001 --dir ../a=/x",
            "haulier image-cache --listen 0.0.0.0:7001 --dir a=",
            "haulier image-cache --listen 0.0.0.0:7001 --dir /x --keep 0",
            "haulier image-cache save --dir /run/restore",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
