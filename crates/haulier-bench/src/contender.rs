//! What is compared: haulier's modes and CRIU alone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use haulier_lab::{Captured, HostCommand};
use serde_json::Value;

use crate::criu::{self, Way};
use crate::settings::Settings;
use crate::stage::{ADDRESS, Stage};

const HAULIER_PORT: u16 = 7000;
const PATIENCE: Duration = Duration::from_secs(300);

/// One way to move a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    /// haulier in the mode of that name.
    Haulier(&'static str),
    /// CRIU alone.
    Criu(Way),
}

impl Contender {
    /// All, the peers first.
    pub(crate) const ALL: [Contender; 6] = [
        Contender::Criu(Way::Copy),
        Contender::Criu(Way::Lazy),
        Contender::Haulier("stop-and-copy"),
        Contender::Haulier("pre-copy"),
        Contender::Haulier("post-copy"),
        Contender::Haulier("hybrid"),
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Contender::Haulier(mode) => mode,
            Contender::Criu(Way::Copy) => "criu-copy",
            Contender::Criu(Way::Lazy) => "criu-lazy-pages",
        }
    }

    /// Whether the haulier at hand can do it.
    pub(crate) fn is_available(self, settings: &Settings) -> bool {
        match self {
            // Without modes there is one way, which is this.
            Contender::Haulier("stop-and-copy") | Contender::Criu(_) => true,
            Contender::Haulier(_) => settings.has_modes,
        }
    }
}

/// Agents that run as long as a stage is used.
#[derive(Default)]
pub(crate) struct Agents {
    servers: Vec<Captured>,
}

impl Agents {
    /// Readies both hosts for a contender.
    pub(crate) fn start(
        stage: &Stage,
        contender: Contender,
        settings: &Settings,
    ) -> Result<Agents> {
        let hosts = [stage.lab.host(1), stage.lab.host(2)];
        let mut agents = Agents::default();
        for host in hosts {
            match contender {
                Contender::Criu(_) => criu::install(host)?,
                Contender::Haulier(_) => {
                    let listen = format!("{}:{HAULIER_PORT}", host.name());
                    let server = haulier(host.command(&settings.haulier), settings)
                        .args(["serve", "--listen", &listen])
                        .spawn_captured()?;
                    server.wait_for_output("listening on", PATIENCE)?;
                    agents.servers.push(server);
                }
            }
        }
        Ok(agents)
    }

    /// What haulier's servers said.
    pub(crate) fn logs(&self) -> String {
        let logs = self
            .servers
            .iter()
            .filter_map(|server| server.stderr().ok());
        logs.collect::<Vec<_>>().join("\n")
    }
}

/// A migration as its command saw it.
#[derive(Debug, Clone)]
pub(crate) struct Moved {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// haulier's own report; null for the peers.
    pub(crate) report: Value,
}

/// Moves the target and waits until all of it is at the destination. `options` are for haulier.
pub(crate) fn migrate(
    stage: &mut Stage,
    contender: Contender,
    settings: &Settings,
    pid: i32,
    options: &[&str],
) -> Result<Moved> {
    let moved = match contender {
        Contender::Haulier(mode) => by_haulier(stage, mode, settings, pid, options)?,
        Contender::Criu(way) => {
            let prepared = criu::prepare(stage, way, &settings.criu)?;
            let began = Instant::now();
            criu::migrate(stage, way, &settings.criu, pid, prepared)?;
            Moved {
                began,
                ended: Instant::now(),
                report: Value::Null,
            }
        }
    };
    stage.check_moved(pid)?;
    if let Contender::Criu(_) = contender {
        criu::clear(stage.source())?;
        criu::clear(stage.destination())?;
    }
    stage.moved();
    Ok(moved)
}

fn by_haulier(
    stage: &Stage,
    mode: &str,
    settings: &Settings,
    pid: i32,
    options: &[&str],
) -> Result<Moved> {
    let (pid, to) = (pid.to_string(), stage.destination().name());
    let destination = format!("{to}:{HAULIER_PORT}");
    let moved_ip = format!("{ADDRESS}/24@eth0");
    let mut command = haulier(stage.source().command(&settings.haulier), settings)
        .args([
            "migrate",
            &pid,
            &destination,
            "--move-ip",
            &moved_ip,
            "--json",
        ])
        .args(options);
    if settings.has_modes {
        command = command.args(["--mode", mode]);
    } else if mode != "stop-and-copy" {
        bail!("this haulier has no --mode");
    }
    if settings.has_compress && !options.contains(&"--compress") {
        command = command.args(["--compress", "none"]);
    }
    let began = Instant::now();
    let output = command.output(PATIENCE)?;
    let ended = Instant::now();
    ensure!(
        output.status.success(),
        "haulier migrate --mode {mode} ended with {}: {}{}",
        output.status,
        output.stderr,
        output.stdout
    );
    let report = last_json(&output.stdout)
        .with_context(|| format!("haulier's report is no JSON: {}", output.stdout))?;
    Ok(Moved {
        began,
        ended,
        report,
    })
}

/// haulier with the CRIU that the peers use.
fn haulier(command: HostCommand, settings: &Settings) -> HostCommand {
    command.env("HAULIER_CRIU", &settings.criu)
}

/// The report: all of the output, or its last line if events come before.
fn last_json(text: &str) -> Option<Value> {
    serde_json::from_str(text)
        .ok()
        .or_else(|| serde_json::from_str(text.lines().last()?).ok())
}

#[cfg(test)]
mod tests {
    use super::last_json;

    #[test]
    fn a_report_may_follow_events() {
        assert_eq!(last_json("{\n\"a\": 1\n}\n").unwrap()["a"], 1);
        assert_eq!(last_json("{\"e\":1}\n{\"a\":2}\n").unwrap()["a"], 2);
        assert!(last_json("moved").is_none());
    }
}
