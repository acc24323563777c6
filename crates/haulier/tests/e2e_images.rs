//! Plain `criu dump --stream` and `criu restore --stream`, with an image-proxy and an image-cache
//! between them.

mod cast;
mod stage;

use std::fs;
use std::process::Command;

use cast::Cast;
use haulier_lab::Signal;
use stage::play::{found, program, says, succeeds, tree_of};
use stage::{LONG, eventually, start};

const MIB: u64 = 1 << 20;

#[test]
fn a_restore_that_is_started_first_waits_for_the_dump() {
    let cast = Cast::new();
    let counter = cast.counter(32);
    let _cache = cast.cache(&[]);
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    let _proxy = cast.proxy(&[]);
    counter.goes_on();

    let dump = cast.dump(counter.pid, &[]).output(LONG).unwrap();
    cast.dumped(dump);
    cast.restored(restore.finish(LONG).unwrap());
    assert!(!cast.stage.host(1).process_alive(counter.pid));
    assert!(cast.stage.host(2).process_alive(counter.pid));
    counter.goes_on();
}

#[test]
fn a_redis_comes_back_with_its_data_and_nothing_is_left_on_disk() {
    let cast = Cast::new();
    let redis = cast.redis(64);
    let _cache = cast.cache(&[]);
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    let _proxy = cast.proxy(&["--compress", "lz4"]);

    let dump = cast.dump_with_vote(redis, &[]).output(LONG).unwrap();
    let said = cast.dumped(dump);
    assert!(said.contains("delivered as dump 1"), "{said}");
    cast.restored(restore.finish(LONG).unwrap());
    cast.is_right_then_ends(redis, 1, 64);
    for host in [1, 2] {
        let files = cast
            .stage
            .host(host)
            .shell("find /srv -name '*.img'")
            .unwrap();
        assert_eq!(files.success(), "");
    }
}

#[test]
fn a_dump_fails_with_the_process_alive_when_the_cache_dies() {
    let cast = Cast::new();
    let counter = cast.counter(32);
    let cache = cast.cache(&[]);
    let proxy = cast.proxy(&["--reconnect", "1s"]);
    proxy
        .wait_for_output("connected to the image-cache", LONG)
        .unwrap();
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    cache.process.kill(Signal::KILL).unwrap();

    let dump = cast.dump_with_vote(counter.pid, &[]).output(LONG).unwrap();
    assert!(!dump.status.success(), "{}", dump.stdout);
    counter.goes_on();
    assert!(cast.stage.host(1).process_alive(counter.pid));
    // The restore has ended without having begun.
    assert!(!restore.finish(LONG).unwrap().status.success());
    let said = proxy.stderr().unwrap();
    assert!(said.contains("image-cache"), "{said}");
}

#[test]
fn a_restore_fails_before_it_starts_when_the_proxy_dies() {
    let cast = Cast::new();
    let counter = cast.counter(32);
    let cache = cast.cache(&["--reconnect", "1s"]);
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    let proxy = cast.proxy(&[]);
    proxy
        .wait_for_output("connected to the image-cache", LONG)
        .unwrap();
    cast.stage.lab.shape(Some("20mbit")).unwrap();
    let dump = cast
        .dump_with_vote(counter.pid, &[])
        .spawn_captured()
        .unwrap();
    cache
        .wait_for_output("a restore reads snapshot 1", LONG)
        .unwrap();
    proxy.process.kill(Signal::KILL).unwrap();

    assert!(!dump.finish(LONG).unwrap().status.success());
    counter.goes_on();
    assert!(cast.stage.host(1).process_alive(counter.pid));
    assert!(!restore.finish(LONG).unwrap().status.success());
    assert!(!cast.stage.host(2).process_alive(counter.pid));
    let said = cache.stderr().unwrap();
    assert!(said.contains("snapshot 1 of main failed"), "{said}");
}

#[test]
fn a_dump_goes_on_over_a_new_connection() {
    let cast = Cast::new();
    let counter = cast.counter(64);
    let cache = cast.cache(&[]);
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    let _proxy = cast.proxy(&[]);
    cast.stage.lab.shape(Some("200mbit")).unwrap();
    let dump = cast
        .dump_with_vote(counter.pid, &[])
        .spawn_captured()
        .unwrap();
    cache
        .wait_for_output("a restore reads snapshot 1", LONG)
        .unwrap();
    for _ in 0..2 {
        // Connections are reset, as by a firewall that lost its state.
        let killed = cast
            .stage
            .host(1)
            .shell("ss -K dst 10.77.0.2 dport = 7001")
            .unwrap();
        killed.success();
    }
    cast.stage.lab.shape(None).unwrap();
    cast.dumped(dump.finish(LONG).unwrap());
    cast.restored(restore.finish(LONG).unwrap());
    counter.goes_on();
    assert!(cast.stage.host(2).process_alive(counter.pid));
    let said = cache.stderr().unwrap();
    assert!(said.matches("sends images").count() >= 2, "{said}");
}

#[test]
fn a_dump_that_the_cache_has_no_room_for_leaves_the_process_alive() {
    let cast = Cast::new();
    let counter = cast.counter(64);
    let _cache = cast.cache(&["--max-memory", "20MiB"]);
    // Without a vote CRIU hears of it as long as the proxy cannot take all of the dump itself.
    let proxy = cast.proxy(&["--max-memory", "8MiB"]);
    for dump in [
        cast.dump(counter.pid, &[]),
        cast.dump_with_vote(counter.pid, &[]),
    ] {
        let dump = dump.output(LONG).unwrap();
        assert!(!dump.status.success(), "{}", dump.stdout);
        counter.goes_on();
        assert!(cast.stage.host(1).process_alive(counter.pid));
    }
    let said = proxy.stderr().unwrap();
    assert!(said.contains("that the cache may use"), "{said}");
    let list = cast.list();
    assert!(list["peak"].as_u64().unwrap() <= 20 * MIB, "{list}");
}

#[test]
fn later_dumps_send_what_changed_and_each_can_be_restored() {
    let cast = Cast::new();
    let redis = cast.redis(64);
    let _cache = cast.cache(&[]);
    let _proxy = cast.proxy(&[]);
    let (bytes, sent) = cast.dumps(redis, 4, 2);
    assert!(sent[0] > 64 * MIB, "{sent:?}");
    let all: u64 = sent.iter().sum();
    assert!(all * 10 < 12 * (bytes + 3 * 2 * MIB), "{sent:?} of {bytes}");
    cast.all_released(4);
    // The second, then the newest, twice.
    for (directory, seed) in [("/srv/images/2", 2), ("/srv/images", 4), ("/srv/images", 4)] {
        cast.restored(cast.restore(directory, &[]).output(LONG).unwrap());
        cast.is_right_then_ends(redis, seed, 2);
    }
}

#[test]
fn a_java_program_is_restored_by_a_restore_that_was_first() {
    let (Some(java), Some(javac)) = (found("java"), found("javac")) else {
        return;
    };
    let cast = Cast::new();
    let home = cast.folder.path();
    let (classes, folder) = (home.join("classes"), home.join("java"));
    fs::create_dir(&folder).unwrap();
    succeeds(
        Command::new(javac)
            .arg("-d")
            .arg(&classes)
            .arg(program("HeapModel.java")),
    );
    let mut argv = vec![java.to_str().unwrap()];
    argv.extend(["-XX:-UsePerfData", "-Xms400m", "-Xmx400m", "-cp"]);
    argv.extend([classes.to_str().unwrap(), "HeapModel"]);
    argv.push(folder.to_str().unwrap());
    let _cache = cast.cache(&[]);
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    let _proxy = cast.proxy(&[]);
    let pid = start(cast.stage.host(1), &argv).pid();
    says(&cast.stage, pid, &folder, "ready 1");

    cast.dumped(cast.dump_with_vote(pid, &[]).output(LONG).unwrap());
    cast.restored(restore.finish(LONG).unwrap());
    assert!(cast.stage.host(2).process_alive(pid));
    fs::write(folder.join("go-1"), "").unwrap();
    says(&cast.stage, pid, &folder, "good 1");
}

#[test]
fn the_connection_may_be_handed_over_as_a_descriptor() {
    let cast = Cast::new();
    let counter = cast.counter(16);
    let _cache = cast.cache(&[]);
    let restore = cast.restore("/srv/images", &[]).spawn_captured().unwrap();
    let (host, port) = (cast.stage.host(2).ipv4(), cast::PORT);
    // Bash connects, the proxy inherits.
    let line = format!(
        "exec 5<>/dev/tcp/{host}/{port}; \
         exec {} image-proxy --connection-fd 5 --dir /srv/images",
        cast::HAULIER
    );
    let proxy = cast.stage.host(1).command("bash").args(["-c", &line]);
    let proxy = proxy.spawn_captured().unwrap();
    proxy.wait_for_output("connected to", LONG).unwrap();
    cast.dumped(cast.dump_with_vote(counter.pid, &[]).output(LONG).unwrap());
    cast.restored(restore.finish(LONG).unwrap());
    counter.goes_on();
}

#[test]
fn thirty_two_trees_are_dumped_at_once_through_one_proxy_into_one_cache() {
    const TREES: usize = 32;
    let cast = Cast::new();
    let directories: Vec<String> = (0..TREES).map(|n| format!("/srv/trees/{n}")).collect();
    for host in [1, 2] {
        for directory in &directories {
            let line = format!("mkdir -p {directory}");
            cast.stage.host(host).shell(&line).unwrap().success();
        }
    }
    let mut options: Vec<String> = Vec::new();
    for (number, directory) in directories.iter().enumerate() {
        options.extend(["--dir".to_owned(), format!("tree-{number}={directory}")]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let _cache = cast.cache(&options);
    let _proxy = cast.proxy(&options);
    // A shell and a child of it, which waits.
    let line = "sleep 100000 & wait";
    let roots: Vec<i32> = (0..TREES)
        .map(|_| start(cast.stage.host(1), &["sh", "-c", line]).pid())
        .collect();
    let trees: Vec<Vec<i32>> = roots
        .iter()
        .map(|root| {
            let mut tree = Vec::new();
            eventually("the child runs", || {
                tree = tree_of(cast.stage.host(1), *root);
                tree.len() == 2
            });
            tree
        })
        .collect();
    let restores: Vec<_> = directories
        .iter()
        .map(|directory| {
            let log = format!("{directory}/restore.log");
            let arguments = ["restore", "--stream", "-d", "-D", directory, "-o", &log];
            cast.criu(2, &arguments).spawn_captured().unwrap()
        })
        .collect();
    let vote = cast.vote();
    let dumps: Vec<_> = directories
        .iter()
        .zip(&roots)
        .map(|(directory, root)| {
            let root = root.to_string();
            let log = format!("{directory}/dump.log");
            let arguments = ["dump", "--stream", "-D", directory, "-t", &root, "-o", &log];
            let command = cast.criu(1, &arguments);
            let command = command.args(["--action-script", vote.to_str().unwrap()]);
            command.spawn_captured().unwrap()
        })
        .collect();
    for dump in dumps {
        dump.finish(LONG).unwrap().success();
    }
    for restore in restores {
        restore.finish(LONG).unwrap().success();
    }
    for pid in trees.iter().flatten() {
        assert!(!cast.stage.host(1).process_alive(*pid), "{pid}");
        assert!(cast.stage.host(2).process_alive(*pid), "{pid}");
    }
}

#[test]
#[ignore = "needs 5 GiB of memory and half a minute"]
fn eight_dumps_of_a_gibibyte_send_little_more_than_one_and_the_changes() {
    let cast = Cast::new();
    let redis = cast.redis(1024);
    let _cache = cast.cache(&["--max-memory", "3GiB"]);
    let proxy = cast.proxy(&[]);
    let (bytes, sent) = cast.dumps(redis, 8, 5);
    eprintln!("{}", proxy.stderr().unwrap());
    let all: u64 = sent.iter().sum();
    eprintln!("{all} of {bytes}: {sent:?}, {}", cast.list());
    assert!(bytes > 1024 * MIB);
    // Changed pages are more than what was written: it is not in whole pages.
    assert!(all * 10 < 12 * (bytes + 7 * 5 * MIB), "{sent:?} of {bytes}");
    cast.all_released(8);
    cast.restored(cast.restore("/srv/images", &[]).output(LONG).unwrap());
    cast.is_right_then_ends(redis, 8, 5);
}

#[test]
fn a_dump_is_saved_as_plain_images_or_a_file_and_loaded_again() {
    let cast = Cast::new();
    let redis = cast.redis(16);
    let _cache = cast.cache(&[]);
    let _proxy = cast.proxy(&[]);
    let dump = cast.dump_with_vote(redis, &[]).output(LONG).unwrap();
    cast.dumped(dump);
    cast.all_released(1);
    let cache = |command: &str, argument: &str| {
        let command = cast.stage.haulier(2).args(["image-cache", command]);
        let command = command.args(["--dir", "/srv/images", argument]);
        command.output(LONG).unwrap()
    };
    cache("save", "/srv/plain").success();
    let again = cache("save", "/srv/plain");
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);

    let plain = [
        "restore",
        "-D",
        "/srv/plain",
        "-d",
        "-W",
        "/srv",
        "-o",
        "restore.log",
    ];
    cast.restored(cast.criu(2, &plain).output(LONG).unwrap());
    cast.is_right_then_ends(redis, 1, 16);

    cast.crit_reads(2, "/srv/plain");

    cache("load", "/srv/plain").success();
    cache("save", "/srv/dump.tar").success();
    for (dump, file) in [("1", "/srv/plain"), ("2", "/srv/dump.tar")] {
        cache("drop", dump).success();
        if file.ends_with(".tar") {
            // Nothing but the file is left of it.
            cache("load", file).success();
        }
        cast.restored(cast.restore("/srv/images", &[]).output(LONG).unwrap());
        cast.is_right_then_ends(redis, 1, 16);
    }
}
