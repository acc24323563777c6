//! How fast memory goes over the link, beside one stream of iperf3.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::contender::{Agents, Contender, migrate};
use crate::record::Run;
use crate::report::Told;
use crate::sections::{Bench, LINKS, Link};
use crate::stage::{Stage, start_threads};

pub(crate) const NAME: &str = "bulk";

/// Ways to send, with haulier's options.
const WAYS: [(&str, &[&str]); 2] = [("1-stream", &["--streams", "1"]), ("default", &[])];

/// A frame on the wire per segment of TCP with timestamps, for an MTU of 1500.
const HEADERS: f64 = 1514.0 / 1448.0;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for link in LINKS {
        let name = |way: &str| format!("{NAME}/{}/{way}", link.name);
        if !WAYS.iter().any(|(way, _)| bench.settings.wants(&name(way))) {
            continue;
        }
        for number in 1..=bench.settings.runs {
            bench.say(&format!("{} {number}/{}", name("*"), bench.settings.runs));
            for (way, options) in WAYS {
                let mut run = Run::new(&name(way), number);
                if let Err(error) = measure(bench, link, options, &mut run) {
                    bench.failed(&mut run, &error);
                }
                bench.record.add(run)?;
            }
        }
    }
    Ok(())
}

/// iperf3 and haulier, one after the other between the same hosts.
fn measure(bench: &Bench, link: Link, options: &[&str], run: &mut Run) -> Result<()> {
    let mode = if bench.settings.has_modes {
        "pre-copy"
    } else {
        "stop-and-copy"
    };
    let contender = Contender::Haulier(mode);
    let mut stage = Stage::build(link.rate)?;
    let agents = Agents::start(&stage, contender, &bench.settings)?;
    let pid = start_threads(&stage, bench.settings.memory)?;
    let iperf = iperf(&stage)?;
    let moved = migrate(&mut stage, contender, &bench.settings, pid, options)
        .with_context(|| agents.logs())?;
    let haulier = Told(&moved.report)
        .bulk_rate()
        .context("no rate in haulier's report")?;
    run.put("iperf3_mbit", iperf / 1e6);
    run.put("haulier_mbit", haulier * 8.0 / 1e6);
    run.put("of_iperf3_percent", 100.0 * haulier * 8.0 / iperf);
    if link.rate.is_some() {
        run.put("of_line_percent", 100.0 * haulier * 8.0 * HEADERS / 1e9);
        run.put("iperf3_of_line_percent", 100.0 * iperf * HEADERS / 1e9);
    }
    run.report = moved.report;
    Ok(())
}

/// Bits per second of one stream from the source to the destination.
fn iperf(stage: &Stage) -> Result<f64> {
    let (from, to) = (stage.source(), stage.destination());
    let server = to
        .command("iperf3")
        .args(["-s", "-1", "--forceflush"])
        .spawn_captured()?;
    server.wait_for_output("listening", Duration::from_secs(10))?;
    let output = from.run(["iperf3", "-c", to.name(), "-t", "2", "-J"])?;
    let _ = server.finish(Duration::from_secs(10))?;
    ensure!(
        output.status.success(),
        "iperf3: {}{}",
        output.stderr,
        output.stdout
    );
    let told: Value = serde_json::from_str(&output.stdout).context("iperf3's report")?;
    Told(&told)
        .number("end.sum_received.bits_per_second")
        .context("no rate in iperf3's report")
}
