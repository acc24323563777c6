use super::category::{PFNZERO, PRESENT, SWAPPED, WRITTEN};
use super::*;
use crate::userfaultfd::{Region as Memory, Userfaultfd, features};

const BYTES: usize = PAGE as usize;

fn own() -> Pagemap {
    Pagemap::open(std::process::id() as i32).unwrap()
}

fn addresses(memory: &Memory) -> Range<u64> {
    memory.address()..memory.address() + memory.len() as u64
}

/// Numbers of the pages that a scan of the memory finds. Some may be told twice: seen once on 6.18,
/// where the last 512 of 6144 ranges came again.
fn scan(memory: &Memory, query: Query) -> Vec<u64> {
    let mut pages = Vec::new();
    let number = |address| (address - memory.address()) / PAGE;
    let found = |range: Range<u64>| pages.extend(number(range.start)..number(range.end));
    own().scan(addresses(memory), query, found).unwrap();
    pages.sort_unstable();
    pages.dedup();
    pages
}

const POPULATED: Query = Query {
    all: 0,
    any: PRESENT | SWAPPED,
    none: PFNZERO,
    protect: false,
    registered: false,
};
const LOOK: Query = Query {
    all: WRITTEN,
    protect: true,
    registered: true,
    ..POPULATED
};

fn registered(pages: usize) -> (Memory, Userfaultfd) {
    let memory = Memory::map(pages * BYTES).unwrap();
    let uffd = Userfaultfd::create(features::WP_ASYNC).unwrap();
    uffd.register_write_protect(memory.address(), memory.len() as u64)
        .unwrap();
    (memory, uffd)
}

#[test]
fn more_ranges_than_one_request_takes_are_found() {
    let pages = 3 * BATCH as u64;
    let memory = Memory::map(pages as usize * BYTES).unwrap();
    let written: Vec<u64> = (0..pages).step_by(2).collect();
    for page in &written {
        memory.write(*page as usize * BYTES, 1);
    }
    let found = scan(&memory, POPULATED);
    let differs = found
        .iter()
        .zip(&written)
        .position(|(one, other)| one != other);
    assert_eq!((found.len(), differs), (written.len(), None));
}

#[test]
fn a_look_tells_what_was_written_since_the_last_one() {
    let (memory, _uffd) = registered(16);
    for page in [1, 2, 3, 9] {
        memory.write(page * BYTES, 1);
    }
    assert_eq!(scan(&memory, LOOK), [1, 2, 3, 9]);
    assert!(scan(&memory, LOOK).is_empty());
    memory.write(2 * BYTES, 2);
    memory.write(12 * BYTES, 1);
    assert_eq!(scan(&memory, LOOK), [2, 12]);
    assert!(scan(&memory, LOOK).is_empty());
    assert_eq!(scan(&memory, POPULATED), [1, 2, 3, 9, 12]);
}

#[test]
fn a_page_that_was_discarded_is_written_when_it_is_again() {
    let (memory, _uffd) = registered(8);
    for page in 0..8 {
        memory.write(page * BYTES, 1);
    }
    assert_eq!(scan(&memory, LOOK).len(), 8);
    memory.discard(0..8 * BYTES).unwrap();
    // No contents, so nothing to send; whoever has the old ones drops them by what is populated.
    assert!(scan(&memory, LOOK).is_empty());
    assert!(scan(&memory, POPULATED).is_empty());
    assert_eq!(memory.read(3 * BYTES), 0);
    assert!(scan(&memory, LOOK).is_empty(), "the page of zeros");
    memory.write(3 * BYTES, 7);
    memory.write(4 * BYTES, 7);
    assert_eq!(scan(&memory, LOOK), [3, 4]);
}

#[test]
fn looking_does_not_inflate_what_is_populated() {
    let (memory, _uffd) = registered(64);
    memory.write(0, 1);
    assert_eq!(memory.read(BYTES), 0);
    scan(&memory, LOOK);
    scan(&memory, LOOK);
    let everything = Query {
        none: 0,
        ..POPULATED
    };
    assert_eq!(scan(&memory, everything), [0, 1]);
}

#[test]
fn what_was_found_before_an_unregistered_mapping_is_told() {
    let memory = Memory::map(8 * BYTES).unwrap();
    for page in 0..8 {
        memory.write(page * BYTES, 1);
    }
    let uffd = Userfaultfd::create(features::WP_ASYNC).unwrap();
    uffd.register_write_protect(memory.address(), 4 * PAGE)
        .unwrap();
    let mut found = Vec::new();
    let error = own()
        .scan(addresses(&memory), LOOK, |range| found.push(range))
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    let start = memory.address();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0], start..start + 4 * PAGE);
}

#[test]
fn entries_tell_what_is_present() {
    let memory = Memory::map(6 * BYTES).unwrap();
    memory.write(BYTES, 1);
    memory.write(4 * BYTES, 1);
    let mut entries = [0; 6];
    assert_eq!(own().entries(memory.address(), &mut entries).unwrap(), 6);
    let present = entries.map(|value| value & entry::PRESENT != 0);
    assert_eq!(present, [false, true, false, false, true, false]);
}
