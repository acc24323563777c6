//! Protocol versions and how two agents agree on one.

/// A version of the protocol. New optional fields and new optional messages need no new version;
/// anything an older peer would misunderstand does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Version {
    /// Stop-and-copy over separate command, image and memory connections.
    V1 = 1,
}

impl Version {
    /// The newest version this build speaks.
    pub const NEWEST: Version = Version::V1;
    /// The oldest version this build speaks: the one before the newest, once there is one.
    pub const OLDEST: Version = Version::V1;

    /// The newest version within both this build's range and the peer's.
    pub fn agree(peer_oldest: u32, peer_newest: u32) -> Option<Version> {
        let newest = (Version::NEWEST as u32).min(peer_newest);
        let oldest = (Version::OLDEST as u32).max(peer_oldest);
        [Version::V1]
            .into_iter()
            .rev()
            .find(|v| (oldest..=newest).contains(&(*v as u32)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_wins() {
        assert_eq!(Version::agree(1, 1), Some(Version::V1));
        assert_eq!(Version::agree(1, 9), Some(Version::V1));
        assert_eq!(Version::agree(2, 9), None);
        assert_eq!(Version::agree(0, 0), None);
    }
}
