//! Rounds end to end: every way to send gives the same memory, and what is gone is gone.

use std::process::{Child, Command, Stdio};

use proptest::prelude::*;

use super::*;

/// Sends rounds over so many channels into a store.
pub(super) fn transfer(
    options: &StreamOptions,
    channels: usize,
    store: &PageStore,
    act: impl FnOnce(&mut PageSender),
) -> Vec<ReceiveStats> {
    let (sources, destinations): (Vec<_>, Vec<_>) = (0..channels).map(|_| tcp_pair()).unzip();
    thread::scope(|scope| {
        let receive = |mut channel| receive_pages(&mut channel, store, &soon()).unwrap();
        let receivers: Vec<_> = destinations
            .into_iter()
            .map(|channel| scope.spawn(move || receive(channel)))
            .collect();
        let mut sender = PageSender::new(sources, options.clone()).unwrap();
        act(&mut sender);
        assert_eq!(sender.finish(&soon()).unwrap().len(), channels);
        receivers.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

fn every_way() -> Vec<StreamOptions> {
    let mut ways = Vec::new();
    for compression in Compression::ALL {
        for deduplicate in [false, true] {
            ways.push(StreamOptions {
                compression,
                deduplicate,
                ..StreamOptions::default()
            });
        }
    }
    ways
}

pub(super) fn of(region: &Region, vpid: u32) -> TaskPages {
    TaskPages {
        pid: std::process::id() as i32,
        task: vpid,
        ranges: vec![PageRange {
            start: region.address(),
            pages: (region.len() / PAGE_BYTES) as u64,
        }],
    }
}

/// Writes a page of a kind: zero, one of a few, text, or noise.
pub(super) fn fill(region: &Region, page: usize, kind: u8, number: u32) {
    let mut state = u64::from(number) * 2 + 1;
    for offset in 0..PAGE_BYTES {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let byte = match kind % 4 {
            0 => 0,
            1 => (number % 3) as u8 + 1,
            2 => b"what is written "[(state >> 61) as usize * 2],
            _ => (state >> 56) as u8,
        };
        region.write(page * PAGE_BYTES + offset, byte);
    }
}

pub(super) fn assert_same(store: &PageStore, region: &Region, vpid: u32) {
    for page in 0..region.len() / PAGE_BYTES {
        let address = region.address() + (page * PAGE_BYTES) as u64;
        let found = store.lookup(vpid, address, 1);
        for offset in 0..PAGE_BYTES {
            let got = match &found {
                Lookup::Data(data) => data[offset],
                Lookup::Zero(_) => 0,
                Lookup::Absent { .. } => panic!("page {page} is absent"),
            };
            let expected = region.read(page * PAGE_BYTES + offset);
            assert_eq!(got, expected, "page {page}, byte {offset}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn every_way_to_send_brings_the_same_memory(
        kinds in prop::collection::vec((any::<u8>(), any::<u32>()), 1..150),
        again in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<u32>()), 0..40),
        channels in 1..3_usize,
    ) {
        for options in every_way() {
            let region = Region::map(kinds.len() * PAGE_BYTES).unwrap();
            for (page, (kind, number)) in kinds.iter().enumerate() {
                fill(&region, page, *kind, *number);
            }
            let store = PageStore::new(1 << 30);
            let received = transfer(&options, channels, &store, |sender| {
                let stats = sender.send_round(vec![of(&region, 9)], &[], 0, false, &soon()).unwrap();
                assert_eq!(stats.pages, kinds.len() as u64);
                assert_eq!(stats.pages, stats.normal + stats.zero_pages + stats.duplicates);
                assert_eq!(stats.raw_bytes, stats.pages * PAGE);
                let by = stats.by_codec;
                assert_eq!(by.none + by.lz4 + by.zstd, stats.normal * PAGE);
                let mut ranges = Vec::new();
                for (page, kind, number) in &again {
                    let page = page.index(kinds.len());
                    fill(&region, page, *kind, *number);
                    let start = region.address() + page as u64 * PAGE;
                    ranges.push(PageRange { start, pages: 1 });
                }
                let pages = TaskPages { ranges, ..of(&region, 9) };
                sender.send_round(vec![pages], &[], 1, false, &soon()).unwrap();
            });
            let pages: u64 = received.iter().map(|stats| stats.pages).sum();
            prop_assert_eq!(pages, (kinds.len() + again.len()) as u64);
            prop_assert_eq!(store.received(), pages);
            prop_assert!(received.iter().all(|stats| stats.rounds == 2));
            assert_same(&store, &region, 9);
            store.retain_tasks(|_| false);
            prop_assert_eq!(store.used(), 0, "the dictionaries are gone with their channels");
        }
    }
}

#[test]
fn compression_and_deduplication_save_bytes_and_are_counted() {
    let region = Region::map(600 * PAGE_BYTES).unwrap();
    for page in 0..600 {
        // 200 of text, 400 of which all but three are repetitions.
        fill(&region, page, if page < 200 { 2 } else { 1 }, page as u32);
    }
    for (compression, codec) in [
        (Compression::Lz4, Compression::Lz4),
        (Compression::Zstd, Compression::Zstd),
        (Compression::None, Compression::None),
    ] {
        let options = StreamOptions {
            compression,
            ..StreamOptions::default()
        };
        let store = PageStore::new(1 << 30);
        transfer(&options, 1, &store, |sender| {
            let stats = sender
                .send_round(vec![of(&region, 1)], &[], 0, false, &soon())
                .unwrap();
            assert_eq!(stats.duplicates, 400 - 2 * 3);
            assert_eq!(stats.normal, 206);
            assert_eq!(stats.compression(), codec);
            let most = if codec == Compression::None { 210 } else { 150 };
            assert!(stats.wire_bytes < most * PAGE, "{compression}: {stats:?}");
        });
        let used = store.used();
        assert!(used < 230 * PAGE, "duplicates share memory: {used}");
        assert_same(&store, &region, 1);
    }
}

#[test]
fn what_is_gone_is_forgotten_on_every_channel() {
    let region = Region::map(4000 * PAGE_BYTES).unwrap();
    for page in 0..4000 {
        fill(&region, page, 3, page as u32);
    }
    let part = |from: u64, pages: u64| PageRange {
        start: region.address() + from * PAGE,
        pages,
    };
    let store = PageStore::new(1 << 30);
    transfer(&StreamOptions::default(), 3, &store, |sender| {
        sender
            .send_round(vec![of(&region, 1)], &[], 0, true, &soon())
            .unwrap();
        let gone = [
            (1, vec![part(0, 3000), part(3500, 1)]),
            (2, vec![part(0, 1)]),
        ];
        let again = TaskPages {
            ranges: vec![part(100, 10)],
            ..of(&region, 1)
        };
        sender
            .send_round(vec![again], &gone, 1, true, &soon())
            .unwrap();
    });
    for page in 0..4000_u64 {
        let there = (100..110).contains(&page) || (page >= 3000 && page != 3500);
        let found = store.lookup(1, part(page, 1).start, 1).pages();
        assert_eq!(found > 0, there, "page {page}");
    }
    let bookkeeping = PAGE * 100;
    assert!(
        store.used() <= 1009 * PAGE + bookkeeping,
        "{}",
        store.used()
    );
}

#[test]
fn pages_that_vanish_are_skipped_while_the_task_runs_and_an_error_otherwise() {
    let region = Region::map(300 * PAGE_BYTES).unwrap();
    for page in 0..300 {
        fill(&region, page, 3, page as u32);
    }
    // Unmapped as the kernel sees it: the reader finds a hole there.
    let hole = Region::map(PAGE_BYTES).unwrap();
    let address = hole.address();
    drop(hole);
    let mut pages = of(&region, 1);
    pages.ranges = vec![
        PageRange {
            start: region.address(),
            pages: 100,
        },
        PageRange {
            start: 1 << 46,
            pages: 70,
        },
        PageRange {
            start: region.address() + 100 * PAGE,
            pages: 200,
        },
    ];
    assert!(address != 1 << 46);
    let store = PageStore::new(1 << 30);
    transfer(&StreamOptions::default(), 2, &store, |sender| {
        let stats = sender
            .send_round(vec![pages.clone()], &[], 0, true, &soon())
            .unwrap();
        assert_eq!((stats.pages, stats.vanished), (300, 70));
    });
    assert_same(&store, &region, 1);

    let (source, _destination) = tcp_pair();
    let mut sender = PageSender::new(vec![source], StreamOptions::default()).unwrap();
    let error = sender
        .send_round(vec![pages], &[], 0, false, &soon())
        .unwrap_err();
    let expected = ReadError::Page {
        pid: std::process::id() as i32,
        address: 1 << 46,
    };
    assert_eq!(error.to_string(), StreamError::Read(expected).to_string());
    let again = sender.send_round(vec![], &[], 1, false, &soon());
    assert!(matches!(again, Err(StreamError::NoChannel)));
}

struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_task_that_exits_while_it_runs_has_no_pages() {
    let mut victim = Victim(
        Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let pid = victim.0.id() as i32;
    victim.0.kill().unwrap();
    victim.0.wait().unwrap();
    let pages = TaskPages {
        pid,
        task: 3,
        ranges: vec![PageRange {
            start: PAGE,
            pages: 1000,
        }],
    };
    let store = PageStore::new(1 << 20);
    let received = transfer(&StreamOptions::default(), 1, &store, |sender| {
        let stats = sender
            .send_round(vec![pages], &[], 0, true, &soon())
            .unwrap();
        assert_eq!((stats.pages, stats.vanished), (0, 1000));
    });
    assert_eq!(received[0].pages, 0);
}

#[test]
fn a_limit_is_kept_without_an_error() {
    let region = Region::map(64 * PAGE_BYTES).unwrap();
    (0..64).for_each(|page| fill(&region, page, 3, page as u32));
    let options = StreamOptions {
        bandwidth: Some(8 << 20),
        ..StreamOptions::default()
    };
    let store = PageStore::new(1 << 30);
    transfer(&options, 2, &store, |sender| {
        let stats = sender
            .send_round(vec![of(&region, 1)], &[], 0, false, &soon())
            .unwrap();
        assert_eq!(stats.normal, 64);
        sender.hurry();
        let all = vec![of(&region, 1)];
        sender.send_round(all, &[], 1, false, &soon()).unwrap();
    });
    assert_same(&store, &region, 1);
}
