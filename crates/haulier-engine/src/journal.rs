//! What is recorded of a hand-over, and when.
//!
//! A record is written, and is on the disk, before the actions that follow it are performed.

/// A record of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceRecord {
    /// The target is about to be frozen; if nothing follows, it is to be thawed.
    Freezing,
    /// The commit is about to be sent; if nothing follows, only the destination knows.
    InDoubt,
    /// The target runs on the destination, which does not have all of it safe yet: the tasks here
    /// are neither to be thawed nor to be killed.
    Serving,
    /// The destination has lost the target: the tasks here are the last copy, and a person decides
    /// whether they run.
    Stranded,
    /// The destination has refused after the commit, or a person has said that the target runs
    /// nowhere else: it is to run here.
    Returning,
    /// The target runs on the destination, or is given up: what is left here is to be removed.
    Released,
    /// The target runs here: what was prepared there is void.
    RolledBack,
}

/// A record of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DestinationRecord {
    /// Resources are about to be taken; if nothing follows, they are to be given back.
    Receiving,
    /// The decision: the target is to run here.
    Committed,
    /// The decision: it is not. A commit that comes later is answered with "refused".
    Refused,
    /// The target runs here and nothing is left to be done.
    Done,
    /// What was made here for a target that will not run here is gone.
    Removed,
    /// The target was to run here, and was killed before it had: it will not run here, and may on
    /// its source.
    Withdrawn,
    /// The target was to run here, and was lost before all of it was safe. It will not run here.
    Lost,
}

impl SourceRecord {
    /// Every record.
    pub const ALL: [SourceRecord; 7] = [
        SourceRecord::Freezing,
        SourceRecord::InDoubt,
        SourceRecord::Serving,
        SourceRecord::Stranded,
        SourceRecord::Returning,
        SourceRecord::Released,
        SourceRecord::RolledBack,
    ];

    /// The word it stands as in a journal.
    pub fn word(self) -> &'static str {
        match self {
            SourceRecord::Freezing => "Freezing",
            SourceRecord::InDoubt => "InDoubt",
            SourceRecord::Serving => "Serving",
            SourceRecord::Stranded => "Stranded",
            SourceRecord::Returning => "Returning",
            SourceRecord::Released => "Released",
            SourceRecord::RolledBack => "RolledBack",
        }
    }

    /// The record that a word stands for.
    pub fn from_word(word: &str) -> Option<SourceRecord> {
        Self::ALL.into_iter().find(|record| record.word() == word)
    }
}

impl DestinationRecord {
    /// Every record.
    pub const ALL: [DestinationRecord; 7] = [
        DestinationRecord::Receiving,
        DestinationRecord::Committed,
        DestinationRecord::Refused,
        DestinationRecord::Done,
        DestinationRecord::Removed,
        DestinationRecord::Withdrawn,
        DestinationRecord::Lost,
    ];

    /// The word it stands as in a journal.
    pub fn word(self) -> &'static str {
        match self {
            DestinationRecord::Receiving => "Receiving",
            DestinationRecord::Committed => "Committed",
            DestinationRecord::Refused => "Refused",
            DestinationRecord::Done => "Done",
            DestinationRecord::Removed => "Removed",
            DestinationRecord::Withdrawn => "Withdrawn",
            DestinationRecord::Lost => "Lost",
        }
    }

    /// The record that a word stands for.
    pub fn from_word(word: &str) -> Option<DestinationRecord> {
        Self::ALL.into_iter().find(|record| record.word() == word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_reads_back_from_its_word() {
        for (number, record) in SourceRecord::ALL.into_iter().enumerate() {
            assert_eq!(record as usize, number);
            assert_eq!(SourceRecord::from_word(record.word()), Some(record));
        }
        for (number, record) in DestinationRecord::ALL.into_iter().enumerate() {
            assert_eq!(record as usize, number);
            assert_eq!(DestinationRecord::from_word(record.word()), Some(record));
        }
        assert_eq!(SourceRecord::from_word("Committed"), None);
        assert_eq!(DestinationRecord::from_word("committed"), None);
    }
}
