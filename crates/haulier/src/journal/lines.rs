//! The text of a journal.
//!
//! A first line that names the version, then a line for each entry: the CRC-32 of its text in eight
//! hexadecimal digits, a space, the text. `<side> is <record>` is a step of the hand-over,
//! `<side> has <kind> <value>` something that is to be given back, or that a recovery needs.
//!
//! A last line without its end was cut by a crash: what it records has not taken effect. Any other
//! line that is not what was written is damage, which nobody may take a decision from.

use std::path::PathBuf;

use haulier_engine::journal::{DestinationRecord, SourceRecord};
use haulier_engine::recovery::{self, Decision};
use haulier_proto::id::Secret;
use thiserror::Error;

/// The first line.
const HEADER: &str = "haulier journal 1";
/// What the first lines of all versions begin with.
const FAMILY: &str = "haulier journal ";
/// Digits of a checksum.
const DIGITS: usize = 8;

/// Which of the two hosts of a migration this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the target comes from.
    Source,
    /// Where it goes to.
    Destination,
}

/// Something that a migration has on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holding {
    /// A cgroup, by its path.
    Cgroup(PathBuf),
    /// An address that moves, as `10.0.0.5/24@eth0`: added here by the destination, removed here by
    /// the source once the target is gone.
    Address(String),
    /// Where CPU time may be taken from the target.
    Throttle(PathBuf),
    /// The destination: whoever takes the migration over asks it, with the secret that the
    /// migration's connections share.
    Peer {
        /// `host:port`.
        address: String,
        /// Shown in every greeting.
        secret: Secret,
    },
}

/// What is written down at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A step of the source.
    Source(SourceRecord),
    /// A step of the destination.
    Destination(DestinationRecord),
    /// Something that one side has.
    Holding(Side, Holding),
}

/// What a journal says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Contents {
    entries: Vec<Entry>,
}

/// A journal that cannot be read. Nothing is done by it until a person has looked at it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Damage {
    /// The first line is none of a journal's.
    #[error("it does not begin with {FAMILY:?}: it is damaged, or no journal")]
    NoJournal,
    /// It was written by another version.
    #[error("it is of version {0:?}; this haulier knows version 1")]
    Version(String),
    /// A line is not what was written.
    #[error("line {0} does not match its checksum: it is damaged")]
    Checksum(usize),
    /// A line was written by another version.
    #[error("line {0} says what this version of haulier does not know: {1:?}")]
    Unknown(usize, String),
}

/// A journal, and how much of its file is whole.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) contents: Contents,
    /// Bytes; what follows them was cut.
    pub(super) whole: usize,
}

/// The lines of a file that has `before` bytes yet, for one more entry.
pub(super) fn lines(before: u64, text: &str) -> String {
    let head = match before {
        0 => format!("{HEADER}\n"),
        _ => String::new(),
    };
    format!("{head}{:08x} {text}\n", crc32fast::hash(text.as_bytes()))
}

/// Reads a journal.
pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, Damage> {
    let nothing = Parsed {
        contents: Contents::default(),
        whole: 0,
    };
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return match HEADER.as_bytes().starts_with(bytes) {
            // Cut with its first line.
            true => Ok(nothing),
            false => Err(Damage::NoJournal),
        };
    };
    let first = &bytes[..end];
    if first != HEADER.as_bytes() {
        let text = String::from_utf8_lossy(first);
        return Err(match text.strip_prefix(FAMILY) {
            Some(version) => Damage::Version(version.to_owned()),
            None => Damage::NoJournal,
        });
    }
    let mut parsed = Parsed {
        whole: end + 1,
        ..nothing
    };
    for (index, line) in bytes[parsed.whole..]
        .split_inclusive(|byte| *byte == b'\n')
        .enumerate()
    {
        let number = index + 2;
        let Some(text) = line.strip_suffix(b"\n") else {
            // Cut; or whole, with damage to the end of the line.
            let but_one = &line[..line.len() - 1];
            return match checked(but_one) {
                Some(_) => Err(Damage::Checksum(number)),
                None => Ok(parsed),
            };
        };
        let text = checked(text).ok_or(Damage::Checksum(number))?;
        let entry =
            Entry::from_text(text).ok_or_else(|| Damage::Unknown(number, text.to_owned()))?;
        parsed.contents.entries.push(entry);
        parsed.whole += line.len();
    }
    Ok(parsed)
}

/// The text of a line, if its checksum is right.
fn checked(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line).ok()?;
    let text = line.get(DIGITS + 1..)?;
    let whole = line == format!("{:08x} {text}", crc32fast::hash(text.as_bytes()));
    whole.then_some(text)
}

impl Side {
    /// The word it stands as in a journal.
    pub fn word(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

impl Entry {
    pub(super) fn text(&self) -> String {
        match self {
            Entry::Source(record) => format!("source is {}", record.word()),
            Entry::Destination(record) => format!("destination is {}", record.word()),
            Entry::Holding(side, holding) => {
                let side = side.word();
                match holding {
                    Holding::Cgroup(path) => format!("{side} has cgroup {}", path.display()),
                    Holding::Address(address) => format!("{side} has address {address}"),
                    Holding::Throttle(path) => format!("{side} has throttle {}", path.display()),
                    Holding::Peer { address, secret } => {
                        format!("{side} has peer {} {address}", secret.to_hex())
                    }
                }
            }
        }
    }

    fn from_text(text: &str) -> Option<Entry> {
        let (side, rest) = text.split_once(' ')?;
        let side = [Side::Source, Side::Destination]
            .into_iter()
            .find(|known| known.word() == side)?;
        match (rest.split_once(' ')?, side) {
            (("is", word), Side::Source) => SourceRecord::from_word(word).map(Entry::Source),
            (("is", word), Side::Destination) => {
                DestinationRecord::from_word(word).map(Entry::Destination)
            }
            (("has", holding), side) => {
                Holding::from_text(holding).map(|holding| Entry::Holding(side, holding))
            }
            _ => None,
        }
    }
}

impl Holding {
    fn from_text(text: &str) -> Option<Holding> {
        match text.split_once(' ')? {
            ("cgroup", path) => Some(Holding::Cgroup(PathBuf::from(path))),
            ("address", address) => Some(Holding::Address(address.to_owned())),
            ("throttle", path) => Some(Holding::Throttle(PathBuf::from(path))),
            ("peer", peer) => {
                let (secret, address) = peer.split_once(' ')?;
                Some(Holding::Peer {
                    address: address.to_owned(),
                    secret: Secret::from_hex(secret)?,
                })
            }
            _ => None,
        }
    }
}

impl Contents {
    pub(crate) fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Whether it says nothing at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether this host was the given side of the migration.
    pub fn is_of(&self, side: Side) -> bool {
        self.entries.iter().any(|entry| match entry {
            Entry::Source(_) => side == Side::Source,
            Entry::Destination(_) => side == Side::Destination,
            Entry::Holding(of, _) => side == *of,
        })
    }

    /// The steps of the source, in order.
    pub fn source_records(&self) -> Vec<SourceRecord> {
        let records = self.entries.iter().filter_map(|entry| match entry {
            Entry::Source(record) => Some(*record),
            Entry::Destination(_) | Entry::Holding(..) => None,
        });
        records.collect()
    }

    /// The steps of the destination, in order.
    pub fn destination_records(&self) -> Vec<DestinationRecord> {
        let records = self.entries.iter().filter_map(|entry| match entry {
            Entry::Destination(record) => Some(*record),
            Entry::Source(_) | Entry::Holding(..) => None,
        });
        records.collect()
    }

    /// Whether the source recorded a step.
    pub fn has_source(&self, record: SourceRecord) -> bool {
        self.entries.contains(&Entry::Source(record))
    }

    /// Whether the destination recorded a step.
    pub fn has_destination(&self, record: DestinationRecord) -> bool {
        self.entries.contains(&Entry::Destination(record))
    }

    /// What was taken on this host as the given side, in order.
    pub fn holdings(&self, side: Side) -> Vec<Holding> {
        let holdings = self.entries.iter().filter_map(|entry| match entry {
            Entry::Holding(of, holding) if *of == side => Some(holding.clone()),
            _ => None,
        });
        holdings.collect()
    }

    /// What the destination decided.
    pub fn decision(&self) -> Decision {
        recovery::decision(&self.destination_records())
    }
}

#[cfg(test)]
mod tests;
