//! The name of a migration and the secret that its connections share.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Names one migration on both hosts: its journal, cgroups, nftables tables and connections.
/// Written as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId([u8; 8]);

/// A text that is not a migration id.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a migration id (16 hexadecimal digits)")]
pub struct BadId(String);

impl MigrationId {
    /// An id from random bytes, which the caller takes from the system's generator.
    pub fn from_random(bytes: [u8; 8]) -> MigrationId {
        MigrationId(bytes)
    }

    /// The id as it stands in messages.
    pub fn bytes(&self) -> [u8; 8] {
        self.0
    }
}

impl TryFrom<&[u8]> for MigrationId {
    type Error = BadId;

    fn try_from(bytes: &[u8]) -> Result<MigrationId, BadId> {
        bytes
            .try_into()
            .map(MigrationId)
            .map_err(|_| BadId(format!("{bytes:02x?}")))
    }
}

impl FromStr for MigrationId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<MigrationId, BadId> {
        if text.len() != 16 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(BadId(text.to_owned()));
        }
        let value = u64::from_str_radix(text, 16).map_err(|_| BadId(text.to_owned()))?;
        Ok(MigrationId(value.to_be_bytes()))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Proves that a connection belongs to a migration. Chosen by the source, shown in every hello;
/// compared in constant time, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A secret from random bytes, which the caller takes from the system's generator.
    pub fn from_random(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// The secret as it stands in messages.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The secret in hexadecimal digits, for a file that only root reads.
    pub fn to_hex(&self) -> String {
        let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or('0');
        let digits = |byte: &u8| [digit(byte >> 4), digit(byte & 15)];
        self.0.iter().flat_map(digits).collect()
    }

    /// The secret that [`Secret::to_hex`] wrote; `None` for any other text.
    pub fn from_hex(text: &str) -> Option<Secret> {
        let digits: Option<Vec<u8>> = text
            .chars()
            .map(|digit| digit.to_digit(16).map(|digit| digit as u8))
            .collect();
        let bytes: Vec<u8> = digits?
            .chunks(2)
            .map(|pair| pair.iter().fold(0, |byte, digit| byte * 16 + digit))
            .collect();
        let whole = text.len() == 64;
        bytes.try_into().ok().filter(|_| whole).map(Secret)
    }

    /// Whether `shown` is this secret, without a hint by timing how much of it is right.
    pub fn matches(&self, shown: &[u8]) -> bool {
        shown.len() == self.0.len()
            && self
                .0
                .iter()
                .zip(shown)
                .fold(0, |difference, (a, b)| difference | (a ^ b))
                == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_what_it_prints() {
        let id = MigrationId::from_random([0, 1, 2, 3, 0xfc, 0xfd, 0xfe, 0xff]);
        assert_eq!(id.to_string(), "00010203fcfdfeff");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(MigrationId::try_from(&id.bytes()[..]), Ok(id));
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "../../etc/passwd",
            "00010203fcfdfef",
            "+0010203fcfdfeff",
        ] {
            assert!(text.parse::<MigrationId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_secret_reads_back_what_it_writes() {
        let mut bytes = [0; 32];
        bytes[0] = 0x0f;
        bytes[31] = 0xf0;
        let secret = Secret::from_random(bytes);
        assert_eq!(Secret::from_hex(&secret.to_hex()), Some(secret.clone()));
        assert!(secret.to_hex().starts_with("0f00"));
        for text in [
            "",
            "0f",
            &secret.to_hex()[1..],
            &format!("{}0", secret.to_hex()),
        ] {
            assert_eq!(Secret::from_hex(text), None, "{text}");
        }
        assert_eq!(Secret::from_hex(&"x".repeat(64)), None);
    }

    #[test]
    fn only_the_whole_secret_matches() {
        let secret = Secret::from_random([7; 32]);
        assert!(secret.matches(&[7; 32]));
        assert!(!secret.matches(&[7; 31]));
        let mut other = [7; 32];
        other[31] = 8;
        assert!(!secret.matches(&other));
    }
}
