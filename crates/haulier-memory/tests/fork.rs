//! A task that forks while pages are missing: both copies get them all.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulier_memory::lazy::{LazyMap, LazyPages, LazyTask};
use haulier_memory::page::{PAGE, PAGE_BYTES, PageRange, PageRun};
use haulier_memory::store::PageStore;

const PAGES: u64 = 256;
const VPID: u32 = 77;

fn arrive(store: &PageStore, memory: u64, pages: std::ops::Range<u64>) {
    let range = PageRange {
        start: memory + pages.start * PAGE,
        pages: pages.end - pages.start,
    };
    let mut data = store.buffer(range.bytes() as usize).unwrap();
    for (bytes, page) in data.chunks_exact_mut(PAGE_BYTES).zip(pages) {
        bytes.fill((page % 255 + 1) as u8);
    }
    store
        .insert(VPID, 0, &[PageRun { range, zero: false }], data)
        .unwrap();
}

#[test]
fn parent_and_child_both_get_every_page() {
    [0, 2].into_iter().for_each(both_get_every_page);
}

/// With so many threads that only fill.
fn both_get_every_page(threads: usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut task = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fork.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 for the task");
    let mut lines = BufReader::new(task.stdout.take().unwrap()).lines();
    let memory: u64 = lines.next().expect("an address").unwrap().parse().unwrap();

    let store = Arc::new(PageStore::new(1 << 30));
    let end = memory + PAGES * PAGE;
    let range = PageRange::between(memory, end);
    let map = LazyMap {
        tasks: vec![LazyTask {
            vpid: VPID,
            ranges: vec![range],
            vmas: vec![(memory, end)],
        }],
    };
    let mut daemon = LazyPages::listen(dir.path())
        .unwrap()
        .fill_threads(threads)
        .start(map, store.clone())
        .unwrap();
    let socket = dir.path().join("lazy-pages.socket");
    writeln!(task.stdin.take().unwrap(), "{}", socket.display()).unwrap();
    // The task reads these before it forks: the child has them by inheritance.
    arrive(&store, memory, 0..16);
    assert_eq!(lines.next().expect("the fork").unwrap(), "forked");
    // Each of the two waits for what is still to come; the first to get a page must not use it up.
    arrive(&store, memory, 16..100);
    daemon.fill().unwrap();
    arrive(&store, memory, 100..PAGES);
    store.seal();
    let status = task.wait().unwrap();
    assert!(status.success(), "the task found wrong pages: {status}");
    let stats = daemon
        .wait_filled(Instant::now() + Duration::from_secs(20))
        .unwrap();
    assert!(stats.copied >= PAGES, "{stats:?}");
    assert_eq!(store.used(), 0, "the last of the two gives the pages back");
    assert!(daemon.restore_finished());
}
