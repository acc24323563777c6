use proptest::prelude::*;

use super::*;
use crate::page::PAGE;
use crate::tracker::TaskScan;

fn set(pages: &[(u64, u64)]) -> RangeSet {
    let range = |&(first, pages)| PageRange {
        start: first * PAGE,
        pages,
    };
    pages.iter().map(range).collect()
}

fn look(task: u32, written: &RangeSet, mapped: &RangeSet) -> Scan {
    Scan {
        tasks: vec![TaskScan {
            task,
            written: written.clone(),
            mapped: mapped.clone(),
            ..TaskScan::default()
        }],
        gone: Vec::new(),
    }
}

#[test]
fn a_page_is_missing_until_it_was_sent_after_its_last_write() {
    let mut ledger = Ledger::new();
    let all = set(&[(0, 10)]);
    assert_eq!(ledger.missing(1, &all), all);
    assert!(ledger.apply(&look(1, &all, &all)).is_empty());
    ledger.sent(1, &set(&[(0, 6)]));
    assert_eq!(ledger.missing(1, &all), set(&[(6, 4)]));
    ledger.apply(&look(1, &set(&[(2, 1)]), &all));
    assert_eq!(ledger.missing(1, &all), set(&[(2, 1), (6, 4)]));
    assert_eq!(ledger.valid_pages(1), 5);
}

#[test]
fn what_is_no_more_is_dropped_once() {
    let mut ledger = Ledger::new();
    let all = set(&[(0, 10)]);
    ledger.apply(&look(1, &all, &all));
    ledger.sent(1, &all);
    // Written and then unmapped, or only unmapped.
    let drops = ledger.apply(&look(1, &set(&[]), &set(&[(0, 4)])));
    assert_eq!(drops, [(1, set(&[(4, 6)]))]);
    assert!(
        ledger
            .apply(&look(1, &set(&[]), &set(&[(0, 4)])))
            .is_empty()
    );
    let gone = Scan {
        tasks: Vec::new(),
        gone: vec![1, 2],
    };
    assert_eq!(ledger.apply(&gone), [(1, set(&[(0, 4)]))]);
    assert_eq!(ledger.missing(1, &all), all);
}

#[test]
fn the_hottest_pages_come_first() {
    let mut ledger = Ledger::new();
    let all = set(&[(0, 10)]);
    ledger.apply(&look(1, &all, &all));
    ledger.apply(&look(1, &set(&[(2, 2), (8, 1)]), &all));
    ledger.apply(&look(1, &set(&[(3, 1)]), &all));
    let wanted = set(&[(1, 4), (8, 1), (20, 1)]);
    let starts: Vec<(u64, u64)> = ledger
        .by_heat(1, &wanted)
        .iter()
        .map(|range| (range.start / PAGE, range.pages))
        .collect();
    assert_eq!(starts, [(3, 1), (2, 1), (8, 1), (1, 1), (4, 1), (20, 1)]);
    assert_eq!(ledger.by_heat(9, &wanted).len(), 3);
}

proptest! {
    /// Whatever the order of looks and sendings, a page counts as valid exactly if it was sent after
    /// the last look that found it written or did not find it mapped.
    #[test]
    fn a_ledger_agrees_with_pages_one_by_one(
        rounds in prop::collection::vec(
            (any::<u16>(), any::<u16>(), any::<u16>()), 1..12)
    ) {
        let bits = |bits: u16| -> RangeSet {
            (0..16).filter(|bit| bits >> bit & 1 == 1).flat_map(|bit| set(&[(bit, 1)]).iter().collect::<Vec<_>>()).collect()
        };
        let mut ledger = Ledger::new();
        let (mut valid, mut last) = (0_u16, [0_usize; 16]);
        for (number, (written, mapped, sent)) in rounds.iter().copied().enumerate() {
            let mapped = mapped | 0x00FF;
            let written = written & mapped;
            ledger.apply(&look(7, &bits(written), &bits(mapped)));
            valid &= !written & mapped;
            for (bit, last) in last.iter_mut().enumerate() {
                if written >> bit & 1 == 1 {
                    *last = number + 1;
                } else if mapped >> bit & 1 == 0 {
                    *last = 0;
                }
            }
            ledger.sent(7, &bits(sent & mapped));
            valid |= sent & mapped;
            prop_assert_eq!(ledger.missing(7, &bits(u16::MAX)), bits(!valid));
        }
        let order: Vec<usize> = ledger
            .by_heat(7, &bits(u16::MAX))
            .iter()
            .flat_map(|range| (0..range.pages).map(|page| last[(range.start / PAGE + page) as usize]))
            .collect();
        prop_assert_eq!(order.len(), 16);
        prop_assert!(order.windows(2).all(|two| two[0] >= two[1]));
    }
}
