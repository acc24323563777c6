//! Many clients that send at fixed times, over TCP and UDP: whether any waited for a
//! retransmission, and whether a datagram was lost.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use haulier_lab::workloads::{OpenLoop, OpenLoopClient, Protocol};

use crate::contender::{Agents, Contender, migrate};
use crate::record::Run;
use crate::report::Told;
use crate::sections::{Bench, Link, for_each_run};
use crate::stage::{ADDRESS, Stage, start_workload};

pub(crate) const NAME: &str = "clients";

const PORT: u16 = 6100;
const TCP: usize = 100;
const INTERVAL: Duration = Duration::from_millis(5);
/// How long they send before and after.
const AROUND: Duration = Duration::from_secs(1);
/// Pages that the server rewrites in a second: 40 MB.
const PAGES_PER_SECOND: &str = "10000";

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    for_each_run(bench, NAME, Ready::new, Ready::run)
}

struct Ready {
    stage: Stage,
    agents: Agents,
    pid: i32,
}

impl Ready {
    fn new(bench: &Bench, link: Link, contender: Contender) -> Result<Ready> {
        let stage = Stage::build(link.rate)?;
        let agents = Agents::start(&stage, contender, &bench.settings)?;
        let listen = format!("{ADDRESS}:{PORT}");
        let memory = (bench.settings.memory >> 20).to_string();
        let echo = ["echo", "--listen", &listen, "--memory", &memory];
        let pid = start_workload(&stage, &echo, PAGES_PER_SECOND, bench.settings.memory)?;
        Ok(Ready { stage, agents, pid })
    }

    fn run(mut self, bench: &Bench, contender: Contender, run: &mut Run) -> Result<Ready> {
        let clients = OpenLoop {
            server: SocketAddr::new(ADDRESS.parse()?, PORT),
            tcp: TCP,
            udp: 1,
            interval: INTERVAL,
            protocol: Protocol::Echo,
        };
        let began = Instant::now();
        let clients = self
            .stage
            .client()
            .in_network(|| OpenLoopClient::start(clients))??;
        std::thread::sleep(AROUND);
        let before = clients.snapshot();
        let moved = migrate(&mut self.stage, contender, &bench.settings, self.pid, &[])
            .with_context(|| self.agents.logs())?;
        std::thread::sleep(AROUND);
        let seen = clients.stop();

        run.put("tcp_longest_ms", seen.tcp.longest_ms);
        run.put("tcp_p999_ms", seen.tcp.p999_ms);
        run.put("tcp_lost", seen.tcp.lost as f64);
        // The age of a lost datagram says nothing but when the clients ended.
        if seen.udp.lost == 0 {
            run.put("udp_longest_ms", seen.udp.longest_ms);
        }
        run.put("udp_lost", seen.udp.lost as f64);
        run.put("udp_doubled", seen.udp.doubled as f64);
        run.put("usual_longest_ms", before.tcp.longest_ms);
        run.put("command_s", (moved.ended - moved.began).as_secs_f64());
        run.put("seconds", began.elapsed().as_secs_f64());
        run.put("downtime_ms", Told(&moved.report).number("downtime_ms"));
        run.report = moved.report;
        let errors: usize = seen.clients.iter().map(|client| client.errors.len()).sum();
        run.put("errors", errors as f64);
        Ok(self)
    }
}
