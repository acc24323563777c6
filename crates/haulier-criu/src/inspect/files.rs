//! What descriptors and mappings are of.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::InspectError;
use super::entries::{FileEntry, InetEntry, RegularEntry, RemapEntry, UnixEntry};
use super::source::Images;
use crate::image::ImageKind;

/// CRIU's number for files with a path.
const REGULAR: u32 = 1;
/// Longest path that is kept: the system's are up to 4096 bytes.
const LONGEST_PATH: usize = 8192;

/// What a descriptor is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A device, `/dev/null` for one.
    Device,
    /// One end of a pipe.
    Pipe,
    /// A pipe that has a name.
    Fifo,
    /// A TCP socket.
    Tcp,
    /// A UDP socket.
    Udp,
    /// An internet socket of another protocol.
    Inet,
    /// A unix socket.
    Unix,
    /// An eventfd.
    Eventfd,
    /// An epoll instance.
    Eventpoll,
    /// An inotify instance.
    Inotify,
    /// A signalfd.
    Signalfd,
    /// A packet socket.
    PacketSocket,
    /// A terminal.
    Terminal,
    /// A fanotify instance.
    Fanotify,
    /// A netlink socket.
    Netlink,
    /// A file of a namespace.
    Namespace,
    /// A tun or tap interface.
    Tun,
    /// Something that the restore has to be given.
    External,
    /// A timerfd.
    Timerfd,
    /// A memfd.
    Memfd,
    /// A BPF map.
    BpfMap,
    /// A pidfd.
    Pidfd,
    /// CRIU has a kind that is not known here.
    Unknown,
}

impl FileKind {
    fn of(number: u32) -> FileKind {
        match number {
            1 => FileKind::File,
            2 => FileKind::Pipe,
            3 => FileKind::Fifo,
            4 => FileKind::Inet,
            5 => FileKind::Unix,
            6 => FileKind::Eventfd,
            7 => FileKind::Eventpoll,
            8 => FileKind::Inotify,
            9 => FileKind::Signalfd,
            10 => FileKind::PacketSocket,
            11 => FileKind::Terminal,
            12 => FileKind::Fanotify,
            13 => FileKind::Netlink,
            14 => FileKind::Namespace,
            15 => FileKind::Tun,
            16 => FileKind::External,
            17 => FileKind::Timerfd,
            18 => FileKind::Memfd,
            19 => FileKind::BpfMap,
            20 => FileKind::Pidfd,
            _ => FileKind::Unknown,
        }
    }

    /// Its name, as in JSON.
    pub fn word(self) -> &'static str {
        match self {
            FileKind::File => "file",
            FileKind::Directory => "directory",
            FileKind::Device => "device",
            FileKind::Pipe => "pipe",
            FileKind::Fifo => "fifo",
            FileKind::Tcp => "tcp",
            FileKind::Udp => "udp",
            FileKind::Inet => "inet",
            FileKind::Unix => "unix",
            FileKind::Eventfd => "eventfd",
            FileKind::Eventpoll => "eventpoll",
            FileKind::Inotify => "inotify",
            FileKind::Signalfd => "signalfd",
            FileKind::PacketSocket => "packet-socket",
            FileKind::Terminal => "terminal",
            FileKind::Fanotify => "fanotify",
            FileKind::Netlink => "netlink",
            FileKind::Namespace => "namespace",
            FileKind::Tun => "tun",
            FileKind::External => "external",
            FileKind::Timerfd => "timerfd",
            FileKind::Memfd => "memfd",
            FileKind::BpfMap => "bpf-map",
            FileKind::Pidfd => "pidfd",
            FileKind::Unknown => "unknown",
        }
    }
}

impl Serialize for FileKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

/// What a descriptor is of, as far as the images say it plainly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpenFile {
    /// What it is.
    pub kind: FileKind,
    /// Its path; the name of a unix socket, with a `@` in front if it is abstract.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Whether no name leads to it any more, or another than its own.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
    /// Where in a file the next read or write is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<u64>,
    /// How a TCP or unix socket stands: `listening`, `established`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<&'static str>,
    /// An internet socket's own address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    /// That of its peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<SocketAddr>,
    /// The pipe's number, which both ends have; a unix socket's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u32>,
    /// The number of a unix socket's peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<u32>,
    /// Which end of a pipe: `read` or `write`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<&'static str>,
}

impl OpenFile {
    fn new(kind: FileKind) -> OpenFile {
        OpenFile {
            kind,
            path: None,
            deleted: false,
            position: None,
            state: None,
            local: None,
            remote: None,
            number: None,
            peer: None,
            end: None,
        }
    }
}

/// Everything that was open, by CRIU's kind and number.
pub(super) struct Files(BTreeMap<(u32, u32), Arc<OpenFile>>);

impl Files {
    /// Reads `files.img`.
    pub(super) fn read(images: &mut Images<'_>) -> Result<Files, InspectError> {
        let mut files = BTreeMap::new();
        // Some have their names from others.
        let mut named = Vec::new();
        if let Some(mut image) = images.open("files.img", ImageKind::Files)? {
            while let Some(entry) = image.next::<FileEntry>()? {
                images.count(1)?;
                let fifo = entry.fifo.and_then(|fifo| fifo.file);
                let terminal = entry.terminal.and_then(|terminal| terminal.file);
                let key = (entry.kind, entry.id);
                named.extend(fifo.or(terminal).map(|file| (key, file)));
                files.insert(key, file(&entry));
            }
        }
        if let Some(mut image) = images.open("remap-fpath.img", ImageKind::RemapPaths)? {
            while let Some(entry) = image.next::<RemapEntry>()? {
                // Not a file of /proc, whose task has ended.
                let gone = matches!(entry.kind, None | Some(0 | 1));
                if let Some(file) = files.get_mut(&(REGULAR, entry.file)).filter(|_| gone) {
                    file.deleted = true;
                }
            }
        }
        for (key, name) in named {
            let path = files.get(&(REGULAR, name)).and_then(|f| f.path.clone());
            if let Some(file) = files.get_mut(&key) {
                file.path = path;
            }
        }
        let files = files.into_iter().map(|(key, file)| (key, Arc::new(file)));
        Ok(Files(files.collect()))
    }

    /// That of a descriptor.
    pub(super) fn get(&self, kind: u32, id: u32) -> Arc<OpenFile> {
        match self.0.get(&(kind, id)) {
            Some(file) => Arc::clone(file),
            None => Arc::new(OpenFile::new(FileKind::of(kind))),
        }
    }

    /// The path of a file that is mapped.
    pub(super) fn path(&self, id: u32) -> Option<String> {
        self.0.get(&(REGULAR, id)).and_then(|f| f.path.clone())
    }
}

fn file(entry: &FileEntry) -> OpenFile {
    let mut file = OpenFile::new(FileKind::of(entry.kind));
    match (file.kind, entry) {
        (
            FileKind::File,
            FileEntry {
                regular: Some(regular),
                ..
            },
        ) => of_regular(&mut file, regular),
        (
            FileKind::Inet,
            FileEntry {
                inet: Some(inet), ..
            },
        ) => of_inet(&mut file, inet),
        (
            FileKind::Unix,
            FileEntry {
                unix: Some(unix), ..
            },
        ) => of_unix(&mut file, unix),
        (
            FileKind::Pipe,
            FileEntry {
                pipe: Some(pipe), ..
            },
        ) => {
            file.number = Some(pipe.pipe);
            file.end = match pipe.flags & 3 {
                0 => Some("read"),
                1 => Some("write"),
                _ => None,
            };
        }
        _ => {}
    }
    file
}

fn of_regular(file: &mut OpenFile, entry: &RegularEntry) {
    const TYPE: u32 = 0o170_000;
    file.kind = match entry.mode.map(|mode| mode & TYPE) {
        Some(0o040_000) => FileKind::Directory,
        Some(0o020_000 | 0o060_000) => FileKind::Device,
        _ => FileKind::File,
    };
    file.path = Some(path(&entry.path));
    if file.kind == FileKind::File {
        file.position = Some(entry.position);
    }
}

fn of_inet(file: &mut OpenFile, entry: &InetEntry) {
    const TCP: u32 = 6;
    const UDP: u32 = 17;
    file.local = address(entry.family, &entry.local, entry.local_port);
    file.remote = address(entry.family, &entry.remote, entry.remote_port)
        .filter(|remote| remote.port() != 0 || !remote.ip().is_unspecified());
    // Of a stream or of datagrams; others may have the same protocol.
    match (entry.kind, entry.protocol) {
        (1, TCP) => {
            file.kind = FileKind::Tcp;
            file.state = Some(state(entry.state));
        }
        (2, UDP) => file.kind = FileKind::Udp,
        _ => {}
    }
}

fn of_unix(file: &mut OpenFile, entry: &UnixEntry) {
    file.number = Some(entry.inode);
    file.peer = Some(entry.peer).filter(|peer| *peer != 0);
    file.state = Some(state(entry.state));
    file.path = match &entry.name[..] {
        [] => None,
        [0, name @ ..] => Some(format!("@{}", path(name))),
        name => {
            let end = name.iter().position(|byte| *byte == 0);
            let name = path(&name[..end.unwrap_or(name.len())]);
            Some(match &entry.directory {
                Some(directory) => format!("{}/{name}", path(directory)),
                None => name,
            })
        }
    };
}

fn address(family: u32, words: &[u32], port: u32) -> Option<SocketAddr> {
    let port = u16::try_from(port).ok()?;
    let bytes = |word: &u32| word.to_le_bytes();
    let ip = match (family, words) {
        (2, [word, ..]) => IpAddr::V4(Ipv4Addr::from(bytes(word))),
        (10, [a, b, c, d, ..]) => {
            let mut all = [0; 16];
            for (place, word) in all.chunks_mut(4).zip([a, b, c, d]) {
                place.copy_from_slice(&bytes(word));
            }
            IpAddr::V6(Ipv6Addr::from(all))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// A state of a socket, as the kernel numbers those of TCP and uses some for others.
fn state(number: u32) -> &'static str {
    match number {
        1 => "established",
        2 => "syn-sent",
        3 => "syn-received",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        6 => "time-wait",
        7 => "closed",
        8 => "close-wait",
        9 => "last-ack",
        10 => "listening",
        11 => "closing",
        _ => "unknown",
    }
}

fn path(bytes: &[u8]) -> String {
    text(&bytes[..bytes.len().min(LONGEST_PATH)])
}

/// As good as it can be shown.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
