//! `haulier inspect`, and dumps that go from one image-cache to another as a stream.

mod cast;
mod stage;

use std::fs;

use cast::{Cast, LEAVING};
use serde_json::Value;
use stage::play::tree_of;
use stage::{LONG, eventually, start};

/// A process with a child that it has a pipe to, a log that it writes, and a socket that listens.
const PROGRAM: &str = r#"
import os, socket, sys, threading, time
log = open(sys.argv[1], "w")
log.write("begun\n")
log.flush()
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    os.read(read, 1)
    os._exit(0)
os.close(read)
listening = socket.socket()
listening.bind(("127.0.0.1", 8042))
listening.listen()
named = socket.socket(socket.AF_UNIX)
named.bind("\0haulier-inspected")
named.listen()
threading.Thread(target=lambda: time.sleep(100000)).start()
open(sys.argv[1] + ".ready", "w").close()
time.sleep(100000)
"#;

/// It, on host 1. Its number, and that of its child.
fn inspected_program(cast: &Cast) -> (i32, i32, String) {
    let log = cast.folder.path().join("log");
    let log = log.to_str().unwrap().to_owned();
    let pid = start(cast.stage.host(1), &["python3", "-c", PROGRAM, &log]).pid();
    eventually("it is ready", || {
        fs::exists(format!("{log}.ready")).unwrap()
    });
    let tree = tree_of(cast.stage.host(1), pid);
    assert_eq!(tree.len(), 2);
    (pid, tree[1], log)
}

#[track_caller]
fn task(dump: &Value, pid: i32) -> &Value {
    let tasks = dump["tasks"].as_array().unwrap();
    let found = tasks.iter().find(|task| task["pid"] == pid);
    found.unwrap_or_else(|| panic!("{pid} in {dump}"))
}

/// The only descriptor of a kind.
#[track_caller]
fn only<'a>(task: &'a Value, kind: &str) -> &'a Value {
    let all = task["descriptors"].as_array().unwrap();
    let found: Vec<&Value> = all.iter().filter(|fd| fd["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind} of {task}");
    found[0]
}

#[test]
fn what_is_in_a_dump_is_told_of_a_cache_a_directory_and_a_file() {
    let cast = Cast::new();
    let (pid, child, log) = inspected_program(&cast);
    let _cache = cast.cache(&[]);
    let _proxy = cast.proxy(&[]);
    let none = cast.inspect(&["/srv/images"]);
    assert_eq!(none.status.code(), Some(1));
    assert!(none.stderr.contains("no complete dump"), "{}", none.stderr);
    let dump = cast.dump_with_vote(pid, &["--leave-running"]).output(LONG);
    cast.dumped(dump.unwrap());
    cast.all_released(1);

    let told = cast.inspected(&["/srv/images"]);
    assert_eq!(told["origin"]["snapshot"], 1, "{told}");
    assert_eq!(told["origin"]["state"], "released");
    assert_eq!(told["tasks"].as_array().unwrap().len(), 2);
    let (parent, born) = (task(&told, pid), task(&told, child));
    assert_eq!(born["parent"], pid, "{born}");
    assert!(
        parent["command"].as_str().unwrap().starts_with("python3"),
        "{parent}"
    );
    assert!(
        parent["executable"]
            .as_str()
            .unwrap()
            .contains("/bin/python3")
    );
    assert_eq!(parent["state"], "running");
    assert_eq!(parent["threads"].as_array().unwrap().len(), 2);
    let memory = |of: &Value, what: &str| of["memory"][what].as_u64().unwrap();
    assert!(memory(parent, "in_images") > 1 << 20, "{parent}");
    assert!(memory(parent, "mapped") > memory(parent, "in_images"));
    assert_eq!(memory(parent, "left_at_source"), 0);
    let tcp = only(parent, "tcp");
    assert_eq!(
        (&tcp["local"], &tcp["state"]),
        (&"127.0.0.1:8042".into(), &"listening".into())
    );
    let unix = only(parent, "unix");
    assert_eq!(unix["path"], "@haulier-inspected");
    let file = only(parent, "file");
    assert_eq!((&file["path"], &file["position"]), (&log.into(), &6.into()));
    let (to, from) = (only(parent, "pipe"), only(born, "pipe"));
    assert_eq!(to["number"], from["number"]);
    assert_eq!(
        (&to["end"], &from["end"]),
        (&"write".into(), &"read".into())
    );
    let bytes = |image: &Value| image["bytes"].as_u64().unwrap();
    let images = told["images"].as_array().unwrap();
    let all: u64 = images.iter().map(bytes).sum();
    assert_eq!(cast.list()["snapshots"][0]["bytes"], all);

    // The same of whatever it is saved as.
    for to in ["/srv/plain", "/srv/dump.tar"] {
        let save = cast.stage.haulier(2).args(["image-cache", "save", to]);
        save.args(["--dir", "/srv/images"])
            .output(LONG)
            .unwrap()
            .success();
        let mut saved = cast.inspected(&[to]);
        saved["origin"] = told["origin"].clone();
        assert_eq!(saved, told);
    }
    let text = cast.inspect(&["/srv/images", "--snapshot", "1"]).success();
    eprintln!("{text}");
    for words in [
        "dump 1 of /srv/images: released",
        "127.0.0.1:8042 listening",
        "pagemap",
    ] {
        assert!(text.contains(words), "{text}");
    }
    // What is damaged is said to be.
    let damage = |line: &str| cast.stage.host(2).shell(line).unwrap().success();
    damage("truncate -s 100000 /srv/dump.tar; truncate -s -3 /srv/plain/files.img");
    for (path, words) in [
        ("/srv/dump.tar", "in the middle"),
        ("/srv/plain", "files.img is not valid"),
        ("/srv", "has no images"),
        ("/srv/none", "cannot look at"),
    ] {
        let refused = cast.inspect(&[path]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    let refused = cast.inspect(&["/srv/images", "--snapshot", "7"]);
    assert!(
        refused.stderr.contains("there is no dump 7"),
        "{}",
        refused.stderr
    );
    assert_eq!(refused.status.code(), Some(1));
    // It was no restore: there can be one.
    cast.restored(cast.restore("/srv/images", &[]).output(LONG).unwrap());
    assert!(cast.stage.host(2).process_alive(child));
}

#[test]
fn a_dump_whose_memory_is_elsewhere_can_be_looked_into_before_and_after_its_restore() {
    let cast = Cast::new();
    let counter = cast.counter(32);
    let cache = cast.lazy_cache(&[]);
    let proxy = cast.lazy_proxy(&[]);
    let dump = cast.dump_with_vote(counter.pid, &LEAVING);
    let dump = dump.spawn_captured().unwrap();
    cache
        .wait_for_output("snapshot 1 of main waits", LONG)
        .unwrap();
    let state = cast.list()["snapshots"][0]["state"].clone();
    for _ in 0..3 {
        let told = cast.inspected(&["/srv/images"]);
        assert_eq!(told["origin"]["state"], state);
        let memory = &task(&told, counter.pid)["memory"];
        assert!(
            memory["left_at_source"].as_u64().unwrap() >= 32 << 20,
            "{memory}"
        );
    }
    // Nothing was begun by it.
    assert_eq!(cast.list()["snapshots"][0]["state"], state);
    assert!(!cache.stderr().unwrap().contains("reads snapshot"));
    let list = cast
        .stage
        .haulier(1)
        .args(["image-proxy", "list", "--json"]);
    let list = list.args(["--dir", "/srv/images"]).output(LONG).unwrap();
    assert_eq!(list.success().trim(), "[]");

    cast.stage.lab.shape(Some("50mbit")).unwrap();
    cast.restored(cast.lazy_restore().output(LONG).unwrap());
    let told = cast.inspected(&["/srv/images"]);
    assert_eq!(told["origin"]["snapshot"], 1);
    cast.stage.lab.shape(None).unwrap();
    cast.dumped(dump.finish(LONG).unwrap());
    proxy
        .wait_for_output("all memory of main has moved", LONG)
        .unwrap();
    counter.goes_on();
    let told = cast.inspected(&["/srv/images"]);
    assert!(
        told["origin"]["state"]
            .as_str()
            .unwrap()
            .contains("restored"),
        "{told}"
    );
}

#[test]
fn a_dump_goes_through_a_pipe_from_one_cache_to_another() {
    let cast = Cast::new();
    let redis = cast.redis(64);
    let _cache = cast.cache(&[]);
    let _proxy = cast.proxy(&[]);
    cast.dumped(cast.dump_with_vote(redis, &[]).output(LONG).unwrap());
    cast.all_released(1);
    let host = cast.stage.host(2);
    host.shell("mkdir -p /srv/other").unwrap().success();
    let other = cast
        .stage
        .haulier(2)
        .args(["image-cache", "--dir", "/srv/other"]);
    let other = other
        .args(["--listen", "127.0.0.1:7002"])
        .spawn_captured()
        .unwrap();
    other.wait_for_output("serving restores", LONG).unwrap();

    let haulier = cast::HAULIER;
    let save = format!("{haulier} image-cache save --dir /srv/images -");
    let load = format!("{haulier} image-cache load --dir /srv/other -");
    let bash = |line: &str| {
        let line = format!("set -o pipefail; {line}");
        host.command("bash")
            .args(["-c", &line])
            .output(LONG)
            .unwrap()
    };
    let piped = bash(&format!("{save} | cat | {load}"));
    assert!(piped.stderr.contains("dump 1 saved"), "{}", piped.stderr);
    let said = piped.success();
    assert!(said.contains("loaded as dump 1"), "{said}");
    let images = |directory: &str| cast.inspected(&[directory])["images"].clone();
    assert_eq!(images("/srv/images"), images("/srv/other"));

    // What is cut on its way is not loaded, and who sends it hears of it.
    for cut in ["head -c 0", "head -c 1000000", "head -c -2000"] {
        let piped = bash(&format!("{save} | {cut} | {load}"));
        assert!(!piped.status.success(), "{cut}");
        assert!(
            piped.stderr.contains("haulier: "),
            "{cut}: {}",
            piped.stderr
        );
    }
    let none = bash(&format!("{save} --snapshot 9 | {load}"));
    assert!(
        none.stderr.contains("no complete snapshot"),
        "{}",
        none.stderr
    );
    // A terminal is no place for it.
    let terminal = bash(&format!("script -qec '{save}' /dev/null"));
    assert!(
        terminal.stdout.contains("is a terminal"),
        "{}",
        terminal.stdout
    );

    cast.restored(cast.restore("/srv/other", &[]).output(LONG).unwrap());
    cast.is_right_then_ends(redis, 1, 64);
}
