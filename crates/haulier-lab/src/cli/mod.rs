//! The command line.

mod workload;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use haulier_lab::{Lab, LabConfig, Process, Signal, running_labs};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// Simulated hosts on one machine, to try live migration without two machines.
///
/// Each host has its own network (eth0, 10.77.0.N and fd77::N), PIDs, mounts, host name and
/// cgroups, and shares the machine's files except /run, /srv, /dev/shm, /var/lib/haulier and
/// /var/log/haulier. All hosts hang on one bridge. Needs root.
#[derive(Parser)]
#[command(name = "haulier-lab", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Args)]
struct Which {
    /// Which lab, if several run.
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a lab and leave it running.
    Up {
        /// How many hosts, 1 to 10.
        #[arg(long, default_value_t = 2)]
        hosts: usize,
        #[command(flatten)]
        which: Which,
    },
    /// Run a command on a host.
    ///
    /// Its input, output and exit code are those of this command (a command killed by signal N
    /// gives 128 + N); SIGINT and SIGTERM are passed on to it and to its
    /// process group.
    Exec {
        /// host1 or 1, host2 or 2, and so on.
        host: String,
        #[command(flatten)]
        which: Which,
        /// Start it in the background, as a daemon that can be migrated (session of its own,
        /// /dev/null as input and output), and print its PID on the host.
        #[arg(short, long)]
        detach: bool,
        /// Start it in this folder of the host.
        #[arg(long, default_value = "/")]
        cwd: std::path::PathBuf,
        /// Start it in a cgroup of its own, of this name.
        #[arg(long)]
        cgroup: Option<String>,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Limit the rate of every link, each way.
    Shape {
        /// For example 100mbit or 1gbit; `off` lifts the limit.
        rate: String,
        #[command(flatten)]
        which: Which,
    },
    /// Cut a host off the network: packets vanish both ways, and nobody is told.
    Cut {
        /// host1 or 1, and so on.
        host: String,
        #[command(flatten)]
        which: Which,
    },
    /// Undo a cut.
    Mend {
        /// host1 or 1, and so on.
        host: String,
        #[command(flatten)]
        which: Which,
    },
    /// Show the running labs, their hosts and what runs there.
    Status,
    /// Stop a lab with everything on its hosts.
    Down {
        #[command(flatten)]
        which: Which,
    },
    /// Programs to migrate, made to be checked. Run them on a host.
    #[command(subcommand)]
    Workload(workload::Workload),
    /// Clients that check a server without pause while it is migrated. Run them on a host.
    #[command(subcommand)]
    Client(workload::Client),
}

pub(crate) fn run() -> Result<ExitCode> {
    match Cli::parse().verb {
        Verb::Up { hosts, which } => up(hosts, &which.name)?,
        Verb::Exec {
            host,
            which,
            detach,
            cwd,
            cgroup,
            command,
        } => {
            let lab = Lab::attach(&which.name)?;
            let [program, arguments @ ..] = command.as_slice() else {
                bail!("no command given")
            };
            let mut started = lab
                .find_host(&host)?
                .command(program)
                .args(arguments)
                .cwd(cwd);
            if let Some(cgroup) = cgroup {
                started = started.cgroup(&cgroup);
            }
            if !detach {
                started = started
                    .stdin_descriptor(std::io::stdin().as_fd().try_clone_to_owned()?)
                    .stdout_descriptor(std::io::stdout().as_fd().try_clone_to_owned()?)
                    .stderr_descriptor(std::io::stderr().as_fd().try_clone_to_owned()?);
                return follow(started.setsid().spawn()?);
            }
            println!("{}", started.setsid().spawn()?.pid());
        }
        Verb::Shape { rate, which } => {
            let rate = if rate == "off" {
                None
            } else {
                Some(rate.as_str())
            };
            Lab::attach(&which.name)?.shape(rate)?;
        }
        Verb::Cut { host, which } => {
            let lab = Lab::attach(&which.name)?;
            lab.cut(lab.find_host(&host)?.number())?;
        }
        Verb::Mend { host, which } => {
            let lab = Lab::attach(&which.name)?;
            lab.mend(lab.find_host(&host)?.number())?;
        }
        Verb::Status => status()?,
        Verb::Down { which } => Lab::attach(&which.name)?.stop()?,
        Verb::Workload(workload) => return workload.run(),
        Verb::Client(client) => return client.run(),
    }
    Ok(ExitCode::SUCCESS)
}

fn up(hosts: usize, name: &str) -> Result<()> {
    let lab = Lab::start_detached(LabConfig::hosts(hosts).name(name))?;
    let option = if name == "lab" {
        String::new()
    } else {
        format!(" --name {name}")
    };
    for host in lab.hosts() {
        println!("{:8} {:12} {}", host.name(), host.ipv4(), host.ipv6());
    }
    println!();
    println!("a shell on a host    haulier-lab exec{option} host1 -- bash");
    println!("something to move    haulier-lab exec{option} host1 -d -- redis-server --save ''");
    println!("a slower network     haulier-lab shape{option} 1gbit");
    println!("what runs where      haulier-lab status");
    println!("the end              haulier-lab down{option}");
    Ok(())
}

/// Waits for the command, passing signals on to it and to its children, as a terminal would: it has
/// a process group of its own.
fn follow(mut process: Process) -> Result<ExitCode> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot handle signals")?;
    let (host, group) = (process.host().clone(), process.pid());
    thread::spawn(move || {
        for raw in signals.forever() {
            if let Some(signal) = Signal::from_named_raw(raw) {
                // It may have ended meanwhile, and then so do we.
                let _ = host.signal_group(group, signal);
            }
        }
    });
    loop {
        match process.wait(Duration::from_secs(3600)) {
            Ok(status) => {
                let code = status
                    .code()
                    .or_else(|| Some(128 + status.signal()?))
                    .unwrap_or(1);
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
            }
            // It may run as long as it likes.
            Err(haulier_lab::Error::Deadline { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
}

fn status() -> Result<()> {
    let names = running_labs()?;
    if names.is_empty() {
        println!("no lab is running; start one with `haulier-lab up`");
    }
    for name in names {
        let lab = match Lab::attach(&name) {
            Ok(lab) => lab,
            // Just coming up or going down.
            Err(error) => {
                println!("lab {name}: {:#}", anyhow::Error::from(error));
                continue;
            }
        };
        println!("lab {name}");
        for host in lab.hosts() {
            println!("  {:8} {:12} {}", host.name(), host.ipv4(), host.ipv6());
            for process in host.processes().unwrap_or_default() {
                println!(
                    "    {:>7} {} {}",
                    process.pid,
                    process.state,
                    process.argv.join(" ")
                );
            }
        }
        for line in lab
            .describe_network()?
            .lines()
            .filter(|line| interesting(line))
        {
            println!("  {line}");
        }
    }
    Ok(())
}

/// The ports and the limits, without the bookkeeping of devices that have neither.
fn interesting(line: &str) -> bool {
    line.contains(" master ") || line.contains(" tbf ")
}
