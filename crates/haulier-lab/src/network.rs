//! The fabric: a network namespace with one bridge, and a veth pair from it to each host.
//!
//! Driven with `ip`, `bridge` and `tc` (iproute2), run in a thread that entered the namespace.

use crate::{Error, Result};
use rustix::fd::AsFd;
use rustix::fd::BorrowedFd;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::thread;

const BRIDGE: &str = "fabric";

/// 10.77.0.N.
pub(crate) fn ipv4_of(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(host).unwrap_or(u8::MAX))
}

/// fd77::N, the number written in hexadecimal digits as it is in decimal, so that host 10 is
/// fd77::10.
pub(crate) fn ipv6_of(host: usize) -> Ipv6Addr {
    let last = u16::from_str_radix(&host.to_string(), 16).unwrap_or(u16::MAX);
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last)
}

/// Lines for /etc/hosts.
pub(crate) fn hosts_file(count: usize) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    for host in 1..=count {
        text.push_str(&format!(
            "{} host{host}\n{} host{host}\n",
            ipv4_of(host),
            ipv6_of(host)
        ));
    }
    text
}

/// Runs `work` in a thread that has entered the network namespace of the process behind `pidfd`,
/// and returns its value. Sockets it opens stay in that namespace.
pub(crate) fn inside<T: Send>(pidfd: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_thread_name_spaces(pidfd, ThreadNameSpaceType::NETWORK)
                .map_err(Error::system("enter a network namespace"))?;
            Ok(work())
        });
        worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes the bridge, in the network namespace of the caller.
///
/// No spanning tree and no forwarding delay, or a new port would stay silent for 30 s; no multicast
/// snooping, or neighbour discovery would depend on a querier that is not there.
pub(crate) fn build_bridge() -> Result<()> {
    // The fabric itself takes no part in the traffic.
    let ipv6_off = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    std::fs::write(ipv6_off, "1").map_err(Error::file("write", ipv6_off))?;
    tool("ip", "link set lo up")?;
    tool(
        "ip",
        &format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
    )?;
    tool("ip", &format!("link set {BRIDGE} up"))
}

/// Makes the veth pair of a host, in the network namespace of the fabric.
pub(crate) fn plug(host: usize, init: i32) -> Result<()> {
    tool(
        "ip",
        &format!("link add host{host} type veth peer name eth0 netns {init}"),
    )?;
    tool("ip", &format!("link set host{host} master {BRIDGE} up"))
}

/// Brings up loopback and eth0, in the network namespace of the host.
pub(crate) fn configure(host: usize) -> Result<()> {
    tool("ip", "link set lo up")?;
    tool("ip", &format!("addr add {}/24 dev eth0", ipv4_of(host)))?;
    tool(
        "ip",
        &format!("addr add {}/64 dev eth0 nodad", ipv6_of(host)),
    )?;
    tool("ip", "link set eth0 up")
}

/// Whether frames pass a bridge port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Port {
    /// Forwarding.
    Open,
    /// Frames are dropped both ways, carrier stays: to the host it looks like a broken switch, not
    /// like a pulled plug.
    BlackHole,
}

/// Sets the port of a host, in the network namespace of the fabric. The numbers are the bridge's
/// port states (BR_STATE_DISABLED, BR_STATE_FORWARDING in linux/if_bridge.h).
pub(crate) fn set_port(host: usize, port: Port) -> Result<()> {
    let state = match port {
        Port::BlackHole => 0,
        Port::Open => 3,
    };
    tool("bridge", &format!("link set dev host{host} state {state}"))
}

/// Limits what a device sends, in the caller's network namespace; `None` lifts the limit.
pub(crate) fn limit(device: &str, rate: Option<Rate>) -> Result<()> {
    let Some(rate) = rate else {
        // Without a limit there is no qdisc to delete, and tc has no "delete if there".
        let shown = output("tc", &format!("qdisc show dev {device}"))?;
        if shown.contains(" tbf ") {
            tool("tc", &format!("qdisc del dev {device} root"))?;
        }
        return Ok(());
    };
    let (burst, queue) = (rate.burst(), rate.queue());
    let bits = rate.bits_per_second;
    tool(
        "tc",
        &format!("qdisc replace dev {device} root tbf rate {bits}bit burst {burst} limit {queue}"),
    )
}

/// A link rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    bits_per_second: u64,
}

impl Rate {
    /// Reads `100mbit`, `2.5gbit`, `64kbit`.
    ///
    /// # Errors
    /// [`Error::BadRate`], also for a rate below 8 kbit or above 100 gbit.
    pub fn parse(text: &str) -> Result<Rate> {
        let bad = || Error::BadRate {
            text: text.to_owned(),
        };
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match lower.get(digits.len()..).unwrap_or_default() {
            "bit" => 1.0,
            "kbit" => 1e3,
            "mbit" => 1e6,
            "gbit" => 1e9,
            _ => return Err(bad()),
        };
        let bits = digits.trim().parse::<f64>().map_err(|_| bad())? * unit;
        if !(8e3..=1e11).contains(&bits) {
            return Err(bad());
        }
        // In range by the check above.
        Ok(Rate {
            bits_per_second: bits as u64,
        })
    }

    /// Bits per second.
    pub fn bits_per_second(self) -> u64 {
        self.bits_per_second
    }

    /// What may be sent at once: 4 ms worth, so that timer slack does not cost rate, and at least
    /// one segmentation-offload packet of 64 KiB.
    fn burst(self) -> u64 {
        (self.bits_per_second / 8 / 250).max(72 * 1024)
    }

    /// What may wait beyond the burst, in bytes: 20 ms worth, as a switch with modest buffers has.
    fn queue(self) -> u64 {
        self.burst() + (self.bits_per_second / 8 / 50).max(128 * 1024)
    }
}

fn tool(program: &str, arguments: &str) -> Result<()> {
    output(program, arguments).map(drop)
}

pub(crate) fn output(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .stdin(Stdio::null())
        .output()
        .map_err(Error::file("run", program))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Tool {
        command: format!("{program} {arguments}"),
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Runs a tool in the network namespace of the process behind `pidfd` and returns what it printed.
pub(crate) fn output_inside(pidfd: impl AsFd, program: &str, arguments: &str) -> Result<String> {
    inside(pidfd.as_fd(), || output(program, arguments))?
}

#[cfg(test)]
mod tests {
    use super::{Rate, ipv6_of};

    #[test]
    fn rates() {
        assert_eq!(
            Rate::parse("1gbit").unwrap().bits_per_second(),
            1_000_000_000
        );
        assert_eq!(
            Rate::parse("2.5Gbit").unwrap().bits_per_second(),
            2_500_000_000
        );
        assert_eq!(Rate::parse(" 64kbit").unwrap().bits_per_second(), 64_000);
        for bad in [
            "", "1", "gbit", "1gb", "-1gbit", "0mbit", "1e9gbit", "nanmbit",
        ] {
            assert!(Rate::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_address_shows_the_number() {
        assert_eq!(ipv6_of(9).to_string(), "fd77::9");
        assert_eq!(ipv6_of(10).to_string(), "fd77::10");
    }
}
