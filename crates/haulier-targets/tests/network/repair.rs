use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use haulier_targets::network::{begin_repair_of, end_repair_of};

use crate::world::{PATIENCE, world};

/// Connects twice, puts one connection into repair mode, waits, and speaks on it.
const CLIENT: &str = "
import socket, sys
other = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
repaired = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
unix = socket.socketpair()
TCP_REPAIR = 19
repaired.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
print('frozen', flush=True)
sys.stdin.readline()
print(repaired.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR), flush=True)
repaired.sendall(b'alive')
sys.stdin.readline()
";

/// That client, with one connection in repair mode.
struct Client {
    process: Child,
    tell: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    /// The ends of its connections: of the other one, and of that in repair mode.
    peers: [TcpStream; 2],
}

impl Client {
    fn start() -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut process = Command::new("python3")
            .args(["-c", CLIENT, &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(process.stdout.take().unwrap()).lines();
        let tell = process.stdin.take().unwrap();
        let peers = [(); 2].map(|()| listener.accept().unwrap().0);
        assert_eq!(said.next().unwrap().unwrap(), "frozen");
        Client {
            process,
            tell,
            said,
            peers,
        }
    }
}

#[test]
fn sockets_left_in_repair_mode_live_again() {
    if world().is_none() {
        return;
    }
    let Client {
        mut process,
        mut tell,
        mut said,
        peers: [_other, mut peer],
    } = Client::start();
    let pid = process.id() as i32;
    assert_eq!(end_repair_of(pid).unwrap(), 1);
    assert_eq!(end_repair_of(pid).unwrap(), 0);
    tell.write_all(b"\n").unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "0");
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = [0; 5];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"alive");
    drop(tell);
    assert!(process.wait().unwrap().success());
}

#[test]
fn a_process_that_is_killed_in_repair_mode_says_nothing_to_its_peers() {
    if world().is_none() {
        return;
    }
    let Client {
        mut process,
        peers: [other, _repaired],
        ..
    } = Client::start();
    assert_eq!(begin_repair_of(process.id() as i32).unwrap(), 2);
    process.kill().unwrap();
    process.wait().unwrap();
    // Neither an end nor a reset has come by the time another connection says its own.
    other.set_nonblocking(true).unwrap();
    let nothing = (&other).read(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}
