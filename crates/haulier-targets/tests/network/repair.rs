use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

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

#[test]
fn sockets_left_in_repair_mode_live_again() {
    if world().is_none() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut child = Command::new("python3")
        .args(["-c", CLIENT, &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut tell = child.stdin.take().unwrap();
    let (_other, _) = listener.accept().unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "frozen");

    let pid = child.id() as i32;
    assert_eq!(end_repair_of(pid).unwrap(), 1);
    assert_eq!(end_repair_of(pid).unwrap(), 0);
    tell.write_all(b"\n").unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "0");
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = [0; 5];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"alive");
    drop(tell);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_process_that_is_killed_in_repair_mode_says_nothing_to_its_peers() {
    if world().is_none() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut child = Command::new("python3")
        .args(["-c", CLIENT, &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let (other, _) = listener.accept().unwrap();
    let (_repaired, _) = listener.accept().unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "frozen");
    assert_eq!(begin_repair_of(child.id() as i32).unwrap(), 2);
    child.kill().unwrap();
    child.wait().unwrap();
    // Neither an end nor a reset has come by the time another connection says its own.
    other.set_nonblocking(true).unwrap();
    let nothing = (&other).read(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}
