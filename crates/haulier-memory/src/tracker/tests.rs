use super::*;

#[test]
fn trackers_are_named_by_words() {
    for word in ["auto", "write-protect", "soft-dirty", "none"] {
        assert_eq!(word.parse::<TrackerChoice>().unwrap().to_string(), word);
    }
    assert!("dirty".parse::<TrackerChoice>().is_err());
}

#[test]
fn what_the_kernel_offers_is_found_by_trying() {
    assert_eq!(choose(TrackerChoice::None).unwrap(), None);
    let auto = choose(TrackerChoice::Auto).unwrap().unwrap();
    assert_eq!(Tracker::new(auto).kind(), auto);
    // Either it works or the reason is told.
    for choice in [TrackerChoice::WriteProtect, TrackerChoice::SoftDirty] {
        match choose(choice) {
            Ok(kind) => assert_eq!(kind.unwrap().to_string(), choice.to_string()),
            Err(error) => assert!(error.to_string().contains(&choice.to_string()), "{error}"),
        }
    }
}

#[test]
fn tasks_that_are_no_more_are_told_once() {
    let mut tracker = Tracker::new(TrackerKind::WriteProtect);
    let task = |task| TaskScan {
        task,
        ..TaskScan::default()
    };
    assert!(
        tracker
            .account(vec![task(1), task(2), task(3)])
            .gone
            .is_empty()
    );
    assert_eq!(tracker.account(vec![task(2), task(4)]).gone, [1, 3]);
    assert!(tracker.account(vec![task(2), task(4)]).gone.is_empty());
}
