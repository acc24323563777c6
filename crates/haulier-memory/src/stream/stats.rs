//! What was sent and what came, in numbers.

use std::time::Duration;

use super::Compression;

/// What was sent in a round, over all channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Number of the round, from zero.
    pub round: u32,
    /// Pages sent: normal, zero, duplicate and changed ones.
    pub pages: u64,
    /// Pages sent with their contents.
    pub normal: u64,
    /// Pages of which only the address was sent, since they are zero.
    pub zero_pages: u64,
    /// Pages sent as a reference to one with the same contents.
    pub duplicates: u64,
    /// Pages of which only what changed since they were sent last was sent.
    pub changed: u64,
    /// Pages that were not mapped any more when they were to be read, or whose task had exited.
    pub vanished: u64,
    /// Bytes of all pages sent: what the memory measures.
    pub raw_bytes: u64,
    /// Bytes sent, headers included.
    pub wire_bytes: u64,
    /// From the start of the round until the peer had all of it in its store.
    pub elapsed: Duration,
    /// Bytes of contents that were sent uncompressed, with LZ4 and with Zstandard, as they measure
    /// uncompressed.
    pub by_codec: CodecBytes,
}

impl RoundStats {
    /// What most contents of the round were compressed with.
    pub fn compression(&self) -> Compression {
        let CodecBytes { none, lz4, zstd } = self.by_codec;
        if none >= lz4.max(zstd) {
            Compression::None
        } else if lz4 >= zstd {
            Compression::Lz4
        } else {
            Compression::Zstd
        }
    }

    /// Bytes per second on the wire, 0 for a round that took no time.
    pub fn wire_rate(&self) -> u64 {
        rate(self.wire_bytes, self.elapsed)
    }

    /// Bytes of memory sent per second, 0 for a round that took no time.
    pub fn raw_rate(&self) -> u64 {
        rate(self.raw_bytes, self.elapsed)
    }

    /// Adds what another channel sent meanwhile, or what was sent in another round.
    pub fn add(&mut self, other: &RoundStats) {
        self.pages += other.pages;
        self.normal += other.normal;
        self.zero_pages += other.zero_pages;
        self.duplicates += other.duplicates;
        self.changed += other.changed;
        self.vanished += other.vanished;
        self.raw_bytes += other.raw_bytes;
        self.wire_bytes += other.wire_bytes;
        self.by_codec.none += other.by_codec.none;
        self.by_codec.lz4 += other.by_codec.lz4;
        self.by_codec.zstd += other.by_codec.zstd;
    }
}

/// Bytes of page contents by how they were encoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CodecBytes {
    /// As they are.
    pub none: u64,
    /// LZ4.
    pub lz4: u64,
    /// Zstandard.
    pub zstd: u64,
}

/// What came on a channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiveStats {
    /// Pages received: normal, zero, duplicate and changed ones.
    pub pages: u64,
    /// Pages of which only the address came.
    pub zero_pages: u64,
    /// Pages that came as a reference.
    pub duplicates: u64,
    /// Rounds that were completed.
    pub rounds: u32,
}

fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let micros = elapsed.as_micros();
    if micros == 0 {
        return 0;
    }
    u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_and_never_divide_by_zero() {
        let mut stats = RoundStats {
            wire_bytes: 500,
            raw_bytes: u64::MAX,
            elapsed: Duration::from_millis(250),
            ..RoundStats::default()
        };
        assert_eq!(stats.wire_rate(), 2000);
        assert_eq!(stats.raw_rate(), u64::MAX);
        stats.elapsed = Duration::ZERO;
        assert_eq!(stats.wire_rate(), 0);
    }
}
