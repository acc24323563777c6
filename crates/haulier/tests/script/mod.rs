//! The other side of a migration, played by a test: it speaks the protocol, and says what the test
//! wants at each point.

#![allow(dead_code, reason = "each test uses some of it")]

pub(crate) mod scene;

use std::thread::{self, JoinHandle};

use haulier_proto::frame::Kind;
use haulier_proto::id::{MigrationId, Secret};
use haulier_proto::message::{
    self, Begin, Commit, Complete, Failure, Findings, Frozen, Held, ImagesDone, Offer, Prepared,
    Requirements, Resumed, Role, RoundEnd, control,
};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::{self, Identity, Purpose};
use haulier_transport::tcp::{self, Listener};
use haulier_transport::wait::Wait;

use crate::stage::{LONG, Stage};

/// What a connection is welcomed as, or refused.
type Connected = Result<Channel, TransportError>;

pub(crate) fn long() -> Wait {
    Wait::uncancellable(LONG)
}

pub(crate) fn resumed() -> control::Body {
    control::Body::Resumed(Resumed {
        pid: 1,
        phases: Vec::new(),
    })
}

pub(crate) fn failed(what: &str) -> control::Body {
    control::Body::Failed(failure("commit", what))
}

pub(crate) fn lost() -> control::Body {
    control::Body::Lost(failure("arrive", "the server was killed"))
}

fn failure(phase: &str, what: &str) -> Failure {
    Failure {
        host: "host2".to_owned(),
        phase: phase.to_owned(),
        what: what.to_owned(),
        ..Failure::default()
    }
}

/// A destination on host 2.
pub(crate) struct Destination {
    listener: Listener,
    me: Identity,
}

/// A migration as the destination sees it.
pub(crate) struct Incoming {
    pub(crate) purpose: Purpose,
    pub(crate) command: Channel,
    streams: Vec<JoinHandle<(Kind, u64, u32)>>,
    packets: Option<Channel>,
}

impl Destination {
    pub(crate) fn open(stage: &Stage) -> Destination {
        let address = stage.address(2);
        let listener = stage.host(2).in_network(|| Listener::bind(&address));
        Destination {
            listener: listener.unwrap().unwrap(),
            me: identity("host2"),
        }
    }

    /// Takes in the next connection, which has to be of that role.
    pub(crate) fn accept(&self, role: Role) -> (Channel, Purpose) {
        let mut channel = self.listener.accept(&long()).unwrap();
        let hello = greeting::receive_hello(&mut channel, &self.me, &long());
        let (_, purpose, version) = hello.unwrap();
        assert_eq!(purpose.role, role);
        greeting::accept(&mut channel, &self.me, version, &long()).unwrap();
        (channel, purpose)
    }

    /// A command connection, up to the source's question whether it fits.
    pub(crate) fn until_checked(&self) -> Incoming {
        let (mut command, purpose) = self.accept(Role::Command);
        let check = command.receive_control("a check", &long()).unwrap();
        assert!(matches!(check, control::Body::Check(_)), "{check:?}");
        Incoming {
            purpose,
            command,
            streams: Vec::new(),
            packets: None,
        }
    }

    /// A migration whose source has begun.
    pub(crate) fn until_begun(&self) -> (Incoming, Begin) {
        let mut incoming = self.until_checked();
        incoming.say(control::Body::Findings(Findings::default()));
        match incoming.hear() {
            control::Body::Begin(begin) => (incoming, begin),
            other => panic!("{other:?} instead of a beginning"),
        }
    }

    /// A migration that has been sent whole: what came is what the source says it sent.
    pub(crate) fn until_offered(&self) -> Incoming {
        let (mut incoming, begin) = self.until_begun();
        let memory = begin.memory_streams;
        incoming.say(control::Body::Prepared(Prepared {}));
        for role in [Role::Images]
            .into_iter()
            .chain((0..memory).map(|_| Role::Memory))
        {
            let (channel, purpose) = self.accept(role);
            assert_eq!(purpose.migration, incoming.purpose.migration);
            assert_eq!(purpose.secret, incoming.purpose.secret);
            incoming.streams.push(thread::spawn(|| drain(channel)));
        }
        // Held open: packets may come to the end.
        if begin.packets {
            incoming.packets = Some(self.accept(Role::Packets).0);
        }
        let (mut pages, mut images, mut rounds) = (0, 0, 0);
        for stream in incoming.streams.drain(..) {
            match stream.join().unwrap() {
                (Kind::ImagesDone, count, _) => images += count,
                (_, count, number) => {
                    pages += count;
                    rounds = number;
                }
            }
        }
        assert_eq!(incoming.hear(), control::Body::Frozen(Frozen {}));
        let offer = incoming.hear();
        let expected = Offer {
            pages,
            images: u32::try_from(images).unwrap(),
            left_behind: 0,
            rounds,
        };
        assert_eq!(offer, control::Body::Offer(expected));
        assert!(pages > 0 && images > 0);
        incoming
    }

    /// A migration whose source has sent its commit.
    pub(crate) fn until_committed(&self) -> Incoming {
        let mut incoming = self.until_offered();
        incoming.say(control::Body::Held(Held::default()));
        assert_eq!(incoming.hear(), control::Body::Commit(Commit {}));
        incoming
    }

    /// Loses the connection over which the commit came, and is asked again over a new one.
    pub(crate) fn asked_again(&self, incoming: Incoming) -> Incoming {
        let Incoming { purpose, .. } = incoming;
        incoming.command.shutdown();
        let (command, again) = self.accept(Role::Command);
        assert_eq!(
            again, purpose,
            "of the same migration, with the same secret"
        );
        let mut incoming = Incoming::again(command, purpose);
        assert_eq!(incoming.hear(), control::Body::Commit(Commit {}));
        incoming
    }
}

impl Incoming {
    /// Of a migration that is asked about again.
    pub(crate) fn again(command: Channel, purpose: Purpose) -> Incoming {
        Incoming {
            purpose,
            command,
            streams: Vec::new(),
            packets: None,
        }
    }

    /// A destination that says "resumed" also says, soon after, that every page is placed.
    pub(crate) fn say(&mut self, body: control::Body) {
        let complete = matches!(body, control::Body::Resumed(_));
        self.command.send_control(body, &long()).unwrap();
        if complete {
            let complete = control::Body::Complete(Complete::default());
            // The source may have gone already, or be killed by the test.
            let _ = self.command.send_control(complete, &long());
        }
    }

    pub(crate) fn hear(&mut self) -> control::Body {
        self.command
            .receive_control("what is due", &long())
            .unwrap()
    }

    /// Puts bytes on the command connection that are not a message.
    pub(crate) fn utter(&self, noise: &[u8]) {
        let written = rustix::io::write(self.command.socket(), noise).unwrap();
        assert_eq!(written, noise.len());
    }
}

/// Receives to the end of the images, or of the last round of pages; returns how many came, and in
/// how many rounds.
fn drain(mut channel: Channel) -> (Kind, u64, u32) {
    let (mut pages, mut rounds) = (0, 0);
    loop {
        let (header, body) = channel.receive(&long()).unwrap();
        match header.kind {
            Kind::ImagesDone => {
                let done: ImagesDone = message::decode(header.kind, &body).unwrap();
                return (header.kind, done.images.into(), 0);
            }
            Kind::RoundEnd => {
                let end: RoundEnd = message::decode(header.kind, &body).unwrap();
                pages += end.pages;
                if end.last {
                    return (header.kind, pages, rounds);
                }
                channel.send_message(header.kind, &end, &long()).unwrap();
                rounds += 1;
            }
            _ => {}
        }
    }
}

/// A source on host 1 of one migration to host 2.
pub(crate) struct Source<'a> {
    stage: &'a Stage,
    id: MigrationId,
    secret: Secret,
}

impl<'a> Source<'a> {
    pub(crate) fn new(stage: &'a Stage, id: u8, secret: u8) -> Source<'a> {
        Source::of(stage, MigrationId::from_random([id; 8]), secret)
    }

    /// The same of a migration that has an id.
    pub(crate) fn of(stage: &'a Stage, id: MigrationId, secret: u8) -> Source<'a> {
        Source {
            stage,
            id,
            secret: Secret::from_random([secret; 32]),
        }
    }

    pub(crate) fn connect(&self, role: Role) -> Connected {
        let (address, wait) = (self.stage.address(2), long());
        let host = self.stage.host(1);
        let mut channel = host.in_network(|| tcp::connect(&address, &wait)).unwrap()?;
        let purpose = Purpose {
            migration: self.id,
            secret: self.secret.clone(),
            role,
            index: 0,
        };
        greeting::introduce(&mut channel, &identity("host1"), &purpose, &wait)?;
        Ok(channel)
    }

    /// A command connection over which a migration of process `root` has begun, and the
    /// destination has prepared for it.
    pub(crate) fn begin(&self, root: i32, memory_streams: u32) -> Channel {
        let mut command = self.connect(Role::Command).unwrap();
        let needs = Requirements {
            root_pid: root,
            pids: vec![root],
            program: "made up".to_owned(),
            ..Requirements::default()
        };
        let mut ask = |body| {
            command.send_control(body, &long()).unwrap();
            command.receive_control("an answer", &long()).unwrap()
        };
        let findings = ask(control::Body::Check(needs));
        assert!(
            matches!(findings, control::Body::Findings(_)),
            "{findings:?}"
        );
        let prepared = ask(control::Body::Begin(Begin {
            memory_streams,
            ..Begin::default()
        }));
        assert_eq!(prepared, control::Body::Prepared(Prepared {}));
        command
    }
}

fn identity(host: &str) -> Identity {
    Identity {
        software: "a test".to_owned(),
        host: host.to_owned(),
    }
}
