use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

fn name(text: &str) -> ImageName {
    ImageName::new(text).unwrap()
}

fn store(memory: u64) -> Store {
    Store::new(Pool::new(memory), [name("a"), name("b")], 3)
}

/// A snapshot with an image of `bytes` and an inventory, up to `state`.
fn dump(store: &Store, target: &str, bytes: &[u8], state: State) -> Key {
    let key = store.begin(&name(target)).unwrap();
    for (image, bytes) in [("core-1.img", bytes), (INVENTORY, b"i")] {
        let image = store.add(&key, &name(image)).unwrap();
        let blob = store.put(bytes).unwrap();
        store.push(&image, vec![Piece::Data(blob)]).unwrap();
        image.finish(End::Complete);
    }
    if state != State::Arriving {
        store.settle(&key, State::Held).unwrap();
    }
    if state == State::Released {
        store.settle(&key, State::Released).unwrap();
    }
    key
}

fn always() -> bool {
    true
}

fn never() -> bool {
    false
}

#[test]
fn a_reader_that_comes_first_waits_for_the_announcement_and_the_release() {
    let store = store(1 << 20);
    let (begun, released) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let (store, begun, released) = (&store, &begun, &released);
        let reader = scope.spawn(move || {
            let reading = store.pick(&name("a"), None, always).unwrap();
            assert!(begun.load(Ordering::SeqCst));
            let answer = reading.request(&name(INVENTORY), always);
            assert!(released.load(Ordering::SeqCst));
            assert!(matches!(answer, Answer::Image(_)));
            let answer = reading.request(&name("mm-1.img"), always);
            assert!(matches!(answer, Answer::Absent));
        });
        begun.store(true, Ordering::SeqCst);
        let key = dump(store, "a", b"x", State::Held);
        released.store(true, Ordering::SeqCst);
        store.settle(&key, State::Released).unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn an_image_is_absent_only_when_the_dump_has_finished() {
    let store = store(1 << 20);
    let key = dump(&store, "a", b"x", State::Arriving);
    let reading = store.pick(&name("a"), None, never).unwrap();
    assert!(matches!(
        reading.request(&name("mm-1.img"), never),
        Answer::Gone
    ));
    assert!(matches!(
        reading.request(&name("core-1.img"), never),
        Answer::Image(_)
    ));
    store.settle(&key, State::Held).unwrap();
    assert!(matches!(
        reading.request(&name("mm-1.img"), never),
        Answer::Absent
    ));
    assert!(matches!(
        reading.request(&name(INVENTORY), never),
        Answer::Gone
    ));
}

#[test]
fn a_failed_dump_fails_its_readers_and_is_not_replaced_by_an_older_one() {
    let store = store(1 << 20);
    dump(&store, "a", b"x", State::Released);
    let key = dump(&store, "a", b"y", State::Arriving);
    let reading = store.pick(&name("a"), None, never).unwrap();
    assert_eq!(reading.key(), &key);
    store
        .settle(&key, State::Failed("the link broke".to_owned()))
        .unwrap();
    assert!(matches!(
        reading.request(&name(INVENTORY), always),
        Answer::Failed(why) if why == "the link broke"
    ));
    assert!(store.pick(&name("a"), None, never).is_none());
    assert!(store.pick(&name("a"), Some(1), never).is_some());
    assert!(store.pick(&name("a"), Some(3), never).is_none());
    assert!(store.settle(&key, State::Held).is_err());
}

#[test]
fn targets_are_the_ones_that_were_given() {
    let store = store(1 << 20);
    assert!(matches!(
        store.begin(&name("c")),
        Err(StoreError::Target(_))
    ));
    let key = dump(&store, "b", b"x", State::Arriving);
    assert!(matches!(
        store.add(&key, &name(INVENTORY)),
        Err(StoreError::Image(_))
    ));
    assert!(store.pick(&name("a"), None, never).is_none());
}

#[test]
fn old_snapshots_give_way_but_not_the_newest_nor_one_that_is_read() {
    let store = store(3 * 10_000 + 8_000);
    for _ in 0..3 {
        dump(&store, "a", &[1; 10_000], State::Released);
    }
    let read = store.pick(&name("a"), Some(1), never).unwrap();
    let key = dump(&store, "a", &[1; 10_000], State::Arriving);
    let left: Vec<u64> = store.list().iter().map(|info| info.key.number).collect();
    assert_eq!(left, [1, 3, 4]);
    store.settle(&key, State::Failed("so".to_owned())).unwrap();
    drop(read);
    dump(&store, "b", &[1; 10_000], State::Released);
    dump(&store, "b", &[1; 10_000], State::Arriving);
    // The newest of each target stay, whatever comes.
    assert!(matches!(
        store.put(&[1; 20_000]),
        Err(StoreError::Full { .. })
    ));
    let left: Vec<_> = store.list().iter().map(|info| info.key.clone()).collect();
    let number = |target: &str, number| Key {
        target: name(target),
        number,
    };
    assert_eq!(
        left,
        [
            number("a", 3),
            number("a", 4),
            number("b", 1),
            number("b", 2)
        ]
    );
}

#[test]
fn only_so_many_are_kept_and_everything_is_given_back() {
    let store = store(1 << 20);
    for _ in 0..5 {
        dump(&store, "a", b"x", State::Released);
    }
    let left: Vec<_> = store.list().iter().map(|info| info.key.clone()).collect();
    assert_eq!(
        left.iter().map(|key| key.number).collect::<Vec<_>>(),
        [3, 4, 5]
    );
    assert_eq!(store.next_number(&name("a")), 6);
    for key in left {
        store.forget(&key).unwrap();
    }
    assert_eq!(store.pool().used().0, 0);
}

#[test]
fn dumps_that_fail_again_and_again_do_not_add_up() {
    let store = store(20 * ENTRY_COST);
    for _ in 0..100 {
        let key = dump(&store, "a", b"x", State::Arriving);
        store.settle(&key, State::Failed("so".to_owned())).unwrap();
    }
    assert_eq!(store.list().len(), 1);
}
