//! Disks that are full, on either host, at every step that needs one.

use super::Scene;
use crate::stage::codes::{MOVED, NOTHING_TOUCHED, ROLLED_BACK, ended, said};
use crate::stage::redis::MOVE;
use crate::stage::sight::journals;
use crate::stage::{LONG, eventually};

const STATE: &str = "/var/lib/haulier";
const FULL: &str = "free disk space";

#[test]
fn a_disk_that_is_full_is_told_before_anything_is_touched() {
    let scene = Scene::set();
    let _server = scene.server("", &[]);
    for host in [1, 2] {
        scene.shrink(host, STATE, "64k");
        scene.fill(host, STATE);
        let output = scene.stage.migrate(1, scene.redis.pid(), 2, &MOVE);
        let name = format!("on host{host}");
        let words = [&name, "writing the journal", "No space left", FULL];
        said(&output, NOTHING_TOUCHED, &words);
        let left = format!("find {STATE} -mindepth 1");
        let left = scene.stage.host(host).shell(&left).unwrap().success();
        assert_eq!(left, format!("{STATE}/filler\n"));
        scene.empty(host, STATE);
        scene.assert_lives_on(1);
    }
    scene.stage.moved(1, scene.redis.pid(), 2, &MOVE);
    scene.assert_lives_on(2);
}

/// What a migration needs is taken at its beginning, and so is what its guard needs to say how it ended.
#[test]
fn disks_that_fill_up_under_way_change_nothing() {
    let scene = Scene::set();
    let server = scene.server("", &[]);
    let point = "source phase pre-copy";
    let migration = scene.migration(point, &[]);
    migration.wait_for_output(point, LONG).unwrap();
    for host in [1, 2] {
        scene.shrink(host, STATE, "64k");
        scene.fill(host, STATE);
    }
    scene.go(1);
    ended(migration, MOVED, &[]);
    scene.kill_server(server);
    let _server = scene.stage.serve(2);
    scene.assert_lives_on(2);
    assert_eq!(journals(&scene.stage, 1), "");
}

#[test]
fn a_destination_that_cannot_record_refuses_before_the_decision_and_is_waited_for_after_it() {
    let scene = Scene::set();
    let words = ["on host2", "writing the journal", FULL];
    for (point, code) in [
        ("destination Record(Receiving)", NOTHING_TOUCHED),
        ("destination Record(Committed)", ROLLED_BACK),
    ] {
        let server = scene.server(point, &[]);
        let migration = scene.migration("", &[]);
        server.wait_for_output(point, LONG).unwrap();
        scene.choke(2, "serve", true);
        scene.go(2);
        ended(migration, code, &words);
        scene.choke(2, "serve", false);
        // A later move brings the address, and nobody is to remove it then.
        eventually("what was removed is recorded", || {
            let line = format!("grep -Lr Removed {STATE} --include journal");
            let without = scene.stage.host(2).shell(&line).unwrap().stdout;
            without.is_empty()
        });
        scene.assert_lives_on(1);
        scene.kill_server(server);
    }

    let point = "destination Record(Done)";
    let server = scene.server(point, &[]);
    let migration = scene.migration("", &[]);
    server.wait_for_output(point, LONG).unwrap();
    scene.choke(2, "serve", true);
    scene.go(2);
    let waits = "the source keeps its copy until the end is recorded";
    server.wait_for_output(waits, LONG).unwrap();
    scene.client.wait_for_operations(100, LONG).unwrap();
    assert!(scene.stage.host(1).process_alive(scene.redis.pid()));
    scene.choke(2, "serve", false);
    ended(migration, MOVED, &[]);
    scene.kill_server(server);
    let _server = scene.stage.serve(2);
    scene.assert_lives_on(2);
}

#[test]
fn a_destination_that_is_killed_before_it_could_record_the_end_finds_it_whole() {
    let scene = Scene::set();
    let point = "destination Record(Done)";
    let server = scene.server(point, &[]);
    let migration = scene.migration("", &["--mode", "hybrid"]);
    server.wait_for_output(point, LONG).unwrap();
    scene.choke(2, "serve", true);
    scene.go(2);
    server.wait_for_output("keeps its copy", LONG).unwrap();
    scene.kill_server(server);
    let _server = scene.stage.serve(2);
    ended(migration, MOVED, &[]);
    scene.assert_lives_on(2);
}

#[test]
fn a_source_that_cannot_record_goes_back_before_the_commit_and_on_after_it() {
    let scene = Scene::set();
    let _server = scene.server("", &[]);
    for (point, code) in [
        ("source Record(Freezing)", NOTHING_TOUCHED),
        ("source Record(InDoubt)", ROLLED_BACK),
    ] {
        let migration = scene.migration(point, &[]);
        migration.wait_for_output(point, LONG).unwrap();
        scene.choke(1, "migrate", true);
        scene.go(1);
        ended(migration, code, &["on host1", "writing the journal", FULL]);
        scene.assert_lives_on(1);
        assert_eq!(journals(&scene.stage, 1), "");
    }
    let point = "source Record(Serving)";
    let migration = scene.migration(point, &[]);
    migration.wait_for_output(point, LONG).unwrap();
    scene.choke(1, "migrate", true);
    scene.go(1);
    migration.wait_for_output(FULL, LONG).unwrap();
    scene.choke(1, "migrate", false);
    ended(migration, MOVED, &[]);
    scene.assert_lives_on(2);
    assert_eq!(journals(&scene.stage, 1), "");
}

/// It has heard that the target is whole at its destination, and says so itself.
#[test]
fn a_source_that_cannot_record_the_end_ends_all_the_same() {
    let scene = Scene::set();
    let _server = scene.server("", &[]);
    let point = "source Record(Released)";
    let migration = scene.migration(point, &[]);
    migration.wait_for_output(point, LONG).unwrap();
    scene.choke(1, "migrate", true);
    scene.go(1);
    ended(migration, MOVED, &[]);
    scene.assert_lives_on(2);
    assert_eq!(journals(&scene.stage, 1), "");
}

/// Images are kept in memory, in a folder that may be full as well.
#[test]
fn no_room_for_images_brings_it_back() {
    let scene = Scene::set();
    let _server = scene.server("", &[]);
    for host in [2, 1] {
        let point = "source Record(Freezing)";
        let migration = scene.migration(point, &[]);
        migration.wait_for_output(point, LONG).unwrap();
        scene.shrink(host, "/run", "8m");
        scene.fill(host, "/run");
        scene.go(1);
        let name = format!("on host{host}");
        ended(
            migration,
            ROLLED_BACK,
            &[&name, "No space left", "what to do: free"],
        );
        scene.empty(host, "/run");
        scene.assert_lives_on(1);
    }
    scene.stage.moved(1, scene.redis.pid(), 2, &MOVE);
    scene.assert_lives_on(2);
}
