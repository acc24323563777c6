//! Pseudo-random numbers that are the same everywhere, so that contents can be told from a seed.

/// The splitmix64 generator of Steele, Lea and Flood (2014): fast, and good enough that no
/// compressor gains anything on its output.
#[derive(Debug, Clone)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    /// The generator for item `index` of a sequence.
    pub(crate) fn nth(seed: u64, index: u64) -> Random {
        Random::new(Random::new(seed ^ index.rotate_left(32)).next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            for (byte, random) in chunk.iter_mut().zip(self.next().to_le_bytes()) {
                *byte = random;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    /// The first output for seed 0, as published with the reference implementation.
    #[test]
    fn is_splitmix64() {
        assert_eq!(Random::new(0).next(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn fills_to_the_last_byte() {
        let mut bytes = [0; 37];
        Random::new(1).fill(&mut bytes);
        assert_ne!(bytes[32..], [0; 5]);
    }
}
