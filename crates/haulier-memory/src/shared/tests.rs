use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;

/// Two processes that share memory; they end with their standard input.
struct Tree {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    child: i32,
    _file: tempfile::NamedTempFile,
}

impl Tree {
    fn start() -> Tree {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut process = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/shared/tests.py"))
            .arg(file.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 for the task");
        let input = process.stdin.take();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let child = line.trim().parse().expect("a pid");
        Tree {
            process,
            input,
            output,
            child,
            _file: file,
        }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.input.as_mut().unwrap(), "{what}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
    }

    fn pids(&self) -> [i32; 2] {
        [self.process.id() as i32, self.child]
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.process.wait();
    }
}

const KINDS: [&str; 9] = [
    "anonymous",
    "memfd",
    "unmapped",
    "system-v",
    "copied",
    "locked",
    "lazy",
    "file",
    "rewritten",
];

/// How often each kind of tagged page came, and the page numbers.
fn read(pages: &EagerPages) -> (BTreeMap<String, Vec<u64>>, ReadStats) {
    let mut found: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let stats = pages
        .read(|batch| -> Result<_, Infallible> {
            assert!(batch.len() <= BATCH && batch.len() % PAGE_BYTES == 0);
            for page in batch.chunks(PAGE_BYTES) {
                let line = page.split(|byte| *byte == b'\n').next().unwrap();
                let Ok(line) = std::str::from_utf8(line) else {
                    continue;
                };
                let Some((kind, number)) = line.split_once(' ') else {
                    continue;
                };
                if let (true, Ok(number)) = (KINDS.contains(&kind), number.parse()) {
                    found.entry(kind.to_owned()).or_default().push(number);
                }
            }
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    (found, stats)
}

#[test]
fn what_is_dumped_with_contents_is_found_and_nothing_else() {
    let tree = Tree::start();
    let pages = EagerPages::scan(tree.pids()).unwrap();
    assert!(pages.unreadable().is_empty(), "{:?}", pages.unreadable());
    let (found, stats) = read(&pages);
    assert_eq!(stats.pages * PAGE, pages.bytes());
    assert_eq!(stats.vanished, 0);
    assert!(pages.worth_it());

    // What two processes share comes once, in order.
    let even: Vec<u64> = (0..1024).step_by(2).collect();
    assert_eq!(found["anonymous"], even);
    assert_eq!(found["memfd"], (8..=64).collect::<Vec<_>>());
    assert_eq!(found["unmapped"], [3]);
    assert_eq!(found["system-v"], (0..32).collect::<Vec<_>>());
    // What a fork copies comes once for each process; locks are not inherited.
    let twice: Vec<u64> = (10..20).chain(10..20).collect();
    assert_eq!(found["copied"], twice);
    assert_eq!(found["locked"], (0..16).collect::<Vec<_>>());
    assert!(!found.contains_key("lazy"));
    assert!(!found.contains_key("file"));
}

#[test]
fn a_later_pass_sees_what_was_written_and_misses_what_is_gone() {
    let mut tree = Tree::start();
    let pages = EagerPages::scan(tree.pids()).unwrap();
    tree.tell("write");
    tree.tell("unmap");
    let (found, stats) = read(&pages);
    assert_eq!(found["rewritten"], [0, 2]);
    assert_eq!(found["anonymous"].len(), 510);
    assert_eq!(found["locked"], (8..16).collect::<Vec<_>>());
    let copied = &found["copied"];
    assert_eq!(copied.len(), 19, "{copied:?}");
    assert_eq!(stats.vanished, 9);
}

#[test]
fn the_taker_can_end_a_pass_and_its_error_comes_back() {
    let tree = Tree::start();
    let pages = EagerPages::scan(tree.pids()).unwrap();
    let mut calls = 0;
    let result = pages.read(|_| -> Result<_, Infallible> {
        calls += 1;
        Ok(ControlFlow::Break(()))
    });
    assert!(result.is_ok());
    assert_eq!(calls, 1);
    let result = pages.read(|_| Err::<ControlFlow<()>, _>("full"));
    assert_eq!(result, Err("full"));
}

#[test]
fn processes_that_are_gone_have_no_pages() {
    let tree = Tree::start();
    let pids = tree.pids();
    let before = EagerPages::scan(pids).unwrap();
    drop(tree);
    let (found, stats) = read(&before);
    assert!(found.is_empty(), "{found:?}");
    assert!(stats.vanished > 0);
    let after = EagerPages::scan([pids[0]]).unwrap();
    assert_eq!(after.bytes(), 0);
    assert!(after.unreadable().is_empty(), "{:?}", after.unreadable());
    assert!(!after.worth_it());
}
