//! Hosts are hosts: apart where they should be, and joined by a network.

use haulier_lab::{Error, Lab, LabConfig, Signal};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

fn lab(hosts: usize) -> Lab {
    Lab::start(LabConfig::hosts(hosts)).unwrap()
}

#[test]
fn hosts_reach_each_other() {
    let lab = lab(3);
    let first = lab.host(1);
    for other in [lab.host(2), lab.host(3)] {
        let addresses = [
            other.ipv4().to_string(),
            other.ipv6().to_string(),
            other.name().into(),
        ];
        for address in addresses {
            first
                .run(["ping", "-c1", "-W5", &address])
                .unwrap()
                .success();
        }
    }
}

#[test]
fn hosts_have_their_own_names_and_files() {
    let lab = lab(2);
    let (one, two) = (lab.host(1), lab.host(2));
    assert_eq!(one.run(["hostname"]).unwrap().success(), "host1\n");
    assert_eq!(two.run(["hostname"]).unwrap().success(), "host2\n");
    for folder in [
        "/run",
        "/srv",
        "/dev/shm",
        "/var/lib/haulier",
        "/var/log/haulier",
    ] {
        let path = format!("{folder}/mark");
        one.write_file(&path, "one").unwrap();
        assert!(!two.exists(&path), "{path} is on both hosts");
        assert_eq!(one.run(["cat", &path]).unwrap().success(), "one");
    }
    // A symbolic link leads to the host's file, not to the machine's.
    one.run(["ln", "-s", "/srv/mark", "/srv/link"])
        .unwrap()
        .success();
    assert_eq!(one.read_file("/srv/link").unwrap(), b"one");
}

#[test]
fn hosts_have_their_own_processes() {
    let lab = lab(2);
    let (one, two) = (lab.host(1), lab.host(2));
    let mut sleeper = one.command("sleep").arg("1000").setsid().spawn().unwrap();
    let other = two.command("sleep").arg("1000").spawn().unwrap();
    assert!(
        (3000..6000).contains(&sleeper.pid()),
        "PID {}",
        sleeper.pid()
    );
    assert!((6000..9000).contains(&other.pid()), "PID {}", other.pid());
    assert!(one.process_alive(sleeper.pid()) && !two.process_alive(sleeper.pid()));
    assert_eq!(one.pids().unwrap(), [sleeper.pid()]);
    assert_eq!(
        one.kill_all_named("sleep", Signal::KILL).unwrap(),
        [sleeper.pid()]
    );
    let status = sleeper.wait(SOON).unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    assert!(two.process_alive(other.pid()));
}

#[test]
fn a_program_has_its_streams_and_no_other_descriptor() {
    let lab = lab(1);
    let host = lab.host(1);
    // The listing has its own descriptor of the folder it lists, 3.
    let listed = host.run(["ls", "/proc/self/fd"]).unwrap().success();
    assert_eq!(
        listed.split_whitespace().collect::<Vec<_>>(),
        ["0", "1", "2", "3"]
    );

    let mut program = host
        .command("sh")
        .args([
            "-c",
            "readlink /proc/self/fd/0 /proc/self/fd/1; echo $PWD $MARK; ps -o sid= $$",
        ])
        .env("MARK", "here")
        .cwd("/srv")
        .stdout_file("/srv/out")
        .setsid()
        .spawn()
        .unwrap();
    assert!(program.wait(SOON).unwrap().success());
    let written = String::from_utf8(host.read_file("/srv/out").unwrap()).unwrap();
    let lines: Vec<&str> = written.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "/dev/null",
            "/srv/out",
            "/srv here",
            &program.pid().to_string()
        ]
    );
}

#[test]
fn programs_end_as_they_end() {
    let lab = lab(1);
    let host = lab.host(1);
    let output = host.shell("echo out; echo err >&2; exit 7").unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\n", "err\n")
    );
    let missing = host.run(["/no/such/program"]).unwrap_err().to_string();
    assert!(
        missing.contains("/no/such/program") && missing.contains("No such file"),
        "{missing}"
    );
    let lost = host
        .command("true")
        .cwd("/no/such/folder")
        .spawn()
        .unwrap_err()
        .to_string();
    assert!(lost.contains("cannot enter /no/such/folder"), "{lost}");
    let late = host
        .command("sleep")
        .arg("1000")
        .output(Duration::from_millis(50))
        .unwrap_err();
    assert!(matches!(late, Error::Deadline { .. }), "{late}");
    host.command("true").output(SOON).unwrap().success();
}

#[test]
fn output_can_be_read_while_a_program_runs() {
    let lab = lab(1);
    let mut talker = lab
        .host(1)
        .command("sh")
        .args(["-c", "echo hello; sleep 1000"])
        .spawn_captured()
        .unwrap();
    talker.wait_for_output("hello", SOON).unwrap();
    assert_eq!(talker.process.try_wait().unwrap(), None);
    talker.process.kill(Signal::TERM).unwrap();
    talker.process.wait(SOON).unwrap();
}

#[test]
fn pid_1_reaps_orphans() {
    let lab = lab(1);
    let host = lab.host(1);
    let said = host
        .shell("sh -c 'sleep 0.05; exit 3' & echo $!")
        .unwrap()
        .success();
    let orphan = said.trim().parse().unwrap();
    host.wait_gone(orphan, SOON).unwrap();
    let reaped = || host.reaped(orphan).unwrap();
    let until = std::time::Instant::now() + SOON;
    while reaped().is_none() && std::time::Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(reaped().and_then(|status| status.code()), Some(3));
    assert_eq!(host.process(orphan), None);
}

#[test]
fn a_pid_can_be_asked_for() {
    let lab = lab(1);
    let host = lab.host(1);
    let chosen = host.command("sleep").arg("1000").pid(4321).spawn().unwrap();
    assert_eq!(chosen.pid(), 4321);
    let taken = host
        .command("sleep")
        .arg("1000")
        .pid(4321)
        .spawn()
        .unwrap_err();
    assert!(taken.to_string().contains("in use"), "{taken}");
    assert_eq!(host.processes().unwrap().len(), 1);
}

#[test]
fn a_program_can_have_a_cgroup() {
    let lab = lab(1);
    let host = lab.host(1);
    let mut command = host
        .command("cat")
        .arg("/proc/self/cgroup")
        .stdout_file("/srv/cgroup");
    command = command.cgroup("app/inner");
    assert!(command.spawn().unwrap().wait(SOON).unwrap().success());
    let shown = String::from_utf8(host.read_file("/srv/cgroup").unwrap()).unwrap();
    assert!(shown.lines().any(|line| line == "0::/app/inner"), "{shown}");
}

#[test]
fn a_closure_can_use_the_network_of_a_host() {
    let lab = lab(2);
    let (one, two) = (lab.host(1), lab.host(2));
    let address = SocketAddr::from((two.ipv4(), 5000));
    let listener = two
        .in_network(|| TcpListener::bind(address))
        .unwrap()
        .unwrap();
    let mut client = one
        .in_network(|| TcpStream::connect(address))
        .unwrap()
        .unwrap();
    let (mut server, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), one.ipv4());
    client.write_all(b"x").unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
    // The machine itself has no such address.
    assert!(TcpListener::bind(address).is_err());
}

#[test]
fn links_can_be_shaped() {
    let lab = lab(2);
    let limits = || {
        let fabric = lab.describe_network().unwrap();
        let hosts = lab
            .hosts()
            .iter()
            .map(|h| h.run(["tc", "qdisc", "show"]).unwrap().success());
        let all = hosts.fold(fabric, |all, one| all + &one);
        all.lines()
            .filter(|line| line.contains("rate 1Gbit"))
            .count()
    };
    assert_eq!(limits(), 0);
    lab.shape(Some("1gbit")).unwrap();
    assert_eq!(limits(), 4);
    lab.shape(None).unwrap();
    lab.shape(None).unwrap();
    assert_eq!(limits(), 0);
    assert!(matches!(
        lab.shape(Some("fast")),
        Err(Error::BadRate { .. })
    ));
}

#[test]
fn a_host_can_be_cut_off_and_mended() {
    let lab = lab(2);
    let ping = || {
        let address = lab.host(2).ipv4().to_string();
        lab.host(1)
            .run(["ping", "-c1", "-W1", &address])
            .unwrap()
            .status
            .success()
    };
    assert!(ping());
    lab.cut(2).unwrap();
    assert!(!ping());
    let carrier = lab
        .host(2)
        .run(["cat", "/sys/class/net/eth0/carrier"])
        .unwrap()
        .success();
    assert_eq!(carrier, "1\n");
    lab.mend(2).unwrap();
    // The neighbour entry may have been given up meanwhile.
    assert!((0..20).any(|_| ping()));
}

#[test]
fn traces_of_a_migration_show() {
    let lab = lab(1);
    let host = lab.host(1);
    assert_eq!(host.leftovers().unwrap(), Vec::<String>::new());
    let before = host.snapshot().unwrap();
    host.shell(
        "mkdir /sys/fs/cgroup/left; echo 1 > /sys/fs/cgroup/left/cgroup.freeze
         nft add table inet haulier_x; mkdir -p /run/haulier/7; touch /run/haulier/7/x
         touch /dev/shm/pages; mkdir /srv/m; mount -t tmpfs none /srv/m; echo",
    )
    .unwrap()
    .success();
    let expected = [
        "cgroup /left",
        "file /dev/shm/pages",
        "file /run/haulier",
        "file /run/haulier/7",
        "file /run/haulier/7/x",
        "frozen-cgroup /left",
        "mount tmpfs /srv/m",
        "nft table inet haulier_x",
    ];
    assert_eq!(host.diff(&before).unwrap(), expected);
    assert_eq!(host.leftovers().unwrap(), expected);
}
