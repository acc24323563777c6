//! Processes that fork while their memory still follows them, through image-proxy and image-cache.

mod cast;
mod stage;

use std::fs;

use cast::{Cast, LEAVING};
use haulier_lab::{Captured, Signal};
use stage::play::{compiled, says, status};
use stage::{LONG, eventually, start};

/// Slow enough for everything to happen before the memory has moved.
const SLOW: &str = "20mbit";

/// A program that runs on host 2 while most of its memory is on host 1.
struct Between {
    cast: Cast,
    name: &'static str,
    pid: i32,
    cache: Captured,
    proxy: Captured,
    dump: Captured,
}

impl Between {
    /// `None` if there is no compiler.
    fn new(name: &'static str) -> Option<Between> {
        let cast = Cast::new();
        let folder = cast.folder.path();
        let program = compiled(name, folder, &[])?;
        let argv = [program.to_str().unwrap(), folder.to_str().unwrap()];
        let pid = loop {
            let pid = start(cast.stage.host(1), &argv).pid();
            says(&cast.stage, pid, folder, "ready 1");
            // Of one that does, a lazy dump leaves nothing behind.
            if !cast.sleeps_at_a_page(pid) {
                break pid;
            }
            cast.stage.host(1).signal(pid, Signal::KILL).unwrap();
            cast.stage.host(1).wait_gone(pid, LONG).unwrap();
            fs::remove_file(folder.join("status")).unwrap();
        };
        let cache = cast.lazy_cache(&["--reconnect", "2s"]);
        let proxy = cast.lazy_proxy(&["--reconnect", "2s"]);
        cast.stage.lab.shape(Some(SLOW)).unwrap();
        let dump = cast.dump_with_vote(pid, &LEAVING).spawn_captured().unwrap();
        cast.restored(cast.lazy_restore().output(LONG).unwrap());
        cache
            .wait_for_output("is restored, its memory follows", LONG)
            .unwrap();
        Some(Between {
            cast,
            name,
            pid,
            cache,
            proxy,
            dump,
        })
    }

    fn tell(&self, name: &str) {
        fs::write(self.cast.folder.path().join(name), "").unwrap();
    }

    /// Those of the program that run on host 2.
    fn living(&self) -> Vec<i32> {
        let processes = self.cast.stage.host(2).processes().unwrap();
        let living = processes.iter().filter(|process| {
            process.is_named(self.name) && process.state != 'Z' && process.state != 'X'
        });
        living.map(|process| process.pid).collect()
    }

    /// Waits for some that were not dumped.
    fn forks(&self, before: &[i32], many: usize) {
        eventually("it forks", || {
            let new = self
                .living()
                .into_iter()
                .filter(|pid| !before.contains(pid));
            new.count() >= many
        });
    }

    fn arrives(self) {
        let signs = status(self.cast.folder.path()).len();
        self.cast.stage.lab.shape(None).unwrap();
        self.cache
            .wait_for_output("all memory of main is in its place", LONG)
            .unwrap();
        eventually("a sign of life", || {
            status(self.cast.folder.path()).len() > signs
        });
        self.tell("go-1");
        says(
            &self.cast.stage,
            self.pid,
            self.cast.folder.path(),
            "good 1",
        );
        self.cast.dumped(self.dump.finish(LONG).unwrap());
        assert!(!self.cast.stage.host(1).process_alive(self.pid));
        drop(self.proxy);
    }

    /// Nothing of it runs on host 2, and what did saw nothing strange.
    fn dies(self) {
        eventually("nothing of it runs without its memory", || {
            self.living().is_empty()
        });
        // Panics if anything is wrong.
        status(self.cast.folder.path());
        assert!(!self.cast.folder.path().join("wrong").exists());
        // The guard has nothing left to hold.
        eventually("the guard ends", || {
            let guards = "grep -laz '^guard$' /proc/[0-9]*/cmdline | wc -l";
            let guards = self.cast.stage.host(2).shell(guards).unwrap();
            guards.stdout.trim() == "0"
        });
        assert!(
            self.cast.stage.host(1).process_alive(self.pid),
            "the last copy"
        );
    }
}

#[test]
fn children_of_the_lazy_phase_have_their_memory() {
    let Some(between) = Between::new("forks") else {
        return;
    };
    let before = between.living();
    assert!(before.contains(&between.pid), "{before:?}");
    between.forks(&before, 3);
    between.arrives();
}

#[test]
fn children_that_leave_their_family_have_their_memory() {
    let Some(between) = Between::new("orphans") else {
        return;
    };
    between.tell("fork");
    between.forks(&[between.pid], 6);
    between.arrives();
}

#[test]
fn children_of_the_lazy_phase_are_killed_when_the_proxy_is() {
    let Some(between) = Between::new("forks") else {
        return;
    };
    between.forks(&between.living(), 3);
    between.proxy.process.kill(Signal::KILL).unwrap();
    between
        .cache
        .wait_for_output("was killed with its memory incomplete", LONG)
        .unwrap();
    between.dies();
}

#[test]
fn children_that_left_their_family_are_killed_when_the_proxy_is() {
    let Some(between) = Between::new("orphans") else {
        return;
    };
    between.tell("fork");
    between.forks(&[between.pid], 6);
    between.proxy.process.kill(Signal::KILL).unwrap();
    between
        .cache
        .wait_for_output("was killed with its memory incomplete", LONG)
        .unwrap();
    between.dies();
}

#[test]
fn children_that_left_their_family_are_killed_when_the_cache_is() {
    let Some(between) = Between::new("orphans") else {
        return;
    };
    between.tell("fork");
    between.forks(&[between.pid], 6);
    between.cache.process.kill(Signal::KILL).unwrap();
    between.dies();
}
