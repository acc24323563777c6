//! The programs of `programs`, which check themselves, on a stage.
//!
//! One says `ready K` in its status file when all is in place, `wait` again and again meanwhile,
//! and, once the file `go-K` exists, `good K` if it still has what it should.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use haulier_lab::Host;
use tempfile::TempDir;

use super::{LONG, Stage, eventually, start};

/// How a process is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    StopAndCopy,
    PreCopy,
    PostCopy,
    Hybrid,
}

impl Mode {
    /// The options of `haulier migrate` for it.
    pub fn options(self) -> Vec<&'static str> {
        let name = match self {
            Mode::StopAndCopy => "stop-and-copy",
            Mode::PreCopy => "pre-copy",
            Mode::PostCopy => "post-copy",
            Mode::Hybrid => "hybrid",
        };
        vec!["--mode", name]
    }

    /// The same for a move that is to take several rounds, of which programs notice something:
    /// little bandwidth, and no prediction that would end them early.
    pub fn slow_options(self, bandwidth: &'static str) -> Vec<&'static str> {
        let mut options = self.options();
        if self != Mode::StopAndCopy {
            options.extend(["--bandwidth", bandwidth]);
            if self == Mode::PreCopy {
                options.extend(["--max-downtime", "2ms", "--max-rounds", "5"]);
                options.extend(["--on-stall", "force"]);
            }
        }
        options
    }
}

/// Two hosts that take processes.
pub fn two_hosts(haulier: &str) -> Stage {
    let stage = Stage::set(2, haulier);
    // They live as long as their lab.
    drop((stage.serve(1), stage.serve(2)));
    stage
}

/// A folder that all hosts see, for one test alone.
pub fn shared_folder() -> TempDir {
    let mut builder = tempfile::Builder::new();
    builder
        .prefix("haulier-workload-")
        .tempdir_in("/var/tmp")
        .unwrap()
}

/// A file of `programs`.
pub fn program(name: &str) -> String {
    format!("{}/tests/programs/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A C program of `programs`, compiled into a folder. `None` if there is no compiler.
#[track_caller]
pub fn compiled(name: &str, folder: &Path, options: &[&str]) -> Option<PathBuf> {
    let gcc = found("gcc")?;
    let binary = folder.join(name);
    let mut compile = Command::new(gcc);
    compile.args(["-O1", "-Wall", "-pthread", "-o"]);
    compile.arg(&binary).args(options);
    succeeds(compile.arg(program(&format!("{name}.c"))));
    Some(binary)
}

/// A program of the system. Not there: the test is skipped, aloud, or fails in CI.
#[track_caller]
pub fn found(name: &str) -> Option<PathBuf> {
    // The system's before any other: what a version manager puts first may be a script.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [PathBuf::from("/usr/bin")]
        .into_iter()
        .chain(std::env::split_paths(&path));
    let found = folders
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    if found.is_none() {
        missing(name);
    }
    found
}

/// The test cannot run, which CI takes for a failure.
#[track_caller]
pub fn missing(name: &str) {
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "CI has no {name}"
    );
    eprintln!("SKIPPED: there is no {name} on this machine");
}

#[track_caller]
pub fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// Starts a program of `programs` on host 1, moves it to host 2 and back, and has it check itself
/// after each move. `argv` names it and its folder; `options` are those of the moves. Returns what
/// haulier said of each.
#[track_caller]
pub fn moves_and_returns(
    stage: &Stage,
    argv: &[&str],
    folder: &Path,
    options: &[&str],
) -> [String; 2] {
    let root = start(stage.host(1), argv).pid();
    all_move_and_return(stage, root, &[folder], options)
}

/// The same for a tree that runs, with several such programs in it.
#[track_caller]
pub fn all_move_and_return(
    stage: &Stage,
    root: i32,
    folders: &[&Path],
    options: &[&str],
) -> [String; 2] {
    let all_say = |text: &str| {
        for folder in folders {
            says(stage, root, folder, text);
        }
    };
    let tell_all = |name: &str| {
        for folder in folders {
            fs::write(folder.join(name), "").unwrap();
        }
    };
    let reports = [(1, (1, 2)), (2, (2, 1))].map(|(turn, (from, to))| {
        all_say(&format!("ready {turn}"));
        let report = tree_moves(stage, from, root, to, options);
        let seen: Vec<usize> = folders.iter().map(|folder| status(folder).len()).collect();
        for (folder, seen) in folders.iter().zip(seen) {
            eventually("a sign of life", || status(folder).len() > seen + 1);
        }
        tell_all(&format!("go-{turn}"));
        all_say(&format!("good {turn}"));
        report
    });
    tell_all("end");
    all_say("done");
    stage.host(1).wait_gone(root, LONG).unwrap();
    reports
}

/// Waits until a program of `programs` says that.
#[track_caller]
pub fn says(stage: &Stage, root: i32, folder: &Path, text: &str) {
    eventually(text, || {
        let alive = stage
            .lab
            .hosts()
            .iter()
            .any(|host| host.process_alive(root));
        let said = status(folder);
        let found = said.iter().any(|line| line == text);
        assert!(found || alive, "it ended, saying {:?}", said.last());
        found
    });
}

/// Moves a tree, all of it, and leaves nothing of it, nor of the move. Returns what haulier said. If
/// the options name no mode, it goes in pre-copy and comes back in post-copy, or as
/// `HAULIER_MODES=there,back` says.
#[track_caller]
pub fn tree_moves(stage: &Stage, from: usize, root: i32, to: usize, options: &[&str]) -> String {
    let modes = std::env::var("HAULIER_MODES").unwrap_or_else(|_| "pre-copy,post-copy".to_owned());
    let (there, back) = modes.split_once(',').expect("two modes");
    let mut options = options.to_vec();
    if !options.contains(&"--mode") {
        options.extend(["--mode", if from == 1 { there } else { back }]);
    }
    let said = stage.moved(from, root, to, &options);
    eprintln!("host {from} to host {to}:\n{said}");
    let tree = tree_of(stage.host(to), root);
    let left: Vec<i32> = tree
        .iter()
        .copied()
        .filter(|pid| stage.host(from).process_alive(*pid))
        .collect();
    assert_eq!(left, Vec::<i32>::new(), "of {tree:?} still on host {from}");
    stage.assert_clean(from, &[]);
    said
}

/// What a program has said, without the numbers. They go up one by one: else an offset was lost.
#[track_caller]
pub fn status(folder: &Path) -> Vec<String> {
    let text = fs::read_to_string(folder.join("status")).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines: Vec<String> = complete
        .lines()
        .zip(1..)
        .map(|(line, number)| match line.split_once(' ') {
            Some((own, text)) if own == number.to_string() => text.to_owned(),
            _ => panic!("line {number} is {line:?}"),
        })
        .collect();
    let wrong = lines.iter().find(|line| line.starts_with("wrong"));
    assert_eq!(wrong, None);
    lines
}

/// A process and all that descend from it.
pub fn tree_of(host: &Host, root: i32) -> Vec<i32> {
    let processes = host.processes().unwrap();
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(parent) = tree.get(at).copied() {
        let children = processes.iter().filter(|process| process.parent == parent);
        tree.extend(children.map(|process| process.pid));
        at += 1;
    }
    tree
}
