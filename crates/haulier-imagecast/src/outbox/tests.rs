//! Outbox and intake together: what goes in comes out in the store, over connections that break.

use std::time::Duration;

use haulier_images::page::{PAGE, PagesHasher, ZERO_HASH};
use proptest::prelude::*;

use super::*;
use crate::intake::Intake;
use crate::message::Held;
use crate::store::{INVENTORY, Key, Next, Pool, State, Store};

fn name(text: &str) -> ImageName {
    ImageName::new(text).unwrap()
}

fn store(memory: u64) -> Arc<Store> {
    Arc::new(Store::new(Pool::new(memory), [name("a"), name("b")], 10))
}

/// A page that shows its number; zero for 0.
fn page(number: u8) -> Vec<u8> {
    vec![number; PAGE]
}

/// Puts an image into the outbox, in frames of `step` pages or bytes.
fn send(outbox: &mut Outbox, snapshot: u64, image: &str, bytes: &[u8], step: usize) {
    let image = name(image);
    let number = outbox.open(snapshot, &image).unwrap();
    let blake3 = if image.is_of_pages() {
        let mut hasher = PagesHasher::new();
        for data in bytes.chunks(step * PAGE) {
            let hashes = haulier_images::page::hash_all_unless_zero(data);
            for hash in &hashes {
                hasher.update(hash.as_ref().unwrap_or(&ZERO_HASH));
            }
            let data = data.to_vec().into();
            outbox.push(number, Item::Pages { data, hashes });
        }
        hasher.finalize()
    } else {
        for data in bytes.chunks(step) {
            outbox.push(number, Item::Plain(data.to_vec().into()));
        }
        *blake3::hash(bytes).as_bytes()
    };
    let length = bytes.len() as u64;
    outbox.push(number, Item::End { length, blake3 });
}

/// Delivers up to `most` frames.
fn deliver(outbox: &mut Outbox, intake: &mut Intake, most: usize) -> usize {
    let mut count = 0;
    while count < most {
        let Some(frame) = outbox.next() else { break };
        let (kind, body) = frame.body();
        intake.frame(kind, &body, Vec::new()).unwrap();
        count += 1;
    }
    count
}

fn contents(store: &Store, key: &Key, image: &str) -> Option<Vec<u8>> {
    let images = store.images(key);
    let (_, image) = images.iter().find(|(n, _)| n.as_str() == image)?;
    let (mut index, mut bytes) = (0, Vec::new());
    loop {
        match image.next(index, u64::MAX, Duration::ZERO) {
            Next::Pieces(pieces) => {
                index += pieces.len();
                for piece in pieces {
                    piece.append_to(&mut bytes).unwrap();
                }
            }
            Next::End => return Some(bytes),
            Next::NotYet | Next::Failed => return None,
        }
    }
}

fn key(number: u64) -> Key {
    Key {
        target: name("a"),
        number,
    }
}

#[test]
fn a_small_image_is_not_stuck_behind_a_large_one() {
    let (store, mut outbox) = (store(64 << 20), Outbox::new(64 << 20, 64 << 20));
    let mut intake = Intake::new(Arc::clone(&store), Arc::default(), false);
    outbox.begin(1, &name("a"));
    let large: Vec<u8> = (0..200).flat_map(|n| page(n as u8)).collect();
    send(&mut outbox, 1, "pages-1.img", &large, 1);
    send(&mut outbox, 1, "core-1.img", b"small", 2);
    // Its header, three parts and its end, and as much of the other.
    deliver(&mut outbox, &mut intake, 12);
    assert_eq!(
        contents(&store, &key(1), "core-1.img"),
        Some(b"small".to_vec())
    );
    assert_eq!(contents(&store, &key(1), "pages-1.img"), None);
}

#[test]
fn a_later_dump_refers_to_what_the_one_before_had() {
    let (store, mut outbox) = (store(64 << 20), Outbox::new(64 << 20, 64 << 20));
    let mut intake = Intake::new(Arc::clone(&store), Arc::default(), false);
    let mut bytes: Vec<u8> = (0..100).flat_map(page).collect();
    let mut sent = Vec::new();
    for snapshot in 1..=3 {
        outbox.begin(snapshot, &name("a"));
        send(&mut outbox, snapshot, "pages-1.img", &bytes, 30);
        outbox.finish(snapshot);
        deliver(&mut outbox, &mut intake, usize::MAX);
        sent.push(outbox.bytes_of(snapshot));
        outbox.release(snapshot);
        deliver(&mut outbox, &mut intake, usize::MAX);
        assert_eq!(store.state(&key(snapshot)), Some(State::Released));
        assert_eq!(
            contents(&store, &key(snapshot), "pages-1.img").as_ref(),
            Some(&bytes)
        );
        bytes[snapshot as usize * PAGE] ^= 128;
    }
    assert!(sent[0] > 99 * 4096, "{sent:?}");
    assert!(sent[1] < 3 * 4096 && sent[2] < 3 * 4096, "{sent:?}");
}

#[test]
fn a_refused_dump_does_not_stop_the_next() {
    let (store, mut outbox) = (store(100_000), Outbox::new(64 << 20, 64 << 20));
    let mut intake = Intake::new(Arc::clone(&store), Arc::default(), false);
    let large: Vec<u8> = (1..=100).flat_map(page).collect();
    outbox.begin(1, &name("a"));
    send(&mut outbox, 1, "pages-1.img", &large, 5);
    outbox.finish(1);
    deliver(&mut outbox, &mut intake, usize::MAX);
    let answers = intake.answers();
    let [Body::Refused(refused)] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert!(
        refused.reason.contains("100000 bytes"),
        "{}",
        refused.reason
    );
    outbox.abort(1, "refused");
    outbox.begin(2, &name("a"));
    send(&mut outbox, 2, "pages-1.img", &large[..5 * PAGE], 5);
    outbox.finish(2);
    deliver(&mut outbox, &mut intake, usize::MAX);
    let held = Body::Held(Held {
        snapshot: 2,
        number: 2,
        images: 1,
        bytes: 5 * PAGE as u64,
    });
    assert_eq!(intake.answers(), [held]);
}

#[test]
fn the_window_bounds_what_is_kept() {
    let mut outbox = Outbox::new(1 << 20, 10_000);
    outbox.begin(1, &name("a"));
    send(&mut outbox, 1, "core-1.img", &[1; 50_000], 1000);
    let mut frames: u64 = 0;
    while outbox.next().is_some() {
        frames += 1;
    }
    assert!(frames < 20, "{frames}");
    assert!(!outbox.acknowledge(frames + 1));
    assert!(outbox.acknowledge(frames));
    assert!(outbox.next().is_some());
    // An answer that was overtaken.
    assert!(outbox.acknowledge(1));
    assert!(!outbox.resume(0));
}

#[test]
fn a_release_that_was_not_heard_is_known() {
    let mut outbox = Outbox::new(1 << 20, 10_000);
    outbox.begin(7, &name("a"));
    outbox.finish(7);
    outbox.release(7);
    while outbox.next().is_some() {}
    outbox.acknowledge(2);
    assert_eq!(outbox.unheard_releases(), [7]);
    outbox.acknowledge(3);
    assert!(outbox.unheard_releases().is_empty());
}

#[derive(Debug, Clone)]
struct Dump {
    pages: Vec<u8>,
    plain: Vec<u8>,
    step: usize,
    aborted: bool,
}

fn dump() -> impl Strategy<Value = Dump> {
    let pages = prop::collection::vec(0_u8..12, 0..40);
    let plain = prop::collection::vec(any::<u8>(), 0..200);
    (pages, plain, 1_usize..9, prop::bool::weighted(0.2)).prop_map(
        |(pages, plain, step, aborted)| Dump {
            pages,
            plain,
            step,
            aborted,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// However often the connection breaks, and whatever was on its way then, each dump arrives
    /// whole, once, or is given up.
    #[test]
    fn what_is_sent_arrives_over_connections_that_break(
        dumps in prop::collection::vec(dump(), 1..5),
        breaks in prop::collection::vec((0_usize..9, 0_usize..5), 0..40),
        window in 5_000_usize..200_000,
    ) {
        let (store, mut outbox) = (store(64 << 20), Outbox::new(1 << 20, window));
        let mut intake = Intake::new(Arc::clone(&store), Arc::default(), false);
        let mut breaks = breaks.into_iter();
        for (index, dump) in dumps.iter().enumerate() {
            let snapshot = index as u64 + 1;
            let pages: Vec<u8> = dump.pages.iter().flat_map(|n| page(*n)).collect();
            outbox.begin(snapshot, &name("a"));
            send(&mut outbox, snapshot, "pages-1.img", &pages, dump.step);
            send(&mut outbox, snapshot, INVENTORY, &dump.plain, dump.step);
            if dump.aborted {
                outbox.abort(snapshot, "so");
            } else {
                outbox.finish(snapshot);
            }
            loop {
                let (arrive, lost) = breaks.next().unwrap_or((usize::MAX, 0));
                let arrived = deliver(&mut outbox, &mut intake, arrive);
                for _ in 0..lost {
                    // Sent, and lost with the connection.
                    outbox.next();
                }
                if arrived == 0 && arrive == usize::MAX {
                    break;
                }
                prop_assert!(outbox.resume(intake.received()));
            }
            let key = key(snapshot);
            if dump.aborted {
                prop_assert!(matches!(store.state(&key), Some(State::Failed(_))));
                continue;
            }
            let answers = intake.answers();
            prop_assert!(matches!(&answers[..], [Body::Held(held)] if held.snapshot == snapshot));
            outbox.release(snapshot);
            prop_assert_eq!(deliver(&mut outbox, &mut intake, usize::MAX), 1);
            prop_assert!(outbox.acknowledge(intake.received()));
            prop_assert_eq!(contents(&store, &key, "pages-1.img"), Some(pages));
            prop_assert_eq!(contents(&store, &key, INVENTORY), Some(dump.plain.clone()));
        }
        intake.lost("the end");
        drop(intake);
        for info in store.list() {
            store.forget(&info.key).unwrap();
        }
        prop_assert_eq!(store.pool().used().0, 0);
    }
}
