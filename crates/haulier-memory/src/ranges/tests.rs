use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Pages of the model are the small numbers below this.
const LIMIT: u64 = 64;

fn range() -> impl Strategy<Value = PageRange> {
    (0..LIMIT, 0..12_u64).prop_map(|(first, pages)| PageRange {
        start: first * PAGE,
        pages,
    })
}

fn numbers(range: PageRange) -> impl Iterator<Item = u64> {
    let first = range.start / PAGE;
    first..first + range.pages
}

fn model(ranges: &[PageRange]) -> BTreeSet<u64> {
    ranges.iter().copied().flat_map(numbers).collect()
}

/// The set has exactly the model's pages, in the fewest ranges.
fn check(set: &RangeSet, model: &BTreeSet<u64>) -> Result<(), TestCaseError> {
    let pages: Vec<u64> = set.iter().flat_map(numbers).collect();
    prop_assert_eq!(&pages, &model.iter().copied().collect::<Vec<_>>());
    prop_assert_eq!(set.pages(), model.len() as u64);
    prop_assert_eq!(set.is_empty(), model.is_empty());
    let ranges: Vec<PageRange> = set.iter().collect();
    prop_assert_eq!(ranges.len(), set.ranges());
    prop_assert!(ranges.windows(2).all(|two| two[0].end() < two[1].start));
    Ok(())
}

proptest! {
    #[test]
    fn inserting_and_removing_is_what_it_is_for_single_pages(
        steps in prop::collection::vec((any::<bool>(), range()), 0..40)
    ) {
        let (mut set, mut pages) = (RangeSet::new(), BTreeSet::new());
        for (put, range) in steps {
            if put {
                set.insert(range);
                pages.extend(numbers(range));
            } else {
                set.remove(range);
                pages.retain(|page| numbers(range).all(|number| number != *page));
            }
            check(&set, &pages)?;
        }
    }

    #[test]
    fn operations_on_two_sets_are_those_of_sets(
        one in prop::collection::vec(range(), 0..20),
        two in prop::collection::vec(range(), 0..20),
        probe in range(),
    ) {
        let (first, second): (RangeSet, RangeSet) =
            (one.iter().copied().collect(), two.iter().copied().collect());
        let (one, two) = (model(&one), model(&two));
        check(&first, &one)?;
        check(&first.intersect(&second), &(&one & &two))?;
        let mut both = first.clone();
        both.union(&second);
        check(&both, &(&one | &two))?;
        let mut rest = first.clone();
        rest.subtract(&second);
        check(&rest, &(&one - &two))?;

        let probed: BTreeSet<u64> = numbers(probe).collect();
        check(&first.within(probe.start, probe.end()).collect(), &(&one & &probed))?;
        prop_assert_eq!(first.covers(probe), probed.is_subset(&one));
        prop_assert_eq!(first.overlaps(probe), !probed.is_disjoint(&one));
        prop_assert_eq!(first.contains(probe.start + 17), one.contains(&(probe.start / PAGE)));
    }
}

#[test]
fn ranges_in_any_order_make_the_same_set() {
    let pages = |first, pages| PageRange {
        start: first * PAGE,
        pages,
    };
    let set: RangeSet = [
        pages(8, 2),
        pages(1, 3),
        pages(10, 1),
        pages(3, 2),
        pages(20, 0),
    ]
    .into_iter()
    .collect();
    assert_eq!(set.iter().collect::<Vec<_>>(), [pages(1, 4), pages(8, 3)]);
}
