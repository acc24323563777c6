//! How pages are sent: compression, limit, deduplication.

use std::fmt;
use std::str::FromStr;

/// How the contents of pages are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Chosen for each channel from the measured rate of the link and of the codecs, and again as
    /// they change.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// LZ4: fast, some 2:1 on memory that compresses.
    Lz4,
    /// Zstandard at its fastest regular level: denser, for links up to a few Gbit/s.
    Zstd,
}

impl Compression {
    /// Every value, in the order in which they are offered.
    pub const ALL: [Compression; 4] = [
        Compression::Auto,
        Compression::None,
        Compression::Lz4,
        Compression::Zstd,
    ];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Auto => "auto",
            Compression::None => "none",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The word is not a kind of compression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no compression; there are auto, none, lz4 and zstd")]
pub struct UnknownCompression(String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let named = |value: &Compression| value.name() == word;
        let found = Compression::ALL.into_iter().find(named);
        found.ok_or_else(|| UnknownCompression(word.to_owned()))
    }
}

/// How a [`super::PageSender`] sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamOptions {
    /// How contents are compressed.
    pub compression: Compression,
    /// Bytes per second over all channels at most.
    pub bandwidth: Option<u64>,
    /// Percent of a line that is found full which are used; 100 is no limit.
    pub line_share: u8,
    /// Bytes per second of a line that was found full a moment ago.
    pub line: Option<u64>,
    /// Whether a page that was sent before over the same channel is sent as a reference.
    pub deduplicate: bool,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            compression: Compression::Auto,
            bandwidth: None,
            line_share: 100,
            line: None,
            deduplicate: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_compression_is_read_as_it_is_written() {
        for value in Compression::ALL {
            assert_eq!(value.to_string().parse(), Ok(value));
        }
        let error = "gzip".parse::<Compression>().unwrap_err();
        assert!(error.to_string().contains("gzip"), "{error}");
    }
}
