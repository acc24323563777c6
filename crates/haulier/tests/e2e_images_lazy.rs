//! Plain `criu dump --stream --lazy-pages` and `criu restore --stream --lazy-pages`, with an image-proxy
//! that fetches the memory and an image-cache that is the lazy-pages daemon.

mod cast;
mod stage;

use std::fs;

use cast::{Cast, Counter, LEAVING};
use haulier_lab::{Captured, HostCommand, Output, Signal};
use stage::play::{compiled, says, tree_of};
use stage::{LONG, eventually, lab_program, start};

/// Slow enough for everything to happen before the memory has moved.
const SLOW: &str = "20mbit";

/// Ends them, so that others can take their places.
fn end(programs: [Captured; 2]) {
    for program in programs {
        // It may have been killed.
        let _ = program.process.kill(Signal::TERM);
        program.finish(LONG).unwrap();
    }
}

fn nothing_on_disk(cast: &Cast) {
    for host in [1, 2] {
        let files = cast.stage.host(host).shell("find /srv -name '*.img'");
        assert_eq!(files.unwrap().success(), "");
    }
}

/// A counter that runs on host 2 while most of its memory is on host 1.
struct Between {
    cast: Cast,
    counter: Counter,
    cache: Captured,
    proxy: Captured,
    dump: Captured,
}

impl Between {
    fn new() -> Between {
        let cast = Cast::new();
        let counter = cast.counter(64);
        let cache = cast.lazy_cache(&["--reconnect", "2s"]);
        let proxy = cast.lazy_proxy(&["--reconnect", "2s"]);
        cast.stage.lab.shape(Some(SLOW)).unwrap();
        let dump = cast.dump_with_vote(counter.pid, &LEAVING);
        let dump = dump.spawn_captured().unwrap();
        cast.restored(cast.lazy_restore().output(LONG).unwrap());
        cache
            .wait_for_output("is restored, its memory follows", LONG)
            .unwrap();
        assert!(cast.stage.host(2).process_alive(counter.pid));
        Between {
            cast,
            counter,
            cache,
            proxy,
            dump,
        }
    }

    /// It is gone from host 2, and stands on host 1 until a person decides. `why`: what the person is
    /// told.
    fn left_to_a_person(&self, why: &str) {
        let host = |number| self.cast.stage.host(number);
        let pid = self.counter.pid;
        eventually("nothing of it runs without its memory", || {
            !host(2).process_alive(pid)
        });
        let mut waits = serde_json::Value::Null;
        eventually("it can be found", || {
            waits = self.list();
            waits[0]["doubt"].is_string()
        });
        assert_eq!(waits.as_array().map(Vec::len), Some(1), "{waits}");
        assert_eq!(
            (&waits[0]["target"], &waits[0]["snapshot"]),
            (&"main".into(), &1.into())
        );
        assert!(waits[0]["doubt"].as_str().unwrap().contains(why), "{waits}");
        assert!(host(1).process_alive(pid), "the last copy");
        let before = fs::read(&self.counter.report).unwrap();
        // A word is needed.
        assert!(!self.settle(&[]).status.success());
        let other = self.settle(&["1", "--run-here"]);
        assert!(other.stderr.contains("is called 1"), "{}", other.stderr);
        assert!(host(1).process_alive(pid));
        assert_eq!(before, fs::read(&self.counter.report).unwrap(), "it stands");
    }

    fn runs_on_here(self) {
        let said = self.settle(&["--run-here"]).success();
        assert!(said.contains("they run on here"), "{said}");
        self.counter.goes_on();
        assert!(self.cast.stage.host(1).process_alive(self.counter.pid));
        assert_eq!(self.list(), serde_json::json!([]));
        assert!(!self.dump.finish(LONG).unwrap().status.success());
        let again = self.cast.stage.haulier(1).args(["image-proxy", "settle"]);
        let again = again.args(["--dir", "/srv/images", "--run-here"]);
        assert!(!again.output(LONG).unwrap().status.success());
    }

    fn given_up(self) {
        let said = self.settle(&["--discard"]).success();
        assert!(said.contains("removed here"), "{said}");
        let pid = self.counter.pid;
        assert!(!self.cast.stage.host(1).process_alive(pid), "it is over");
        assert_eq!(self.list(), serde_json::json!([]));
        self.cast.dumped(self.dump.finish(LONG).unwrap());
    }

    /// What `haulier image-proxy list` says.
    fn list(&self) -> serde_json::Value {
        let list = self.cast.stage.haulier(1).args(["image-proxy", "list"]);
        let list = list.args(["--dir", "/srv/images", "--json"]);
        serde_json::from_str(&list.output(LONG).unwrap().success()).unwrap()
    }

    fn settle(&self, word: &[&str]) -> Output {
        let settle = self.cast.stage.haulier(1).args(["image-proxy", "settle"]);
        let settle = settle.args(["--dir", "/srv/images"]).args(word);
        settle.output(LONG).unwrap()
    }
}

#[test]
fn the_memory_of_a_redis_follows_it() {
    let cast = Cast::new();
    let redis = cast.redis(64);
    let cache = cast.lazy_cache(&[]);
    let restore = cast.lazy_restore().spawn_captured().unwrap();
    let proxy = cast.lazy_proxy(&["--compress", "lz4"]);

    let dump = cast.dump_with_vote(redis, &LEAVING).spawn_captured();
    cast.restored(restore.finish(LONG).unwrap());
    cast.dumped(dump.unwrap().finish(LONG).unwrap());
    cache
        .wait_for_output("all memory of main is in its place", LONG)
        .unwrap();
    proxy
        .wait_for_output("all memory of main has moved", LONG)
        .unwrap();
    assert!(!cast.stage.host(1).process_alive(redis));
    cast.is_right_then_ends(redis, 1, 64);
    nothing_on_disk(&cast);
    // It is not here to be restored again.
    let again = cast.lazy_restore().output(LONG).unwrap();
    assert!(!again.status.success());
    cache
        .wait_for_output("it was restored before", LONG)
        .unwrap();
}

/// The options of a dump give it a connection, or an address to listen at.
fn nothing_of_an_aligned_stack_is_left(dump: impl Fn(&Cast, i32) -> Captured, proxy: &[&str]) {
    let cast = Cast::new();
    let folder = cast.folder.path();
    let Some(program) = compiled("aligned", folder, &[]) else {
        return;
    };
    let (program, folder) = (program.to_str().unwrap(), folder.to_str().unwrap());
    let pid = start(cast.stage.host(1), &[program, folder]).pid();
    says(&cast.stage, pid, cast.folder.path(), "ready 1");
    let cache = cast.lazy_cache(&[]);
    let restore = cast.lazy_restore().spawn_captured().unwrap();
    let proxy = cast.proxy(proxy);

    let dump = dump(&cast, pid);
    cast.restored(restore.finish(LONG).unwrap());
    cast.dumped(dump.finish(LONG).unwrap());
    let log = cast.stage.host(1).read_file("/srv/images/dump.log");
    let log = String::from_utf8_lossy(&log.unwrap()).into_owned();
    assert!(log.contains("Starting lazy pages server"), "a lazy dump");
    cache
        .wait_for_output("all memory of main is in its place: 0 pages", LONG)
        .unwrap();
    proxy
        .wait_for_output("all memory of main has moved", LONG)
        .unwrap();
    assert!(!cast.stage.host(1).process_alive(pid));
    fs::write(cast.folder.path().join("go-1"), "").unwrap();
    says(&cast.stage, pid, cast.folder.path(), "good 1");
    // As after every lazy dump.
    let again = cast.lazy_restore().output(LONG).unwrap();
    assert!(!again.status.success());
}

#[test]
fn a_dump_that_had_to_take_all_memory_is_restored_as_it_was_dumped() {
    nothing_of_an_aligned_stack_is_left(
        |cast, pid| cast.dump_with_vote(pid, &LEAVING).spawn_captured().unwrap(),
        &["--lazy-pages", "--page-server", "127.0.0.1:9100"],
    );
}

#[test]
fn a_dump_without_a_vote_that_had_to_take_all_memory_is_restored_as_it_was_dumped() {
    nothing_of_an_aligned_stack_is_left(
        |cast, pid| cast.dump(pid, &LEAVING).spawn_captured().unwrap(),
        &["--lazy-pages", "--page-server", "127.0.0.1:9100"],
    );
}

#[test]
fn a_dump_with_a_given_connection_that_had_to_take_all_memory_is_restored_as_it_was_dumped() {
    let dump = |cast: &Cast, pid| dump_with_connection(cast, pid).spawn_captured().unwrap();
    nothing_of_an_aligned_stack_is_left(dump, &["--lazy-pages"]);
}

/// A dump that connects, and becomes CRIU. There is no vote.
fn dump_with_connection(cast: &Cast, pid: i32) -> HostCommand {
    let connect = "import os, socket, sys\n\
        s = socket.socket(socket.AF_UNIX)\n\
        s.connect('/srv/images/page-server.sock')\n\
        os.dup2(s.fileno(), 77)\n\
        os.execv(sys.argv[1], sys.argv[1:])";
    let criu =
        std::env::var("HAULIER_CRIU").unwrap_or_else(|_| "/opt/haulier/criu/sbin/criu".into());
    let pid = pid.to_string();
    cast.stage.host(1).command("python3").args([
        "-c",
        connect,
        &criu,
        "dump",
        "--stream",
        "-D",
        "/srv/images",
        "-t",
        &pid,
        "-o",
        "dump.log",
        "-v4",
        "--manage-cgroups=ignore",
        "--lazy-pages",
        "--ps-socket",
        "77",
    ])
}

#[test]
fn a_tree_is_fetched_over_a_connection_that_its_dump_was_given() {
    let cast = Cast::new();
    let reports = ["one", "two", "three"].map(|name| cast.folder.path().join(name));
    let workers: Vec<String> = reports
        .iter()
        .map(|report| {
            format!(
                "{} workload threads --threads 2 --memory 16 --pages-per-second 500 --report {} &",
                lab_program(),
                report.display()
            )
        })
        .collect();
    let line = format!("{} wait", workers.join(" "));
    let root = start(cast.stage.host(1), &["sh", "-c", &line]).pid();
    let counters = reports.map(|report| Counter { pid: root, report });
    counters.iter().for_each(Counter::goes_on);
    let tree = tree_of(cast.stage.host(1), root);
    assert_eq!(tree.len(), 4);

    let cache = cast.lazy_cache(&[]);
    let restore = cast.lazy_restore().spawn_captured().unwrap();
    let _proxy = cast.proxy(&["--lazy-pages"]);
    let dump = dump_with_connection(&cast, root).spawn_captured().unwrap();
    cast.restored(restore.finish(LONG).unwrap());
    counters.iter().for_each(Counter::goes_on);
    cast.dumped(dump.finish(LONG).unwrap());
    cache
        .wait_for_output("all memory of main is in its place", LONG)
        .unwrap();
    counters.iter().for_each(Counter::goes_on);
    for pid in tree {
        assert!(!cast.stage.host(1).process_alive(pid), "{pid}");
        assert!(cast.stage.host(2).process_alive(pid), "{pid}");
    }
    nothing_on_disk(&cast);
}

#[test]
fn memory_goes_on_following_over_a_new_connection() {
    let between = Between::new();
    let Between {
        cast,
        counter,
        cache,
        dump,
        ..
    } = between;
    for _ in 0..2 {
        // Connections are reset, as by a firewall that lost its state.
        let killed = cast.stage.host(1).shell("ss -K dst 10.77.0.2 dport = 7001");
        killed.unwrap().success();
    }
    counter.goes_on();
    cast.stage.lab.shape(None).unwrap();
    cast.dumped(dump.finish(LONG).unwrap());
    counter.goes_on();
    assert!(!cast.stage.host(1).process_alive(counter.pid));
    let said = cache.stderr().unwrap();
    assert!(said.matches("sends images").count() >= 2, "{said}");
}

/// Either side is killed in the middle.
fn without_cache() -> Between {
    let between = Between::new();
    let moving = between.list();
    assert!(moving[0]["doubt"].is_null(), "{moving}");
    let early = between.settle(&["--discard"]);
    let plain = "nothing is to be settled";
    assert!(early.stderr.contains(plain), "{}", early.stderr);
    between.cache.process.kill(Signal::KILL).unwrap();
    let proxy = &between.proxy;
    proxy
        .wait_for_output("it is not known whether main runs at its destination", LONG)
        .unwrap();
    between.left_to_a_person("the connection to the image-cache was lost");
    between
}

fn without_proxy() -> Between {
    let between = Between::new();
    between.proxy.process.kill(Signal::KILL).unwrap();
    let cache = &between.cache;
    cache
        .wait_for_output("was killed with its memory incomplete", LONG)
        .unwrap();
    let said = cache.stderr().unwrap();
    assert!(
        said.contains("the connection to the image-proxy was lost"),
        "{said}"
    );
    between.left_to_a_person("the image-proxy was ended");
    between
}

#[test]
fn without_its_cache_a_process_runs_on_at_its_source_when_a_person_says_so() {
    without_cache().runs_on_here();
}

#[test]
fn without_its_cache_a_process_is_given_up_when_a_person_says_so() {
    without_cache().given_up();
}

#[test]
fn without_its_proxy_a_process_runs_on_at_its_source_when_a_person_says_so() {
    without_proxy().runs_on_here();
}

#[test]
fn without_its_proxy_a_process_is_given_up_when_a_person_says_so() {
    without_proxy().given_up();
}

#[test]
fn whatever_fails_before_a_restore_has_the_process_run_on() {
    let cast = Cast::new();
    let counter = cast.counter(16);
    let pid = counter.pid;
    let dumped = |cache: &Captured| {
        let dump = cast.dump_with_vote(pid, &LEAVING).spawn_captured().unwrap();
        cache
            .wait_for_output("snapshot 1 of main waits", LONG)
            .unwrap();
        dump
    };
    let goes_on = |dump: Captured| {
        assert!(!dump.finish(LONG).unwrap().status.success());
        assert!(cast.stage.host(1).process_alive(pid));
        assert!(!cast.stage.host(2).process_alive(pid));
        counter.goes_on();
    };
    // The proxy dies.
    let cache = cast.lazy_cache(&["--reconnect", "1s"]);
    let proxy = cast.lazy_proxy(&["--reconnect", "1s"]);
    let dump = dumped(&cache);
    proxy.process.kill(Signal::KILL).unwrap();
    goes_on(dump);
    cache
        .wait_for_output("snapshot 1 of main failed", LONG)
        .unwrap();
    end([cache, proxy]);

    // The cache dies.
    let cache = cast.lazy_cache(&["--reconnect", "1s"]);
    let proxy = cast.lazy_proxy(&["--reconnect", "1s"]);
    let dump = dumped(&cache);
    cache.process.kill(Signal::KILL).unwrap();
    goes_on(dump);
    let said = proxy.stderr().unwrap();
    assert!(said.contains("main runs on here"), "{said}");
    end([cache, proxy]);

    // Its number is taken at the destination.
    let cache = cast.lazy_cache(&[]);
    let proxy = cast.lazy_proxy(&[]);
    let dump = dumped(&cache);
    let taken = cast.stage.host(2).command("sleep").args(["1000"]).pid(pid);
    let taken = taken.spawn().unwrap();
    assert!(!cast.lazy_restore().output(LONG).unwrap().status.success());
    taken.kill(Signal::KILL).unwrap();
    eventually("its number is free", || {
        cast.stage.host(2).process(pid).is_none()
    });
    goes_on(dump);
    let said = proxy.stderr().unwrap();
    assert!(said.contains("the restore failed"), "{said}");
    end([cache, proxy]);

    // The restore does not know that memory is missing.
    let cache = cast.lazy_cache(&[]);
    let proxy = cast.lazy_proxy(&[]);
    let dump = dumped(&cache);
    let restore = cast.restore("/srv/images", &[]).output(LONG).unwrap();
    assert!(!restore.status.success());
    cache
        .wait_for_output("criu restore needs --lazy-pages", LONG)
        .unwrap();
    goes_on(dump);
    end([cache, proxy]);

    // Nobody wants it.
    let cache = cast.lazy_cache(&[]);
    let proxy = cast.lazy_proxy(&[]);
    let dump = dumped(&cache);
    let drop_it = cast.stage.haulier(2).args(["image-cache", "drop", "1"]);
    let drop_it = drop_it.args(["--dir", "/srv/images"]);
    drop_it.output(LONG).unwrap().success();
    goes_on(dump);
    end([cache, proxy]);
}

#[test]
fn memory_is_left_behind_only_if_both_sides_were_told() {
    let cast = Cast::new();
    let counter = cast.counter(16);
    let fails = || {
        let dump = cast.dump_with_vote(counter.pid, &LEAVING).output(LONG);
        assert!(!dump.unwrap().status.success());
        assert!(cast.stage.host(1).process_alive(counter.pid));
        counter.goes_on();
    };
    let cache = cast.cache(&[]);
    let proxy = cast.lazy_proxy(&[]);
    fails();
    let said = proxy.stderr().unwrap();
    let plain = "this image-cache runs without --lazy-pages";
    assert!(said.contains(plain), "{said}");
    end([cache, proxy]);

    let _cache = cast.lazy_cache(&[]);
    let proxy = cast.proxy(&[]);
    proxy
        .wait_for_output("connected to the image-cache", LONG)
        .unwrap();
    fails();
    let said = proxy.stderr().unwrap();
    let plain = "the image-proxy runs without --lazy-pages";
    assert!(said.contains(plain), "{said}");
}

/// CRIU becomes a page server even if its script says no, and nobody fetches.
#[test]
fn a_proxy_that_learns_too_late_that_memory_is_left_behind_has_the_process_run_on() {
    let cast = Cast::new();
    let folder = cast.folder.path();
    let Some(program) = compiled("small", folder, &["-static"]) else {
        return;
    };
    let (program, place) = (program.to_str().unwrap(), folder.to_str().unwrap());
    let pid = start(cast.stage.host(1), &[program, place]).pid();
    says(&cast.stage, pid, folder, "ready 1");
    let _cache = cast.lazy_cache(&[]);
    let proxy = cast.proxy(&[]);
    let connected = proxy.wait_for_output("connected to the image-cache", LONG);
    connected.unwrap();

    proxy.process.kill(Signal::STOP).unwrap();
    let dump = cast.dump_with_vote(pid, &LEAVING).spawn_captured();
    eventually("the dump waits for its script", || {
        let script = "grep -ql '=post-dump' $(ls -d /proc/[0-9]*/environ)";
        let script = cast.stage.host(1).shell(script);
        script.unwrap().status.success()
    });
    proxy.process.kill(Signal::CONT).unwrap();

    assert!(!dump.unwrap().finish(LONG).unwrap().status.success());
    let said = proxy.stderr().unwrap();
    let plain = "the image-proxy runs without --lazy-pages";
    assert!(said.contains(plain), "{said}");
    fs::write(folder.join("go-1"), "").unwrap();
    says(&cast.stage, pid, folder, "good 1");
}

#[test]
fn a_dump_that_left_nothing_behind_is_restored_without_lazy_pages_only() {
    let cast = Cast::new();
    let counter = cast.counter(16);
    let cache = cast.lazy_cache(&[]);
    let _proxy = cast.lazy_proxy(&[]);
    cast.dumped(cast.dump_with_vote(counter.pid, &[]).output(LONG).unwrap());
    for _ in 0..2 {
        assert!(!cast.lazy_restore().output(LONG).unwrap().status.success());
        assert!(!cast.stage.host(2).process_alive(counter.pid));
    }
    cache
        .wait_for_output("criu restore needs no --lazy-pages for it", LONG)
        .unwrap();
    cast.restored(cast.restore("/srv/images", &[]).output(LONG).unwrap());
    counter.goes_on();
}

#[test]
fn a_dump_whose_memory_is_elsewhere_is_not_saved() {
    let cast = Cast::new();
    let counter = cast.counter(16);
    let cache = cast.lazy_cache(&[]);
    let _proxy = cast.lazy_proxy(&[]);
    let dump = cast.dump_with_vote(counter.pid, &LEAVING);
    let dump = dump.spawn_captured().unwrap();
    cache
        .wait_for_output("snapshot 1 of main waits", LONG)
        .unwrap();
    for file in ["/srv/saved", "/srv/saved.tar"] {
        let save = cast.stage.haulier(2).args(["image-cache", "save", file]);
        let save = save.args(["--dir", "/srv/images"]).output(LONG).unwrap();
        assert!(!save.status.success());
        assert!(save.stderr.contains("memory"), "{}", save.stderr);
        let there = cast.stage.host(2).shell(&format!("ls -A {file} | wc -l"));
        assert_eq!(there.unwrap().stdout.trim(), "0");
    }
    // It does no harm to the dump.
    cast.restored(cast.lazy_restore().output(LONG).unwrap());
    cast.dumped(dump.finish(LONG).unwrap());
    counter.goes_on();
}
