//! Programs that work without pause move to another host and back, in every mode.
//!
//! They are in `programs`, and check all of their memory after each move; see `stage::play`.

mod stage;

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use haulier_lab::workloads::{OpenLoop, OpenLoopClient, Protocol, threads};
use haulier_lab::{Host, Process, Signal};
use stage::codes::NOTHING_TOUCHED;
use stage::play::{
    Mode, all_move_and_return, compiled, says, shared_folder, status, tree_moves, two_hosts,
};
use stage::{LONG, MOVING_V4, Stage, eventually, lab_program, start};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

/// A module of tests for each workload, which is a function that takes a mode.
macro_rules! in_every_mode {
    ($($workload:ident)+) => {$(
        mod $workload {
            use super::stage::play::Mode;

            #[test]
            fn stop_and_copy() {
                super::$workload(Mode::StopAndCopy);
            }

            #[test]
            fn pre_copy() {
                super::$workload(Mode::PreCopy);
            }

            #[test]
            fn post_copy() {
                super::$workload(Mode::PostCopy);
            }

            #[test]
            fn hybrid() {
                super::$workload(Mode::Hybrid);
            }
        }
    )+};
}

in_every_mode! {
    a_process_that_forks_all_the_time
    sixty_four_writing_threads
    pages_of_which_a_little_changes
    ten_thousand_areas
    a_stack_pointer_at_the_beginning_of_a_page
    memory_that_changes_without_a_write
    random_programs
    a_standing_program_page_by_page
    nine_tenths_of_the_allowance
    open_loop_clients_lose_nothing
}

fn a_process_that_forks_all_the_time(mode: Mode) {
    // Most of its pages are duplicates of its parent's, which cost little.
    one_program("forks", &[], mode, "8MiB");
}

fn sixty_four_writing_threads(mode: Mode) {
    one_program("writers", &[], mode, "40MiB");
}

/// With a limit only that is sent again.
fn pages_of_which_a_little_changes(mode: Mode) {
    for report in one_program("touches", &[], mode, "16MiB") {
        let rounds = matches!(mode, Mode::PreCopy | Mode::Hybrid);
        assert_eq!(report.contains(" changed; "), rounds, "{report}");
    }
}

fn ten_thousand_areas(mode: Mode) {
    one_program("areas", &[], mode, "60MiB");
}

/// CRIU dumps all memory of such a process, unless it is hidden: so little is not, on the way back.
fn a_stack_pointer_at_the_beginning_of_a_page(mode: Mode) {
    one_program("aligned", &[], mode, "8MiB");
}

fn memory_that_changes_without_a_write(mode: Mode) {
    // CRIU dumps SysV segments only together with the namespace they are in.
    one_program("shared", &["unshare", "--ipc"], mode, "10MiB");
}

/// Several at once, the first of which does little but map, unmap and move.
/// `HAULIER_SEEDS` has other seeds, separated by commas, or says how many to take from 1 on: `=20`.
fn random_programs(mode: Mode) {
    let folder = shared_folder();
    let Some(binary) = compiled("random", folder.path(), &[]) else {
        return;
    };
    for seeds in seeds(mode).chunks(4) {
        eprintln!("HAULIER_SEEDS={}", seeds.join(","));
        let stage = two_hosts(HAULIER);
        let folders: Vec<_> = seeds.iter().map(|seed| folder.path().join(seed)).collect();
        let mut line = String::new();
        for (number, (seed, folder)) in seeds.iter().zip(&folders).enumerate() {
            fs::create_dir(folder).unwrap();
            let only = if number == 0 { "maps" } else { "" };
            line += &format!("{} {} {seed} {only} & ", binary.display(), folder.display());
        }
        let root = start(stage.host(1), &["sh", "-c", &(line + "wait")]).pid();
        let folders: Vec<&Path> = folders.iter().map(AsRef::as_ref).collect();
        all_move_and_return(&stage, root, &folders, &mode.slow_options("60MiB"));
    }
}

fn seeds(mode: Mode) -> Vec<String> {
    let given = env::var("HAULIER_SEEDS").unwrap_or_default();
    if let Some(count) = given.strip_prefix('=') {
        let count: u64 = count.parse().unwrap();
        return (1..=count).map(|seed| seed.to_string()).collect();
    }
    if !given.is_empty() {
        return given.split(',').map(str::to_owned).collect();
    }
    // Others for each mode.
    let first = 10 * mode as u64 + 1;
    (first..first + 3).map(|seed| seed.to_string()).collect()
}

/// A program that was stopped before the move is compared with itself from outside.
fn a_standing_program_page_by_page(mode: Mode) {
    let (stage, folder) = (two_hosts(HAULIER), shared_folder());
    let Some(binary) = compiled("random", folder.path(), &[]) else {
        return;
    };
    let own = folder.path().to_str().unwrap();
    // The kernel writes to the area that this setting does without whenever it schedules a thread.
    let tunable = "GLIBC_TUNABLES=glibc.pthread.rseq=0";
    let argv = ["env", tunable, binary.to_str().unwrap(), own, "77"];
    let root = start(stage.host(1), &argv).pid();
    says(&stage, root, folder.path(), "ready 1");
    let seen = status(folder.path()).len();
    eventually("it has worked", || status(folder.path()).len() > seen + 5);
    let tree = stage::play::tree_of(stage.host(1), root);
    for pid in &tree {
        stage.host(1).signal(*pid, Signal::STOP).unwrap();
    }
    eventually("it stands", || {
        tree.iter().all(|pid| is_stopped(stage.host(1), *pid))
    });
    let before: Vec<Memory> = tree.iter().map(|pid| Memory::of(&stage, 1, *pid)).collect();
    let pages: usize = before.iter().map(Memory::pages).sum();
    assert!(pages > 100, "{pages}");
    tree_moves(&stage, 1, root, 2, &mode.options());
    for (pid, before) in tree.iter().zip(&before) {
        before.assert_same(&Memory::of(&stage, 2, *pid));
        assert!(is_stopped(stage.host(2), *pid), "{pid} was not to go on");
    }
    for pid in &tree {
        stage.host(2).signal(*pid, Signal::CONT).unwrap();
    }
    fs::write(folder.path().join("go-1"), "").unwrap();
    says(&stage, root, folder.path(), "good 1");
}

fn nine_tenths_of_the_allowance(mode: Mode) {
    let (stage, folder) = (Stage::set(2, HAULIER), shared_folder());
    let path = folder.path().join("report");
    let workload = rewriting(&stage, &path, "40");
    let memory = memory_of(stage.host(1), workload.pid());
    let allowance = memory * 10 / 9;
    drop(stage.serve_with(2, &["--max-memory", &allowance.to_string()]));
    tree_moves(&stage, 1, workload.pid(), 2, &mode.slow_options("60MiB"));
    goes_on(&path);
    stage.host(2).signal(workload.pid(), Signal::TERM).unwrap();
    stage.host(2).wait_gone(workload.pid(), LONG).unwrap();
    let report = threads::read_report(&fs::read(&path).unwrap());
    assert_eq!(report.unwrap().errors, 0);
}

/// Whatever the mode: it is refused before anything is done that depends on it.
#[test]
fn eleven_tenths_of_the_allowance_are_refused() {
    let (stage, folder) = (Stage::set(2, HAULIER), shared_folder());
    let path = folder.path().join("report");
    let workload = rewriting(&stage, &path, "40");
    let allowance = memory_of(stage.host(1), workload.pid()) * 10 / 11;
    drop(stage.serve_with(2, &["--max-memory", &allowance.to_string()]));
    for mode in [
        Mode::StopAndCopy,
        Mode::PreCopy,
        Mode::PostCopy,
        Mode::Hybrid,
    ] {
        let output = stage.migrate(1, workload.pid(), 2, &mode.options());
        let said = &output.stderr;
        assert_eq!(output.status.code(), Some(NOTHING_TOUCHED), "{said}");
        assert!(said.contains("memory"), "{said}");
        goes_on(&path);
    }
    stage.assert_clean(1, &[]);
    stage.assert_clean(2, &[]);
}

/// It writes more than the link carries, until it is given less time; at its new place it has all.
#[test]
fn a_writer_that_outruns_the_link_is_throttled_and_has_its_time_back() {
    let (stage, folder) = (two_hosts(HAULIER), shared_folder());
    let path = folder.path().join("report");
    let workload = rewriting(&stage, &path, "8");
    let mut options = Mode::PreCopy.options();
    options.extend(["--bandwidth", "8MiB", "--max-downtime", "5ms"]);
    options.extend(["--on-stall", "throttle", "--max-rounds", "8"]);
    let said = stage.moved(1, workload.pid(), 2, &options);
    assert!(said.contains("% of its CPU time taken"), "{said}");
    goes_on(&path);
    // Neither the quota nor anything else is left of it.
    stage.assert_clean(1, &[]);
}

/// Others who use it have their part, unless told otherwise.
#[test]
fn a_line_is_known_to_be_full() {
    let (stage, folder) = (two_hosts(HAULIER), shared_folder());
    stage.lab.shape(Some("200mbit")).unwrap();
    let path = folder.path().join("report");
    let workload = rewriting(&stage, &path, "48");
    let mut options = Mode::Hybrid.options();
    options.extend(["--compress", "none"]);
    for (from, to, share, known) in [(1, 2, "80", true), (2, 1, "100", false)] {
        let options = [&options[..], &["--line-share", share]].concat();
        let said = stage.moved(from, workload.pid(), to, &options);
        let line = "MiB/s; 80 % of that used";
        assert_eq!(said.contains(line), known, "{said}");
        goes_on(&path);
    }
}

fn open_loop_clients_lose_nothing(mode: Mode) {
    let stage = Stage::set(3, HAULIER);
    drop((stage.serve(1), stage.serve(2)));
    stage.give_addresses(1);
    let server: SocketAddr = format!("{MOVING_V4}:6100").parse().unwrap();
    let listen = server.to_string();
    let argv = [
        &*lab_program(),
        "workload",
        "echo",
        "--listen",
        &listen,
        "--memory",
        "24",
        "--pages-per-second",
        "2000",
    ];
    let root = start(stage.host(1), &argv).pid();
    let config = OpenLoop {
        server,
        tcp: 20,
        udp: 4,
        interval: Duration::from_millis(5),
        protocol: Protocol::Echo,
    };
    let mut clients = None;
    eventually("the server listens", || {
        let start = || OpenLoopClient::start(config).ok();
        clients = stage.host(3).in_network(start).unwrap();
        clients.is_some()
    });
    let clients = clients.unwrap();
    let go_on = || {
        let seen = clients.snapshot();
        eventually("answers come", || {
            let now = clients.snapshot();
            now.tcp.answered > seen.tcp.answered + 2000
                && now.udp.answered > seen.udp.answered + 400
        });
    };
    let moving = format!("{MOVING_V4}/24@eth0");
    let options = [mode.options(), vec!["--move-ip", &moving]].concat();
    for (from, to) in [(1, 2), (2, 1)] {
        go_on();
        tree_moves(&stage, from, root, to, &options);
    }
    go_on();
    let report = clients.stop();
    eprintln!("{:?}\n{:?}", report.tcp, report.udp);
    assert_eq!(report.errors(), Vec::<&str>::new());
    assert_eq!((report.tcp.lost, report.udp.lost), (0, 0));
    assert!(stage.host(1).process_alive(root));
}

/// Moves a C program of `programs` there and back, in rounds if the mode has any. Returns the reports.
#[track_caller]
fn one_program(name: &str, before: &[&str], mode: Mode, bandwidth: &'static str) -> Vec<String> {
    let (stage, folder) = (two_hosts(HAULIER), shared_folder());
    let Some(binary) = compiled(name, folder.path(), &[]) else {
        return Vec::new();
    };
    let own = [&*binary, folder.path()].map(|path| path.to_str().unwrap());
    let argv = [before, &own].concat();
    let options = mode.slow_options(bandwidth);
    let reports = stage::play::moves_and_returns(&stage, &argv, folder.path(), &options);
    for report in &reports {
        let rounds = report.lines().filter(|line| line.contains(" round "));
        // Else the test would say nothing about what happens between rounds.
        assert!(mode != Mode::PreCopy || rounds.count() > 1, "{report}");
    }
    reports.into()
}

/// A workload of so many MiB that rewrites and checks it.
fn rewriting(stage: &Stage, report: &Path, memory: &str) -> Process {
    let program = lab_program();
    let mut argv = vec![&*program, "workload", "threads", "--memory", memory];
    argv.extend(["--threads", "4", "--pages-per-second", "4000", "--report"]);
    argv.push(report.to_str().unwrap());
    let workload = start(stage.host(1), &argv);
    goes_on(report);
    workload
}

#[track_caller]
fn goes_on(report: &Path) {
    let read = || threads::read_report(&fs::read(report).unwrap_or_default());
    let (line, iterations) = read().map_or((0, 0), |seen| (seen.line, seen.iterations));
    eventually("pages are rewritten, lines are reported", || {
        read().is_ok_and(|seen| seen.line > line + 2 && seen.iterations > iterations)
    });
}

/// Bytes of memory that a process has for itself.
fn memory_of(host: &Host, pid: i32) -> u64 {
    let status = host.root().join(format!("proc/{pid}/status"));
    let status = fs::read_to_string(status).unwrap();
    let kibibytes = |field: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.unwrap().parse().unwrap()
    };
    (kibibytes("RssAnon:") + kibibytes("RssShmem:")) * 1024
}

fn is_stopped(host: &Host, pid: i32) -> bool {
    let processes = host.processes().unwrap();
    let found = processes.iter().find(|process| process.pid == pid);
    found.is_some_and(|process| process.state == 'T')
}

/// Private memory of a process, as `/proc` shows it.
struct Memory {
    pid: i32,
    areas: Vec<Area>,
}

/// Neighbouring areas of equal protection: CRIU may make one of several.
#[derive(PartialEq)]
struct Area {
    from: u64,
    to: u64,
    protection: String,
    bytes: Vec<u8>,
}

impl Memory {
    fn of(stage: &Stage, host: usize, pid: i32) -> Memory {
        let proc = stage.host(host).root().join(format!("proc/{pid}"));
        let maps = fs::read_to_string(proc.join("maps")).unwrap();
        let memory = fs::File::open(proc.join("mem")).unwrap();
        let mut areas: Vec<Area> = Vec::new();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (from, to) = words.next().unwrap().split_once('-').unwrap();
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            let (from, to) = (address(from), address(to));
            let protection = words.next().unwrap().to_owned();
            // What the kernel shows to all has its own contents on each host.
            let is_kernels = ["[vvar", "[vdso", "[vsyscall"]
                .iter()
                .any(|name| line.contains(name));
            if is_kernels || protection.ends_with('s') {
                continue;
            }
            let mut bytes = vec![0; (to - from) as usize];
            memory.read_exact_at(&mut bytes, from).unwrap();
            match areas.last_mut() {
                Some(last) if last.to == from && last.protection == protection => {
                    last.to = to;
                    last.bytes.extend(bytes);
                }
                _ => areas.push(Area {
                    from,
                    to,
                    protection,
                    bytes,
                }),
            }
        }
        Memory { pid, areas }
    }

    fn pages(&self) -> usize {
        self.areas.iter().map(|area| area.bytes.len() / 4096).sum()
    }

    #[track_caller]
    fn assert_same(&self, other: &Memory) {
        let lines = |of: &Memory| -> Vec<String> {
            let line = |area: &Area| format!("{:x}-{:x} {}", area.from, area.to, area.protection);
            of.areas.iter().map(line).collect()
        };
        assert_eq!(lines(self), lines(other), "areas of {}", self.pid);
        for (before, after) in self.areas.iter().zip(&other.areas) {
            let pages = before.bytes.chunks(4096).zip(after.bytes.chunks(4096));
            for (page, (one, other)) in pages.enumerate() {
                let at = one.iter().zip(other).position(|(a, b)| a != b);
                let address = before.from + page as u64 * 4096;
                assert_eq!(at, None, "page {address:x} of process {}", self.pid);
            }
        }
    }
}
