//! With processes of their own: this program plays target, client and helper too, started again with a
//! role.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};

use super::super::{Directly, TakeUserfaultfd, leftover};
use super::*;

const ROLE: &str = "HAULIER_TEST_ROLE";
const TARGET: &str = "HAULIER_TEST_TARGET";
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_secs(2);

/// This program again, as something else.
fn role(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let test = format!("remote::apart::tests::{role}");
    command
        .args(["--exact", &test, "--nocapture", "--test-threads=1"])
        .env(ROLE, role);
    command
}

fn plays(role: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|name| name == role)
}

/// Not a test but the helper.
#[test]
fn as_helper() {
    if plays("as_helper") {
        std::process::exit(i32::from(serve(|| {}).is_err()));
    }
}

/// Not a test but a client, which takes again and again until it is killed.
#[test]
fn as_client() {
    if !plays("as_client") {
        return;
    }
    let target = std::env::var(TARGET).unwrap().parse().unwrap();
    let mut helper = Apart::start(role("as_helper")).unwrap();
    helper.take(target, SHORT).unwrap();
    println!("taken {}", helper.pid());
    loop {
        helper.take(target, SHORT).unwrap();
    }
}

/// Not a test but a target: it computes, sleeps and waits, and checks what comes out, until its
/// standard input ends. It exits with 7 if all was right.
#[test]
fn as_target() {
    if !plays("as_target") {
        return;
    }
    static OVER: AtomicBool = AtomicBool::new(false);
    static ROUNDS: AtomicU64 = AtomicU64::new(0);
    let right = compute(1);
    let (begun, has_begun) = mpsc::channel();
    let work = move |naps: bool, begun: mpsc::Sender<()>| {
        // Until it runs, a thread has all its signals blocked.
        begun.send(()).unwrap();
        while !OVER.load(Ordering::Relaxed) {
            let before = Instant::now();
            if compute(1) != right {
                println!("wrong");
                std::process::exit(8);
            }
            if naps {
                thread::sleep(Duration::from_micros(200));
                assert!(before.elapsed() >= Duration::from_micros(200));
            }
            ROUNDS.fetch_add(1, Ordering::Relaxed);
        }
    };
    let threads = [false, true].map(|naps| {
        let begun = begun.clone();
        thread::spawn(move || work(naps, begun))
    });
    threads.iter().for_each(|_| has_begun.recv().unwrap());
    println!("target ready");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    OVER.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(ROUNDS.load(Ordering::Relaxed) > 0);
    std::process::exit(7);
}

/// Integers and floating point, in registers for the most part.
fn compute(seed: u64) -> (u64, u64) {
    let (mut bits, mut float) = (seed, 1.0_f64);
    for _ in 0..20_000 {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        float = (float + (bits >> 40) as f64).sqrt();
    }
    (bits, float.to_bits())
}

/// The first words of a line that begins so: the test program says other things too.
fn line(output: &mut BufReader<ChildStdout>, begin: &str) -> String {
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if let Some(at) = line.find(begin) {
            return line[at + begin.len()..].trim().to_owned();
        }
        line.clear();
    }
    panic!("no line begins with {begin:?}");
}

struct Target(Child);

impl Target {
    fn start() -> Target {
        let mut process = role("as_target")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        line(&mut output, "target ready");
        Target(process)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// It runs, nobody traces it, and nothing is left in it.
    fn assert_free(&self) {
        let tasks = format!("/proc/{}/task", self.pid());
        for task in fs::read_dir(tasks).unwrap() {
            let status = task.unwrap().path().join("status");
            let status = fs::read_to_string(status).unwrap();
            assert!(status.contains("\nTracerPid:\t0\n"), "{status}");
            assert!(status.contains("\nSigBlk:\t0000000000000000\n"), "{status}");
        }
        assert_eq!(userfaultfds(self.pid()), 0);
    }

    /// Everything that it has computed was right.
    fn assert_right(mut self) {
        drop(self.0.stdin.take());
        assert_eq!(self.0.wait().unwrap().code(), Some(7));
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn userfaultfds(pid: i32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    links
        .filter(|link| link.to_string_lossy().contains("userfaultfd"))
        .count()
}

/// Waits until a process has ended, whoever reaps it.
fn await_end(pid: &str) {
    let deadline = Instant::now() + LONG;
    let lives = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
        state.is_some_and(|state| !matches!(state, Some('Z' | 'X')))
    };
    while lives() {
        assert!(Instant::now() < deadline, "the helper does not end");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_helper_takes_and_its_target_does_not_notice() {
    let target = Target::start();
    let mut helper = Apart::start(role("as_helper")).unwrap();
    let mut stops = Vec::new();
    for _ in 0..200 {
        let taken = helper.take(target.pid(), SHORT).unwrap();
        let begin = format!("{} (", target.pid());
        assert!(taken.beside.stat.starts_with(&begin), "{taken:?}");
        let mut maps = String::new();
        fs::File::from(taken.beside.maps)
            .read_to_string(&mut maps)
            .unwrap();
        assert!(maps.contains("[stack]"), "{maps}");
        stops.push(taken.stopped);
    }
    target.assert_free();
    stops.sort();
    println!("stopped by a helper: median {:?}", stops[stops.len() / 2]);
    drop(helper);
    target.assert_right();
}

#[test]
fn errors_are_told_and_the_helper_lives_on() {
    let target = Target::start();
    let mut helper = Apart::start(role("as_helper")).unwrap();
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    let gone = helper.take(ended.id() as i32, SHORT);
    assert!(matches!(
        gone,
        Err(ApartError::Remote(
            RemoteError::Io { .. } | RemoteError::Gone
        ))
    ));
    helper.take(target.pid(), SHORT).unwrap();
    // Killed itself, it is lost, and says so.
    helper.process.kill().unwrap();
    let lost = helper.take(target.pid(), SHORT);
    assert!(matches!(lost, Err(ApartError::Lost(_))), "{lost:?}");
    let none = Apart::start(Command::new("/nowhere/haulier"));
    assert!(matches!(none, Err(ApartError::Start(_))));
    target.assert_free();
    target.assert_right();
}

#[test]
fn a_client_that_hangs_up_while_the_target_is_held_leaves_it_as_it_was() {
    let target = Target::start();
    for _ in 0..200 {
        let pair = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        );
        let (ours, theirs) = pair.unwrap();
        let (say_held, held) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        let (say_held, may_go) = (Mutex::new(say_held), Mutex::new(may_go));
        let helper = thread::spawn(move || {
            serve::serve_at(theirs.as_fd(), || {
                say_held.lock().unwrap().send(()).unwrap();
                let _ = may_go.lock().unwrap().recv_timeout(LONG);
            })
        });
        let request = Request {
            pid: target.pid(),
            timeout: SHORT,
            work: Work::Take,
        };
        wire::send(ours.as_fd(), &request.encode(), &[]).unwrap();
        held.recv_timeout(LONG).unwrap();
        assert_eq!(userfaultfds(target.pid()), 1);
        drop(ours);
        drop(go);
        helper.join().unwrap().unwrap();
        target.assert_free();
    }
    target.assert_right();
}

#[test]
fn a_client_that_is_killed_at_any_moment_leaves_the_target_as_it_was() {
    let target = Target::start();
    for round in 0..200_u64 {
        let mut client = role("as_client")
            .env(TARGET, target.pid().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(client.stdout.take().unwrap());
        let helper = line(&mut output, "taken ");
        thread::sleep(Duration::from_micros(round * 37 % 1000));
        client.kill().unwrap();
        client.wait().unwrap();
        await_end(&helper);
        target.assert_free();
    }
    target.assert_right();
}

#[test]
fn what_a_killed_tracer_has_left_is_found_and_closed() {
    let target = Target::start();
    assert_eq!(leftover::of(target.pid()).unwrap(), []);
    // What a tracer makes that never comes to close it.
    let made = as_left(target.pid());
    let [found] = leftover::of(target.pid()).unwrap()[..] else {
        panic!("nothing is found of {made}");
    };
    assert_eq!(found.fd, made);
    let other = leftover::Leftover {
        inode: found.inode + 1,
        ..found
    };
    let mut helper = Apart::start(role("as_helper")).unwrap();
    helper.close(target.pid(), SHORT, other).unwrap();
    assert_eq!(userfaultfds(target.pid()), 1, "it is another one");
    helper.close(target.pid(), SHORT, found).unwrap();
    target.assert_free();
    let made = as_left(target.pid());
    let [found] = leftover::of(target.pid()).unwrap()[..] else {
        panic!("nothing is found of {made}");
    };
    Directly.close(target.pid(), SHORT, found).unwrap();
    target.assert_free();
    target.assert_right();
}

/// Has the target make a userfaultfd, and keep it.
fn as_left(pid: i32) -> i32 {
    use super::super::{USER_MODE_ONLY, as_tracer, with_thread};
    let deadline = Instant::now() + SHORT;
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;
    let make = || {
        with_thread(pid, deadline, |thread| {
            Ok(thread.call(libc::SYS_userfaultfd, [flags, 0, 0])?.unwrap())
        })
    };
    as_tracer(make).unwrap().0 as i32
}
