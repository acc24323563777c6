use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Long enough for anything that is to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How long is listened for what must not come.
pub(crate) const SILENCE: Duration = Duration::from_millis(300);

/// A network namespace, gone with the object.
pub(crate) struct Namespace(Child);

impl Namespace {
    pub(crate) fn new() -> Self {
        // It ends with its standard input, so with us, whatever happens to us.
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n", "unshare --net failed");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = fs::File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        let inside = move || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            work()
        };
        match thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs a command inside that must succeed; returns what it printed.
    pub(crate) fn sh(&self, command: &str) -> String {
        let output = self.run(|| Command::new("sh").args(["-c", command]).output().unwrap());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn sysctl(&self, path: &str, value: &str) {
        self.run(|| fs::write(format!("/proc/sys/net/{path}"), value).unwrap());
    }

    pub(crate) fn listen(&self, address: SocketAddr) -> TcpListener {
        self.run(|| TcpListener::bind(address).unwrap())
    }

    pub(crate) fn connect(&self, to: SocketAddr, within: Duration) -> std::io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&to, within))
    }

    /// The line of the neighbour table about `ip`.
    pub(crate) fn neighbour(&self, ip: IpAddr) -> String {
        self.sh(&format!("ip neigh show {ip}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A host `b` with interface `vb`, and its neighbour `a` with `va`.
pub(crate) struct World {
    pub(crate) a: Namespace,
    pub(crate) b: Namespace,
}

/// Interface addresses: a is .1, b is .6; .5 is free to move.
pub(crate) const MOVED: [&str; 2] = ["10.0.0.5/24@vb", "fd00::5/64@vb"];
pub(crate) const STAYING: [&str; 2] = ["10.0.0.6", "fd00::6"];

/// None if this machine lacks what it takes, said loudly; a failure in CI.
pub(crate) fn world() -> Option<World> {
    for tool in ["unshare", "ip", "nft", "python3"] {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output();
        if !found.unwrap().status.success() {
            return skip(&format!("there is no {tool}"));
        }
    }
    if !rustix::process::geteuid().is_root() {
        return skip("only root can make network namespaces");
    }
    let world = World {
        a: Namespace::new(),
        b: Namespace::new(),
    };
    let World { a, b } = &world;
    a.sh(&format!(
        "ip link add va type veth peer name vb netns {}",
        b.pid()
    ));
    for (host, device, last) in [(a, "va", 1), (b, "vb", 6)] {
        // Failing to resolve shall not take seconds.
        for family in ["ipv4", "ipv6"] {
            host.sysctl(&format!("{family}/neigh/{device}/retrans_time_ms"), "50");
        }
        host.sysctl(&format!("ipv6/conf/{device}/accept_dad"), "0");
        host.sh(&format!(
            "ip link set lo up && ip link set {device} up && \
             ip addr add 10.0.0.{last}/24 dev {device} && \
             ip addr add fd00::{last}/64 dev {device} nodad"
        ));
    }
    Some(world)
}

fn skip(reason: &str) -> Option<World> {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "cannot test the network: {reason}"
    );
    eprintln!("!!! NOT TESTED: the network identity: {reason} !!!");
    None
}

/// Waits for something that must become true.
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// An open connection from `a` to a listener on `ip` in `b`: the listener and both ends.
pub(crate) fn connection(world: &World, ip: IpAddr) -> (TcpListener, TcpStream, TcpStream) {
    let listener = world.b.listen((ip, 0).into());
    let client = world
        .a
        .connect(listener.local_addr().unwrap(), PATIENCE)
        .unwrap();
    let (server, _) = listener.accept().unwrap();
    (listener, client, server)
}
