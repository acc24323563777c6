use std::fs::File;
use std::io::{Cursor, Write};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::cache;
use crate::inventory::example;
use crate::link::Way;
use crate::tests::Running;

const LONG: Duration = Duration::from_secs(30);

fn wait() -> Wait {
    Wait::uncancellable(LONG)
}

/// A dump of nobody: CRIU would make none, but it is whole.
fn write_dump(directory: &Path, pages: usize) {
    fs::create_dir_all(directory).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).unwrap();
    write(INVENTORY, &example(false));
    let words = [0x5456_4319_u32, 0x5027_3030];
    let pstree: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    write("pstree.img", &pstree);
    write("netns-10.img", b"");
    write("pages-1.img", &vec![7; pages * 4096]);
}

fn look(path: &Path, snapshot: Option<u64>) -> Result<Inspected, String> {
    inspect(path, snapshot, &wait()).map_err(|error| crate::directory::explain(&error))
}

fn cache() -> Running {
    Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 2, |_| {})
}

#[test]
fn a_dump_is_the_same_in_a_cache_a_directory_and_a_file() {
    let cache = cache();
    let served = cache.directory(0);
    let why = look(&served, None).unwrap_err();
    assert_eq!(why, "there is no complete dump yet");
    let home = tempfile::tempdir().unwrap();
    for pages in [3, 5] {
        let plain = home.path().join(format!("plain-{pages}"));
        write_dump(&plain, pages);
        cache::load(&served, &plain, &wait()).unwrap();
        let there = look(&served, None).unwrap();
        let (snapshot, state) = (pages as u64 / 2, "released".to_owned());
        assert_eq!(there.origin, Origin::Cache { snapshot, state });
        assert_eq!(there.dump.images.len(), 4);
        let here = look(&plain, None).unwrap();
        assert_eq!(
            (&here.origin, &here.dump),
            (&Origin::Directory, &there.dump)
        );
        let file = home.path().join("dump.tar");
        cache::save(&served, Some(snapshot), &file, &wait()).unwrap();
        let filed = look(&file, None).unwrap();
        assert_eq!(
            (&filed.origin, &filed.dump),
            (&Origin::Archive, &there.dump)
        );
    }
    assert_eq!(
        look(&served, Some(1)).unwrap().dump,
        look(&home.path().join("plain-3"), None).unwrap().dump
    );
    let none = look(&served, Some(9)).unwrap_err();
    assert_eq!(none, "there is no dump 9");
    for path in ["plain-3", "dump.tar"] {
        let why = look(&home.path().join(path), Some(1)).unwrap_err();
        assert!(why.contains("only there dumps have numbers"), "{why}");
    }
}

#[test]
fn what_is_nothing_to_look_into_is_said_to_be_that() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let says = |path: &Path, words: &str| {
        let why = look(path, None).unwrap_err();
        assert!(why.contains(words), "{why}");
    };
    says(&at("none"), "cannot look at");
    says(home.path(), "has no images, and no image-cache serves it");
    fs::write(at("core-1.img"), "core").unwrap();
    says(home.path(), "there is no inventory.img");
    fs::write(at(INVENTORY), "an inventory").unwrap();
    says(home.path(), "it is no Inventory image");
    fs::write(at("text.tar"), "not at all").unwrap();
    says(&at("text.tar"), "cannot read");

    let plain = at("plain");
    write_dump(&plain, 1);
    let mut whole = tar::Builder::new(Vec::new());
    whole.append_dir_all(".", &plain).unwrap();
    let whole = whole.into_inner().unwrap();
    fs::write(at("whole.tar"), &whole).unwrap();
    assert_eq!(
        look(&at("whole.tar"), None).unwrap().dump,
        look(&plain, None).unwrap().dump
    );
    for cut in (0..whole.len() - 1024).step_by(512).chain([100, 700, 5000]) {
        fs::write(at("cut.tar"), &whole[..cut]).unwrap();
        assert!(
            look(&at("cut.tar"), None).is_err(),
            "{cut} of {}",
            whole.len()
        );
    }
    // A size that is not true takes no memory.
    let mut header = tar::Header::new_gnu();
    header.set_path("inventory.img").unwrap();
    header.set_size(1 << 60);
    header.set_cksum();
    let mut file = File::create(at("huge.tar")).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&[0; 2048]).unwrap();
    says(&at("huge.tar"), "in the middle of an image");
}

#[test]
fn a_dump_goes_from_cache_to_cache_as_a_stream() {
    let cache = cache();
    let [from, to] = [0, 1].map(|target| cache.directory(target));
    let home = tempfile::tempdir().unwrap();
    let plain = home.path().join("plain");
    // More than what fits a socket, and a chunk.
    write_dump(&plain, 1000);
    cache::load(&from, &plain, &wait()).unwrap();
    let mut stream = Vec::new();
    let saved = cache::save_to(&from, None, &mut stream, &wait()).unwrap();
    assert_eq!((saved.snapshot, saved.images), (1, 4));
    let loaded = cache::load_from(&to, &mut &stream[..], &wait()).unwrap();
    assert_eq!((loaded.images, loaded.bytes), (saved.images, saved.bytes));
    assert_eq!(
        look(&to, None).unwrap().dump,
        look(&plain, None).unwrap().dump
    );

    // A cut one is refused, and leaves the one before.
    let cut = &stream[..stream.len() / 2];
    let why = cache::load_from(&to, &mut &cut[..], &wait()).unwrap_err();
    assert!(
        why.to_string().contains("cannot be loaded") || why.to_string().contains("cannot read"),
        "{why}"
    );
    // So is one whose sender dies, wherever.
    struct Dies<'a>(Cursor<&'a [u8]>);
    impl Read for Dies<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("it dies")),
                count => Ok(count),
            }
        }
    }
    let died = cache::load_from(&to, &mut Dies(Cursor::new(cut)), &wait()).unwrap_err();
    assert!(matches!(died, ControlError::Read(_)), "{died}");
    // One that is not wanted is not sent to its end.
    let refused = cache::load_from(&to, &mut io::repeat(1), &wait()).unwrap_err();
    assert!(matches!(refused, ControlError::No(_)), "{refused}");
    assert_eq!(
        look(&to, None).unwrap().dump,
        look(&plain, None).unwrap().dump
    );

    let mut none = Vec::new();
    let why = cache::save_to(&to, Some(99), &mut none, &wait()).unwrap_err();
    assert!(why.to_string().contains("no complete snapshot"), "{why}");
    assert!(none.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn damaged_archives_are_errors_or_dumps(
        damage in proptest::collection::vec((0..8192_usize, any::<u8>()), 1..12),
        length in 0..8192_usize,
    ) {
        let home = tempfile::tempdir().unwrap();
        let mut whole = tar::Builder::new(Vec::new());
        let plain = home.path().join("plain");
        write_dump(&plain, 1);
        whole.append_dir_all(".", &plain).unwrap();
        let mut bytes = whole.into_inner().unwrap();
        for (place, byte) in damage {
            if let Some(damaged) = bytes.get_mut(place) {
                *damaged = byte;
            }
        }
        let file = home.path().join("damaged.tar");
        fs::write(&file, &bytes).unwrap();
        let _ = look(&file, None);
        fs::write(&file, &bytes[..length.min(bytes.len())]).unwrap();
        let _ = look(&file, None);
    }
}
