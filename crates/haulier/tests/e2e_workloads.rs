//! Programs of many kinds move to another host and back, and go on with everything they had.
//!
//! Most of them are in `programs` and check themselves; see `stage::play`.

mod stage;

use std::fs::{self, File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use haulier_lab::workloads::{connections, threads};
use haulier_lab::{Host, Signal};
use rustix::io::ioctl_fionread;
use stage::play::{
    compiled, found, moves_and_returns, program, says, shared_folder, succeeds, tree_moves,
};
use stage::{LONG, MOVING_V4, Stage, eventually, lab_program, play, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

#[test]
fn a_pipeline_moves_with_what_is_in_its_pipes() {
    const LINES: u64 = 200_000;
    let (stage, folder) = (two_hosts(), shared_folder());
    let (out, finish) = (folder.path().join("out"), folder.path().join("finish"));
    let line = format!(
        "seq 1 {LINES} | awk '{{print $1 % 7, \"of\", $1}}' | sh {} {} > {}",
        program("throttle.sh"),
        finish.display(),
        out.display()
    );
    let shell = start(stage.host(1), &["sh", "-c", &line]).pid();
    let written = || lines_in(&out);

    for (from, to) in [(1, 2), (2, 1)] {
        let before = written();
        eventually("lines come out", || written() > before);
        for stage_of_pipe in ["seq", "awk"] {
            let writer = named(stage.host(from), stage_of_pipe);
            eventually("the pipes are filled", || {
                queued(stage.host(from), writer, 1) > 30_000
            });
        }
        tree_moves(&stage, from, shell, to, &[]);
        let after = written();
        eventually("lines come out after the move", || written() > after);
    }
    fs::write(&finish, "").unwrap();
    stage.host(1).wait_gone(shell, LONG).unwrap();
    let lines: Vec<String> = (1..=LINES).map(|n| format!("{} of {n}\n", n % 7)).collect();
    let expected = lines.concat();
    let out = fs::read_to_string(&out).unwrap();
    assert_eq!(first_difference(&out, &expected), None);
}

#[test]
fn threads_move() {
    let (stage, folder) = (two_hosts(), shared_folder());
    let path = folder.path().join("report");
    let program = [&*lab_program(), "workload", "threads"].map(str::to_owned);
    let options = "--threads 8 --memory 64 --pages-per-second 20000 --report";
    let argv = program.iter().map(String::as_str);
    let argv: Vec<&str> = argv
        .chain(options.split(' '))
        .chain([path.to_str().unwrap()])
        .collect();
    let workload = start(stage.host(1), &argv).pid();
    let report = || threads::read_report(&fs::read(&path).unwrap_or_default());
    let go_on = || {
        let (line, iterations) = report().map_or((0, 0), |seen| (seen.line, seen.iterations));
        eventually("pages are rewritten, lines are reported", || {
            report().is_ok_and(|seen| seen.line > line + 3 && seen.iterations > iterations)
        });
    };
    for (from, to) in [(1, 2), (2, 1)] {
        go_on();
        assert_eq!(thread_count(stage.host(from), workload), 9);
        tree_moves(&stage, from, workload, to, &[]);
        assert_eq!(thread_count(stage.host(to), workload), 9);
        go_on();
    }
    stage.host(1).signal(workload, Signal::TERM).unwrap();
    stage.host(1).wait_gone(workload, LONG).unwrap();
    assert_eq!(report().unwrap().errors, 0);
}

#[test]
fn a_jvm_moves_with_its_heap() {
    let (Some(java), Some(javac)) = (found("java"), found("javac")) else {
        return;
    };
    let (stage, folder) = (two_hosts(), shared_folder());
    let classes = folder.path().join("classes");
    succeeds(
        Command::new(javac)
            .arg("-d")
            .arg(&classes)
            .arg(program("HeapModel.java")),
    );
    let options = ["-XX:-UsePerfData", "-Xms400m", "-Xmx400m", "-cp"];
    let mut argv = vec![java.to_str().unwrap()];
    argv.extend(options);
    argv.extend([classes.to_str().unwrap(), "HeapModel"]);
    argv.push(folder.path().to_str().unwrap());
    moves_and_returns(&stage, &argv, folder.path(), &[]);
}

#[test]
fn two_hundred_connections_move() {
    let stage = Stage::set(3, HAULIER);
    let _servers = (stage.serve(1), stage.serve(2));
    stage.give_addresses(1);
    let server: SocketAddr = format!("{MOVING_V4}:6000").parse().unwrap();
    let listen = server.to_string();
    let argv = [
        &*lab_program(),
        "workload",
        "connections",
        "--listen",
        &listen,
    ];
    let workload = start(stage.host(1), &argv).pid();
    let mut client = None;
    eventually("the server listens", || {
        let open = || connections::Client::open(server, 200).ok();
        client = stage.host(3).in_network(open).unwrap();
        client.is_some()
    });
    let mut client = client.unwrap();
    client.round().unwrap();

    let moving = format!("{MOVING_V4}/24@eth0");
    for (from, to) in [(1, 2), (2, 1)] {
        client.begin().unwrap();
        tree_moves(&stage, from, workload, to, &["--move-ip", &moving]);
        client.finish().unwrap();
        client.round().unwrap();
    }
    assert_eq!(client.count(), 200);
}

#[test]
fn kernel_objects_move() {
    let Some(python) = found("python3") else {
        return;
    };
    let (stage, folder) = (two_hosts(), shared_folder());
    // Not in the shared folder: there the source, which keeps its frozen tasks until they run at
    // the destination, would keep the lock from them.
    let lock = "/srv/lock";
    for host in stage.lab.hosts() {
        host.write_file(lock, "").unwrap();
    }
    let script = program("kernel_objects.py");
    let (python, own) = (python.to_str().unwrap(), folder.path().to_str().unwrap());
    moves_and_returns(&stage, &[python, &script, own, lock], folder.path(), &[]);
}

/// The source keeps its frozen tasks, and with them their locks, until they run at the destination:
/// on a file system that both hosts share they are in their own way.
#[test]
fn a_lock_on_a_shared_file_keeps_a_program_where_it_is() {
    let Some(python) = found("python3") else {
        return;
    };
    let (stage, folder) = (two_hosts(), shared_folder());
    let lock = folder.path().join("lock");
    fs::write(&lock, "").unwrap();
    let script = program("kernel_objects.py");
    let argv = [
        python.to_str().unwrap(),
        &script,
        folder.path().to_str().unwrap(),
        lock.to_str().unwrap(),
    ];
    let root = start(stage.host(1), &argv).pid();
    says(&stage, root, folder.path(), "ready 1");
    let output = stage.migrate(1, root, 2, &["--step-time", "5"]);
    // Refused at once, or rolled back.
    assert!(matches!(output.status.code(), Some(3 | 4)), "{output:?}");
    eprintln!("{}", output.stderr);
    assert!(stage.host(1).process_alive(root));
    stage.host(2).wait_gone(root, LONG).unwrap();
    fs::write(folder.path().join("go-1"), "").unwrap();
    says(&stage, root, folder.path(), "good 1");
    stage.assert_clean(1, &[]);
    stage.assert_clean(2, &[]);
    let names = fs::read_dir(folder.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    let ghosts = names
        .iter()
        .filter(|name| name.to_string_lossy().contains(".ghost"));
    assert_eq!(ghosts.count(), 0, "{names:?}");
}

#[test]
fn memory_of_every_kind_moves() {
    let (stage, folder) = (two_hosts(), shared_folder());
    let Some(binary) = compiled("memory", folder.path(), &[]) else {
        return;
    };
    let argv = [&*binary, folder.path()].map(|path| path.to_str().unwrap());
    moves_and_returns(&stage, &argv, folder.path(), &[]);
}

fn two_hosts() -> Stage {
    play::two_hosts(HAULIER)
}

/// The only process of that name on a host.
#[track_caller]
fn named(host: &Host, name: &str) -> i32 {
    let mut found = host.processes().unwrap();
    found.retain(|process| process.comm == name);
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found[0].pid
}

fn thread_count(host: &Host, pid: i32) -> usize {
    let tasks = host.root().join(format!("proc/{pid}/task"));
    fs::read_dir(tasks).unwrap().count()
}

/// Bytes in the pipe that a process has as that descriptor.
fn queued(host: &Host, pid: i32, descriptor: i32) -> u64 {
    let pipe = host.root().join(format!("proc/{pid}/fd/{descriptor}"));
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut options = OpenOptions::new();
    let pipe: File = options
        .read(true)
        .custom_flags(nonblocking)
        .open(pipe)
        .unwrap();
    ioctl_fionread(&pipe).unwrap()
}

fn lines_in(path: &Path) -> usize {
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

/// The first line that differs, with what it should be: files are too long to print.
fn first_difference<'a>(
    one: &'a str,
    other: &'a str,
) -> Option<(usize, Option<&'a str>, Option<&'a str>)> {
    let (mut one, mut other) = (one.lines(), other.lines());
    for number in 1.. {
        match (one.next(), other.next()) {
            (None, None) => break,
            (a, b) if a == b => {}
            (a, b) => return Some((number, a, b)),
        }
    }
    None
}
