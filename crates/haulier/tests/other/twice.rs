//! A target that is wanted by two migrations, and a migration that comes a second time.

use haulier_proto::message::{Requirements, Role, control};

use super::{HAULIER, Scene};
use crate::script::{Source, long};
use crate::stage::codes::{MOVED, NOTHING_TOUCHED, ended, said};
use crate::stage::redis::MOVE;
use crate::stage::{LONG, Stage, eventually, start};

#[test]
fn a_target_under_way_is_nobody_elses() {
    let scene = Scene::set();
    let _servers = [scene.server("", &[]), scene.stage.serve(3)];
    let pid = scene.redis.pid();
    // While it runs, and when it stands.
    for point in ["source phase pre-copy", "source SendOffer"] {
        let migration = scene.migration(point, &[]);
        migration.wait_for_output(point, LONG).unwrap();
        for to in [2, 3] {
            let second = scene.stage.migrate(1, pid, to, &MOVE);
            let words = ["on host1", "is being moved already", "haulier cancel"];
            said(&second, NOTHING_TOUCHED, &words);
        }
        if point.contains("SendOffer") {
            scene.go(1);
            ended(migration, MOVED, &[]);
            break;
        }
        let agent = scene.pid_of(1, "migrate");
        let stop = haulier_lab::Signal::TERM;
        scene.stage.host(1).signal(agent, stop).unwrap();
        scene.go(1);
        ended(migration, NOTHING_TOUCHED, &["interrupted"]);
        scene.assert_lives_on(1);
    }
    scene.assert_lives_on(2);
}

/// All see it free, and begin at once.
#[test]
fn of_two_that_begin_together_one_moves_it() {
    let stage = Stage::set(3, HAULIER);
    let _servers = [stage.serve(2), stage.serve(3)];
    let counter = start(stage.host(1), &["sh", "-c", "while :; do :; done"]);
    let both = [2, 3].map(|to| {
        let migration = stage.migration(1, counter.pid(), to, &[]);
        migration.spawn_captured().unwrap()
    });
    let both = both.map(|migration| migration.finish(LONG).unwrap());
    let codes = both.each_ref().map(|output| output.status.code().unwrap());
    let moved: Vec<usize> = [2, 3]
        .into_iter()
        .filter(|host| stage.host(*host).process_alive(counter.pid()))
        .collect();
    assert!(
        codes == [MOVED, NOTHING_TOUCHED] && moved == [2]
            || codes == [NOTHING_TOUCHED, MOVED] && moved == [3],
        "{codes:?} {moved:?} {both:?}"
    );
    assert!(!stage.host(1).process_alive(counter.pid()));
    stage.assert_clean(1, &[]);
}

#[test]
fn neither_a_part_of_a_target_under_way_nor_what_it_is_a_part_of_is_moved() {
    let stage = Stage::set(2, HAULIER);
    let _server = stage.serve(2);
    let tree = "(while :; do sleep 1000; done) & while :; do sleep 1000; done";
    let family = start(stage.host(1), &["sh", "-c", tree]);
    let children = || {
        let all = stage.host(1).processes().unwrap();
        let shells = all.into_iter().filter(|process| process.comm == "sh");
        let mut shells: Vec<(i32, i32)> = shells.map(|p| (p.pid, p.parent)).collect();
        shells.retain(|(_, parent)| *parent == family.pid());
        shells
    };
    eventually("the tree stands", || !children().is_empty());
    let (child, parent) = children()[0];
    for (first, second) in [(parent, child), (child, parent)] {
        let point = "source phase pre-copy";
        let migration = stage.migration(1, first, 2, &[]);
        let migration = migration.env(haulier::checkpoint::HOLD_AT, point);
        let migration = migration.env(haulier::checkpoint::HOLD_UNTIL, "/run/go");
        let migration = migration.spawn_captured().unwrap();
        eventually("it is held, or refused", || {
            let said = migration.stderr().unwrap();
            said.contains("held at") || said.contains("what to do")
        });
        if first == child && !migration.stderr().unwrap().contains("held at") {
            // That child alone cannot be moved anyhow.
            migration.finish(LONG).unwrap();
            continue;
        }
        let other = stage.migrate(1, second, 2, &[]);
        said(&other, NOTHING_TOUCHED, &["is being moved already"]);
        let stop = haulier_lab::Signal::TERM;
        migration.process.kill(stop).unwrap();
        stage.host(1).write_file("/run/go", b"").unwrap();
        ended(migration, NOTHING_TOUCHED, &["interrupted"]);
        stage.host(1).shell("rm /run/go").unwrap().success();
        stage.assert_clean(1, &[]);
        assert!(stage.host(1).process_alive(parent) && stage.host(1).process_alive(child));
    }
}

/// What a destination answers to the first message of a migration.
fn asked(source: &Source<'_>) -> Vec<String> {
    let mut command = source.connect(Role::Command).unwrap();
    let check = control::Body::Check(Requirements {
        root_pid: 2500,
        pids: vec![2500],
        ..Requirements::default()
    });
    command.send_control(check, &long()).unwrap();
    match command.receive_control("findings", &long()).unwrap() {
        control::Body::Findings(found) => found.problems.into_iter().map(|p| p.what).collect(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_known(source: &Source<'_>) {
    let problems = asked(source);
    let known = problems
        .iter()
        .any(|what| what.contains("is known here already"));
    assert!(known, "{problems:?}");
}

#[test]
fn a_migration_that_comes_again_is_refused() {
    let stage = Stage::set(2, HAULIER);
    let server = stage.serve(2);
    let source = Source::new(&stage, 1, 1);
    let command = source.begin(2500, 1);
    // While it is under way, by who knows its secret, and by who does not.
    assert_known(&source);
    let error = Source::new(&stage, 1, 2).connect(Role::Command);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the secret is wrong"), "{error}");
    // When it has been refused.
    drop(command);
    stage.assert_clean(2, &[]);
    assert_known(&source);

    // When it has moved its target; also by a server that has begun since.
    let counter = start(stage.host(1), &["sh", "-c", "while :; do :; done"]);
    stage.moved(1, counter.pid(), 2, &[]);
    let name = stage
        .host(2)
        .shell("ls /var/lib/haulier")
        .unwrap()
        .success();
    let id = name.trim().parse().unwrap();
    let error = Source::of(&stage, id, 1).connect(Role::Command);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the secret is wrong"), "{error}");
    server.process.kill(haulier_lab::Signal::KILL).unwrap();
    server.finish(LONG).unwrap();
    let _server = stage.serve(2);
    assert_known(&Source::of(&stage, id, 1));
    assert!(stage.host(2).process_alive(counter.pid()));
}

/// The earlier one was about to add it when its server was killed, as far as its journal knows.
#[test]
fn an_address_that_a_later_migration_has_brought_is_not_removed_for_an_earlier_one() {
    let scene = Scene::set();
    let server = scene.server("", &[]);
    let point = "source phase pre-copy";
    let migration = scene.migration(point, &[]);
    migration.wait_for_output(point, LONG).unwrap();
    let shell = |line: &str| scene.stage.host(2).shell(line).unwrap().success();
    shell("cp -a /var/lib/haulier /srv/earlier");
    let journal = shell("cat /srv/earlier/*/journal");
    assert!(journal.contains("10.77.0.100"), "{journal}");
    let agent = scene.pid_of(1, "migrate");
    let stop = haulier_lab::Signal::TERM;
    scene.stage.host(1).signal(agent, stop).unwrap();
    scene.go(1);
    ended(migration, NOTHING_TOUCHED, &["interrupted"]);
    scene.stage.moved(1, scene.redis.pid(), 2, &MOVE);
    scene.kill_server(server);
    shell("cp -a /srv/earlier/. /var/lib/haulier");
    let server = scene.stage.serve(2);
    let told = "removing what will not run here";
    server.wait_for_output(told, LONG).unwrap();
    scene.assert_lives_on(2);
}
