use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, MoveIp};

/// A TCP connection, by its two ends. IPv4-mapped IPv6 addresses are written as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Connection {
    /// The end that the process has.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

/// A connection that a process has, and what it is in the middle of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OpenConnection {
    /// Its ends.
    pub connection: Connection,
    /// Where it stands.
    pub state: TcpState,
}

/// States of a connection that a process can have, include/net/tcp_states.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TcpState {
    /// Open in both directions.
    Established,
    /// Asked to be opened from here.
    SynSent,
    /// Asked to be opened from there.
    SynReceived,
    /// Closed here, not acknowledged.
    FinWait1,
    /// Closed here.
    FinWait2,
    /// Closed there.
    CloseWait,
    /// Closed there, then here, not acknowledged.
    LastAck,
    /// Closed at both ends at once.
    Closing,
}

/// The TCP connections that the processes have descriptors of: any state but listening,
/// unconnected and time-wait.
///
/// Connections that wait in a listener's backlog, not accepted yet, belong to no process and
/// are not found. Nor are sockets of a network namespace that none of the processes is in.
///
/// # Errors
/// [`Error::Proc`] if a process may not be looked at, [`Error::ProcFormat`]. A process that has
/// ended has no connections.
pub fn connections_of(pids: &[i32]) -> Result<Vec<OpenConnection>, Error> {
    let sockets = sockets_of(pids)?.into_iter();
    let mut open: Vec<OpenConnection> = sockets
        .filter_map(|socket| {
            let connection = Connection {
                local: socket.local,
                remote: socket.remote,
            };
            Some(OpenConnection {
                connection,
                state: connected(socket.state)?,
            })
        })
        .collect();
    open.sort_unstable();
    open.dedup();
    Ok(open)
}

/// The local addresses that the processes listen on, the unspecified address included.
///
/// # Errors
/// As for [`connections_of`].
pub fn listeners_of(pids: &[i32]) -> Result<Vec<SocketAddr>, Error> {
    let sockets = sockets_of(pids)?
        .into_iter()
        .filter(|socket| socket.state == LISTEN);
    let mut addresses: Vec<SocketAddr> = sockets.map(|socket| socket.local).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// The local addresses that anything listens on in the network namespace of the calling thread.
///
/// # Errors
/// [`Error::Proc`], [`Error::ProcFormat`].
pub fn listening_here() -> Result<Vec<SocketAddr>, Error> {
    let sockets = sockets_seen_by("thread-self")?.into_iter();
    Ok(sockets
        .filter(|socket| socket.state == LISTEN)
        .map(|socket| socket.local)
        .collect())
}

/// Those of `open` that cannot go on elsewhere when the addresses `moved` go along: their local
/// address stays behind, or they are loopback connections to a process that does (the other
/// end is not in `open`).
pub fn stranded(open: &[OpenConnection], moved: &[MoveIp]) -> Vec<OpenConnection> {
    let ours: HashSet<Connection> = open.iter().map(|open| open.connection).collect();
    let stays = |open: &&OpenConnection| {
        let Connection { local, remote } = open.connection;
        if local.ip().is_loopback() {
            !ours.contains(&Connection {
                local: remote,
                remote: local,
            })
        } else {
            !moved.iter().any(|address| address.ip() == local.ip())
        }
    };
    open.iter().filter(stays).copied().collect()
}

const LISTEN: u8 = 10;

fn connected(state: u8) -> Option<TcpState> {
    Some(match state {
        1 => TcpState::Established,
        2 => TcpState::SynSent,
        3 | 12 => TcpState::SynReceived,
        4 => TcpState::FinWait1,
        5 => TcpState::FinWait2,
        8 => TcpState::CloseWait,
        9 => TcpState::LastAck,
        11 => TcpState::Closing,
        _ => return None,
    })
}

/// A line of /proc/PID/net/tcp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    inode: u64,
}

/// A process that ended since its number was read has none: a shell's children come and go.
fn sockets_of(pids: &[i32]) -> Result<Vec<Socket>, Error> {
    let mut inodes = HashSet::new();
    let mut namespaces: BTreeMap<PathBuf, Vec<i32>> = BTreeMap::new();
    for pid in pids {
        let Some(sockets) = unless_ended(*pid, descriptors(*pid))? else {
            continue;
        };
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let namespace = fs::read_link(&path).map_err(|source| Error::Proc { path, source });
        if let Some(namespace) = unless_ended(*pid, namespace)? {
            inodes.extend(sockets.into_iter().map(|(_, inode)| inode));
            namespaces.entry(namespace).or_default().push(*pid);
        }
    }
    let mut found = HashMap::new();
    for members in namespaces.values() {
        // Each of them shows the whole namespace.
        for pid in members {
            let Some(sockets) = unless_ended(*pid, sockets_seen_by(&pid.to_string()))? else {
                continue;
            };
            let ours = sockets.into_iter().filter(|s| inodes.contains(&s.inode));
            found.extend(ours.map(|socket| (socket.inode, socket)));
            break;
        }
    }
    Ok(found.into_values().collect())
}

/// `None` if reading about a process failed because it has ended, reaped or not.
pub(super) fn unless_ended<T>(pid: i32, result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(Error::Proc { .. }) if has_ended(pid) => Ok(None),
        other => other.map(Some),
    }
}

fn has_ended(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The name before the state may hold parentheses itself.
        Ok(stat) => stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}

/// All TCP sockets of the network namespace that a process (a number, or `thread-self`) is in.
fn sockets_seen_by(process: &str) -> Result<Vec<Socket>, Error> {
    let mut sockets = Vec::new();
    for table in ["tcp", "tcp6"] {
        let path = PathBuf::from(format!("/proc/{process}/net/{table}"));
        let fail = |source| Error::Proc {
            path: path.clone(),
            source,
        };
        let file = match File::open(&path) {
            // The kernel has no IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table == "tcp6" => continue,
            file => file.map_err(fail)?,
        };
        for line in BufReader::new(file).lines().skip(1) {
            let line = line.map_err(fail)?;
            let malformed = || Error::ProcFormat {
                path: path.clone(),
                line: line.clone(),
            };
            sockets.push(parse(&line).ok_or_else(malformed)?);
        }
    }
    Ok(sockets)
}

/// The descriptors of a process that are sockets, of whatever kind, with their inodes.
pub(super) fn descriptors(pid: i32) -> Result<Vec<(i32, u64)>, Error> {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let fail = |source| Error::Proc {
        path: folder.clone(),
        source,
    };
    let mut sockets = Vec::new();
    for entry in fs::read_dir(&folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let target = match fs::read_link(entry.path()) {
            // Closed since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            target => target.map_err(|source| Error::Proc {
                path: entry.path(),
                source,
            })?,
        };
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let (Some(number), Some(inode)) = (number, inode(&target)) {
            sockets.push((number, inode));
        }
    }
    Ok(sockets)
}

fn inode(target: &Path) -> Option<u64> {
    target
        .to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

fn parse(line: &str) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace();
    let local = endpoint(fields.nth(1)?)?;
    let remote = endpoint(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    // Queues, timer, retransmissions, user and timeout come before the inode.
    let inode = fields.nth(5)?.parse().ok()?;
    Some(Socket {
        local,
        remote,
        state,
        inode,
    })
}

/// `0500000A:0050`: words of the address in network order, printed as numbers of this
/// machine's; the port as a number.
fn endpoint(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut octets = Vec::with_capacity(16);
    for start in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?;
        octets.extend(word.to_ne_bytes());
    }
    if let Ok(octets) = <[u8; 4]>::try_from(octets.as_slice()) {
        return Some((Ipv4Addr::from(octets), port).into());
    }
    let ip = Ipv6Addr::from(<[u8; 16]>::try_from(octets.as_slice()).ok()?);
    Some(match ip.to_ipv4_mapped() {
        Some(ip) => (ip, port).into(),
        None => (ip, port).into(),
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn lines_of_both_tables_are_read() {
        let line = "   0: 0500000A:0050 0100000A:8F3C 01 00000000:00000000 00:00000000 00000000 \
                    0        0 4711 1 0000000000000000 20 4 30 10 -1";
        let socket = parse(line).unwrap();
        assert_eq!(socket.local, address("10.0.0.5:80"));
        assert_eq!(socket.remote, address("10.0.0.1:36668"));
        assert_eq!((socket.state, socket.inode), (1, 4711));
        let ends = "000000FD000000000000000005000000:0050 0000000000000000FFFF00000100000A:0051";
        let line = line.replace("0500000A:0050 0100000A:8F3C", ends);
        // The words are as a little-endian machine prints them.
        let socket = parse(&line).unwrap();
        assert_eq!(socket.local, address("[fd00::5]:80"));
        assert_eq!(socket.remote, address("10.0.0.1:81"));
        assert_eq!(parse("0: 0500000A"), None);
    }

    #[test]
    fn processes_that_have_ended_are_no_obstacle() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        while !has_ended(pid) {
            std::thread::yield_now();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap();
        let found = |pid| listeners_of(&[pid, std::process::id() as i32]).unwrap();
        assert!(found(pid).contains(&own), "not reaped");
        child.wait().unwrap();
        assert!(found(pid).contains(&own), "reaped");
        assert!(!has_ended(std::process::id() as i32));
    }

    #[test]
    fn our_own_connections_and_listeners_are_found() {
        let pid = std::process::id() as i32;
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        let connection = Connection {
            local: client.local_addr().unwrap(),
            remote: client.peer_addr().unwrap(),
        };
        let reverse = Connection {
            local: connection.remote,
            remote: connection.local,
        };
        let open = connections_of(&[pid, pid]).unwrap();
        for wanted in [connection, reverse] {
            let found: Vec<_> = open
                .iter()
                .filter(|open| open.connection == wanted)
                .collect();
            assert_eq!(found.len(), 1, "{wanted:?} in {open:?}");
            assert_eq!(found[0].state, TcpState::Established);
        }
        assert!(
            listeners_of(&[pid])
                .unwrap()
                .contains(&listener.local_addr().unwrap())
        );
        drop(server);
        let open = connections_of(&[pid]).unwrap();
        assert!(open.contains(&OpenConnection {
            connection,
            state: TcpState::CloseWait
        }));
        assert!(!open.iter().any(|open| open.connection == reverse));
    }

    #[test]
    fn what_stays_behind_is_stranded() {
        let open = |local: &str, remote: &str| OpenConnection {
            connection: Connection {
                local: address(local),
                remote: address(remote),
            },
            state: TcpState::Established,
        };
        let moves = open("10.0.0.5:80", "10.0.0.9:1000");
        let stays = open("10.0.0.6:80", "10.0.0.9:1000");
        let inside = [
            open("127.0.0.1:1", "127.0.0.1:2"),
            open("127.0.0.1:2", "127.0.0.1:1"),
        ];
        let outside = open("127.0.0.1:1", "127.0.0.1:3");
        let all = [&[moves, stays, outside][..], &inside].concat();
        let moved: MoveIp = "10.0.0.5/24@eth0".parse().unwrap();
        assert_eq!(stranded(&all, &[moved]), [stays, outside]);
        assert_eq!(stranded(&all, &[]), [moves, stays, outside]);
    }
}
