//! Peers that mean no good.

use haulier_images::page::PAGE;
use haulier_images::runs::{self, PAGED, Run};
use haulier_proto::message::{ImageEnd, ImageHeader};
use proptest::prelude::*;

use super::*;
use crate::compress::Compression;
use crate::message::{Ack, Fault, GaveUp, Go, Over, Placed, Restored, Session, Wanted};
use crate::store::Pool;
use haulier_memory::page::PageRange;
use haulier_sys::wait::Wait;

const MEMORY: u64 = 1 << 20;

fn intake() -> Intake {
    intake_that_is_lazy(false)
}

fn intake_that_is_lazy(lazy: bool) -> Intake {
    let target = ImageName::new("a").unwrap();
    Intake::new(
        Arc::new(Store::new(Pool::new(MEMORY), [target], 3)),
        Arc::default(),
        lazy,
    )
}

type Frame = (Kind, Vec<u8>);

fn encode(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}

fn begin(snapshot: u64, target: &str) -> Frame {
    session(Body::Begin(Begin {
        snapshot,
        target: target.to_owned(),
    }))
}

fn session(body: Body) -> Frame {
    (Kind::ImageSession, encode(&Session::from(body)))
}

fn header(number: u32, snapshot: u64, name: &str) -> Frame {
    let header = ImageHeader {
        number,
        name: name.to_owned(),
        size: None,
        snapshot,
    };
    (Kind::ImageHeader, encode(&header))
}

fn data(number: u32, bytes: &[u8]) -> Frame {
    let mut body = number.to_le_bytes().to_vec();
    body.extend_from_slice(bytes);
    (Kind::ImageData, body)
}

fn paged(number: u32, runs: &[Run], literal: &[u8]) -> Frame {
    let mut body = runs::encode(number, runs);
    body.extend_from_slice(literal);
    (Kind::ImageData, body)
}

fn end(number: u32, length: u64, blake3: &[u8]) -> Frame {
    let end = ImageEnd {
        number,
        length,
        blake3: blake3.to_vec(),
    };
    (Kind::ImageEnd, encode(&end))
}

fn done(snapshot: u64, images: u32) -> Frame {
    (Kind::ImagesDone, encode(&ImagesDone { images, snapshot }))
}

fn release(snapshot: u64) -> Frame {
    session(Body::Release(Release { snapshot }))
}

fn take(intake: &mut Intake, frames: &[Frame]) -> Result<(), Violation> {
    frames
        .iter()
        .try_for_each(|(kind, body)| intake.frame(*kind, body, Vec::new()))
}

#[test]
fn what_is_out_of_order_ends_the_session() {
    let bad: &[(&str, Vec<Frame>)] = &[
        ("a frame of another kind", vec![(Kind::Pages, Vec::new())]),
        ("no protobuf", vec![(Kind::ImageSession, vec![255; 9])]),
        ("an unknown message", vec![(Kind::ImageSession, Vec::new())]),
        (
            "a message of the cache's",
            vec![session(Body::Ack(Ack { received: 1 }))],
        ),
        ("a name that leads out", vec![begin(1, "../a")]),
        ("a dump again", vec![begin(1, "a"), begin(1, "a")]),
        ("two dumps at once", vec![begin(1, "a"), begin(2, "a")]),
        ("an image of no dump", vec![header(0, 1, "core-1.img")]),
        (
            "an image that leads out",
            vec![begin(1, "a"), header(0, 1, "../../etc/passwd")],
        ),
        (
            "an image with an absolute name",
            vec![begin(1, "a"), header(0, 1, "/etc/passwd")],
        ),
        (
            "an image without a name",
            vec![begin(1, "a"), header(0, 1, "")],
        ),
        (
            "an image with a zero in its name",
            vec![begin(1, "a"), header(0, 1, "a\0b")],
        ),
        (
            "an image number again",
            vec![begin(1, "a"), header(0, 1, "a.img"), header(0, 1, "b.img")],
        ),
        (
            "a number that is a flag",
            vec![begin(1, "a"), header(PAGED, 1, "a.img")],
        ),
        ("data of no image", vec![begin(1, "a"), data(0, b"x")]),
        ("data without a number", vec![(Kind::ImageData, vec![0; 3])]),
        (
            "pages of an image that has none",
            vec![
                begin(1, "a"),
                header(0, 1, "core-1.img"),
                paged(0, &[Run::Zero { pages: 1 }], &[]),
            ],
        ),
        (
            "bytes of an image of pages",
            vec![begin(1, "a"), header(0, 1, "pages-1.img"), data(0, b"x")],
        ),
        (
            "pages that nobody sent",
            vec![
                begin(1, "a"),
                header(0, 1, "pages-1.img"),
                paged(0, &[Run::Bank { first: 0, pages: 1 }], &[]),
            ],
        ),
        (
            "pages beyond the last number",
            vec![
                begin(1, "a"),
                header(0, 1, "pages-1.img"),
                paged(
                    0,
                    &[Run::Bank {
                        first: u32::MAX,
                        pages: 2,
                    }],
                    &[],
                ),
            ],
        ),
        (
            "pages without end",
            vec![
                begin(1, "a"),
                header(0, 1, "pages-1.img"),
                paged(
                    0,
                    &[Run::Zero {
                        pages: (1 << 30) - 1,
                    }],
                    &[],
                ),
            ],
        ),
        ("an end of no image", vec![begin(1, "a"), end(0, 0, &[])]),
        ("an image that is missing", vec![begin(1, "a"), done(1, 1)]),
        (
            "an image that has not ended",
            vec![begin(1, "a"), header(0, 1, "a.img"), done(1, 1)],
        ),
        ("a release of nothing", vec![release(1)]),
        ("a release too early", vec![begin(1, "a"), release(1)]),
        (
            "more when all is there",
            vec![begin(1, "a"), done(1, 0), header(0, 1, "a.img")],
        ),
    ];
    for (what, frames) in bad {
        let mut intake = intake();
        assert!(take(&mut intake, frames).is_err(), "{what}");
        intake.lost("it broke the protocol");
        for info in intake.store.list() {
            assert!(!matches!(info.state, State::Released), "{what}");
        }
    }
}

#[test]
fn a_damaged_image_fails_its_dump_and_no_other() {
    for (length, blake3) in [
        (2, *blake3::hash(b"x").as_bytes()),
        (1, *blake3::hash(b"y").as_bytes()),
    ] {
        let mut intake = intake();
        let bad = [
            begin(1, "a"),
            header(0, 1, "core-1.img"),
            data(0, b"x"),
            end(0, length, &blake3),
            // What still comes of it is passed over.
            header(1, 1, "pages-1.img"),
            paged(1, &[Run::Bank { first: 9, pages: 1 }], &[]),
            end(1, 0, &[]),
            done(1, 2),
        ];
        take(&mut intake, &bad).unwrap();
        let answers = intake.answers();
        assert!(matches!(&answers[..], [Body::Refused(_)]), "{answers:?}");
        let good = [
            session(Body::Abort(Abort {
                snapshot: 1,
                reason: String::new(),
            })),
            begin(2, "a"),
            header(0, 2, "core-1.img"),
            data(0, b"x"),
            end(0, 1, blake3::hash(b"x").as_bytes()),
            done(2, 1),
            release(2),
        ];
        take(&mut intake, &good).unwrap();
        let states: Vec<State> = intake.store.list().into_iter().map(|i| i.state).collect();
        assert_eq!(states, [State::Released]);
    }
}

#[test]
fn an_unknown_target_is_refused() {
    let mut intake = intake();
    take(&mut intake, &[begin(1, "b"), header(0, 1, "a.img")]).unwrap();
    let answers = intake.answers();
    assert!(
        matches!(&answers[..], [Body::Refused(refused)] if refused.reason.contains("target b")),
        "{answers:?}"
    );
}

#[test]
fn what_is_not_complete_when_the_session_is_lost_fails_and_what_is_held_stays() {
    let mut intake = intake();
    take(&mut intake, &[begin(1, "a"), done(1, 0), begin(2, "a")]).unwrap();
    assert_eq!(intake.said().len(), 1);
    intake.lost("gone");
    let states: Vec<State> = intake.store.list().into_iter().map(|i| i.state).collect();
    assert_eq!(states, [State::Held, State::Failed("gone".to_owned())]);
}

#[test]
fn nothing_that_is_sent_takes_more_than_the_allowance() {
    // Images under way, names, small data, zero pages, dumps: each without end.
    let mut intake = intake();
    take(&mut intake, &[begin(9, "a")]).unwrap();
    let many = (0..).map(|n| header(n, 9, &format!("image-{n}.img")));
    assert!(take(&mut intake, &many.take(9000).collect::<Vec<_>>()).is_err());
    assert!(intake.store.pool().used().1 <= MEMORY);
    intake.lost("enough");
    take(&mut intake, &[begin(1, "a")]).unwrap();
    for number in 0..20_000 {
        let image = header(number, 1, &format!("image-{number}.img"));
        take(&mut intake, &[image]).unwrap();
        take(&mut intake, &[data(number, b"x")]).unwrap();
        let last = end(number, 1, blake3::hash(b"x").as_bytes());
        take(&mut intake, &[last]).unwrap();
    }
    assert!(intake.store.pool().used().1 <= MEMORY);
    take(
        &mut intake,
        &[session(Body::Abort(Abort {
            snapshot: 1,
            reason: String::new(),
        }))],
    )
    .unwrap();
    take(&mut intake, &[begin(2, "a"), header(0, 2, "pages-1.img")]).unwrap();
    for _ in 0..100_000 {
        let zeros = paged(0, &[Run::Zero { pages: 1024 }], &[]);
        take(&mut intake, &[zeros]).unwrap();
    }
    assert!(intake.store.pool().used().1 <= MEMORY);
    intake.lost("enough");
    for snapshot in 10..5000 {
        take(
            &mut intake,
            &[begin(snapshot, "a"), done(snapshot, 0), release(snapshot)],
        )
        .unwrap();
    }
    assert!(intake.store.pool().used().1 <= MEMORY);
}

/// Frames that are mostly well-formed, in any order.
fn frame() -> impl Strategy<Value = Frame> {
    let small = 0_u32..4;
    let snapshot = 0_u64..4;
    let name = prop::sample::select(vec![
        "core-1.img",
        "pages-1.img",
        "pages-2.img",
        "inventory.img",
        "..",
        "a/b",
    ]);
    let run = prop_oneof![
        (1_u32..2000).prop_map(|pages| Run::Zero { pages }),
        (0_u32..20, 1_u32..20).prop_map(|(first, pages)| Run::Bank { first, pages }),
        (1_u32..4).prop_map(|pages| Run::Literal { pages }),
    ];
    let noise = prop::collection::vec(any::<u8>(), 0..64);
    prop_oneof![
        snapshot.clone().prop_map(|s| begin(s, "a")),
        (small.clone(), snapshot.clone(), name).prop_map(|(n, s, name)| header(n, s, name)),
        (small.clone(), noise.clone()).prop_map(|(n, bytes)| data(n, &bytes)),
        (small.clone(), prop::collection::vec(run, 0..5)).prop_map(|(n, runs)| {
            let literal = runs.iter().map(|run| match run {
                Run::Literal { pages } => *pages as usize * PAGE,
                _ => 0,
            });
            let literal = vec![7; literal.sum()];
            paged(n, &runs, &literal)
        }),
        (small.clone(), 0_u64..9000, noise.clone()).prop_map(|(n, l, b)| end(n, l, &b)),
        (snapshot.clone(), small).prop_map(|(s, n)| done(s, n)),
        snapshot.clone().prop_map(release),
        snapshot.prop_map(|snapshot| session(Body::Abort(Abort {
            snapshot,
            reason: "so".to_owned()
        }))),
        (prop::sample::select(Kind::ALL.to_vec()), noise),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever comes, nothing panics, the allowance holds, no dump that is not complete is held,
    /// and in the end everything is given back.
    #[test]
    fn hostile_frames_do_no_harm(frames in prop::collection::vec(frame(), 0..60)) {
        let mut intake = intake();
        for (kind, body) in &frames {
            if intake.frame(*kind, body, Vec::new()).is_err() {
                break;
            }
            prop_assert!(intake.store.pool().used().1 <= MEMORY);
        }
        let store = Arc::clone(&intake.store);
        intake.lost("the end");
        drop(intake);
        for info in store.list() {
            if matches!(info.state, State::Held | State::Released) {
                for (name, image) in store.images(&info.key) {
                    prop_assert!(!name.as_str().contains('/'));
                    let end = image.next(usize::MAX, 1, std::time::Duration::ZERO);
                    prop_assert!(matches!(end, crate::store::Next::End));
                }
            }
            store.forget(&info.key).unwrap();
        }
        prop_assert_eq!(store.pool().used().0, 0);
    }
}

/// Room for pages that come lazily: a frame of the longest fits, and not two.
const LAZY_ROOM: u64 = 2 << 20;

fn lazy_pages(snapshot: u64, task: u32, first: u64, pages: u64, zero: bool) -> Frame {
    let pages = LazyPages {
        snapshot,
        task,
        range: PageRange {
            start: first << 12,
            pages,
        },
        zero,
    };
    let mut body = pages.head().to_vec();
    if !zero {
        body.resize(body.len() + pages.range.pages as usize * PAGE, 5);
    }
    // Some of them.
    let (head, contents) = body.split_at(24);
    let compressed = LazyPages::compressed(Compression::Lz4, head, contents);
    let body = compressed.filter(|_| task == 2).unwrap_or(body);
    (Kind::LazyPages, body)
}

/// What is said of memory that is left behind, by either side; some of it damaged.
fn lazy_frame() -> impl Strategy<Value = Frame> {
    let snapshot = 0_u64..3;
    let reason = prop::sample::select(vec!["", "so"]).prop_map(str::to_owned);
    let body = prop_oneof![
        4 => snapshot.clone().prop_map(|snapshot| Body::Left(Left { snapshot })),
        4 => snapshot.clone().prop_map(|snapshot| Body::Go(Go { snapshot })),
        2 => (snapshot.clone(), reason.clone())
            .prop_map(|(snapshot, reason)| Body::Over(Over { snapshot, reason })),
        1 => prop_oneof![
            snapshot.clone().prop_map(|snapshot| Body::Wanted(Wanted { snapshot })),
            snapshot.clone().prop_map(|snapshot| Body::Restored(Restored { snapshot })),
            snapshot.clone().prop_map(|snapshot| Body::Placed(Placed { snapshot })),
            (snapshot.clone(), reason, any::<bool>()).prop_map(|(snapshot, reason, ran)| {
                Body::GaveUp(GaveUp { snapshot, reason, ran })
            }),
            (snapshot.clone(), any::<u32>(), prop::collection::vec(any::<u64>(), 0..5)).prop_map(
                |(snapshot, task, pages)| Body::Fault(Fault { snapshot, task, pages })
            ),
        ],
    ];
    let first = prop_oneof![0_u64..300, any::<u64>()];
    let pages = (snapshot, 0_u32..3, first, 0_u64..260, any::<bool>());
    let whole = prop_oneof![
        body.prop_map(session),
        pages.prop_map(|(s, task, first, pages, zero)| lazy_pages(s, task, first, pages, zero)),
    ];
    (whole, prop::option::weighted(0.1, any::<(usize, u8)>())).prop_map(
        |((kind, mut body), damage)| {
            if let (Some((at, with)), false) = (damage, body.is_empty()) {
                let at = at % body.len().min(40);
                body[at] ^= with;
            }
            (kind, body)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever comes of memory that is left behind, whether a restore goes on or not: nothing panics, what
    /// there is room for is not passed, no dump that is not complete is held, and in the end everything is
    /// given back.
    #[test]
    fn hostile_frames_of_memory_that_is_left_behind_do_no_harm(
        frames in prop::collection::vec(
            prop_oneof![3 => lazy_frame(), 2 => frame(), 1 => (0_u64..3).prop_map(|s| begin(s, "a"))],
            0..60,
        ),
        restored in any::<u64>(),
    ) {
        let mut intake = intake_that_is_lazy(true);
        let mut stores = Vec::new();
        for (index, (kind, body)) in frames.iter().enumerate() {
            if *kind == Kind::LazyPages {
                // As a connection does, with less patience.
                let lazy = intake.lazy_of(body);
                let wait = Wait::uncancellable(std::time::Duration::ZERO);
                if lazy.is_some_and(|lazy| lazy.await_room(&wait).is_err()) {
                    break;
                }
            }
            if intake.frame(*kind, body, Vec::new()).is_err() {
                break;
            }
            for (number, lazy) in &intake.lazies {
                if restored >> ((index as u64 + number) % 64) & 1 == 1 && !lazy.is_over() {
                    stores.push(lazy.goes_with(LAZY_ROOM));
                }
            }
            prop_assert!(stores.iter().all(|store| store.used() <= LAZY_ROOM));
            prop_assert!(intake.store.pool().used().1 <= MEMORY);
            prop_assert!(intake.said().len() <= 2 * frames.len());
        }
        let store = Arc::clone(&intake.store);
        intake.lost("the end");
        prop_assert!(intake.lazies.is_empty());
        drop(intake);
        for info in store.list() {
            if matches!(info.state, State::Held | State::Released) {
                for (_, image) in store.images(&info.key) {
                    let end = image.next(usize::MAX, 1, std::time::Duration::ZERO);
                    prop_assert!(matches!(end, crate::store::Next::End));
                }
            }
            store.forget(&info.key).unwrap();
        }
        prop_assert_eq!(store.pool().used().0, 0);
    }
}

#[test]
fn pages_that_nobody_places_wait_at_the_proxy() {
    let mut intake = intake_that_is_lazy(true);
    let left = session(Body::Left(Left { snapshot: 1 }));
    take(&mut intake, &[begin(1, "a"), left]).unwrap();
    for zero in [false, true] {
        let store = intake.lazies[&1].goes_with(LAZY_ROOM);
        let mut frames = 0;
        let now = Wait::uncancellable(std::time::Duration::ZERO);
        loop {
            // Each page on its own, so that each takes an entry of its own.
            let frame = lazy_pages(1, 7, 2 * frames, 1, zero);
            if intake.lazy_of(&frame.1).unwrap().await_room(&now).is_err() {
                break;
            }
            take(&mut intake, &[frame]).unwrap();
            assert!(store.used() <= LAZY_ROOM);
            frames += 1;
        }
        assert!(frames > 200);
        // As the daemon does.
        store.retain(7, &[]);
    }
}
