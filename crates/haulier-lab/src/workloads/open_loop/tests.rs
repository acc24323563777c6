use super::super::echo;
use super::*;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};

fn free_address() -> SocketAddr {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.local_addr().unwrap()
}

fn clients_of(server: SocketAddr, tcp: usize, udp: usize) -> OpenLoopClient {
    let config = OpenLoop {
        server,
        tcp,
        udp,
        interval: Duration::from_millis(5),
        protocol: Protocol::Echo,
    };
    let until = Instant::now() + PATIENCE;
    loop {
        match OpenLoopClient::start(config) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < until, "{error:?}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn until(client: &OpenLoopClient, enough: impl Fn(&OpenLoopReport) -> bool) {
    let until = Instant::now() + PATIENCE;
    while !enough(&client.snapshot()) {
        assert!(Instant::now() < until, "{:?}", client.snapshot());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_request_is_answered_by_an_echo_server() {
    let listen = free_address();
    thread::spawn(move || {
        echo::serve(&echo::Config {
            listen,
            memory_mib: 1,
            pages_per_second: Some(100),
        })
    });
    let client = clients_of(listen, 20, 3);
    until(&client, |seen| {
        seen.tcp.answered > 400 && seen.udp.answered > 60
    });
    let report = client.stop();
    assert_eq!((report.tcp.clients, report.udp.clients), (20, 3));
    assert_eq!((report.tcp.lost, report.udp.lost), (0, 0), "{report:?}");
    assert_eq!((report.udp.doubled, report.errors().len()), (0, 0));
    assert_eq!(report.tcp.answered, report.tcp.sent);
    assert!(report.tcp.median_ms > 0.0 && report.tcp.median_ms <= report.tcp.p999_ms);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["clients"][22]["kind"], "udp");
}

/// An open loop goes on sending, and counts a wait from when its request was due.
#[test]
fn a_server_that_stands_still_is_waited_for_by_all_requests_of_that_time() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        thread::sleep(Duration::from_millis(200));
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..count]).unwrap();
        }
    });
    let client = clients_of(server, 1, 0);
    until(&client, |seen| seen.tcp.answered > 50);
    let report = client.stop();
    assert_eq!(report.tcp.lost, 0);
    assert!(report.tcp.longest_ms > 150.0, "{report:?}");
    // Half of what was sent was sent while it stood still.
    assert!(report.tcp.median_ms > 10.0, "{report:?}");
    assert!(report.tcp.longest_at_ms < 50.0, "{report:?}");
}

#[test]
fn a_wrong_answer_and_an_end_are_errors() {
    for (said, expected) in [(&[b'x'; 32][..], "answer 0 is"), (b"", "closed")] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let server = listener.local_addr().unwrap();
        let client = clients_of(server, 1, 0);
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 32]).unwrap();
        stream.write_all(said).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        until(&client, |seen| !seen.errors().is_empty());
        let report = client.stop();
        assert!(report.errors()[0].contains(expected), "{report:?}");
        assert!(report.tcp.lost > 0);
    }
}

#[test]
fn nobody_there_is_a_loss_of_datagrams() {
    let client = clients_of(free_address(), 0, 1);
    until(&client, |seen| seen.udp.sent > 5);
    let report = client.stop();
    assert_eq!((report.udp.answered, report.udp.lost), (0, report.udp.sent));
}
