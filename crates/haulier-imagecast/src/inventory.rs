//! What an inventory tells of its dump.

use prost::Message;

/// More than an inventory ever has: what is read of one that somebody made up.
pub(crate) const LONGEST: usize = 64 << 10;
/// The magic word, and the length of the entry.
const HEAD: usize = 8;

/// The entry of an inventory, as far as it matters here (CRIU 4.0 to 4.2).
#[derive(Clone, Copy, PartialEq, Message)]
struct Entry {
    /// Only a pre-dump has it.
    #[prost(uint32, optional, tag = "9")]
    pre_dump_mode: Option<u32>,
}

/// Whether it is that of `criu pre-dump`: memory and nothing else, of a process that runs on. What is
/// no inventory that CRIU would write is left to CRIU's restore to judge.
pub(crate) fn is_of_pre_dump(image: &[u8]) -> bool {
    let entry = image.get(HEAD..).unwrap_or_default();
    Entry::decode(entry).is_ok_and(|entry| entry.pre_dump_mode.is_some())
}

/// An inventory as CRIU writes it, for tests.
#[cfg(test)]
pub(crate) fn example(pre_dump: bool) -> Vec<u8> {
    // img_version 2, fdinfo_per_id, dump_uptime 7, pre_dump_mode 1, a name of the run.
    let mut entry = vec![0x08, 2, 0x10, 1, 0x40, 7];
    if pre_dump {
        entry.extend([0x48, 1]);
    }
    entry.extend([0x6a, 3, b'r', b'u', b'n']);
    let words = [0x5831_3116, entry.len() as u32];
    let mut image: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    image.extend(entry);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pre_dump_is_told_from_a_dump() {
        assert!(is_of_pre_dump(&example(true)));
        assert!(!is_of_pre_dump(&example(false)));
        // The mode of a pre-dump may be the one with number 0.
        let mut image = example(true);
        let mode = image.len() - 6;
        assert_eq!(image[mode], 1);
        image[mode] = 0;
        assert!(is_of_pre_dump(&image));
        for other in [&b""[..], b"inventory", &example(true)[..HEAD + 1]] {
            assert!(!is_of_pre_dump(other));
        }
    }
}
