//! The files a target needs where it is restored, and whether they are there.
//!
//! CRIU opens files again by path, and maps the pages of a file that were never written from the
//! destination's copy: a library of the same size but other contents would corrupt the target
//! without a word. So what is mapped is compared by contents, before anything is frozen.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use haulier_proto::message::{FileNeeded, Problem};
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;

use crate::descriptors::{Descriptor, DescriptorKind, descriptors_of};
use crate::process::{self, ProcessTree};

/// Files that are open only for reading are compared by contents up to this size.
const LARGEST_COMPARED: u64 = 64 << 20;
/// Descriptors that CRIU cannot save, by their kernel name.
const UNSAVABLE: [&str; 4] = ["io_uring", "userfaultfd", "perf_event", "bpf-prog"];
/// Type bits of `st_mode`.
const TYPE_BITS: u32 = 0o170_000;
/// Permission bits of `st_mode`.
const PERMISSION_BITS: u32 = 0o7777;

/// How much of a file has to agree, least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Agreement {
    Existence,
    Size,
    Contents,
}

/// The files that a tree has open, mapped or as its directories.
///
/// # Errors
/// If `/proc` cannot be read; a process that ended meanwhile is left out.
pub fn needed_by(tree: &ProcessTree) -> io::Result<Vec<FileNeeded>> {
    let mut needs: BTreeMap<PathBuf, (Agreement, &'static str)> = BTreeMap::new();
    let mut locked: HashSet<PathBuf> = HashSet::new();
    let mut need = |path: PathBuf, agreement, purpose| {
        let entry = needs.entry(path).or_insert((agreement, purpose));
        if agreement > entry.0 {
            *entry = (agreement, purpose);
        }
    };
    for pid in tree.pids() {
        for (link, agreement, purpose) in [
            ("exe", Agreement::Contents, "program"),
            ("cwd", Agreement::Existence, "directory"),
            ("root", Agreement::Existence, "directory"),
        ] {
            if let Ok(path) = fs::read_link(format!("/proc/{pid}/{link}")) {
                need(path, agreement, purpose);
            }
        }
        for (path, shared) in mapped_files(pid) {
            // What is written through a mapping is the file's, and may change until the freeze.
            let agreement = match shared {
                true => Agreement::Existence,
                false => Agreement::Contents,
            };
            need(path, agreement, "mapped");
        }
        for descriptor in descriptors_of(pid).unwrap_or_default() {
            if let DescriptorKind::File(path) = descriptor.kind {
                if descriptor.locked {
                    locked.insert(path.clone());
                }
                // What the target writes to may change until the freeze: CRIU compares its size.
                let agreement = if descriptor.writable {
                    Agreement::Existence
                } else {
                    Agreement::Contents
                };
                need(path, agreement, "open");
            }
        }
    }
    let mut files = Vec::new();
    for (path, (agreement, purpose)) in needs.into_iter().filter(|(path, _)| is_comparable(path)) {
        if let Some(file) = describe(&path, agreement, purpose)? {
            files.push(FileNeeded {
                locked: locked.contains(&path),
                ..file
            });
        }
    }
    Ok(files)
}

/// What is wrong with the needed files on this host.
pub fn problems_with(files: &[FileNeeded]) -> Vec<Problem> {
    files.iter().filter_map(problem_with).collect()
}

/// Descriptors of the tree that cannot move with it, each with what to do about it.
pub fn obstacles_of(tree: &ProcessTree) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut pipes: HashMap<u64, String> = HashMap::new();
    for process in &tree.processes {
        let who = format!("{} ({})", process.name, process.pid);
        for descriptor in descriptors_of(process.pid).unwrap_or_default() {
            match &descriptor.kind {
                DescriptorKind::Pipe(inode) => {
                    let place = format!("{who} has, as descriptor {}, a pipe", descriptor.number);
                    pipes.entry(*inode).or_insert(place);
                }
                kind => found.extend(obstacle(&who, &descriptor, kind)),
            }
        }
    }
    found.extend(pipes_to_outside(tree, &pipes));
    found
}

fn obstacle(who: &str, descriptor: &Descriptor, kind: &DescriptorKind) -> Option<(String, String)> {
    let number = descriptor.number;
    match kind {
        DescriptorKind::Anonymous(name) if UNSAVABLE.contains(&name.as_str()) => Some((
            format!("{who} has, as descriptor {number}, {name}, which CRIU cannot save"),
            format!("have the program not use {name}"),
        )),
        DescriptorKind::File(path) if is_terminal(path) => Some((
            format!(
                "{who} has, as descriptor {number}, the terminal {}",
                path.display()
            ),
            "start it with its input and output redirected".to_owned(),
        )),
        _ => None,
    }
}

/// CRIU would restore such a pipe with nobody at its other end.
fn pipes_to_outside(tree: &ProcessTree, pipes: &HashMap<u64, String>) -> Vec<(String, String)> {
    if pipes.is_empty() {
        return Vec::new();
    }
    let inside: HashSet<i32> = tree.pids().into_iter().collect();
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if inside.contains(&pid) {
            continue;
        }
        for descriptor in descriptors_of(pid).unwrap_or_default() {
            let DescriptorKind::Pipe(inode) = descriptor.kind else {
                continue;
            };
            if let Some(place) = pipes.get(&inode) {
                // A child forked since the tree was read is no outsider.
                if process::descends_from(pid, tree.root()) {
                    break;
                }
                found.entry(inode).or_insert_with(|| {
                    let what = format!("{place} that process {pid} outside of the tree also has");
                    let remedy =
                        "move the tree that holds both, or redirect it to a file".to_owned();
                    (what, remedy)
                });
            }
        }
    }
    found.into_values().collect()
}

fn is_terminal(path: &Path) -> bool {
    path.starts_with("/dev/pts")
        || path.starts_with("/dev/tty")
        || path == Path::new("/dev/console")
}

/// Kernel file systems show other contents on every host, and CRIU deals with them.
fn is_comparable(path: &Path) -> bool {
    !path.starts_with("/proc") && !path.starts_with("/sys")
}

/// Files mapped by a process, without those that have no name any more.
/// Files that a process maps, and whether it writes to them through that mapping.
fn mapped_files(pid: i32) -> Vec<(PathBuf, bool)> {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut files: Vec<(PathBuf, bool)> = maps
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let start = line.iter().position(|byte| *byte == b'/')?;
            let path = &line[start..];
            let mode = line.split(|byte| *byte == b' ').nth(1)?;
            let shared = mode.get(1) == Some(&b'w') && mode.get(3) == Some(&b's');
            let deleted = path.ends_with(b" (deleted)");
            (!deleted).then(|| (OsStr::from_bytes(path).into(), shared))
        })
        .collect();
    files.dedup();
    files
}

fn describe(path: &Path, agreement: Agreement, purpose: &str) -> io::Result<Option<FileNeeded>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        // Removed or hidden since: CRIU will say what becomes of it.
        Err(_) => return Ok(None),
    };
    let mut needed = FileNeeded {
        path: path.as_os_str().as_bytes().to_vec(),
        mode: metadata.mode(),
        purpose: purpose.to_owned(),
        device: if is_device(&metadata) {
            metadata.rdev()
        } else {
            0
        },
        ..FileNeeded::default()
    };
    if metadata.is_file() && agreement >= Agreement::Size {
        needed.size = Some(metadata.len());
        let compared = purpose != "open" || metadata.len() <= LARGEST_COMPARED;
        if agreement == Agreement::Contents && compared {
            needed.blake3 = hash(path)?;
        }
    }
    Ok(Some(needed))
}

fn problem_with(needed: &FileNeeded) -> Option<Problem> {
    let path = PathBuf::from(std::ffi::OsString::from_vec(needed.path.clone()));
    let shown = path.display();
    let purpose = match needed.purpose.as_str() {
        "program" => "the target's program",
        "mapped" => "mapped by the target",
        "directory" => "the target's directory",
        _ => "open in the target",
    };
    let problem = |what: String, remedy: &str| {
        Some(Problem {
            what,
            remedy: remedy.to_owned(),
        })
    };
    let metadata = match fs::metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let remedy = match needed.mode & TYPE_BITS {
                0o040_000 => "create the directory there",
                _ => "copy it there, or share the file system it is on",
            };
            return problem(format!("{shown} ({purpose}) does not exist"), remedy);
        }
        Err(error) => {
            return problem(
                format!("{shown} ({purpose}) cannot be examined: {error}"),
                "see why",
            );
        }
    };
    if metadata.mode() & TYPE_BITS != needed.mode & TYPE_BITS {
        return problem(
            format!("{shown} ({purpose}) is another kind of file"),
            "replace it",
        );
    }
    if is_device(&metadata) && metadata.rdev() != needed.device {
        return problem(
            format!("{shown} ({purpose}) is another device"),
            "create the same node",
        );
    }
    if metadata.is_file() && metadata.mode() & PERMISSION_BITS != needed.mode & PERMISSION_BITS {
        let what = format!(
            "{shown} ({purpose}) has mode {:04o}, on the source {:04o}",
            metadata.mode() & PERMISSION_BITS,
            needed.mode & PERMISSION_BITS
        );
        return problem(what, "give it the same mode");
    }
    if needed.locked && metadata.is_file() && is_locked(&path) {
        let what = format!("{shown} ({purpose}) is locked by the target, and here as well");
        let remedy = "if both hosts share the file, this is the target's own lock, which cannot \
                      move between them: have the program release it";
        return problem(what, remedy);
    }
    if let Some(size) = needed.size {
        if metadata.len() != size {
            let what = format!(
                "{shown} ({purpose}) has {} bytes, on the source {size}",
                metadata.len()
            );
            return problem(what, "make it the same on both hosts");
        }
    }
    if !needed.blake3.is_empty() {
        match hash(&path) {
            Ok(hash) if hash == needed.blake3 => {}
            Ok(_) => {
                let what = format!("{shown} ({purpose}) has other contents than on the source");
                return problem(what, "install the same version on both hosts");
            }
            Err(error) => return problem(format!("{shown} cannot be read: {error}"), "see why"),
        }
    }
    None
}

fn is_device(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() || metadata.file_type().is_block_device()
}

/// Whether somebody holds a lock of either kind on the file. The restore would wait for it, while
/// the target stands still.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(path) else {
        return false;
    };
    let operation = FlockOperation::NonBlockingLockExclusive;
    let busy = |result: Result<(), Errno>| matches!(result, Err(Errno::AGAIN | Errno::ACCESS));
    // Both are released when the file is closed.
    busy(flock(&file, operation)) || busy(fcntl_lock(&file, operation))
}

fn hash(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().as_bytes().to_vec()),
            count => {
                hasher.update(&buffer[..count]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn this_process_needs_its_program_and_finds_it_here() {
        let tree = ProcessTree::read(std::process::id() as i32).unwrap();
        let files = needed_by(&tree).unwrap();
        let exe = std::env::current_exe().unwrap();
        let program = files.iter().find(|file| file.purpose == "program").unwrap();
        assert_eq!(program.path, exe.as_os_str().as_bytes());
        assert_eq!(program.blake3.len(), 32);
        assert!(files.iter().any(|file| file.purpose == "mapped"));
        let libraries: Vec<_> = files
            .into_iter()
            .filter(|file| file.purpose != "open")
            .collect();
        assert_eq!(problems_with(&libraries), []);
    }

    #[test]
    fn a_file_that_is_written_through_a_mapping_may_change() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, &[1; 4096]).unwrap();
        let code = "import mmap,sys; f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); f.close(); \
                    print(flush=True); sys.stdin.read()";
        let mut child = std::process::Command::new("python3")
            .args(["-c", code])
            .arg(file.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let files = needed_by(&ProcessTree::read(child.id() as i32).unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let path = file.path().as_os_str().as_bytes();
        let needed = files.iter().find(|needed| needed.path == path).unwrap();
        assert!(needed.blake3.is_empty());
        fs::write(file.path(), [2; 4096]).unwrap();
        assert_eq!(problem_with(needed), None);
    }

    #[test]
    fn every_difference_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        fs::write(&path, b"12345").unwrap();
        let needed = describe(&path, Agreement::Contents, "open")
            .unwrap()
            .unwrap();
        assert_eq!(problem_with(&needed), None);
        let complaint = || problem_with(&needed).unwrap().what;

        fs::write(&path, b"12346").unwrap();
        assert!(complaint().contains("other contents"));
        fs::write(&path, b"123456").unwrap();
        assert!(complaint().contains("has 6 bytes, on the source 5"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(complaint().contains("has mode 0600, on the source 0644"));
        fs::remove_file(&path).unwrap();
        assert!(complaint().contains("does not exist"));
        fs::create_dir(&path).unwrap();
        assert!(complaint().contains("another kind of file"));
    }

    #[test]
    fn a_child_forked_since_the_tree_was_read_is_no_outsider() {
        use std::process::{Command, Stdio};
        let tree = ProcessTree::read(std::process::id() as i32).unwrap();
        let mut child = Command::new("sleep")
            .arg("60")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let found = obstacles_of(&tree);
        child.kill().unwrap();
        child.wait().unwrap();
        let its = format!("process {} outside", child.id());
        assert!(
            !found.iter().any(|(what, _)| what.contains(&its)),
            "{found:?}"
        );
        assert!(process::descends_from(child.id() as i32, tree.root()));
    }

    #[test]
    fn a_lock_that_is_taken_already_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let needed = describe(file.path(), Agreement::Existence, "open")
            .unwrap()
            .unwrap();
        let needed = FileNeeded {
            locked: true,
            ..needed
        };
        assert_eq!(problem_with(&needed), None);
        flock(file.as_file(), FlockOperation::LockExclusive).unwrap();
        assert!(
            problem_with(&needed)
                .unwrap()
                .what
                .contains("is locked by the target")
        );
    }

    #[test]
    fn a_pipe_to_an_outsider_is_an_obstacle() {
        use std::process::{Command, Stdio};
        let mut child = Command::new("sleep")
            .arg("60")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let tree = ProcessTree::read(child.id() as i32).unwrap();
        let found = obstacles_of(&tree);
        child.kill().unwrap();
        child.wait().unwrap();
        let own = format!("process {} outside", std::process::id());
        assert!(
            found.iter().any(|(what, _)| what.contains(&own)),
            "{found:?}"
        );
    }
}
