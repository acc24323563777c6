//! Hosts are good enough for CRIU: it moves a program from one to the other, its open file and its
//! TCP connection included.

use haulier_lab::workloads::{connections, threads};
use haulier_lab::{Lab, LabConfig, Signal, program};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);

/// `$HAULIER_CRIU`, the one in PATH, or the one that scripts/criu builds.
fn criu() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join("criu"));
    let found = std::env::var_os("HAULIER_CRIU")
        .map(PathBuf::from)
        .into_iter()
        .chain(in_path)
        .chain([PathBuf::from("/opt/haulier/criu/sbin/criu")])
        .find(|candidate| candidate.is_file());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "CI has no CRIU");
        eprintln!("SKIPPED: there is no CRIU on this machine; scripts/criu builds one");
    }
    found
}

fn move_it(criu: &PathBuf, lab: &Lab, pid: i32, prepare_destination: impl Fn()) {
    let images = tempfile::tempdir().unwrap();
    let common = [
        "--tcp-established",
        "--manage-cgroups=ignore",
        "--network-lock=skip",
    ];
    let dump = lab
        .host(1)
        .command(criu)
        .args(["dump", "-t", &pid.to_string(), "-D"]);
    dump.arg(images.path())
        .args(common)
        .output(SOON)
        .unwrap()
        .success();
    assert!(!lab.host(1).process_alive(pid));
    prepare_destination();
    let restore = lab
        .host(2)
        .command(criu)
        .args(["restore", "-d", "-D"])
        .arg(images.path());
    restore.args(common).output(SOON).unwrap().success();
    assert!(lab.host(2).process_alive(pid));
}

#[test]
fn memory_threads_and_an_open_file_move() {
    let Some(criu) = criu() else { return };
    let lab = Lab::start(LabConfig::hosts(2)).unwrap();
    let (source, destination) = (lab.host(1), lab.host(2));
    let workload = source
        .command(program().unwrap())
        .args(["workload", "threads", "--threads", "3", "--memory", "8"])
        .args(["--report", "/srv/report"])
        .setsid()
        .spawn()
        .unwrap();
    let status = |host: usize| {
        let text = lab.host(host).read_file("/srv/report").unwrap_or_default();
        threads::read_report(&text)
    };
    let wait_for_line = |host: usize, line: u64| {
        let until = Instant::now() + SOON;
        while !status(host).is_ok_and(|status| status.line >= line) {
            assert!(Instant::now() < until, "{:?}", status(host));
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait_for_line(1, 3);
    move_it(&criu, &lab, workload.pid(), || {
        let report = source.read_file("/srv/report").unwrap();
        destination.write_file("/srv/report", report).unwrap();
    });
    wait_for_line(2, status(1).unwrap().line + 3);
    // Restored with criu as its parent, which has ended: PID 1 sees its end.
    destination.signal(workload.pid(), Signal::TERM).unwrap();
    destination.wait_gone(workload.pid(), SOON).unwrap();
    assert_eq!(status(2).unwrap().errors, 0);
    assert_eq!(source.leftovers().unwrap(), Vec::<String>::new());
}

#[test]
fn connections_move_with_their_address() {
    let Some(criu) = criu() else { return };
    let lab = Lab::start(LabConfig::hosts(3)).unwrap();
    let address = ["addr", "add", "10.77.0.100/24", "dev", "eth0"];
    lab.host(1)
        .command("ip")
        .args(address)
        .output(SOON)
        .unwrap()
        .success();
    let workload = lab
        .host(1)
        .command(program().unwrap())
        .args(["workload", "connections", "--listen", "10.77.0.100:7000"])
        .setsid()
        .spawn()
        .unwrap();
    let server = SocketAddr::from(([10, 77, 0, 100], 7000));
    let open = || connections::Client::open(server, 20);
    let until = Instant::now() + SOON;
    let mut client = loop {
        match lab.host(3).in_network(open).unwrap() {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
    };
    client.round().unwrap();
    client.begin().unwrap();
    move_it(&criu, &lab, workload.pid(), || {
        let gone = ["ip", "addr", "del", "10.77.0.100/24", "dev", "eth0"];
        lab.host(1).run(gone).unwrap().success();
        lab.host(2)
            .command("ip")
            .args(address)
            .output(SOON)
            .unwrap()
            .success();
        lab.host(3)
            .run(["ip", "neigh", "flush", "dev", "eth0"])
            .unwrap()
            .success();
    });
    client.finish().unwrap();
    client.round().unwrap();
}
