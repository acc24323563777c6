//! A destination without memory. What the kernel does when the machine itself has none left, killing
//! processes of its choice, is the fault matrix: each of ours is killed there at every point.

use super::Scene;
use crate::stage::LONG;
use crate::stage::codes::{NOTHING_TOUCHED, ROLLED_BACK, ended};
use crate::stage::redis::{self, MOVE};

/// Redis grows by so much while it is moved.
fn grow(scene: &Scene) {
    redis::fill(&scene.stage, 1, 24 << 20);
}

/// Between the check and the rounds.
fn grown(scene: &Scene, meanwhile: impl FnOnce()) -> haulier_lab::Captured {
    let point = "source phase pre-copy";
    let migration = scene.migration(point, &[]);
    migration.wait_for_output(point, LONG).unwrap();
    meanwhile();
    grow(scene);
    scene.go(1);
    migration
}

#[test]
fn a_target_that_outgrows_what_is_allowed_stays() {
    let scene = Scene::set();
    let _server = scene.server("", &["--max-memory", "20MiB"]);
    let migration = grown(&scene, || {});
    let words = [
        "on host2",
        "\"pre-copy\"",
        "store is full",
        "raise --max-memory",
    ];
    ended(migration, NOTHING_TOUCHED, &words);
    scene.stage.assert_clean(2, &["file "]);
    scene.client.wait_for_operations(100, LONG).unwrap();
    assert!(scene.stage.host(1).process_alive(scene.redis.pid()));
    scene.stage.assert_clean(1, &["cgroup /redis", "file "]);
}

#[test]
fn a_destination_without_memory_for_pages_refuses_them() {
    let scene = Scene::set();
    let _server = scene.server("", &[]);
    let migration = grown(&scene, || {
        let pid = scene.pid_of(2, "serve");
        let size = format!("sed -n 's/^VmSize:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/{pid}/status");
        let size = scene.stage.host(2).shell(&size).unwrap().success();
        let size: u64 = size.trim().parse().unwrap();
        scene.limit(2, pid, &format!("--as={}:", (size << 10) + (8 << 20)));
    });
    ended(
        migration,
        NOTHING_TOUCHED,
        &["on host2", "memory", "what to do"],
    );
    scene.assert_lives_on_grown();
}

#[test]
fn a_restore_without_memory_is_undone() {
    let scene = Scene::set();
    let _server = scene.server("", &[]);
    let point = "source Record(Freezing)";
    let migration = scene.migration(point, &[]);
    migration.wait_for_output(point, LONG).unwrap();
    let processes = scene.stage.host(2).processes().unwrap();
    for criu in processes.iter().filter(|process| process.is_named("criu")) {
        scene.limit(2, criu.pid, "--as=16777216:");
    }
    scene.go(1);
    let words = [
        "on host2",
        "\"restore\"",
        "what to do: free memory on that host",
    ];
    ended(migration, ROLLED_BACK, &words);
    scene.assert_lives_on(1);
    scene.stage.moved(1, scene.redis.pid(), 2, &MOVE);
    scene.assert_lives_on(2);
}

impl Scene {
    /// It runs here, untouched, with what it has got since.
    #[track_caller]
    fn assert_lives_on_grown(&self) {
        self.client.wait_for_operations(100, LONG).unwrap();
        assert_eq!(self.client.snapshot().error_count, 0);
        assert!(self.stage.host(1).process_alive(self.redis.pid()));
        assert!(!self.stage.host(2).process_alive(self.redis.pid()));
        self.stage.assert_clean(1, &["cgroup /redis", "file "]);
        self.stage.assert_clean(2, &["file "]);
    }
}
