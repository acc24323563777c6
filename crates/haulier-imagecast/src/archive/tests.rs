use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;
use crate::inventory::example;
use crate::store::{Answer, End, Pool, State};

const MEMORY: u64 = 16 << 20;

fn name(text: &str) -> ImageName {
    ImageName::new(text).unwrap()
}

fn store() -> Store {
    Store::new(Pool::new(MEMORY), [name("a")], 10)
}

fn never() -> Cancel {
    Cancel::new().unwrap()
}

/// An entry, whatever it says of itself.
fn entry(path: &[u8], kind: EntryType, size: u64, data: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path);
    header.set_entry_type(kind);
    header.set_mode(MODE);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(path: &str, data: &[u8]) -> Vec<u8> {
    entry(path.as_bytes(), EntryType::Regular, data.len() as u64, data)
}

fn inventory() -> Vec<u8> {
    file(INVENTORY, &example(false))
}

/// Loads an archive of these entries, with its end.
fn load_entries(store: &Store, entries: &[Vec<u8>]) -> Result<Delivered, String> {
    let mut bytes = entries.concat();
    bytes.extend([0; 1024]);
    load_bytes(store, &bytes)
}

fn load_bytes(store: &Store, bytes: &[u8]) -> Result<Delivered, String> {
    let target = name("a");
    let read = |key: &Key| read(store, key, bytes, Path::new("x.tar"));
    directory::load_as_snapshot(store, &target, read).map_err(|e| directory::explain(&e))
}

/// It is refused for a reason with `why` in it, and leaves nothing behind.
#[track_caller]
fn refused(entries: &[Vec<u8>], why: &str) {
    let store = store();
    let error = load_entries(&store, entries).unwrap_err();
    assert!(error.contains(why), "{error}");
    assert_eq!((store.list().len(), store.pool().used().0), (0, 0));
}

fn image(store: &Store, image: &str) -> Vec<u8> {
    let reading = store.pick(&name("a"), None, || false).unwrap();
    let Answer::Image(image) = reading.request(&name(image), || false) else {
        panic!("no {image}");
    };
    let mut bytes = Vec::new();
    let stop = never();
    ImageReader::new(&image, &stop)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

fn pages() -> Vec<u8> {
    (0..600_usize)
        .flat_map(|page| vec![if page % 3 == 0 { 0 } else { page as u8 }; 4096])
        .collect()
}

#[test]
fn a_snapshot_comes_back_from_its_file_and_tar_reads_it() {
    let store = store();
    let images = [
        ("pages-1.img", pages()),
        ("core-1.img", vec![7; 1_500_000]),
        ("empty-1.img", Vec::new()),
        (INVENTORY, example(false)),
    ];
    let entries = images.clone().map(|(name, bytes)| file(name, &bytes));
    load_entries(&store, &entries).unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("dump.tar");
    fs::write(&path, "what was there before").unwrap();
    let saved = save(&store, &name("a"), None, &path, &never()).unwrap();
    assert_eq!((saved.snapshot, saved.images), (1, 4));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    // No name of its own is left.
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);

    let loaded = load(&store, &name("a"), &path).unwrap();
    assert_eq!(loaded.snapshot, 2);
    assert_eq!((loaded.images, loaded.bytes), (saved.images, saved.bytes));
    for (name, bytes) in &images {
        assert!(image(&store, name) == *bytes, "{name} differs");
    }
    let plain = home.path().join("plain");
    fs::create_dir(&plain).unwrap();
    tar::Archive::new(File::open(&path).unwrap())
        .unpack(&plain)
        .unwrap();
    for (name, bytes) in &images {
        assert!(fs::read(plain.join(name)).unwrap() == *bytes, "{name}");
    }
}

#[test]
fn what_tar_makes_of_a_directory_can_be_loaded() {
    let store = store();
    let entries = [
        entry(b"./", EntryType::Directory, 0, b""),
        file("./dump.log", b"(00.01) done"),
        file("./core-1.img", b"core"),
        file("./inventory.img", &example(false)),
    ];
    let loaded = load_entries(&store, &entries).unwrap();
    assert_eq!(loaded.images, 2);
    assert_eq!(image(&store, "core-1.img"), b"core");
}

#[test]
fn names_that_lead_elsewhere_and_what_is_no_plain_file_are_refused() {
    for bad in [
        "../core-1.img",
        "/core-1.img",
        "a/core-1.img",
        "./../core-1.img",
        "././core-1.img",
        "..",
        "",
        ".hidden.img",
        "core 1.img",
    ] {
        refused(&[file(bad, b"x"), inventory()], "is not the name of");
    }
    let utf8 = entry(b"core-\xff.img", EntryType::Regular, 0, b"");
    refused(&[utf8, inventory()], "is not the name of");
    // A long name in two parts.
    let mut header = Header::new_ustar();
    header.as_mut_bytes()[345..348].copy_from_slice(b"etc");
    header.as_mut_bytes()[..10].copy_from_slice(b"core-1.img");
    header.set_entry_type(EntryType::Regular);
    header.set_size(0);
    header.set_cksum();
    refused(
        &[header.as_bytes().to_vec(), inventory()],
        "is not the name of",
    );
    for kind in [
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Directory,
        EntryType::Fifo,
        EntryType::Char,
        EntryType::Block,
        EntryType::Continuous,
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::GNUSparse,
        EntryType::XHeader,
        EntryType::XGlobalHeader,
        EntryType::new(b'?'),
    ] {
        let odd = entry(b"core-1.img", kind, 0, b"");
        refused(&[odd, inventory()], "is no plain file");
    }
    // Extensions are not even read: there is no room for them.
    let long = entry(b"././@LongLink", EntryType::GNULongName, u64::MAX / 2, b"x");
    refused(&[long, inventory()], "is no plain file");
}

#[test]
fn sizes_that_are_not_true_and_what_is_too_much_are_refused() {
    for size in [5000, 5 << 20, 1 << 62, u64::MAX - 511, u64::MAX] {
        let short = entry(b"core-1.img", EntryType::Regular, size, b"x");
        let store = store();
        let error = load_entries(&store, &[inventory(), short]).unwrap_err();
        assert!(!error.is_empty());
        assert_eq!((store.list().len(), store.pool().used().0), (0, 0));
        // One that is passed over.
        let short = entry(b"dump.log", EntryType::Regular, size, b"x");
        let _ = load_entries(&store, &[inventory(), short]);
        assert!(store.pool().used().1 <= MEMORY);
    }
    let large = vec![1; MEMORY as usize + 1];
    refused(
        &[file("core-1.img", &large), inventory()],
        "that the cache may use",
    );
    let twice = [inventory(), file("x.img", b"a"), file("x.img", b"b")];
    refused(&twice, "came twice");
}

#[test]
fn an_archive_that_is_cut_anywhere_is_refused() {
    let whole = [
        inventory(),
        file("core-1.img", &[3; 1000]),
        file("pages-1.img", &pages()[..8192]),
    ]
    .concat();
    for cut in (0..=whole.len()).step_by(256) {
        let store = store();
        assert!(load_bytes(&store, &whole[..cut]).is_err(), "{cut}");
        assert_eq!(store.pool().used().0, 0);
    }
    let mut ended = whole;
    ended.extend([0; 512]);
    assert!(load_bytes(&store(), &ended).is_ok());
}

#[test]
fn no_dump_and_a_pre_dump_are_refused_and_the_one_before_stays_the_newest() {
    refused(&[file("core-1.img", b"x")], "no inventory");
    refused(&[], "no inventory");
    refused(&[file(INVENTORY, &example(true))], "pre-dump");
    let store = store();
    load_entries(&store, &[inventory(), file("core-1.img", b"one")]).unwrap();
    load_entries(&store, &[file("core-1.img", b"two")]).unwrap_err();
    assert_eq!(image(&store, "core-1.img"), b"one");
}

#[test]
fn a_file_that_cannot_be_written_leaves_nothing() {
    let store = store();
    load_entries(&store, &[inventory(), file("core-1.img", b"x")]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("dump.tar");
    let stopped = never();
    stopped.cancel();
    assert!(save(&store, &name("a"), None, &path, &stopped).is_err());
    assert!(save(&store, &name("a"), Some(7), &path, &never()).is_err());
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    let missing = home.path().join("missing/dump.tar");
    assert!(save(&store, &name("a"), None, &missing, &never()).is_err());
    // Only a snapshot that is released can be saved.
    let key = store.begin(&name("a")).unwrap();
    let image = store.add(&key, &name(INVENTORY)).unwrap();
    let blob = store.put(b"i").unwrap();
    store.push(&image, vec![Piece::Data(blob)]).unwrap();
    image.finish(End::Complete);
    store.settle(&key, State::Held).unwrap();
    assert!(save(&store, &name("a"), Some(key.number), &path, &never()).is_err());
}

#[test]
fn a_path_says_whether_it_is_a_file() {
    let home = tempfile::tempdir().unwrap();
    let at = |path: &str| home.path().join(path);
    fs::create_dir(at("there.tar")).unwrap();
    symlink(at("there.tar"), at("link.tar")).unwrap();
    fs::write(at("file"), "").unwrap();
    assert!(is_for_saving(&at("new.tar")));
    for directory in ["there.tar", "link.tar", "new.tar/", "new", "tar", ".tar"] {
        assert!(!is_for_saving(&at(directory)), "{directory}");
    }
    assert!(is_for_loading(&at("file")));
    assert!(!is_for_loading(&at("there.tar")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn damaged_archives_never_take_more_than_the_allowance_nor_leave_anything(
        damage in proptest::collection::vec((0..6144_usize, any::<u8>()), 1..20),
    ) {
        let mut bytes = [
            inventory(),
            file("pages-1.img", &pages()[4096..4096 + 2048]),
            file("core-1.img", b"core"),
        ]
        .concat();
        bytes.extend([0; 1024]);
        for (at, value) in damage {
            let length = bytes.len();
            bytes[at % length] = value;
        }
        let store = Store::new(Pool::new(1 << 20), [name("a")], 10);
        let loaded = load_bytes(&store, &bytes);
        prop_assert!(store.pool().used().1 <= 1 << 20);
        prop_assert_eq!(store.list().len(), usize::from(loaded.is_ok()));
        if let Ok(loaded) = loaded {
            let key = Key { target: name("a"), number: loaded.snapshot };
            store.forget(&key).unwrap();
        }
        prop_assert_eq!(store.pool().used().0, 0);
    }
}
