use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use haulier_sys::wait::Wait;

use super::*;
use crate::chunks::ChunkReader;
use crate::lazy::Lazy;
use crate::store::{End, INVENTORY, Key, Piece, Pool};

const LONG: Duration = Duration::from_secs(30);

fn name(text: &str) -> ImageName {
    ImageName::new(text).unwrap()
}

fn store() -> Store {
    Store::new(Pool::new(16 << 20), [name("a")], 10)
}

/// A snapshot with an inventory, which arrives.
fn arriving(store: &Store, inventory: &[u8]) -> Key {
    let key = store.begin(&name("a")).unwrap();
    let image = store.add(&key, &name(INVENTORY)).unwrap();
    let blob = store.put(inventory).unwrap();
    let pieces = vec![Piece::Data(blob), Piece::Zero { pages: 2 }];
    store.push(&image, pieces).unwrap();
    image.finish(End::Complete);
    key
}

fn held(store: &Store, inventory: &[u8]) -> Key {
    let key = arriving(store, inventory);
    store.settle(&key, State::Held).unwrap();
    key
}

/// What a reader hears: which snapshot, its images, and what the asked one has.
fn look(
    store: &Store,
    number: Option<u64>,
    image: &str,
) -> Result<(Opened, usize, Vec<u8>), String> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let [ours, theirs] = [ours, theirs].map(|socket| {
        socket.set_nonblocking(true).unwrap();
        OwnedFd::from(socket)
    });
    let stop = Cancel::new().unwrap();
    thread::scope(|scope| {
        let stop = &stop;
        let served = scope.spawn(move || serve(&theirs, store, &name("a"), number, stop));
        let wait = Wait::uncancellable(LONG);
        let heard = (|| {
            let opened = match control::receive(&ours, &wait)? {
                Reply::Opened(opened) => opened,
                reply => panic!("{reply:?}"),
            };
            let mut list = Vec::new();
            ChunkReader::new(&ours, &wait).read_to_end(&mut list)?;
            let list: Vec<ImageSize> = serde_json::from_slice(&list)?;
            let mut contents = Vec::new();
            for _ in 0..2 {
                let name = image.to_owned();
                control::send(&ours, &ReadImage { name }, &wait)?;
                contents.clear();
                ChunkReader::new(&ours, &wait).read_to_end(&mut contents)?;
            }
            io::Result::Ok((opened, list.len(), contents))
        })();
        drop(ours);
        served.join().unwrap()?;
        heard.map_err(|error| error.to_string())
    })
}

#[test]
fn a_reader_gets_images_as_often_as_it_asks() {
    let store = store();
    held(&store, b"one");
    let (opened, images, contents) = look(&store, None, INVENTORY).unwrap();
    assert_eq!((opened.snapshot, &*opened.state), (1, "held"));
    assert_eq!(images, 1);
    assert_eq!(contents.len(), 3 + 8192);
    assert!(contents.starts_with(b"one\0"));
    assert!(look(&store, Some(1), "core-1.img").is_err());
    // Nobody reads any more.
    let target = name("a");
    store.forget(&Key { target, number: 1 }).unwrap();
}

#[test]
fn only_what_is_complete_is_looked_into() {
    let store = store();
    let why = |number| look(&store, number, INVENTORY).unwrap_err();
    assert_eq!(why(None), "there is no complete dump yet");
    assert_eq!(why(Some(3)), "there is no dump 3");
    held(&store, b"one");
    let second = arriving(&store, b"two");
    assert_eq!(look(&store, None, INVENTORY).unwrap().0.snapshot, 1);
    assert_eq!(why(Some(2)), "dump 2 cannot be looked into: arriving");
    store
        .settle(&second, State::Failed("of old age".to_owned()))
        .unwrap();
    let why = why(Some(2));
    assert_eq!(why, "dump 2 cannot be looked into: failed: of old age");
    assert_eq!(look(&store, None, INVENTORY).unwrap().0.snapshot, 1);
}

#[test]
fn a_dump_whose_memory_is_elsewhere_is_not_restored_by_looking_into_it() {
    let store = store();
    let key = held(&store, b"one");
    let lazy = Arc::new(Lazy::new(1, key.clone(), Arc::default()));
    store.leave(&key, Arc::clone(&lazy)).unwrap();
    store.settle(&key, State::Released).unwrap();
    let before = lazy.describe();
    for _ in 0..2 {
        let (opened, ..) = look(&store, None, INVENTORY).unwrap();
        assert_eq!(opened.state, format!("released, {before}"));
    }
    assert_eq!(lazy.describe(), before);
    // Nothing was said to its source.
    assert!(lazy.said().is_empty());
}
