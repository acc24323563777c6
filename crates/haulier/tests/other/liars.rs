//! A destination that lies, and what it can do: see docs/trust.md. More of its kind, with answers that are
//! due, are in `e2e_lies`.

use haulier_proto::frame::Kind;
use haulier_proto::message::{
    Commit, Complete, Findings, Held, Missing, MissingPages, Prepared, Problem, Rejoin, Resumed,
    Role, RoundEnd, control,
};
use haulier_transport::channel::Channel;

use crate::script::scene::Scene;
use crate::script::{Destination, Incoming, long, lost};
use crate::stage::codes::{MOVED, NEEDS_YOU, NOTHING_TOUCHED, ROLLED_BACK, ended, said};
use crate::stage::sight::stands_still;
use crate::stage::{LONG, start};

/// Every message that a destination has, and some that it has not.
fn messages() -> Vec<control::Body> {
    vec![
        control::Body::Findings(Findings::default()),
        control::Body::Prepared(Prepared {}),
        control::Body::Held(Held::default()),
        control::Body::Resumed(Resumed::default()),
        control::Body::Complete(Complete::default()),
        lost(),
        control::Body::Missing(Missing::default()),
        control::Body::Commit(Commit {}),
        control::Body::Rejoin(Rejoin::default()),
    ]
}

/// What is said when a process is asked for, instead of what is due.
type Lie = Box<dyn Fn(&mut Incoming)>;

fn lies() -> Vec<Lie> {
    let said = |message: control::Body| -> Lie {
        Box::new(move |incoming: &mut Incoming| incoming.say(message.clone()))
    };
    let noise: Lie = Box::new(|incoming| incoming.utter(&[0xa5; 4096]));
    messages().into_iter().map(said).chain([noise]).collect()
}

#[test]
fn what_is_not_due_ends_the_migration_and_the_target_runs_on() {
    let scene = Scene::set();
    // An answer without problems is one, at first, and leave to begin is one then.
    for (due, lie) in lies().into_iter().enumerate() {
        if due != 0 {
            let migration = scene.migrate(&[]);
            let mut incoming = scene.destination.until_checked();
            lie(&mut incoming);
            ended(
                migration,
                NOTHING_TOUCHED,
                &["on host1, in phase \"check\""],
            );
        }
        if due != 1 {
            let migration = scene.migrate(&[]);
            let (mut incoming, _) = scene.destination.until_begun();
            lie(&mut incoming);
            ended(
                migration,
                NOTHING_TOUCHED,
                &["on host1, in phase \"prepare\""],
            );
        }
    }
    scene.assert_back();
}

/// It stands by then, and may not be given up for any of these.
#[test]
fn a_claim_before_the_commit_gets_no_process() {
    let scene = Scene::set();
    for message in [
        control::Body::Complete(Complete::default()),
        lost(),
        control::Body::Missing(Missing::default()),
    ] {
        let migration = scene.migrate(&[]);
        let mut incoming = scene.destination.until_offered();
        stands_still(&scene.stage, scene.counter.pid());
        incoming.say(message);
        ended(migration, ROLLED_BACK, &["where held was due"]);
        scene.assert_back();
    }
}

#[test]
fn noise_where_pages_and_images_are_acknowledged_brings_it_back() {
    let scene = Scene::set();
    let round = RoundEnd {
        round: 77,
        pages: u64::MAX,
        last: true,
    };
    for noise in [true, false] {
        let migration = scene.migrate(&[]);
        let (mut incoming, begin) = scene.destination.until_begun();
        incoming.say(control::Body::Prepared(Prepared {}));
        let memory = (0..begin.memory_streams).map(|_| Role::Memory);
        let streams: Vec<Channel> = [Role::Images]
            .into_iter()
            .chain(memory)
            .map(|role| scene.destination.accept(role).0)
            .collect();
        for mut stream in streams {
            if noise {
                let _ = rustix::io::write(stream.socket(), &[0xa5; 4096]);
            } else {
                let _ = stream.send_message(Kind::RoundEnd, &round, &long());
            }
            // Nor does it take anything.
            stream.shutdown();
        }
        let output = migration.finish(LONG).unwrap();
        let code = output.status.code();
        assert!(
            matches!(code, Some(NOTHING_TOUCHED | ROLLED_BACK)),
            "{output:?}"
        );
        assert!(output.stderr.contains("on host1"), "{}", output.stderr);
        scene.assert_back();
    }
}

/// It is what a destination is trusted with: whoever is given a process can throw it away.
#[test]
fn a_destination_that_only_says_that_it_runs_there_is_believed() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    let mut incoming = scene.destination.until_committed();
    // Neither of these is an answer, and the copy stays.
    for message in messages() {
        let answers = matches!(
            message,
            control::Body::Complete(_) | control::Body::Resumed(_) | control::Body::Lost(_)
        );
        if !answers {
            incoming.say(message);
        }
    }
    stands_still(&scene.stage, scene.counter.pid());
    incoming.say(control::Body::Complete(Complete::default()));
    ended(migration, MOVED, &[]);
    assert!(!scene.stage.host(1).process_alive(scene.counter.pid()));
    scene.stage.assert_clean(1, &[]);
}

#[test]
fn a_flood_of_messages_is_not_kept() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    let (mut incoming, _) = scene.destination.until_begun();
    incoming.say(control::Body::Prepared(Prepared {}));
    let big = control::Body::Findings(Findings {
        kernel: "x".repeat(1 << 20),
        ..Findings::default()
    });
    let mut sent = 0;
    while sent < 1000 && incoming.command.send_control(big.clone(), &long()).is_ok() {
        sent += 1;
    }
    assert!(sent < 100, "{sent} MiB were taken");
    ended(
        migration,
        NOTHING_TOUCHED,
        &["on host1", "says more than there is to say"],
    );
    scene.assert_back();
}

#[test]
fn words_of_a_peer_do_nothing_to_the_terminal() {
    let scene = Scene::set();
    let migration = scene.migrate(&[]);
    let problem = Problem {
        what: "\u{1b}]0;mine\u{7}\u{1b}[2Jno".to_owned(),
        remedy: "\u{9b}1Anone".to_owned(),
    };
    let findings = Findings {
        problems: vec![problem; 1000],
        ..Findings::default()
    };
    let mut incoming = scene.destination.until_checked();
    incoming.say(control::Body::Findings(findings));
    let text = ended(migration, NOTHING_TOUCHED, &["what to do"]);
    assert!(
        !text.chars().any(|c| c.is_control() && c != '\n'),
        "{text:?}"
    );
    assert!(text.len() < 10_000, "{}", text.len());
    scene.assert_back();
}

/// Whoever takes over for a source that was killed serves what the destination says it lacks.
#[test]
fn memory_of_other_processes_is_not_given_away() {
    let Scene {
        stage,
        counter,
        destination,
    } = Scene::set();
    let stranger = start(stage.host(1), &["sleep", "1000"]);
    let migration = stage.migration(1, counter.pid(), 2, &["--doubt-time", "1"]);
    let migration = migration.spawn_captured().unwrap();
    let incoming = destination.until_committed();
    incoming.command.shutdown();
    drop((incoming, destination));
    ended(migration, NEEDS_YOU, &["stands frozen here"]);

    let maps = format!(
        "sed -n '/\\[stack\\]/s/-.*//p' /proc/{}/maps",
        stranger.pid()
    );
    let stack = stage.host(1).shell(&maps).unwrap().success();
    let stack = u64::from_str_radix(stack.trim(), 16).unwrap();
    let destination = Destination::open(&stage);
    let recover = stage.haulier(1).args(["recover", "--wait", "3"]);
    let recover = recover.spawn_captured().unwrap();
    let (command, purpose) = destination.accept(Role::Command);
    let mut asked = Incoming::again(command, purpose);
    assert_eq!(asked.hear(), control::Body::Commit(Commit {}));
    let resumed = control::Body::Resumed(Resumed::default());
    asked.command.send_control(resumed, &long()).unwrap();
    assert!(matches!(asked.hear(), control::Body::Rejoin(_)));
    let task = MissingPages {
        task: u32::try_from(stranger.pid()).unwrap(),
        starts: vec![stack / 4096],
        lengths: vec![1],
    };
    asked.say(control::Body::Missing(Missing {
        tasks: vec![task],
        round: 9,
    }));
    // It is hung up, and no memory is offered: what comes next is the question again.
    assert!(asked.command.receive(&long()).is_err());
    let (command, _) = destination.accept(Role::Command);
    drop((command, destination));
    let output = recover.finish(LONG).unwrap();
    said(&output, NEEDS_YOU, &["is none of the migration's"]);
    stands_still(&stage, counter.pid());
}
