//! Packets that a lock drops, and where they are delivered.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use haulier_sys::wait::Wait;
use haulier_targets::network::{
    ArmedLock, Capture, Delivery, EngagedLock, Error, Injector, LockScope, MoveIp, add,
    queued_datagrams_of, remove,
};

use crate::world::{MOVED, Namespace, PATIENCE, SILENCE, World, connection, eventually, world};

/// The moved addresses, there already.
fn moved(host: &Namespace) -> [MoveIp; 2] {
    MOVED.map(|moved| {
        let moved: MoveIp = moved.parse().unwrap();
        host.run(|| add(&moved).unwrap());
        moved
    })
}

fn engage(host: &Namespace, id: &str, moved: &[MoveIp]) -> (Capture, EngagedLock) {
    host.run(|| {
        let capture = Capture::open(id).unwrap();
        let mut armed = ArmedLock::arm(id).unwrap();
        armed.capture_to(&capture);
        let lock = armed.engage(&LockScope::new(moved, &[])).unwrap();
        (capture, lock)
    })
}

fn ips(moved: &[MoveIp]) -> Vec<IpAddr> {
    moved.iter().map(MoveIp::ip).collect()
}

fn next(capture: &mut Capture) -> Vec<u8> {
    let packet = capture.next(&Wait::uncancellable(PATIENCE)).unwrap();
    packet.expect("a packet was to be captured").to_vec()
}

fn rest(capture: &mut Capture) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some(packet) = capture.next(&Wait::uncancellable(SILENCE)).unwrap() {
        packets.push(packet.to_vec());
    }
    packets
}

/// What follows the headers of a datagram or (with options) of a segment.
fn data(packet: &[u8]) -> &[u8] {
    let ip = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let udp = packet[if ip == 20 { 9 } else { 6 }] == 17;
    let transport = if udp {
        8
    } else {
        usize::from(packet[ip + 12] >> 4) * 4
    };
    &packet[ip + transport..]
}

fn server(host: &Namespace, ip: IpAddr) -> (UdpSocket, SocketAddr) {
    let socket = host.run(|| UdpSocket::bind((ip, 0)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// A client that knows its way: it would get no answer to its question from a locked host.
fn client(host: &Namespace, server: &UdpSocket, to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = host.run(|| UdpSocket::bind(any).unwrap());
    client.send_to(b"before", to).unwrap();
    receives(server, b"before");
    client
}

fn receives(socket: &UdpSocket, expected: &[u8]) -> SocketAddr {
    let mut buffer = vec![0; 65536];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert!(
        &buffer[..length] == expected,
        "{length} bytes instead of {}",
        expected.len()
    );
    from
}

fn nothing_left(world: &World) {
    assert_eq!(world.b.sh("nft list ruleset"), "");
    let log = world.b.sh("cat /proc/net/netfilter/nfnetlink_log");
    assert_eq!(log, "");
    assert_eq!(world.b.sh("ip -o link | wc -l").trim(), "2");
}

#[test]
fn datagrams_are_captured_from_the_lock_on_and_delivered_once() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    for address in &addresses {
        let ip = address.ip();
        let (socket, to) = server(b, ip);
        let client = client(a, &socket, to);
        let (mut capture, mut lock) = engage(b, "cd01", &addresses);
        let sent: [&[u8]; 4] = [b"one", b"", b"of odd length", &[7; 5000]];
        for datagram in sent {
            client.send_to(datagram, to).unwrap();
        }
        let mut injector = b.run(|| Injector::open(&ips(&addresses)));
        let packets = rest(&mut capture);
        if ip.is_ipv4() {
            // Put together again from its fragments; IPv6 does that later.
            let captured: Vec<&[u8]> = packets.iter().map(|packet| data(packet)).collect();
            assert!(captured == sent);
        }
        b.run(|| {
            lock.lift().unwrap();
            for packet in &packets {
                assert_eq!(injector.inject(packet).unwrap(), Delivery::Done);
            }
        });
        client.send_to(b"after", to).unwrap();
        let port = client.local_addr().unwrap().port();
        let all = sent.into_iter().chain([&b"after"[..]]);
        for datagram in all {
            assert_eq!(receives(&socket, datagram).port(), port);
        }
        let stats = capture.stats();
        assert_eq!(stats.captured, packets.len() as u64);
        assert_eq!((stats.missed, stats.merged, stats.corrupt), (0, 0, 0));
        b.run(|| drop((capture, lock)));
    }
    nothing_left(&world);
}

/// The client sends much at once, which its kernel hands over in packets of up to 64 KiB
/// without checksums; nothing of it is acknowledged but what is delivered.
#[test]
fn a_stream_goes_on_with_what_was_captured() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    a.sysctl("ipv4/tcp_early_retrans", "0");
    for address in &addresses {
        // No retransmission may do the work of what is tested.
        let ip = address.ip();
        a.sh(&format!("ip route add {ip} dev va rto_min 60s"));
        let (_listener, mut client, mut server) = connection(&world, address.ip());
        client.write_all(b"before").unwrap();
        let mut buffer = vec![0; 6];
        server.read_exact(&mut buffer).unwrap();
        let (mut capture, mut lock) = engage(b, "cd02", &addresses);
        let sent: Vec<u8> = (0..12_000_u32).map(|n| (n % 251) as u8).collect();
        client.write_all(&sent).unwrap();
        let packets = rest(&mut capture);
        let carried: usize = packets.iter().map(|packet| data(packet).len()).sum();
        assert_eq!(carried, sent.len(), "in {} packets", packets.len());
        assert!(packets.iter().any(|packet| packet.len() > 1500));
        let mut injector = b.run(|| Injector::open(&ips(&addresses)));
        b.run(|| {
            lock.lift().unwrap();
            for packet in &packets {
                assert_eq!(injector.inject(packet).unwrap(), Delivery::Done);
            }
        });
        arrives(&mut server, &sent);
        server.write_all(b"reply").unwrap();
        arrives(&mut client, b"reply");
        b.run(|| drop((capture, lock)));
    }
    nothing_left(&world);
}

fn arrives(stream: &mut TcpStream, expected: &[u8]) {
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut buffer = vec![0; expected.len()];
    stream.read_exact(&mut buffer).unwrap();
    assert!(buffer == expected);
}

#[test]
fn packets_are_delivered_whatever_is_thought_of_their_source() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    a.sh("ip addr add 203.0.113.9/32 dev va && ip route add 10.0.0.5/32 dev va src 203.0.113.9");
    let ip = addresses[0].ip();
    let (socket, to) = server(b, ip);
    let client = client(a, &socket, to);
    let (mut capture, mut lock) = engage(b, "cd03", &addresses);
    client.send_to(b"x", to).unwrap();
    let packet = next(&mut capture);
    assert_eq!(packet[12..16], [203, 0, 113, 9]);
    b.run(|| lock.lift().unwrap());
    let mut injector = b.run(|| Injector::open(&ips(&addresses)));
    for mode in ["0", "1", "2"] {
        b.sysctl("ipv4/conf/all/rp_filter", mode);
        b.run(|| assert_eq!(injector.inject(&packet).unwrap(), Delivery::Done));
        assert_eq!(receives(&socket, b"x").ip().to_string(), "203.0.113.9");
    }
    // A client of the destination itself, whose address the packet bears.
    b.sh("ip addr add 203.0.113.9/32 dev vb");
    b.run(|| assert_eq!(injector.inject(&packet).unwrap(), Delivery::Done));
    receives(&socket, b"x");
    // The filter that firewalld sets up.
    b.sh("nft add table inet f");
    b.sh("nft 'add chain inet f p { type filter hook prerouting priority 0; }'");
    b.sh("nft add rule inet f p fib saddr . iif oif missing drop");
    b.run(|| assert_eq!(injector.inject(&packet).unwrap(), Delivery::Done));
    receives(&socket, b"x");
    b.sh("nft delete table inet f");
    b.run(|| drop((capture, lock)));
    nothing_left(&world);
}

#[test]
fn only_what_is_for_the_moved_addresses_is_delivered() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    for address in &addresses {
        let ip = address.ip();
        let (socket, to) = server(b, ip);
        let client = client(a, &socket, to);
        let (mut capture, lock) = engage(b, "cd04", &addresses);
        client.send_to(b"x", to).unwrap();
        let packet = next(&mut capture);
        b.run(|| drop(lock));
        let (source, destination) = if ip.is_ipv4() {
            (12..16, 16..20)
        } else {
            (8..24, 24..40)
        };
        b.run(|| {
            let mut injector = Injector::open(&[]);
            let refused = injector.inject(&packet).unwrap_err();
            assert!(matches!(refused, Error::PacketRefused(_)), "{refused}");
            let mut injector = Injector::open(&ips(&addresses));
            let mut cut = packet.clone();
            cut.pop();
            let mut own = packet.clone();
            own[source.clone()].copy_from_slice(&packet[destination.clone()]);
            for (packet, well) in [(&cut, false), (&vec![], false), (&own, true)] {
                assert_eq!(injector.inject(packet).is_ok(), well);
            }
            // Nothing is sent out in another's name.
            remove(address).unwrap();
        });
        std::thread::sleep(Duration::from_millis(6));
        b.run(|| {
            let mut injector = Injector::open(&ips(&addresses));
            let error = injector.inject(&packet).unwrap_err();
            assert!(matches!(error, Error::Inject { .. }), "{error}");
        });
    }
}

#[test]
fn a_socket_with_a_full_buffer_has_no_room() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    for address in &addresses {
        let (socket, to) = server(b, address.ip());
        let client = client(a, &socket, to);
        let (mut capture, lock) = engage(b, "cd05", &addresses);
        client.send_to(&[1; 1000], to).unwrap();
        let packet = next(&mut capture);
        b.run(|| drop((capture, lock)));
        let mut injector = b.run(|| Injector::open(&ips(&addresses)));
        let mut delivered = 0;
        b.run(|| {
            while injector.inject(&packet).unwrap() == Delivery::Done {
                delivered += 1;
            }
        });
        assert!(delivered > 10, "{delivered}");
        for _ in 0..delivered {
            receives(&socket, &[1; 1000]);
        }
        b.run(|| assert_eq!(injector.inject(&packet).unwrap(), Delivery::Done));
        receives(&socket, &[1; 1000]);
    }
}

#[test]
fn queued_datagrams_are_found_and_stay() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    let pid = std::process::id() as i32;
    for address in &addresses {
        let ip = address.ip();
        let any: IpAddr = if ip.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
        let (socket, bound) = server(b, any);
        let to = SocketAddr::new(ip, bound.port());
        let client = client(a, &socket, to);
        let sent: [&[u8]; 3] = [b"one", b"", b"three"];
        let queued = |count: usize| {
            let mut found = Vec::new();
            eventually("the datagrams are queued", || {
                found = queued_datagrams_of(&[pid], &ips(&addresses))
                    .unwrap()
                    .packets;
                found.retain(|packet| port(packet) == to.port());
                found.len() == count
            });
            found
        };
        for datagram in sent {
            client.send_to(datagram, to).unwrap();
        }
        let packets = queued(3);
        for (packet, datagram) in packets.iter().zip(sent) {
            assert_eq!(data(packet), datagram);
        }
        for datagram in sent {
            receives(&socket, datagram);
        }
        assert_eq!(queued(0), [[0; 0]; 0]);
        let mut injector = b.run(|| Injector::open(&ips(&addresses)));
        for (packet, datagram) in packets.iter().zip(sent) {
            b.run(|| assert_eq!(injector.inject(packet).unwrap(), Delivery::Done));
            let from = receives(&socket, datagram);
            assert_eq!(from.port(), client.local_addr().unwrap().port());
        }
    }
}

/// Asks for merged datagrams, tells its port, and reads nothing until told to.
const MERGING_SERVER: &str = "
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(17, 104, 1)
s.bind(('10.0.0.5', 0))
print(s.getsockname()[1], flush=True)
sys.stdin.readline()
print(len(s.recv(65536)), s.getsockopt(1, 42), s.getsockopt(0, 8), flush=True)
";
/// Has the kernel cut datagrams of 100 bytes out of one.
const MERGING_CLIENT: &str = "
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(17, 103, 100)
s.sendto(b'x' * 250, ('10.0.0.5', int(sys.argv[1])))
";

/// Datagrams that the kernel merged for a socket that wants them so are several again.
#[test]
fn merged_datagrams_in_a_queue_are_taken_apart() {
    let Some(world) = world() else { return };
    let (a, b) = (&world.a, &world.b);
    let addresses = moved(b);
    let python = |host: &Namespace, script: &str, argument: &str| {
        host.run(|| {
            Command::new("python3")
                .args(["-c", script, argument])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
    };
    let mut server = python(b, MERGING_SERVER, "");
    let mut said = BufReader::new(server.stdout.take().unwrap()).lines();
    let to = said.next().unwrap().unwrap();
    let mut client = python(a, MERGING_CLIENT, &to);
    assert!(client.wait().unwrap().success());
    let pid = server.id() as i32;
    let mut found = Vec::new();
    eventually("the datagrams are queued", || {
        found = queued_datagrams_of(&[pid], &ips(&addresses))
            .unwrap()
            .packets;
        !found.is_empty()
    });
    let lengths: Vec<usize> = found.iter().map(|packet| data(packet).len()).collect();
    assert_eq!(lengths, [100, 100, 50]);
    assert!(found.iter().all(|packet| port(packet).to_string() == to));
    server.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "250 -1 0");
    assert!(server.wait().unwrap().success());
}

fn port(packet: &[u8]) -> u16 {
    let at = if packet[0] >> 4 == 4 { 22 } else { 42 };
    u16::from_be_bytes([packet[at], packet[at + 1]])
}
