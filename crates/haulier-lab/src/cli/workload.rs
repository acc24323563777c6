//! `haulier-lab workload` and `haulier-lab client`.

use anyhow::Result;
use clap::{ArgGroup, Args, Subcommand};
use haulier_lab::workloads::{
    Gap, OpenLoop, OpenLoopClient, Protocol, RedisClient, Report, check_redis, connections, echo,
    fill_redis, threads,
};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

#[derive(Subcommand)]
pub(crate) enum Workload {
    /// Threads that rewrite memory and check it. Ends on SIGTERM; fails when memory is not as it
    /// should be.
    Threads {
        /// How many threads.
        #[arg(long, default_value_t = 4)]
        threads: usize,
        /// How much memory in all, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 64)]
        memory: usize,
        /// How many pages all threads together rewrite each second [default: as many as they can].
        #[arg(long, value_name = "N")]
        pages_per_second: Option<u64>,
        /// Where to write a status line (JSON) every 100 ms.
        #[arg(long, value_name = "FILE")]
        report: PathBuf,
    },
    /// A server on one thread that keeps a counter for each of its TCP connections.
    Connections {
        /// The address to listen on.
        #[arg(long, value_name = "IP:PORT", default_value = "[::]:7000")]
        listen: SocketAddr,
        /// How many connections it takes at a time.
        #[arg(long, default_value_t = 10_000)]
        count: usize,
    },
    /// A server on one thread that sends back what comes, over TCP and UDP. Fails when its memory
    /// is not as it should be.
    Echo {
        /// The address to listen on; for UDP not a wildcard.
        #[arg(long, value_name = "IP:PORT")]
        listen: SocketAddr,
        /// Memory that is rewritten and checked beside, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 0)]
        memory: usize,
        /// How many of its pages are rewritten each second [default: as many as a thread can].
        #[arg(long, value_name = "N")]
        pages_per_second: Option<u64>,
    },
}

#[derive(Args)]
pub(crate) struct Data {
    /// Address of the Redis server.
    #[arg(long, value_name = "IP:PORT")]
    addr: SocketAddr,
    /// How much data, in MiB.
    #[arg(long)]
    mib: u64,
    /// What the data is made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Subcommand)]
pub(crate) enum Client {
    /// Use a Redis server over one connection and check every answer. Fails if one was wrong, or
    /// if the connection was lost.
    #[command(group = ArgGroup::new("end").required(true).args(["seconds", "until_file"]))]
    Redis {
        /// Address of the Redis server.
        #[arg(long, value_name = "IP:PORT")]
        addr: SocketAddr,
        /// Run that long.
        #[arg(long = "for", value_name = "SECONDS")]
        seconds: Option<u64>,
        /// Run until this file exists.
        #[arg(long, value_name = "PATH")]
        until_file: Option<PathBuf>,
        /// Print the report as JSON, and no progress.
        #[arg(long)]
        json: bool,
    },
    /// Fill a Redis server with random values that `check-redis` can recognise.
    FillRedis(Data),
    /// Compare every value that `fill-redis` stored.
    CheckRedis(Data),
    /// Send at fixed times over many TCP connections and UDP sockets, whether answers come or not,
    /// and time each answer from when its request was due. Fails if an answer was wrong or missing.
    #[command(group = ArgGroup::new("stop").required(true).args(["seconds", "until_file"]))]
    OpenLoop {
        /// Address of the server: the `echo` workload, or Redis.
        #[arg(long, value_name = "IP:PORT")]
        addr: SocketAddr,
        /// How many TCP connections.
        #[arg(long, default_value_t = 100)]
        tcp: usize,
        /// How many UDP sockets.
        #[arg(long, default_value_t = 0)]
        udp: usize,
        /// From one request of a client to its next, in milliseconds.
        #[arg(long, value_name = "MS", default_value_t = 5)]
        every: u64,
        /// The server is Redis; its ECHO is used. No UDP then.
        #[arg(long, conflicts_with = "udp")]
        redis: bool,
        /// Run that long.
        #[arg(long = "for", value_name = "SECONDS")]
        seconds: Option<u64>,
        /// Run until this file exists.
        #[arg(long, value_name = "PATH")]
        until_file: Option<PathBuf>,
        /// Print the report as JSON, each client included.
        #[arg(long)]
        json: bool,
    },
    /// Open many connections to the `connections` workload and check every answer.
    Connections {
        /// Address of the server.
        #[arg(long, value_name = "IP:PORT")]
        addr: SocketAddr,
        /// How many connections.
        #[arg(long, default_value_t = 200)]
        count: usize,
        /// How long to go on.
        #[arg(long = "for", value_name = "SECONDS", default_value_t = 10)]
        seconds: u64,
    },
}

impl Workload {
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Workload::Threads {
                threads,
                memory,
                pages_per_second,
                report,
            } => {
                let config = threads::Config {
                    threads,
                    memory_mib: memory,
                    pages_per_second,
                    report,
                };
                Ok(verdict(threads::run(&config)?.errors == 0))
            }
            Workload::Connections { listen, count } => {
                connections::serve(listen, count)?;
                Ok(ExitCode::SUCCESS)
            }
            Workload::Echo {
                listen,
                memory,
                pages_per_second,
            } => {
                echo::serve(&echo::Config {
                    listen,
                    memory_mib: memory,
                    pages_per_second,
                })?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Client {
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Client::Redis {
                addr,
                seconds,
                until_file,
                json,
            } => use_redis(addr, over(seconds, until_file), json),
            Client::OpenLoop {
                addr,
                tcp,
                udp,
                every,
                redis,
                seconds,
                until_file,
                json,
            } => {
                let protocol = if redis {
                    Protocol::Redis
                } else {
                    Protocol::Echo
                };
                let config = OpenLoop {
                    server: addr,
                    tcp,
                    udp,
                    interval: Duration::from_millis(every),
                    protocol,
                };
                send_open_loop(config, over(seconds, until_file), json)
            }
            Client::FillRedis(data) => {
                fill_redis(data.addr, data.seed, data.mib << 20)?;
                Ok(ExitCode::SUCCESS)
            }
            Client::CheckRedis(data) => {
                let check = check_redis(data.addr, data.seed, data.mib << 20)?;
                println!("{} keys, {} wrong", check.keys, check.wrong);
                if let Some(first) = check.first_wrong {
                    println!("{first}");
                }
                Ok(verdict(check.wrong == 0))
            }
            Client::Connections {
                addr,
                count,
                seconds,
            } => {
                let mut client = connections::Client::open(addr, count)?;
                let (began, mut rounds) = (Instant::now(), 0_u64);
                while began.elapsed().as_secs() < seconds {
                    client.round()?;
                    rounds += 1;
                }
                println!("{count} connections, {rounds} rounds, no error");
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn verdict(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Tells whether the time is up, or the file there.
fn over(seconds: Option<u64>, until_file: Option<PathBuf>) -> impl Fn() -> bool {
    let began = Instant::now();
    move || {
        seconds.is_some_and(|limit| began.elapsed().as_secs() >= limit)
            || until_file.as_ref().is_some_and(|file| file.exists())
    }
}

fn send_open_loop(config: OpenLoop, over: impl Fn() -> bool, json: bool) -> Result<ExitCode> {
    let client = OpenLoopClient::start(config)?;
    while !over() {
        thread::sleep(Duration::from_millis(20));
    }
    let report = client.stop();
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        for (name, sum) in [("TCP", &report.tcp), ("UDP", &report.udp)] {
            println!(
                "{name}: {} clients  {} requests  {} lost  median {:.2} ms  99 % {:.2} ms  longest {:.1} ms",
                sum.clients, sum.sent, sum.lost, sum.median_ms, sum.p99_ms, sum.longest_ms,
            );
        }
        for error in report.errors() {
            println!("error: {error}");
        }
    }
    let good = report.errors().is_empty() && report.tcp.lost == 0 && report.udp.lost == 0;
    Ok(verdict(good))
}

fn use_redis(address: SocketAddr, over: impl Fn() -> bool, json: bool) -> Result<ExitCode> {
    let client = RedisClient::start(address)?;
    let mut next_progress = Instant::now() + Duration::from_secs(1);
    while !over() && !client.has_ended() {
        thread::sleep(Duration::from_millis(20));
        if !json && Instant::now() >= next_progress {
            next_progress += Duration::from_secs(1);
            println!("{}", in_words(&client.snapshot()));
        }
    }
    let report = client.stop();
    if json {
        println!("{}", serde_json::to_string(&ReportJson::from(&report))?);
    } else {
        println!("{}", in_words(&report));
        for error in &report.errors {
            println!("error: {error}");
        }
    }
    Ok(verdict(report.error_count == 0))
}

fn in_words(report: &Report) -> String {
    format!(
        "{:5.1} s  {:9} operations  {} errors  longest gap {:.1} ms",
        report.duration.as_secs_f64(),
        report.operations,
        report.error_count,
        milliseconds(report.longest_gap()),
    )
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The report for programs. Times are milliseconds; `began_at_unix_ms` is since 1970.
#[derive(Serialize)]
struct ReportJson<'a> {
    operations: u64,
    error_count: u64,
    errors: &'a [String],
    duration_ms: f64,
    longest_gap_ms: f64,
    gaps: Vec<GapJson>,
}

#[derive(Serialize)]
struct GapJson {
    began_ms: f64,
    began_at_unix_ms: f64,
    length_ms: f64,
}

impl<'a> From<&'a Report> for ReportJson<'a> {
    fn from(report: &'a Report) -> ReportJson<'a> {
        ReportJson {
            operations: report.operations,
            error_count: report.error_count,
            errors: &report.errors,
            duration_ms: milliseconds(report.duration),
            longest_gap_ms: milliseconds(report.longest_gap()),
            gaps: report.gaps.iter().map(GapJson::from).collect(),
        }
    }
}

impl From<&Gap> for GapJson {
    fn from(gap: &Gap) -> GapJson {
        // A clock before 1970 is not worth a failure.
        let since_1970 = gap.began_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        GapJson {
            began_ms: milliseconds(gap.began),
            began_at_unix_ms: milliseconds(since_1970),
            length_ms: milliseconds(gap.length),
        }
    }
}
