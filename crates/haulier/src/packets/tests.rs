use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use haulier_targets::network::{ArmedLock, Capture, EngagedLock, Injector, LockScope};
use haulier_transport::channel::Channel;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const QUIET: Duration = Duration::from_millis(100);
/// Addresses of `lo`, which need not be added.
const TARGET: &str = "127.0.0.5";
const ID: &str = "ef01";

/// Runs a test in a network namespace of its own; not at all if there can be none.
fn alone(test: fn()) {
    if !rustix::process::geteuid().is_root() {
        let ci = std::env::var("CI").as_deref() == Ok("true");
        assert!(!ci, "only root can make network namespaces");
        eprintln!("!!! NOT TESTED: packets: only root can make network namespaces !!!");
        return;
    }
    let mut child = Command::new("unshare")
        .args(["--net", "sh", "-c", "ip link set lo up && echo && exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0];
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let namespace = File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
    let inside = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        test();
    };
    let result = thread::spawn(inside).join();
    drop(child.stdin.take());
    child.wait().unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn target() -> IpAddr {
    TARGET.parse().unwrap()
}

fn channels() -> (Channel, Channel) {
    let (a, b) = UnixStream::pair().unwrap();
    (
        Channel::new(a, "destination").unwrap(),
        Channel::new(b, "source").unwrap(),
    )
}

fn engage() -> (Capture, EngagedLock) {
    let capture = Capture::open(ID).unwrap();
    let mut armed = ArmedLock::arm(ID).unwrap();
    armed.capture_to(&capture);
    let scope = LockScope {
        addresses: vec![target()],
        connections: Vec::new(),
    };
    let lock = armed.engage(&scope).unwrap();
    (capture, lock)
}

struct World {
    server: UdpSocket,
    client: UdpSocket,
    to: SocketAddr,
}

fn world() -> World {
    let server = UdpSocket::bind((TARGET, 0)).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = server.local_addr().unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    World { server, client, to }
}

impl World {
    fn send(&self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.client.send_to(&number.to_be_bytes(), self.to).unwrap();
        }
    }

    fn receives(&self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            let mut buffer = [0; 8];
            let (length, from) = self.server.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..length], number.to_be_bytes());
            assert_eq!(from, self.client.local_addr().unwrap());
        }
    }

    fn has_no_more(&self) {
        self.server.set_read_timeout(Some(QUIET)).unwrap();
        assert!(self.server.recv(&mut [0; 8]).is_err());
    }
}

/// One host plays both: what its lock drops goes round to it again.
#[test]
fn every_packet_arrives_once_and_in_order() {
    alone(|| {
        let world = world();
        // More of the first than the socket has room for at once.
        let queued: Vec<Vec<u8>> = {
            let (mut capture, lock) = engage();
            world.send(0..1000);
            let mut packets = Vec::new();
            let wait = || haulier_sys::wait::Wait::uncancellable(QUIET);
            while let Some(packet) = capture.next(&wait()).unwrap() {
                packets.push(packet.to_vec());
            }
            drop(lock);
            packets
        };
        assert_eq!(queued.len(), 1000);
        let (capture, mut lock) = engage();
        let (to_destination, from_source) = channels();
        let mut receiver = PacketReceiver::start(from_source, None).unwrap();
        let forwarder = Forwarder::start(capture, queued, to_destination).unwrap();
        world.send(1000..2000);
        forwarder.committed();
        let sent = forwarder.finish(QUIET, PATIENCE);
        assert_eq!((sent.queued, sent.sent, sent.unsent), (1000, 2000, 0));
        assert_eq!(sent.capture.captured, 1000);
        lock.lift().unwrap();
        receiver.release(Injector::open(&[target()])).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while receiver.stats().delayed == 0 {
            assert!(Instant::now() < deadline, "the socket had room for all");
            thread::yield_now();
        }
        world.receives(0..2000);
        let received = receiver.finish(PATIENCE);
        assert_eq!((received.received, received.delivered), (2000, 2000));
        assert_eq!((received.undelivered, received.overflowed), (0, 0));
        world.has_no_more();
    });
}

#[test]
fn what_comes_after_the_release_is_delivered_too() {
    alone(|| {
        let world = world();
        let (mut sender, from_source) = channels();
        let mut receiver = PacketReceiver::start(from_source, None).unwrap();
        receiver.release(Injector::open(&[target()])).unwrap();
        let (mut capture, lock) = engage();
        world.send(0..10);
        let mut packets = Vec::new();
        let wait = || haulier_sys::wait::Wait::uncancellable(PATIENCE);
        for _ in 0..10 {
            packets.push(capture.next(&wait()).unwrap().unwrap().to_vec());
        }
        drop(lock);
        for packet in &packets {
            sender
                .send(haulier_proto::frame::Kind::Packet, &[packet], &wait())
                .unwrap();
        }
        world.receives(0..10);
        // Not a packet, and for somebody else.
        for bad in [&b"nonsense"[..], &[]] {
            sender
                .send(haulier_proto::frame::Kind::Packet, &[bad], &wait())
                .unwrap();
        }
        drop(sender);
        let stats = receiver.finish(PATIENCE);
        assert_eq!((stats.delivered, stats.undelivered), (10, 2));
    });
}

#[test]
fn a_target_that_goes_on_gets_what_it_missed() {
    alone(|| {
        let world = world();
        let (capture, mut lock) = engage();
        let (to_destination, from_source) = channels();
        let forwarder = Forwarder::start(capture, Vec::new(), to_destination).unwrap();
        let receiver = PacketReceiver::start(from_source, None).unwrap();
        world.send(0..100);
        lock.lift().unwrap();
        let missed = forwarder.abort();
        drop(receiver);
        assert_eq!(missed.len(), 100);
        let stats = deliver(Injector::open(&[target()]), missed);
        assert_eq!((stats.delivered, stats.undelivered), (100, 0));
        world.receives(0..100);
    });
}

#[test]
fn a_committed_target_that_is_aborted_leaves_nothing_to_deliver() {
    alone(|| {
        let world = world();
        let (capture, lock) = engage();
        let (to_destination, from_source) = channels();
        let forwarder = Forwarder::start(capture, Vec::new(), to_destination).unwrap();
        forwarder.committed();
        world.send(0..10);
        // The connection is lost: nothing waits for it.
        drop(from_source);
        assert_eq!(forwarder.abort(), [[0; 0]; 0]);
        drop(lock);
    });
}

/// The destination's own lock drops what comes early.
#[test]
fn early_packets_are_kept_for_the_target() {
    alone(|| {
        let world = world();
        let (capture, mut lock) = engage();
        let (to_destination, from_source) = channels();
        let mut receiver = PacketReceiver::start(from_source, Some(capture)).unwrap();
        world.send(0..100);
        drop(to_destination);
        lock.lift().unwrap();
        receiver.release(Injector::open(&[target()])).unwrap();
        world.receives(0..100);
        let stats = receiver.finish(PATIENCE);
        assert_eq!((stats.received, stats.delivered), (100, 100));
    });
}

#[test]
fn no_more_is_kept_than_there_may_be() {
    let mut kept = Kept::default();
    for _ in 0..MOST_PACKETS {
        assert_eq!(kept.push(vec![1]), 0);
    }
    assert_eq!(kept.push(vec![2]), 1);
    assert_eq!(kept.push(vec![3; MOST_BYTES]), MOST_PACKETS as u64);
    assert_eq!(kept.take().len(), 1);
    assert_eq!(kept.bytes, 0);
}
