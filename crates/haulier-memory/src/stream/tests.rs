//! Streams over real sockets: from our own memory, and from hostile peers.

mod again;
mod rounds;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use haulier_proto::frame::{FrameError, Header, Kind};
use haulier_proto::message::RoundEnd;
use haulier_sys::userfaultfd::Region;

use super::codec::Codec;
use super::frame::{Run, RunKind};
use super::*;
use crate::page::{PAGE, PAGE_BYTES, PageRange};
use crate::store::{Lookup, PageStore};

fn soon() -> Wait {
    Wait::uncancellable(Duration::from_secs(20))
}

fn tcp_pair() -> (Channel, Channel) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (destination, _) = listener.accept().unwrap();
    (
        Channel::new(source, "destination").unwrap(),
        Channel::new(destination, "source").unwrap(),
    )
}

/// A region in which every fourth page is zero, and its pages as a task.
fn task(vpid: u32, pages: usize, seed: u8) -> (Region, TaskPages) {
    let region = Region::map(pages * PAGE_BYTES).unwrap();
    for page in (0..pages).filter(|page| page % 4 != 2) {
        region.write(page * PAGE_BYTES + 77, value(seed, page));
        // No two are the same.
        for (offset, byte) in (page as u32).to_le_bytes().into_iter().enumerate() {
            region.write(page * PAGE_BYTES + 3000 + offset, byte);
        }
    }
    let range = PageRange {
        start: region.address(),
        pages: pages as u64,
    };
    let pages = TaskPages {
        pid: std::process::id() as i32,
        task: vpid,
        ranges: vec![range],
    };
    (region, pages)
}

fn value(seed: u8, page: usize) -> u8 {
    (page / 7) as u8 ^ seed | 1
}

fn check(store: &PageStore, region: &Region, vpid: u32, seed: u8) {
    for page in 0..region.len() / PAGE_BYTES {
        let address = region.address() + (page * PAGE_BYTES) as u64;
        match store.lookup(vpid, address, 1) {
            Lookup::Zero(1) => assert_eq!(page % 4, 2, "page {page}"),
            Lookup::Data(data) => {
                assert_ne!(page % 4, 2, "page {page}");
                assert_eq!(data[77], value(seed, page), "page {page}");
            }
            other => panic!("page {page}: {other:?}"),
        }
    }
}

#[test]
fn several_rounds_over_several_channels_arrive_whole() {
    let (sources, destinations): (Vec<_>, Vec<_>) = (0..3).map(|_| tcp_pair()).unzip();
    let options = StreamOptions {
        compression: Compression::None,
        ..StreamOptions::default()
    };
    let mut sender = PageSender::new(sources, options).unwrap();
    let store = PageStore::new(1 << 30);
    let (first, first_pages) = task(10, 3000, 0x11);
    let (second, second_pages) = task(11, 1001, 0x55);
    thread::scope(|scope| {
        let receivers: Vec<_> = destinations
            .into_iter()
            .map(|mut channel| {
                let store = &store;
                scope.spawn(move || receive_pages(&mut channel, store, &soon()).unwrap())
            })
            .collect();
        let all = vec![first_pages.clone(), second_pages];
        let stats = sender.send_round(all, &[], 0, false, &soon()).unwrap();
        assert_eq!((stats.pages, stats.zero_pages), (4001, 1000));
        assert!(stats.wire_bytes > 3001 * PAGE && stats.wire_bytes < 3200 * PAGE);
        for page in (0..3000).filter(|page| page % 4 != 2) {
            first.write(page * PAGE_BYTES + 77, value(0xAA, page));
        }
        let stats = sender
            .send_round(vec![first_pages], &[], 1, true, &soon())
            .unwrap();
        assert_eq!((stats.pages, stats.zero_pages), (3000, 750));
        sender.finish(&soon()).unwrap();
        let mut sum = ReceiveStats::default();
        for receiver in receivers {
            let stats = receiver.join().unwrap();
            assert_eq!(stats.rounds, 2);
            sum.pages += stats.pages;
            sum.zero_pages += stats.zero_pages;
        }
        assert_eq!((sum.pages, sum.zero_pages), (7001, 1750));
    });
    check(&store, &first, 10, 0xAA);
    check(&store, &second, 11, 0x55);
}

#[test]
fn one_broken_channel_ends_the_round_on_all() {
    let (sources, destinations): (Vec<_>, Vec<_>) = (0..2).map(|_| tcp_pair()).unzip();
    let mut destinations = destinations.into_iter();
    // One destination goes away; the other never reads, so that its sender would wait for ever.
    drop(destinations.next());
    let (_region, pages) = task(1, 20_000, 3);
    let wait = Wait::uncancellable(Duration::from_secs(3600));
    let error = send_pages(sources, vec![pages], &wait).unwrap_err();
    assert!(matches!(error, StreamError::Channel(_)), "{error}");
}

#[test]
fn a_task_that_is_gone_is_an_error() {
    let (source, _destination) = tcp_pair();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let range = PageRange {
        start: PAGE,
        pages: 1,
    };
    let pages = TaskPages {
        pid: child.id() as i32,
        task: 1,
        ranges: vec![range],
    };
    let error = send_pages(vec![source], vec![pages], &soon()).unwrap_err();
    assert!(
        matches!(error, StreamError::Read(ReadError::Process { .. })),
        "{error}"
    );
    assert!(matches!(
        send_pages(vec![], vec![], &soon()),
        Err(StreamError::NoChannel)
    ));
}

/// What a receiver with a store of 64 KiB says to a frame of a peer.
fn refusal(kind: Kind, parts: &[&[u8]]) -> StreamError {
    let (mut source, mut destination) = unix_pair();
    source.send(kind, parts, &soon()).unwrap();
    drop(source);
    let store = PageStore::new(64 << 10);
    let error = receive_pages(&mut destination, &store, &soon()).unwrap_err();
    assert_eq!(store.used(), 0, "a refused frame leaves nothing behind");
    error
}

fn unix_pair() -> (Channel, Channel) {
    let (source, destination) = UnixStream::pair().unwrap();
    (
        Channel::new(source, "destination").unwrap(),
        Channel::new(destination, "source").unwrap(),
    )
}

fn head(round: u32, pages: u64, zero: bool) -> Vec<u8> {
    let mut head = Vec::new();
    let run = Run {
        range: PageRange { start: PAGE, pages },
        kind: if zero { RunKind::Zero } else { RunKind::Data },
    };
    frame::encode(1, round, Codec::None, &[run], &[], &mut head);
    head
}

#[test]
fn hostile_frames_are_refused_before_anything_is_allocated_for_them() {
    let invalid = |error| matches!(error, StreamError::Frame { .. });
    assert!(invalid(refusal(Kind::Pages, &[b"short"])));
    assert!(invalid(refusal(Kind::Pages, &[&head(0, 1, false)])));
    assert!(invalid(refusal(
        Kind::Pages,
        &[&head(0, u32::MAX.into(), false), &[0; 4096]]
    )));
    let error = refusal(Kind::Pages, &[&head(0, 17, false), &[1; 17 * PAGE_BYTES]]);
    assert!(
        matches!(error, StreamError::Store(StoreError::Full { .. })),
        "{error}"
    );
    let error = refusal(Kind::Pages, &[&head(1, 1, true)]);
    assert!(
        matches!(
            error,
            StreamError::Round {
                expected: 0,
                got: 1,
                ..
            }
        ),
        "{error}"
    );
    let frame_of = |codec, kind, references: &[u32]| {
        let (mut head, start) = (Vec::new(), PAGE);
        let range = PageRange { start, pages: 1 };
        frame::encode(1, 0, codec, &[Run { range, kind }], references, &mut head);
        head
    };
    let reason = |error| match error {
        StreamError::Frame { reason, .. } => reason,
        other => panic!("{other}"),
    };
    for entry in [0, 2047, u32::MAX] {
        let frame = frame_of(Codec::None, RunKind::Reference, &[entry]);
        let error = refusal(Kind::Pages, &[&frame]);
        assert_eq!(reason(error), PageFrameError::Reference(entry));
    }
    for codec in [Codec::Lz4, Codec::Zstd] {
        let frame = frame_of(codec, RunKind::Data, &[]);
        let error = refusal(Kind::Pages, &[&frame, &[0x5A; 100]]);
        assert_eq!(reason(error), PageFrameError::Compressed { expected: 4096 });
    }
    assert!(invalid(refusal(Kind::Discard, &[&[0; 23]])));
    let error = refusal(Kind::ImageData, &[b""]);
    assert!(
        matches!(error, StreamError::Channel(TransportError::Frame { .. })),
        "{error}"
    );
}

#[test]
fn damaged_contents_and_a_missing_frame_are_noticed() {
    let (source, destination) = UnixStream::pair().unwrap();
    let mut destination = Channel::new(destination, "source").unwrap();
    let (head, mut contents) = (head(0, 1, false), vec![1; PAGE_BYTES]);
    let header = Header::for_body(Kind::Pages, &[&head, &contents]).unwrap();
    contents[100] ^= 1;
    let bytes = [&header.encode()[..], &head, &contents].concat();
    (&source).write_all(&bytes).unwrap();
    let store = PageStore::new(64 << 10);
    let error = receive_pages(&mut destination, &store, &soon()).unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::Channel(TransportError::Frame {
                source: FrameError::Checksum { .. },
                ..
            })
        ),
        "{error:?}"
    );
    assert_eq!(store.used(), 0);

    let (mut source, mut destination) = unix_pair();
    let end = RoundEnd {
        round: 0,
        pages: 3,
        last: true,
    };
    source.send_message(Kind::RoundEnd, &end, &soon()).unwrap();
    let error = receive_pages(&mut destination, &store, &soon()).unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::Count {
                expected: 3,
                got: 0,
                ..
            }
        ),
        "{error}"
    );
}
