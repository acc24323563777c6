use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest interface name: IFNAMSIZ (16) less its terminating zero.
const MAX_INTERFACE_NAME: usize = 15;

/// An address that moves with the target, and the interface that has it:
/// `10.0.0.5/24@eth0`, `fd00::5/64@eth0`.
///
/// The interface may be named differently on the two hosts: [`MoveIp::on`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MoveIp {
    ip: IpAddr,
    prefix: u8,
    interface: String,
}

impl MoveIp {
    /// Checks the three parts.
    ///
    /// # Errors
    /// See [`MoveIpError`].
    pub fn new(ip: IpAddr, prefix: u8, interface: &str) -> Result<Self, MoveIpError> {
        let (longest, reserved) = match ip {
            IpAddr::V4(ip) => (32, ip.is_broadcast()),
            IpAddr::V6(ip) => (128, ip.to_ipv4_mapped().is_some()),
        };
        if reserved || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
            return Err(MoveIpError::CannotMove(ip));
        }
        if prefix == 0 || prefix > longest {
            return Err(MoveIpError::Prefix {
                ip,
                longest,
                found: prefix.to_string(),
            });
        }
        check_interface(interface)?;
        Ok(Self {
            ip,
            prefix,
            interface: interface.to_owned(),
        })
    }

    /// The address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// How many leading bits name the subnet.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The interface that has, or is to have, the address.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The same address on an interface of another name.
    ///
    /// # Errors
    /// [`MoveIpError::Interface`].
    pub fn on(&self, interface: &str) -> Result<Self, MoveIpError> {
        Self::new(self.ip, self.prefix, interface)
    }
}

/// Why a text is no [`MoveIp`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoveIpError {
    /// Not of the form address/prefix@interface.
    #[error("{0:?}: expected ADDRESS/PREFIX@INTERFACE, as in 10.0.0.5/24@eth0")]
    Form(String),
    /// Not an address.
    #[error("{0:?} is not an IPv4 or IPv6 address")]
    Address(String),
    /// Not a length of this family's prefixes.
    #[error("prefix length {found:?} of {ip}: expected a number from 1 to {longest}")]
    Prefix {
        /// The address.
        ip: IpAddr,
        /// 32 or 128.
        longest: u8,
        /// What was given.
        found: String,
    },
    /// Not a name an interface can have.
    #[error(
        "interface {0:?}: expected 1 to 15 bytes without '/', ':' or white space, \
         and neither \".\" nor \"..\""
    )]
    Interface(String),
    /// Loopback, multicast, broadcast, unspecified or IPv4-mapped: never one host's own.
    #[error("{0} is not an address that can move: expected a unicast address of an interface")]
    CannotMove(IpAddr),
}

impl FromStr for MoveIp {
    type Err = MoveIpError;

    fn from_str(text: &str) -> Result<Self, MoveIpError> {
        let form = || MoveIpError::Form(text.to_owned());
        let (address, interface) = text.split_once('@').ok_or_else(form)?;
        let (ip, prefix) = address.split_once('/').ok_or_else(form)?;
        let ip: IpAddr = ip
            .parse()
            .map_err(|_| MoveIpError::Address(ip.to_owned()))?;
        // u8's own parser would take "+24".
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let parsed = prefix.parse().ok().filter(|_| digits);
        let prefix = parsed.ok_or_else(|| MoveIpError::Prefix {
            ip,
            longest: if ip.is_ipv4() { 32 } else { 128 },
            found: prefix.to_owned(),
        })?;
        Self::new(ip, prefix, interface)
    }
}

impl fmt::Display for MoveIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.ip, self.prefix, self.interface)
    }
}

impl TryFrom<String> for MoveIp {
    type Error = MoveIpError;

    fn try_from(text: String) -> Result<Self, MoveIpError> {
        text.parse()
    }
}

impl From<MoveIp> for String {
    fn from(address: MoveIp) -> Self {
        address.to_string()
    }
}

/// The kernel's own rule, dev_valid_name() in net/core/dev.c.
fn check_interface(name: &str) -> Result<(), MoveIpError> {
    let wrong = name.is_empty()
        || name.len() > MAX_INTERFACE_NAME
        || matches!(name, "." | "..")
        || name
            .chars()
            .any(|c| matches!(c, '/' | ':' | '\0') || c.is_whitespace());
    if wrong {
        Err(MoveIpError::Interface(name.to_owned()))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> MoveIpError {
        text.parse::<MoveIp>().unwrap_err()
    }

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "10.0.0.5/24@eth0",
            "fd00::5/64@eth0",
            "10.0.0.5/32@br-lan.100",
        ] {
            let address: MoveIp = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<MoveIp>(&json).unwrap(), address);
        }
        let address: MoveIp = "10.0.0.5/24@eth0".parse().unwrap();
        assert_eq!(address.on("ens3").unwrap().to_string(), "10.0.0.5/24@ens3");
    }

    #[test]
    fn a_wrong_form_says_what_is_expected() {
        for text in [
            "",
            "10.0.0.5",
            "10.0.0.5/24",
            "10.0.0.5@eth0",
            "eth0@10.0.0.5/24",
        ] {
            let error = error(text);
            assert!(matches!(error, MoveIpError::Form(_)), "{text}: {error:?}");
            assert!(error.to_string().contains("10.0.0.5/24@eth0"));
        }
        assert_eq!(error("web/24@eth0"), MoveIpError::Address("web".into()));
    }

    #[test]
    fn prefixes_have_a_range() {
        for text in [
            "10.0.0.5/33@e",
            "10.0.0.5/0@e",
            "10.0.0.5/+8@e",
            "10.0.0.5/300@e",
        ] {
            assert!(error(text).to_string().contains("from 1 to 32"), "{text}");
        }
        for text in ["fd00::5/129@e", "fd00::5/@e"] {
            assert!(error(text).to_string().contains("from 1 to 128"), "{text}");
        }
    }

    #[test]
    fn interface_names_are_the_kernels() {
        for name in ["", "sixteen-bytes-xx", "a/b", "a b", "..", "a:1"] {
            let error = error(&format!("10.0.0.5/24@{name}"));
            assert_eq!(error, MoveIpError::Interface(name.into()));
        }
        assert!("10.0.0.5/24@fifteen-bytes-x".parse::<MoveIp>().is_ok());
    }

    #[test]
    fn addresses_of_no_single_host_cannot_move() {
        for ip in [
            "127.0.0.1/8",
            "::1/128",
            "224.0.0.1/24",
            "0.0.0.0/8",
            "ff02::1/64",
        ] {
            assert!(
                matches!(error(&format!("{ip}@e")), MoveIpError::CannotMove(_)),
                "{ip}"
            );
        }
        assert!(matches!(
            error("::ffff:10.0.0.5/96@e"),
            MoveIpError::CannotMove(_)
        ));
    }
}
