use proptest::prelude::*;

use super::*;

fn some_entries() -> Vec<Entry> {
    let secret = Secret::from_random([0xa7; 32]);
    vec![
        Entry::Holding(
            Side::Source,
            Holding::Peer {
                address: "[fd00::2]:7000".to_owned(),
                secret,
            },
        ),
        Entry::Holding(
            Side::Source,
            Holding::Cgroup(PathBuf::from("/sys/fs/cgroup/a b/haulier-1")),
        ),
        Entry::Source(SourceRecord::Freezing),
        Entry::Destination(DestinationRecord::Receiving),
        Entry::Holding(
            Side::Destination,
            Holding::Address("10.0.0.5/24@eth0".to_owned()),
        ),
        Entry::Destination(DestinationRecord::Committed),
    ]
}

fn written(entries: &[Entry]) -> String {
    let mut text = String::new();
    for entry in entries {
        text.push_str(&lines(text.len() as u64, &entry.text()));
    }
    text
}

#[test]
fn every_entry_reads_back() {
    let mut entries = some_entries();
    entries.extend(SourceRecord::ALL.map(Entry::Source));
    entries.extend(DestinationRecord::ALL.map(Entry::Destination));
    entries.push(Entry::Holding(
        Side::Source,
        Holding::Throttle(PathBuf::from("/sys/fs/cgroup/cpu/haulier-1")),
    ));
    let text = written(&entries);
    let parsed = parse(text.as_bytes()).unwrap();
    assert_eq!(parsed.contents.entries, entries);
    assert_eq!(parsed.whole, text.len());
    assert!(text.starts_with("haulier journal 1\n"));
}

#[test]
fn cut_anywhere_it_says_what_was_whole() {
    let entries = some_entries();
    let text = written(&entries);
    for cut in 0..text.len() {
        let part = &text.as_bytes()[..cut];
        let parsed = parse(part).unwrap_or_else(|damage| panic!("cut at {cut}: {damage}"));
        let ends = part.iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(parsed.contents.entries, entries[..ends.saturating_sub(1)]);
        let whole = part.iter().rposition(|byte| *byte == b'\n');
        assert_eq!(parsed.whole, whole.map_or(0, |end| end + 1));
    }
}

#[test]
fn a_cut_that_left_zeros_is_a_cut() {
    let text = written(&some_entries());
    let mut bytes = text.clone().into_bytes();
    bytes.extend([0; 40]);
    let parsed = parse(&bytes).unwrap();
    assert_eq!(parsed.whole, text.len());
}

#[test]
fn every_flipped_bit_is_found() {
    let text = written(&some_entries());
    for index in 0..text.len() {
        for bit in 0..8 {
            let mut bytes = text.clone().into_bytes();
            bytes[index] ^= 1 << bit;
            assert!(parse(&bytes).is_err(), "bit {bit} of byte {index}");
        }
    }
}

#[test]
fn another_version_is_not_guessed_at() {
    let text = written(&some_entries());
    let later = text.replacen("journal 1", "journal 2", 1);
    let damage = parse(later.as_bytes()).unwrap_err();
    assert_eq!(damage, Damage::Version("2".to_owned()));
    assert_eq!(
        parse(b"source is Freezing\n").unwrap_err(),
        Damage::NoJournal
    );
    let unknown = format!("{HEADER}\n") + &lines(1, "source is Confused");
    assert_eq!(
        parse(unknown.as_bytes()).unwrap_err(),
        Damage::Unknown(2, "source is Confused".to_owned())
    );
}

#[test]
fn only_whole_records_of_the_destination_decide() {
    let mut entries = some_entries();
    let text = written(&entries);
    let decision = |text: &str| parse(text.as_bytes()).unwrap().contents.decision();
    assert_eq!(decision(&text), Decision::Committed);
    assert_eq!(decision(&text[..text.len() - 1]), Decision::Open);
    entries.push(Entry::Destination(DestinationRecord::Done));
    entries.push(Entry::Source(SourceRecord::Released));
    assert_eq!(decision(&written(&entries)), Decision::Done);
    assert_eq!(decision(""), Decision::Open);
}

#[test]
fn holdings_are_told_by_side() {
    let parsed = parse(written(&some_entries()).as_bytes()).unwrap();
    let contents = parsed.contents;
    assert_eq!(contents.holdings(Side::Source).len(), 2);
    assert_eq!(
        contents.holdings(Side::Destination),
        [Holding::Address("10.0.0.5/24@eth0".to_owned())]
    );
    assert!(contents.is_of(Side::Source) && contents.is_of(Side::Destination));
    assert!(!Contents::default().is_of(Side::Source));
}

proptest! {
    /// Whatever the file is, reading it ends, and a whole journal is never taken for another.
    #[test]
    fn no_damage_is_taken_for_what_was_written(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let text = written(&some_entries());
        let mut bytes = text.clone().into_bytes();
        for (index, byte) in edits {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        if bytes != text.as_bytes() {
            if let Ok(parsed) = parse(&bytes) {
                let whole = parse(text.as_bytes()).unwrap().contents.entries;
                prop_assert!(whole.starts_with(&parsed.contents.entries));
                prop_assert!(parsed.whole < bytes.len());
            }
        }
    }

    #[test]
    fn noise_is_no_journal(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(parsed) = parse(&bytes) {
            prop_assert!(parsed.contents.is_empty());
        }
    }
}
