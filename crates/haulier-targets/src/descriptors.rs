//! Open descriptors of a process, as `/proc` shows them.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What a descriptor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DescriptorKind {
    /// A file with a name: regular, directory, device or named pipe.
    File(PathBuf),
    /// A file whose name has been removed; CRIU takes its contents along.
    Unlinked(PathBuf),
    /// A pipe without a name, by inode number.
    Pipe(u64),
    /// A socket, by inode number.
    Socket(u64),
    /// Something else without a name: `eventfd`, `userfaultfd`, `io_uring`, ...
    Anonymous(String),
}

/// An open descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// What it is.
    pub kind: DescriptorKind,
    /// Whether it is open for writing.
    pub writable: bool,
    /// Whether the process holds a lock on the file through it.
    pub locked: bool,
}

/// The open descriptors of a process. One that is closed meanwhile is left out.
///
/// # Errors
/// If the process is gone or may not be looked at.
pub fn descriptors_of(pid: i32) -> io::Result<Vec<Descriptor>> {
    let mut descriptors = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Some(number) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(link) = fs::read_link(entry.path()) else {
            continue;
        };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        descriptors.push(Descriptor {
            number,
            kind: kind_of(link),
            writable: is_writable(&info),
            locked: info.lines().any(|line| line.starts_with("lock:")),
        });
    }
    descriptors.sort_by_key(|descriptor| descriptor.number);
    Ok(descriptors)
}

fn kind_of(link: PathBuf) -> DescriptorKind {
    let bytes = link.as_os_str().as_bytes();
    if bytes.starts_with(b"/") {
        return match bytes.strip_suffix(b" (deleted)") {
            Some(name) => DescriptorKind::Unlinked(std::ffi::OsStr::from_bytes(name).into()),
            None => DescriptorKind::File(link),
        };
    }
    let text = link.to_string_lossy();
    let inode = |prefix: &str| -> Option<u64> {
        text.strip_prefix(prefix)?
            .strip_prefix(":[")?
            .strip_suffix(']')?
            .parse()
            .ok()
    };
    if let Some(inode) = inode("pipe") {
        return DescriptorKind::Pipe(inode);
    }
    if let Some(inode) = inode("socket") {
        return DescriptorKind::Socket(inode);
    }
    let name = text.strip_prefix("anon_inode:").unwrap_or(&text);
    DescriptorKind::Anonymous(name.trim_matches(['[', ']']).to_owned())
}

fn is_writable(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags
        .and_then(|text| u32::from_str_radix(text.trim(), 8).ok())
        .unwrap_or(0);
    // O_WRONLY is 1 and O_RDWR is 2 on every architecture.
    flags & 3 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("named");
        let named = fs::File::create(&path).unwrap();
        let lock = rustix::fs::FlockOperation::LockExclusive;
        rustix::fs::flock(&named, lock).unwrap();
        let gone = tempfile::tempfile_in(directory.path()).unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let all = descriptors_of(std::process::id() as i32).unwrap();
        use std::os::fd::AsRawFd;
        let find = |fd: i32| {
            all.iter()
                .find(|descriptor| descriptor.number == fd)
                .unwrap()
        };
        let path = fs::canonicalize(path).unwrap();
        assert_eq!(find(named.as_raw_fd()).kind, DescriptorKind::File(path));
        assert!(find(named.as_raw_fd()).writable);
        assert!(find(named.as_raw_fd()).locked);
        assert!(!find(gone.as_raw_fd()).locked);
        assert!(matches!(
            find(gone.as_raw_fd()).kind,
            DescriptorKind::Unlinked(_)
        ));
        assert!(matches!(
            find(reader.as_raw_fd()).kind,
            DescriptorKind::Pipe(_)
        ));
        assert!(!find(reader.as_raw_fd()).writable);
        assert!(matches!(
            find(socket.as_raw_fd()).kind,
            DescriptorKind::Socket(_)
        ));
        assert_eq!(
            kind_of(PathBuf::from("anon_inode:[io_uring]")),
            DescriptorKind::Anonymous("io_uring".to_owned())
        );
    }
}
