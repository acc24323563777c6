//! Whether this host can take a target: everything that can be known before it is touched.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use haulier_criu::find::Version;
use haulier_proto::message::{Findings, Problem, Requirements};
use haulier_targets::network::{self, MoveIp};
use haulier_targets::{files, host};
use haulier_transport::wait::Cancel;

use crate::destination::Shared;

/// Memory that has to remain for everything else.
const SPARE_MEMORY: u64 = 64 << 20;
/// How long what a connection that was cut leaves behind takes to go, once the cut is noticed.
const LETTING_GO: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(50);
/// Most problems of a kind that are listed; the first ones tell enough.
const MOST_LISTED: usize = 5;

/// What stands in the way. `stop` tells that the source has gone.
pub(crate) fn findings(shared: &Shared, needs: &Requirements, stop: &Cancel) -> Findings {
    let mut problems = Vec::new();
    problems.extend(platform(shared, needs));
    problems.extend(criu(shared, needs));
    problems.extend(memory(shared, needs));
    problems.extend(places(shared, needs, stop));
    problems.extend(
        files::problems_with(&needs.files)
            .into_iter()
            .take(MOST_LISTED),
    );
    let criu_version = shared
        .criu
        .as_ref()
        .map_or(0, |criu| criu.version().number());
    Findings {
        problems,
        criu_version,
        kernel: shared.host.kernel.clone(),
    }
}

/// Process numbers and addresses. A target whose last move ended with the link may come again before
/// this host's kernel has noticed that end, and what was made for it is gone.
fn places(shared: &Shared, needs: &Requirements, stop: &Cancel) -> Vec<Problem> {
    // A cut is noticed at the kernel's first probe.
    let deadline = Instant::now() + shared.options.link_time.attempt() + LETTING_GO;
    loop {
        // Asked first: what one that ends in this moment has left is seen when it is looked again.
        let others = shared.registry.undecided() > 1;
        let mut problems = numbers(needs);
        problems.extend(addresses(needs));
        let late = Instant::now() > deadline || shared.stop.is_cancelled();
        if problems.is_empty() || !others || late || stop.sleep(LOOK) {
            return problems;
        }
    }
}

fn platform(shared: &Shared, needs: &Requirements) -> Vec<Problem> {
    let mut problems = Vec::new();
    if needs.architecture != shared.host.architecture {
        problems.push(problem(
            format!(
                "this host is {}, the source {}",
                shared.host.architecture, needs.architecture
            ),
            "move it to a host of the same architecture",
        ));
    }
    let flags: BTreeSet<String> = needs.cpu_flags.iter().cloned().collect();
    let lacking = shared.host.lacks(&flags);
    if !lacking.is_empty() {
        problems.push(problem(
            format!("this host's processor lacks {}", lacking.join(" ")),
            "move it to a host with these features, or, if it uses none of them, pass \
             --skip-cpu-check",
        ));
    }
    problems
}

fn criu(shared: &Shared, needs: &Requirements) -> Vec<Problem> {
    let criu = match &shared.criu {
        Ok(criu) => criu,
        Err(reason) => return vec![problem(reason.clone(), "then start haulier serve again")],
    };
    let theirs = Version::from_number(needs.criu_version);
    let mut problems = Vec::new();
    if criu.version() < theirs {
        problems.push(problem(
            format!("this host has {criu}, the source {theirs}: older ones cannot read its images"),
            "install the same CRIU here, or a newer one",
        ));
    }
    if !criu.has_lazy_pages() {
        problems.push(problem(
            format!("{criu} has no lazy pages here"),
            "use a kernel with userfaultfd",
        ));
    }
    problems
}

fn numbers(needs: &Requirements) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (number, name) in host::taken_numbers(&needs.pids)
        .into_iter()
        .take(MOST_LISTED)
    {
        problems.push(problem(
            format!("process number {number} is taken here, by {name}"),
            "end that process, or run the target where numbers do not collide",
        ));
    }
    let limit = host::number_limit();
    if needs.pids.iter().any(|number| *number >= limit) {
        problems.push(problem(
            format!("this host gives out process numbers up to {limit} only"),
            "raise kernel.pid_max here to that of the source",
        ));
    }
    problems
}

fn memory(shared: &Shared, needs: &Requirements) -> Option<Problem> {
    let available = host::available_memory();
    let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec();
    if needs.memory_bytes.saturating_add(SPARE_MEMORY) > available {
        return Some(problem(
            format!(
                "it has {}, this host {} free",
                size(needs.memory_bytes),
                size(available)
            ),
            "free memory here",
        ));
    }
    let allowed = shared.options.max_memory;
    (needs.memory_bytes > allowed).then(|| {
        problem(
            format!(
                "it has {}, this host allows {}",
                size(needs.memory_bytes),
                size(allowed)
            ),
            "raise --max-memory of haulier serve",
        )
    })
}

fn addresses(needs: &Requirements) -> Vec<Problem> {
    let present = match network::addresses() {
        Ok(present) => present,
        Err(error) => return vec![problem(error.to_string(), "see why")],
    };
    let mut problems = Vec::new();
    if let Err(error) = network::probe() {
        problems.push(problem(
            error.to_string(),
            "without it its connections cannot be kept",
        ));
    }
    let mut moving = Vec::new();
    for text in &needs.move_addresses {
        let address: MoveIp = match text.parse() {
            Ok(address) => address,
            Err(error) => {
                problems.push(problem(
                    format!("{text}: {error}"),
                    "name it as ADDRESS/PREFIX@INTERFACE",
                ));
                continue;
            }
        };
        if !present
            .iter()
            .any(|found| found.interface == address.interface())
            && !interface_exists(&address)
        {
            problems.push(problem(
                format!(
                    "there is no interface {} here for {}",
                    address.interface(),
                    address.ip()
                ),
                "name the interface alike on both hosts",
            ));
        }
        if present.iter().any(|found| found.ip == address.ip()) {
            problems.push(problem(
                format!("the address {} is here already", address.ip()),
                "remove it from this host",
            ));
        }
        moving.push(address.ip());
    }
    for text in &needs.bound_addresses {
        let here = |ip: IpAddr| present.iter().any(|found| found.ip == ip) || moving.contains(&ip);
        if !text.parse().is_ok_and(here) {
            problems.push(problem(
                format!("it listens on {text}, which is not an address of this host"),
                "move the address along with --move-ip",
            ));
        }
    }
    problems.extend(ports(needs));
    problems
}

fn ports(needs: &Requirements) -> Vec<Problem> {
    let taken = network::listening_here().unwrap_or_default();
    let overlap = |a: &SocketAddr, b: &SocketAddr| {
        a.port() == b.port()
            && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
    };
    needs
        .listening
        .iter()
        .filter_map(|text| text.parse::<SocketAddr>().ok())
        .filter(|wanted| taken.iter().any(|found| overlap(found, wanted)))
        .map(|wanted| {
            problem(
                format!("port {} is taken here", wanted.port()),
                "stop what listens on it",
            )
        })
        .collect()
}

fn interface_exists(address: &MoveIp) -> bool {
    std::path::Path::new("/sys/class/net")
        .join(address.interface())
        .exists()
}

fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem {
        what: what.into(),
        remedy: remedy.into(),
    }
}
