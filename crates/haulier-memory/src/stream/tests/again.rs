//! Pages that are sent again: as their changes, where the line is slow.

use proptest::prelude::*;

use super::rounds::{assert_same, fill, of, transfer};
use super::*;
use crate::stream::changes::{self, ChangedPage};
use crate::stream::versions::{Change, page_hash};

/// Limited, and so held for slow, but to nothing that takes time.
fn slow(compression: Compression) -> StreamOptions {
    StreamOptions {
        compression,
        bandwidth: Some(1 << 40),
        ..StreamOptions::default()
    }
}

#[test]
fn only_what_changed_of_a_page_is_sent_again() {
    for compression in Compression::ALL {
        let region = Region::map(1000 * PAGE_BYTES).unwrap();
        (0..1000).for_each(|page| fill(&region, page, 3, page as u32));
        let store = PageStore::new(1 << 30);
        let received = transfer(&slow(compression), 2, &store, |sender| {
            let mut send = |round| {
                let all = vec![of(&region, 1)];
                sender.send_round(all, &[], round, true, &soon()).unwrap()
            };
            assert_eq!(send(0).changed, 0);
            (0..1000).for_each(|page| region.write(page * PAGE_BYTES + page, page as u8));
            let stats = send(1);
            assert_eq!((stats.pages, stats.changed, stats.normal), (1000, 1000, 0));
            assert_eq!(stats.raw_bytes, 1000 * PAGE);
            assert!(stats.wire_bytes < 300 * 1000, "{stats:?}");
            let stats = send(2);
            assert_eq!(stats.changed, 1000);
            assert!(stats.wire_bytes < 30 * 1000, "nothing changed: {stats:?}");
            // Back to what they were, and others in whole.
            (0..1000).for_each(|page| fill(&region, page, 3, (page / 2 * 2) as u32));
            let stats = send(3);
            assert_eq!((stats.changed, stats.normal), (500, 500));
        });
        assert_eq!(received.iter().map(|stats| stats.pages).sum::<u64>(), 4000);
        assert_same(&store, &region, 1);
        store.retain_tasks(|_| false);
        assert_eq!(store.used(), 0);
    }
}

#[test]
fn pages_are_sent_whole_where_the_line_is_not_known_to_be_slow_or_pages_may_be_placed() {
    let region = Region::map(100 * PAGE_BYTES).unwrap();
    (0..100).for_each(|page| fill(&region, page, 3, page as u32));
    let store = PageStore::new(1 << 30);
    let send = |sender: &mut PageSender, round| {
        let all = vec![of(&region, 1)];
        sender.send_round(all, &[], round, true, &soon()).unwrap()
    };
    transfer(&StreamOptions::default(), 1, &store, |sender| {
        let changed: Vec<u64> = (0..3).map(|round| send(sender, round).changed).collect();
        assert_eq!(changed, [0, 0, 0]);
    });
    let store = PageStore::new(1 << 30);
    transfer(&slow(Compression::None), 1, &store, |sender| {
        let changed: Vec<u64> = (0..2).map(|round| send(sender, round).changed).collect();
        assert_eq!(changed, [0, 100]);
        sender.send_whole();
        store.discard(1, of(&region, 1).ranges[0]);
        let stats = send(sender, 2);
        assert_eq!(stats.changed, 0, "{stats:?}");
    });
    assert_same(&store, &region, 1);
}

#[derive(Debug, Clone)]
enum Step {
    /// Some bytes of a page.
    Touch(prop::sample::Index, usize, u8),
    /// All of a page, by its kind.
    Fill(prop::sample::Index, u8, u32),
    /// The peer drops it, and it is sent in this round, or not.
    Drop(prop::sample::Index, bool),
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let page = any::<prop::sample::Index>;
    let step = prop_oneof![
        6 => (page(), 0..PAGE_BYTES, any::<u8>()).prop_map(|(p, at, to)| Step::Touch(p, at, to)),
        2 => (page(), any::<u8>(), any::<u32>()).prop_map(|(p, kind, to)| Step::Fill(p, kind, to)),
        1 => (page(), any::<bool>()).prop_map(|(p, again)| Step::Drop(p, again)),
    ];
    prop::collection::vec(prop::collection::vec(step, 0..60), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_is_written_between_rounds_arrives(
        pages in 1..200_usize,
        rounds in steps(),
        channels in 1..4_usize,
        which in 0..4_usize,
    ) {
        let region = Region::map(pages * PAGE_BYTES).unwrap();
        (0..pages).for_each(|page| fill(&region, page, page as u8, page as u32 % 7));
        let store = PageStore::new(1 << 30);
        transfer(&slow(Compression::ALL[which]), channels, &store, |sender| {
            sender.send_round(vec![of(&region, 9)], &[], 0, true, &soon()).unwrap();
            let mut dropped = std::collections::BTreeSet::new();
            for (round, steps) in rounds.iter().enumerate() {
                let mut written = std::mem::take(&mut dropped);
                let mut gone = Vec::new();
                for step in steps {
                    let index = match step {
                        Step::Touch(page, at, to) => {
                            let page = page.index(pages);
                            region.write(page * PAGE_BYTES + at, *to);
                            page
                        }
                        Step::Fill(page, kind, to) => {
                            let page = page.index(pages);
                            fill(&region, page, *kind, *to);
                            page
                        }
                        Step::Drop(page, again) => {
                            let page = page.index(pages);
                            gone.push(at(&region, page));
                            if !again && !written.contains(&page) {
                                dropped.insert(page);
                                continue;
                            }
                            page
                        }
                    };
                    dropped.remove(&index);
                    written.insert(index);
                }
                let ranges = written.into_iter().map(|page| at(&region, page)).collect();
                let task = TaskPages { ranges, ..of(&region, 9) };
                let gone = [(9, gone)];
                sender.send_round(vec![task], &gone, round as u32 + 1, true, &soon()).unwrap();
            }
            let ranges = dropped.into_iter().map(|page| at(&region, page)).collect();
            let task = TaskPages { ranges, ..of(&region, 9) };
            let last = rounds.len() as u32 + 1;
            sender.send_round(vec![task], &[], last, true, &soon()).unwrap();
        });
        assert_same(&store, &region, 9);
    }
}

fn at(region: &Region, page: usize) -> PageRange {
    PageRange {
        start: region.address() + (page * PAGE_BYTES) as u64,
        pages: 1,
    }
}

/// What a receiver that has a page of round 0 says to a change of it in round 1.
fn answer(change: Change, blocks: &[u8]) -> Result<(), PageFrameError> {
    let (mut source, mut destination) = unix_pair();
    let page = [1; PAGE_BYTES];
    let wait = soon();
    let end = |round, pages, last| RoundEnd { round, pages, last };
    source
        .send(Kind::Pages, &[&head(0, 1, false), &page], &wait)
        .unwrap();
    source
        .send_message(Kind::RoundEnd, &end(0, 1, false), &wait)
        .unwrap();
    let mut body = Vec::new();
    let changed = ChangedPage {
        address: PAGE,
        change,
    };
    changes::encode(1, 1, Codec::None, &[changed], &mut body);
    let parts: [&[u8]; 2] = [&body, blocks];
    source.send(Kind::PageChanges, &parts, &wait).unwrap();
    source
        .send_message(Kind::RoundEnd, &end(1, 1, true), &wait)
        .unwrap();
    let store = PageStore::new(64 << 10);
    match receive_pages(&mut destination, &store, &wait) {
        Ok(stats) => {
            assert_eq!((stats.pages, stats.rounds), (2, 2));
            Ok(())
        }
        Err(StreamError::Frame { reason, .. }) => Err(reason),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_change_that_does_not_fit_is_refused() {
    let mut page = [1; PAGE_BYTES];
    page[256..512].fill(2);
    let change = Change {
        base: 0,
        blocks: 2,
        hash: page_hash(&page),
    };
    assert_eq!(answer(change, &[2; 256]), Ok(()));
    let address = PAGE;
    let refused = PageFrameError::Changed { address };
    assert_eq!(answer(change, &[3; 256]), Err(refused.clone()));
    let elsewhere = Change {
        blocks: 4,
        ..change
    };
    assert_eq!(answer(elsewhere, &[2; 256]), Err(refused));
    let later = Change { base: 1, ..change };
    let base = PageFrameError::Base { address, round: 1 };
    assert_eq!(answer(later, &[2; 256]), Err(base));
}

#[test]
fn a_change_of_a_page_that_is_not_here_is_refused() {
    let change = Change {
        base: 0,
        blocks: 0,
        hash: 0,
    };
    let changed = ChangedPage {
        address: 7 * PAGE,
        change,
    };
    let mut body = Vec::new();
    changes::encode(1, 1, Codec::None, &[changed], &mut body);
    let (mut source, mut destination) = unix_pair();
    source.send(Kind::PageChanges, &[&body], &soon()).unwrap();
    let store = PageStore::new(64 << 10);
    let error = receive_rounds(&mut destination, &store, 1, |_| {}, &soon()).unwrap_err();
    let StreamError::Frame { reason, .. } = error else {
        panic!("{error}")
    };
    let (address, round) = (7 * PAGE, 0);
    assert_eq!(reason, PageFrameError::Base { address, round });
    assert_eq!(store.used(), 0);
}
