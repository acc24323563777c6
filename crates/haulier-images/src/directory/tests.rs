use std::fs;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use haulier_proto::frame::Kind;
use haulier_proto::message::{ImageEnd, ImageHeader, ImagesDone};
use haulier_transport::error::TransportError;

use super::*;

const CHUNK: usize = 1 << 20;

fn soon() -> Wait {
    Wait::uncancellable(Duration::from_secs(20))
}

fn pair() -> (Channel, Channel) {
    let (a, b) = UnixStream::pair().unwrap();
    (Channel::new(a, "b").unwrap(), Channel::new(b, "a").unwrap())
}

#[test]
fn a_directory_arrives_whole_and_only_its_images() {
    let from = tempfile::tempdir().unwrap();
    let to = tempfile::tempdir().unwrap();
    let large: Vec<u8> = (0..CHUNK * 2 + 77).map(|n| (n % 253) as u8).collect();
    fs::write(from.path().join("pages-1.img"), &large).unwrap();
    fs::write(from.path().join("inventory.img"), b"").unwrap();
    fs::write(from.path().join("dump.log"), b"not an image").unwrap();
    let (mut a, mut b) = pair();
    let source = from.path().to_owned();
    let sender = thread::spawn(move || send(&source, &mut a, &soon()).unwrap());
    let received = receive(to.path(), u64::MAX, &mut b, &soon()).unwrap();
    assert_eq!(received, sender.join().unwrap());
    assert_eq!(
        received,
        ImageCount {
            images: 2,
            bytes: large.len() as u64,
            ..ImageCount::default()
        }
    );
    assert_eq!(fs::read(to.path().join("pages-1.img")).unwrap(), large);
    assert_eq!(fs::read(to.path().join("inventory.img")).unwrap(), b"");
    assert!(!to.path().join("dump.log").exists());
}

/// What a receiver with a limit of 100 bytes says to frames sent by hand.
fn receive_from(hand: impl FnOnce(&mut Channel) + Send + 'static) -> ImagesError {
    let to = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair();
    let sender = thread::spawn(move || hand(&mut a));
    let result = receive(to.path(), 100, &mut b, &soon());
    sender.join().unwrap();
    result.unwrap_err()
}

fn header(number: u32, name: &str) -> ImageHeader {
    ImageHeader {
        number,
        name: name.to_owned(),
        size: None,
        snapshot: 0,
    }
}

#[test]
fn hostile_peers_are_refused() {
    let error = receive_from(|channel| {
        channel
            .send_message(Kind::ImageHeader, &header(0, "../x.img"), &soon())
            .unwrap();
    });
    assert!(matches!(error, ImagesError::Name(_)), "{error}");

    let error = receive_from(|channel| {
        channel
            .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
            .unwrap();
        channel
            .send(Kind::ImageData, &[&[0; 4], &[1; 101]], &soon())
            .unwrap();
    });
    assert!(
        matches!(error, ImagesError::TooLarge { limit: 100 }),
        "{error}"
    );

    let error = receive_from(|channel| {
        channel
            .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
            .unwrap();
        channel
            .send_message(Kind::ImageHeader, &header(1, "a.img"), &soon())
            .unwrap();
    });
    assert!(matches!(error, ImagesError::File { .. }), "{error}");

    let error = receive_from(|channel| {
        channel
            .send(Kind::ImageData, &[&[9, 0, 0, 0], &[1]], &soon())
            .unwrap();
    });
    assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");

    let error = receive_from(|channel| {
        channel.send(Kind::ImageData, &[&[9, 0]], &soon()).unwrap();
    });
    assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");
}

#[test]
fn damaged_cut_and_missing_images_are_noticed() {
    let error = receive_from(|channel| {
        channel
            .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
            .unwrap();
        let end = ImageEnd {
            number: 0,
            length: 0,
            blake3: vec![0; 32],
        };
        channel.send_message(Kind::ImageEnd, &end, &soon()).unwrap();
    });
    assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");

    let error = receive_from(|channel| {
        channel
            .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
            .unwrap();
        let done = ImagesDone {
            images: 1,
            snapshot: 0,
        };
        channel
            .send_message(Kind::ImagesDone, &done, &soon())
            .unwrap();
    });
    assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");

    let error = receive_from(|_| {});
    assert!(
        matches!(error, ImagesError::Transport(TransportError::Closed { .. })),
        "{error}"
    );
}
