//! Memory of real, stopped processes goes over TCP into the store, and is what it was.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use haulier_memory::page::{PAGE, PAGE_BYTES, PageRange};
use haulier_memory::store::{Lookup, PageStore};
use haulier_memory::stream::{TaskPages, receive_pages, send_pages};
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;

/// A stopped process; killed when dropped.
struct Frozen {
    process: Child,
    memory: PageRange,
    contents: Vec<u8>,
}

impl Frozen {
    fn start(dir: &Path, seed: u32) -> Self {
        let file = dir.join(seed.to_string());
        let mut process = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/frozen_task.py"))
            .arg(seed.to_string())
            .arg(&file)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 for the task");
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        let mut frozen = Self {
            process,
            memory: PageRange { start: 0, pages: 0 },
            contents: Vec::new(),
        };
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let (start, pages) = line.trim().split_once(' ').expect("address and pages");
        frozen.memory = PageRange {
            start: start.parse().unwrap(),
            pages: pages.parse().unwrap(),
        };
        frozen.contents = std::fs::read(file).unwrap();
        frozen
    }

    fn pages(&self, task: u32, ranges: Vec<PageRange>) -> TaskPages {
        TaskPages {
            pid: self.process.id() as i32,
            task,
            ranges,
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn compare(store: &PageStore, task: u32, frozen: &Frozen, ranges: &[PageRange]) {
    let mut zero = 0;
    for range in ranges {
        for address in (range.start..range.end()).step_by(PAGE_BYTES) {
            let at = (address - frozen.memory.start) as usize;
            let expected = &frozen.contents[at..at + PAGE_BYTES];
            match store.lookup(task, address, 1) {
                Lookup::Data(data) => assert!(*data == *expected, "task {task} {address:#x}"),
                Lookup::Zero(_) => {
                    zero += 1;
                    assert!(
                        expected.iter().all(|byte| *byte == 0),
                        "task {task} {address:#x}"
                    );
                }
                Lookup::Absent { .. } => panic!("page {address:#x} of task {task} did not arrive"),
            }
        }
    }
    assert!(zero > 0, "zero pages are not stored");
}

#[test]
fn the_memory_of_stopped_processes_arrives_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Frozen::start(dir.path(), 1), Frozen::start(dir.path(), 2));
    let whole = vec![first.memory];
    // Pieces of all lengths, also across the border to what is inaccessible.
    let pieces: Vec<PageRange> = (0..40)
        .map(|n| PageRange {
            start: second.memory.start + n * 51 * PAGE,
            pages: n + 1,
        })
        .collect();
    let tasks = vec![
        first.pages(1, whole.clone()),
        second.pages(2, pieces.clone()),
    ];

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let wait = Wait::uncancellable(Duration::from_secs(30));
    let store = PageStore::new(1 << 30);
    thread::scope(|scope| {
        let (mut sources, mut receivers) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            sources.push(Channel::new(source, "destination").unwrap());
            let mut channel = Channel::new(listener.accept().unwrap().0, "source").unwrap();
            let (store, wait) = (&store, &wait);
            receivers.push(scope.spawn(move || receive_pages(&mut channel, store, wait).unwrap()));
        }
        let stats = send_pages(sources, tasks, &wait).unwrap();
        let sent = whole
            .iter()
            .chain(&pieces)
            .map(|range| range.pages)
            .sum::<u64>();
        assert_eq!(stats.pages, sent);
        let received: u64 = receivers
            .into_iter()
            .map(|thread| thread.join().unwrap().pages)
            .sum();
        assert_eq!(received, sent);
    });
    compare(&store, 1, &first, &whole);
    compare(&store, 2, &second, &pieces);
    // What was not asked for did not come.
    let beyond = second.memory.start + PAGE;
    assert!(matches!(store.lookup(2, beyond, 1), Lookup::Absent { .. }));
}
