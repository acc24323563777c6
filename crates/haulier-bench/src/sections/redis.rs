//! Redis with one client that writes without pause: its longest gap, the service it lost, and what
//! the move cost.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::analysis::{BIN, rate, service};
use crate::contender::{Agents, Contender, Moved, migrate};
use crate::record::Run;
use crate::report::Told;
use crate::sections::{Bench, Link, for_each_run, put_phases};
use crate::stage::{Redis, Stage, resident, sent_bytes};
use crate::writer::Writer;

pub(crate) const NAME: &str = "redis";

const SECOND: Duration = Duration::from_secs(1);
/// How long normal service is measured. From one second to the next the same client of an idle machine has been
/// seen to make anything from 14 000 to 26 000 turns, and whatever is too much counts as lost later.
const NORMAL: Duration = Duration::from_secs(5);
/// How long service may take to come back after the command has ended.
const RECOVERY: Duration = Duration::from_secs(20);
/// An answer on the wire: five bytes, and headers of TCP with timestamps, IP and Ethernet.
const ANSWER: u64 = 5 + 32 + 20 + 14;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for_each_run(bench, NAME, Ready::new, Ready::run)
}

struct Ready {
    stage: Stage,
    agents: Agents,
    redis: Redis,
}

impl Ready {
    fn new(bench: &Bench, link: Link, contender: Contender) -> Result<Ready> {
        let stage = Stage::build(link.rate)?;
        let agents = Agents::start(&stage, contender, &bench.settings)?;
        let redis = Redis::start(&stage, bench.settings.memory)?;
        Ok(Ready {
            stage,
            agents,
            redis,
        })
    }

    /// One migration under the client. An error takes the stage with it.
    fn run(mut self, bench: &Bench, contender: Contender, run: &mut Run) -> Result<Ready> {
        let Redis { pid, keys, server } = self.redis;
        let clock = Instant::now();
        let client = self.stage.client();
        let writer = client.in_network(|| Writer::start(server, keys, clock))??;
        // The first second is for connections and caches to warm up.
        std::thread::sleep(SECOND);
        let count = writer.count();
        std::thread::sleep(NORMAL);
        let normal = (writer.count() - count) as f64 / NORMAL.as_secs_f64();
        let memory = resident(self.stage.source(), pid)?;
        let source = self.stage.source().clone();
        let wire = sent_bytes(&source)?;

        let moved = migrate(&mut self.stage, contender, &bench.settings, pid, &[])
            .with_context(|| self.agents.logs())?;
        let wire = sent_bytes(&source)? - wire;
        let began = (moved.began - clock).as_nanos() as u64;
        let before = began - NORMAL.as_nanos() as u64..began;
        writer.wait_until_normal(normal, RECOVERY);
        let lost_connection = writer.has_ended();
        let answers = writer.stop()?;
        ensure!(!lost_connection, "the client lost its connection");
        figures(run, contender, &answers, before, &moved, memory, wire)?;
        Ok(self)
    }
}

fn figures(
    run: &mut Run,
    contender: Contender,
    answers: &[u64],
    before: std::ops::Range<u64>,
    moved: &Moved,
    memory: u64,
    wire: u64,
) -> Result<()> {
    let seen = service(answers, before.clone()).context("the client had too few answers")?;
    let began = before.end;
    let milliseconds = |time: u64| time as f64 / 1e6;
    run.put("normal_per_s", seen.normal);
    run.put("usual_gap_ms", milliseconds(seen.usual_gap));
    run.put("usual_loss_ms", seen.usual_loss * 1e3);
    run.put("gap_ms", milliseconds(seen.gap.end - seen.gap.start));
    run.put("lost_s", seen.lost);
    run.put("lost_since_gap_s", seen.lost_since_gap);
    run.put("back_s", seen.back.map(|back| (back - began) as f64 / 1e9));
    run.put("command_s", (moved.ended - moved.began).as_secs_f64());
    run.put("memory_mib", memory as f64 / f64::from(1 << 20));
    // What the source answered to the client is not the migration's.
    let answered = answers.partition_point(|at| *at < seen.gap.start)
        - answers.partition_point(|at| *at < began);
    let wire = wire.saturating_sub(answered as u64 * ANSWER);
    run.put("wire_mib", wire as f64 / f64::from(1 << 20));

    let told = Told(&moved.report);
    run.put("downtime_ms", told.number("downtime_ms"));
    run.put("predicted_ms", told.number("predicted_ms"));
    run.put("rounds", told.round_count());
    run.put("remote_faults", told.number("faults.remote"));
    run.put("fault_median_us", told.fault_us("histogram", 0.5));
    run.put("fault_p99_us", told.fault_us("histogram", 0.99));
    run.put(
        "remote_fault_median_us",
        told.fault_us("remote_histogram", 0.5),
    );
    run.put(
        "remote_fault_p99_us",
        told.fault_us("remote_histogram", 0.99),
    );
    put_phases(run, &told);
    if let Contender::Haulier(_) = contender {
        let rewritten = told.rewritten().unwrap_or(0.0);
        run.put("rewritten_mib", rewritten / f64::from(1 << 20));
        run.put("wire_ratio", wire as f64 / (memory as f64 + rewritten));
    }
    if let Some((start, _)) = told.rounds_ms() {
        // Until the client was served no more: haulier's clock began a little after ours.
        let start = began + (start * 1e6) as u64;
        if start + BIN < seen.gap.start {
            let share = rate(answers, start..seen.gap.start) / seen.normal;
            run.put("during_rounds_percent", 100.0 * share);
        }
    }
    let first = began.saturating_sub(SECOND.as_nanos() as u64);
    let last = answers.last().copied().unwrap_or(first);
    run.answers = (first..last)
        .step_by(BIN as usize)
        .map(|start| (rate(answers, start..start + BIN) * BIN as f64 / 1e9).round() as u64)
        .collect();
    run.report = moved.report.clone();
    Ok(())
}
