//! Pages sent ahead, and images that refer to them.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use haulier_images::account::Account;
use haulier_images::directory::{self, ImageCount, ImagesError};
use haulier_images::page::PAGE;
use haulier_images::sender::{AheadStats, ImageSender};
use haulier_proto::frame::Kind;
use haulier_proto::message::{ImageEnd, ImageHeader};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::wait::Wait;

fn soon() -> Wait {
    Wait::uncancellable(Duration::from_secs(60))
}

fn pair() -> (Channel, Channel) {
    let (a, b) = UnixStream::pair().unwrap();
    (Channel::new(a, "b").unwrap(), Channel::new(b, "a").unwrap())
}

/// Pages whose contents nobody can guess, different for each seed.
fn random(pages: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = pages * PAGE / 8;
    (0..words)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// What the sender and the receiver of one transfer say, and its bytes on the wire after the pages
/// sent ahead. The received images are compared with those sent.
struct Transfer {
    sent: ImageCount,
    received: ImageCount,
    wire: u64,
    account: Account,
}

fn transfer(
    images: &[(&str, &[u8])],
    bank_limit: u64,
    ahead: impl FnOnce(&mut ImageSender) + Send,
) -> Transfer {
    let from = tempfile::tempdir().unwrap();
    let to = tempfile::tempdir().unwrap();
    for (name, contents) in images {
        fs::write(from.path().join(name), contents).unwrap();
    }
    let (a, mut b) = pair();
    let account = Account::new(u64::MAX);
    let (sent, wire, received) = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sender = ImageSender::new(a, bank_limit);
            ahead(&mut sender);
            let before = sender.wire_bytes();
            let count = sender.send_directory(from.path(), &soon()).unwrap();
            (count, sender.wire_bytes() - before)
        });
        let received =
            directory::receive_into_account(to.path(), &account, &mut b, &soon()).unwrap();
        let (sent, wire) = sender.join().unwrap();
        (sent, wire, received)
    });
    for (name, contents) in images {
        assert!(
            fs::read(to.path().join(name)).unwrap() == *contents,
            "{name} differs"
        );
    }
    assert_eq!(sent, received);
    Transfer {
        sent,
        received,
        wire,
        account,
    }
}

#[test]
fn an_unchanged_image_is_sent_as_references() {
    let pages = random(4000, 1);
    let result = transfer(&[("pages-1.img", &pages)], u64::MAX, |sender| {
        for part in pages.chunks(1 << 20) {
            sender.send_ahead(part, &soon()).unwrap();
        }
        assert_eq!(sender.bank_bytes(), pages.len() as u64);
    });
    assert!(result.wire < pages.len() as u64 / 50, "{}", result.wire);
    assert_eq!(result.received.bytes, pages.len() as u64);
    assert_eq!(result.received.referenced, 4000);
    assert_eq!(result.received.bank_unused, 0);
    // The images stay, what was sent ahead does not.
    assert_eq!(result.account.used(), pages.len() as u64);
    assert!(result.account.peak() > 2 * pages.len() as u64);
}

#[test]
fn pages_in_another_order_are_still_few_bytes() {
    let pages = random(3000, 2);
    let mut image = Vec::new();
    for index in 0..3000 {
        let page = index * 1009 % 3000;
        image.extend_from_slice(&pages[page * PAGE..(page + 1) * PAGE]);
    }
    let result = transfer(&[("pages-7.img", &image)], u64::MAX, |sender| {
        sender.send_ahead(&pages, &soon()).unwrap();
    });
    assert!(result.wire < image.len() as u64 / 50, "{}", result.wire);
}

#[test]
fn what_changed_is_sent_with_the_image_and_zero_pages_never() {
    let mut pages = random(2000, 3);
    for zero in [0, 5, 6, 700, 1999] {
        pages[zero * PAGE..(zero + 1) * PAGE].fill(0);
    }
    let before = pages.clone();
    for changed in [1, 2, 500, 1998] {
        pages[changed * PAGE + 17] ^= 1;
    }
    // Grown since, and shorter images beside it.
    pages.extend_from_slice(&random(100, 4));
    let zeros = vec![0; 300 * PAGE];
    let odd = &pages[..5 * PAGE + 1];
    let images: [(&str, &[u8]); 6] = [
        ("core-1.img", &before[..10 * PAGE]),
        ("pages-1.img", &pages),
        ("pages-2.img", &zeros),
        ("pages-3.img", odd),
        ("pages-4.img", b""),
        ("pages-x.img", &before[..PAGE]),
    ];
    let result = transfer(&images, u64::MAX, |sender| {
        let stats = sender.send_ahead(&before, &soon()).unwrap();
        let expected = AheadStats {
            pages: 2000,
            zero: 5,
            known: 0,
            sent: 1995,
            left: 0,
        };
        assert_eq!(stats, expected);
        let stats = sender.send_ahead(&before, &soon()).unwrap();
        assert_eq!((stats.known, stats.sent), (1995, 0));
    });
    let plain = images[0].1.len() + odd.len() + PAGE;
    let literal = 104 * PAGE + plain;
    assert!(result.wire > literal as u64);
    assert!(result.wire < literal as u64 + 10_000, "{}", result.wire);
    assert_eq!(result.sent.images, 6);
    assert_eq!(result.sent.referenced, 1991);
    assert_eq!(result.sent.bank_unused, 4);
}

#[test]
fn equal_pages_are_sent_once() {
    let page = random(1, 5);
    let pages = page.repeat(500);
    let result = transfer(&[("pages-1.img", &pages)], u64::MAX, |sender| {
        let stats = sender.send_ahead(&pages, &soon()).unwrap();
        assert_eq!((stats.sent, stats.known), (1, 499));
    });
    assert_eq!(result.received.bank_pages, 1);
    assert_eq!(result.received.referenced, 500);
}

#[test]
fn scattered_new_pages_go_ahead_in_frames_that_one_call_can_send() {
    let mut pages = random(6000, 6);
    transfer(&[("pages-1.img", &pages.clone())], u64::MAX, |sender| {
        for odd in (1..6000).step_by(2) {
            pages[odd * PAGE..(odd + 1) * PAGE].fill(0);
        }
        let stats = sender.send_ahead(&pages, &soon()).unwrap();
        assert_eq!((stats.sent, stats.zero), (3000, 3000));
    });
}

#[test]
fn no_more_than_the_limit_is_sent_ahead() {
    let pages = random(100, 7);
    let result = transfer(&[("pages-1.img", &pages)], 40 * PAGE as u64 + 1, |sender| {
        assert!(!sender.is_full());
        let stats = sender.send_ahead(&pages, &soon()).unwrap();
        assert_eq!((stats.sent, stats.left), (40, 60));
        assert!(sender.is_full());
    });
    assert_eq!(result.received.referenced, 40);
    let result = transfer(&[("pages-1.img", &pages)], 0, |sender| {
        sender.send_ahead(&pages, &soon()).unwrap();
    });
    assert_eq!(result.received.bank_pages, 0);
}

#[test]
fn images_that_nothing_was_sent_ahead_for_go_whole() {
    let pages = random(300, 8);
    let result = transfer(&[("pages-1.img", &pages)], u64::MAX, |_| {});
    assert!(result.wire > pages.len() as u64);
    assert_eq!(result.received.referenced, 0);
}

#[test]
fn random_changes_arrive() {
    for seed in 1..20_u64 {
        let pages = random(700, seed);
        let mut image = Vec::new();
        let choices = random(2, seed + 100);
        for (index, choice) in choices[..1200].iter().enumerate() {
            let known = index * (1 + *choice as usize) % 700;
            let page = &pages[known * PAGE..(known + 1) * PAGE];
            match choice % 4 {
                0 => image.extend_from_slice(&[0; PAGE]),
                1 => image.extend(page.iter().map(|byte| byte ^ choice)),
                2 => image.extend_from_slice(&pages[index % 700 * PAGE..][..PAGE]),
                _ => image.extend_from_slice(page),
            }
        }
        println!("seed {seed}");
        let later = random(1, seed + 200);
        transfer(
            &[("pages-1.img", &image), ("pages-2.img", &later)],
            u64::MAX,
            |sender| {
                sender.send_ahead(&pages, &soon()).unwrap();
            },
        );
    }
}

#[test]
fn images_are_sent_while_the_dump_writes_them() {
    for bank_limit in [0, u64::MAX] {
        let pages = random(3000, 9);
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        let (a, mut b) = pair();
        let complete = AtomicBool::new(false);
        // How much has come, as the dump sees it, which waits for some of it: without that it
        // could be done before anybody looks.
        let account = Account::new(u64::MAX);
        let (sent, received) = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut sender = ImageSender::new(a, bank_limit);
                sender.send_ahead(&pages[..2500 * PAGE], &soon()).unwrap();
                let complete = || complete.load(Ordering::SeqCst);
                sender.send_growing(from.path(), complete, &soon()).unwrap()
            });
            let receiver = scope.spawn(|| {
                directory::receive_into_account(to.path(), &account, &mut b, &soon()).unwrap()
            });
            fs::write(from.path().join("core-1.img"), b"core").unwrap();
            let mut small = fs::File::create(from.path().join("pages-2.img")).unwrap();
            small.write_all(&pages[..PAGE]).unwrap();
            let mut growing = fs::File::create(from.path().join("pages-1.img")).unwrap();
            for part in pages[..2000 * PAGE].chunks(300_001) {
                growing.write_all(part).unwrap();
            }
            wait_for(|| to.path().join("pages-1.img").exists());
            wait_for(|| fs::metadata(to.path().join("pages-1.img")).unwrap().len() > 7 << 20);
            assert!(!to.path().join("core-1.img").exists());
            growing.write_all(&pages[2000 * PAGE..]).unwrap();
            small.write_all(&pages[PAGE..600 * PAGE]).unwrap();
            complete.store(true, Ordering::SeqCst);
            (sender.join().unwrap(), receiver.join().unwrap())
        });
        assert_eq!(sent, received);
        assert_eq!(received.images, 3);
        if bank_limit > 0 {
            assert_eq!(received.referenced, 3100);
        }
        for name in ["core-1.img", "pages-1.img", "pages-2.img"] {
            let read = |dir: &Path| fs::read(dir.join(name)).unwrap();
            assert!(read(from.path()) == read(to.path()), "{name} differs");
        }
    }
}

fn wait_for(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not happen");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_dump_that_does_not_end_meets_the_deadline() {
    let from = tempfile::tempdir().unwrap();
    let (a, _b) = pair();
    let mut sender = ImageSender::new(a, u64::MAX);
    let wait = Wait::uncancellable(Duration::from_millis(5));
    let error = sender
        .send_growing(from.path(), || false, &wait)
        .unwrap_err();
    assert!(
        matches!(
            error,
            ImagesError::Transport(TransportError::Deadline { .. })
        ),
        "{error:?}"
    );
}

#[test]
fn an_image_that_vanishes_while_it_is_sent_is_an_error() {
    let from = tempfile::tempdir().unwrap();
    let path = from.path().join("pages-1.img");
    fs::write(&path, random(300, 10)).unwrap();
    let (a, mut b) = pair();
    thread::scope(|scope| {
        scope.spawn(move || while b.receive(&soon()).is_ok() {});
        let mut sender = ImageSender::new(a, u64::MAX);
        let looks = AtomicU32::new(0);
        let complete = || {
            let looks = looks.fetch_add(1, Ordering::SeqCst);
            if looks == 1 {
                fs::remove_file(&path).unwrap();
            }
            looks == 1
        };
        let error = sender.send_growing(from.path(), complete, &soon());
        assert!(matches!(error, Err(ImagesError::File { .. })), "{error:?}");
    });
}

/// What a receiver with a limit of 10 MiB says to frames sent by hand.
fn receive_from(hand: impl FnOnce(&mut Channel) + Send + 'static) -> ImagesError {
    let to = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair();
    let sender = thread::spawn(move || hand(&mut a));
    let result = directory::receive(to.path(), 10 << 20, &mut b, &soon());
    // The sender may still be sending.
    drop(b);
    sender.join().unwrap();
    result.unwrap_err()
}

fn ahead(channel: &mut Channel, first: u32, count: u32, bytes: usize) {
    let contents = vec![7; bytes];
    let head = [first.to_le_bytes(), count.to_le_bytes()].concat();
    let _ = channel.send(Kind::BankPages, &[&head, &contents], &soon());
}

fn begin(channel: &mut Channel, name: &str) {
    let header = ImageHeader {
        number: 0,
        name: name.to_owned(),
        size: None,
        snapshot: 0,
    };
    let _ = channel.send_message(Kind::ImageHeader, &header, &soon());
}

/// Image data of page runs (kind and count, first), and literal contents.
fn runs(channel: &mut Channel, runs: &[(u32, u32)], literal: usize) {
    let mut body = (1_u32 << 31).to_le_bytes().to_vec();
    body.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for (head, first) in runs {
        body.extend_from_slice(&head.to_le_bytes());
        body.extend_from_slice(&first.to_le_bytes());
    }
    body.resize(body.len() + literal, 3);
    let _ = channel.send(Kind::ImageData, &[&body], &soon());
}

const BANK: u32 = 1 << 30;
const LITERAL: u32 = 2 << 30;

fn is_wrong(error: &ImagesError, part: &str) -> bool {
    matches!(error, ImagesError::Wrong { what, .. } if what.contains(part))
}

#[test]
fn hostile_pages_sent_ahead_are_refused() {
    for (first, count, bytes) in [
        (0, 0, 0),
        (0, 2, PAGE),
        (0, 1, PAGE + 1),
        (0, u32::MAX, PAGE),
        (1, 1, PAGE),
        (u32::MAX, 1, PAGE),
        (0, 1025, 1025 * PAGE),
    ] {
        let error = receive_from(move |channel| ahead(channel, first, count, bytes));
        assert!(
            is_wrong(&error, "sent ahead"),
            "{first} {count} {bytes}: {error:?}"
        );
    }
    let error = receive_from(|channel| {
        let _ = channel.send(Kind::BankPages, &[&[0; 7]], &soon());
    });
    assert!(is_wrong(&error, "without a head"), "{error:?}");
    let error = receive_from(|channel| {
        begin(channel, "pages-1.img");
        ahead(channel, 0, 1, PAGE);
    });
    assert!(is_wrong(&error, "after an image"), "{error:?}");
    let error = receive_from(|channel| {
        for block in 0..4 {
            ahead(channel, block * 1024, 1024, 1024 * PAGE);
        }
    });
    assert!(matches!(error, ImagesError::TooLarge { .. }), "{error:?}");
}

#[test]
fn hostile_references_are_refused() {
    type Case = (&'static [(u32, u32)], usize, &'static str);
    let cases: [Case; 9] = [
        (&[(BANK | 1, 4)], 0, "not sent ahead"),
        (&[(BANK | 2, 3)], 0, "not sent ahead"),
        (&[(BANK | 1, u32::MAX)], 0, "not sent ahead"),
        (&[(BANK, 0)], 0, "no pages"),
        (&[(LITERAL | 2, 0)], PAGE, "for pages that have"),
        (&[(LITERAL | 1, 0)], PAGE + 1, "for pages that have"),
        (&[(1, 0)], PAGE, "for pages that have"),
        (&[(LITERAL | 1, 1)], PAGE, "kind"),
        (&[((3 << 30) | 1, 0)], 0, "kind"),
    ];
    for (list, literal, what) in cases {
        let list = list.to_vec();
        let shown = format!("{list:x?} {literal}");
        let error = receive_from(move |channel| {
            ahead(channel, 0, 4, 4 * PAGE);
            begin(channel, "pages-1.img");
            runs(channel, &list, literal);
        });
        assert!(is_wrong(&error, what), "{shown}: {error:?}");
    }
    let error = receive_from(|channel| {
        begin(channel, "core-1.img");
        runs(channel, &[(1, 0)], 0);
    });
    assert!(is_wrong(&error, "form"), "{error:?}");
    let error = receive_from(|channel| {
        begin(channel, "pages-1.img");
        runs(channel, &[(1, 0)], 0);
        let _ = channel.send(Kind::ImageData, &[&[0; 4], &[1; 100]], &soon());
    });
    assert!(is_wrong(&error, "form"), "{error:?}");
}

#[test]
fn zero_and_known_pages_count_against_the_limit() {
    for run in [(2561, 0), ((1 << 30) - 1, 0)] {
        let error = receive_from(move |channel| {
            begin(channel, "pages-1.img");
            runs(channel, &[run], 0);
        });
        assert!(matches!(error, ImagesError::TooLarge { .. }), "{error:?}");
    }
    let error = receive_from(|channel| {
        ahead(channel, 0, 1000, 1000 * PAGE);
        begin(channel, "pages-1.img");
        runs(channel, &[(BANK | 1000, 0), (BANK | 1000, 0)], 0);
    });
    assert!(matches!(error, ImagesError::TooLarge { .. }), "{error:?}");
}

#[test]
fn an_image_of_the_wrong_pages_is_noticed() {
    let error = receive_from(|channel| {
        ahead(channel, 0, 2, 2 * PAGE);
        begin(channel, "pages-1.img");
        runs(channel, &[(BANK | 2, 0)], 0);
        let end = ImageEnd {
            number: 0,
            length: 2 * PAGE as u64,
            // What a plain image of these bytes would have.
            blake3: blake3::hash(&[7; 2 * PAGE]).as_bytes().to_vec(),
        };
        let _ = channel.send_message(Kind::ImageEnd, &end, &soon());
    });
    assert!(is_wrong(&error, "damaged"), "{error:?}");
}

#[test]
fn a_directory_that_cannot_be_listed_is_an_error() {
    let (a, _b) = pair();
    let mut sender = ImageSender::new(a, u64::MAX);
    let error = sender
        .send_directory(Path::new("/nonexistent"), &soon())
        .unwrap_err();
    assert!(matches!(error, ImagesError::File { .. }), "{error:?}");
}
