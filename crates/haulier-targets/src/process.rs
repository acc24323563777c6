//! A tree of processes, as `/proc` shows it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The namespaces that a target of this driver shares with haulier.
const SHARED_NAMESPACES: [&str; 3] = ["mnt", "net", "pid"];

/// The process tree cannot be read, or is not one this driver can move.
#[derive(Debug, Error)]
pub enum TreeError {
    /// There is no such process.
    #[error("there is no process {0} on this host")]
    NoSuchProcess(i32),
    /// A file of `/proc` could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// A process of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// Its threads, itself included.
    pub threads: Vec<i32>,
    /// Its short name.
    pub name: String,
    /// Its state letter.
    pub state: char,
    /// Device number of its controlling terminal, zero if it has none.
    pub terminal: i32,
}

/// A process and all its descendants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessTree {
    /// The processes, parents first; the first one is the root.
    pub processes: Vec<Process>,
}

impl ProcessTree {
    /// Reads the tree below `root`. A process that ends meanwhile is left out.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn read(root: i32) -> Result<ProcessTree, TreeError> {
        let first = read_process(root)
            .map_err(|error| gone_or(error, TreeError::NoSuchProcess(root), root))?;
        let mut processes = vec![first];
        let mut next = 0;
        while let Some(process) = processes.get(next) {
            for child in children_of(process) {
                match read_process(child) {
                    Ok(child) => processes.push(child),
                    Err(error) if is_gone(&error) => {}
                    Err(error) => return Err(read_error(child, error)),
                }
            }
            next += 1;
        }
        Ok(ProcessTree { processes })
    }

    /// The root's number.
    pub fn root(&self) -> i32 {
        self.processes[0].pid
    }

    /// The root's short name.
    pub fn name(&self) -> &str {
        &self.processes[0].name
    }

    /// Numbers of the processes.
    pub fn pids(&self) -> Vec<i32> {
        self.processes.iter().map(|process| process.pid).collect()
    }

    /// Whether `pid` is one of them.
    pub fn contains(&self, pid: i32) -> bool {
        self.processes.iter().any(|process| process.pid == pid)
    }

    /// Whether the root's session is led by a process outside of the tree.
    pub fn session_is_outside(&self) -> bool {
        !self.contains(self.processes[0].session)
    }

    /// Numbers that have to be free where the tree is restored: processes, threads, and the groups
    /// and sessions within the tree, whose leaders CRIU creates anew.
    pub fn numbers(&self) -> BTreeSet<i32> {
        let outside = self.processes[0].session;
        let shell_job = self.session_is_outside();
        let mut numbers = BTreeSet::new();
        for process in &self.processes {
            numbers.extend(&process.threads);
            numbers.insert(process.pid);
            if !(shell_job && process.session == outside) {
                numbers.extend([process.group, process.session]);
            }
        }
        numbers.remove(&0);
        numbers
    }

    /// What stands in the way of moving this tree at all: in its own state, whatever the
    /// destination. Each with what to do about it.
    pub fn obstacles(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let own = std::process::id() as i32;
        if self.contains(own) {
            found.push((
                "haulier itself runs inside of the process tree".to_owned(),
                "start haulier from outside of it, e.g. from another login".to_owned(),
            ));
        }
        for process in &self.processes {
            let who = format!("{} ({})", process.name, process.pid);
            if process.terminal != 0 {
                found.push((
                    format!("{who} has a controlling terminal"),
                    "start it without one: with setsid, or by a service manager".to_owned(),
                ));
            }
            if let Some(tracer) = tracer_of(process.pid) {
                found.push((
                    format!("{who} is traced by process {tracer}"),
                    "detach the debugger or tracer".to_owned(),
                ));
            }
            if let Some(namespace) = foreign_namespace(process.pid) {
                found.push((
                    format!("{who} is in a {namespace} namespace of its own"),
                    "containers cannot be moved by this version: run haulier inside of it"
                        .to_owned(),
                ));
            }
        }
        if self.processes[0].state == 'Z' {
            found.push((
                format!("process {} has ended and waits to be reaped", self.root()),
                "name a process that runs".to_owned(),
            ));
        }
        found
    }

    /// Bytes of memory that belong to the tree alone: anonymous, shared and swapped out.
    pub fn memory_bytes(&self) -> u64 {
        self.processes
            .iter()
            .map(|process| memory_of(process.pid))
            .sum()
    }
}

/// Whether a process is below `root` now, or has ended.
pub(crate) fn descends_from(pid: i32, root: i32) -> bool {
    let mut at = pid;
    while at != root {
        match read_process(at) {
            // No parent, or one outside of this PID namespace.
            Ok(process) if process.parent == 0 => return false,
            Ok(process) => at = process.parent,
            Err(_) => return true,
        }
    }
    true
}

/// When a process began, in ticks since the system did: with its number, what tells it from others.
/// `None` if it is not there.
pub fn began(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The 22nd of proc_pid_stat(5); the state is the third, behind the name.
    let (_, after) = stat.rsplit_once(") ")?;
    after.split(' ').nth(22 - 3)?.parse().ok()
}

fn read_process(pid: i32) -> io::Result<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat");
    // The name stands in parentheses and may itself hold parentheses and spaces.
    let (before, after) = stat.rsplit_once(") ").ok_or_else(malformed)?;
    let name = before.split_once('(').ok_or_else(malformed)?.1.to_owned();
    let fields: Vec<&str> = after.split(' ').collect();
    let number = |index: usize| -> io::Result<i32> {
        fields
            .get(index)
            .and_then(|field| field.parse().ok())
            .ok_or_else(malformed)
    };
    Ok(Process {
        pid,
        parent: number(1)?,
        group: number(2)?,
        session: number(3)?,
        threads: threads_of(pid)?,
        name,
        state: fields[0].chars().next().ok_or_else(malformed)?,
        terminal: number(4)?,
    })
}

fn threads_of(pid: i32) -> io::Result<Vec<i32>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(thread) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            threads.push(thread);
        }
    }
    Ok(threads)
}

fn children_of(process: &Process) -> Vec<i32> {
    let of_thread = |thread: &i32| {
        let file = format!("/proc/{}/task/{thread}/children", process.pid);
        fs::read_to_string(file).unwrap_or_default()
    };
    let lists: Vec<String> = process.threads.iter().map(of_thread).collect();
    lists
        .iter()
        .flat_map(|l| l.split_whitespace())
        .filter_map(|n| n.parse().ok())
        .collect()
}

fn tracer_of(pid: i32) -> Option<i32> {
    status_number(pid, "TracerPid:")
        .and_then(|n| i32::try_from(n).ok())
        .filter(|t| *t != 0)
}

fn memory_of(pid: i32) -> u64 {
    let kibibytes = |field| status_number(pid, field).unwrap_or(0);
    (kibibytes("RssAnon:") + kibibytes("RssShmem:") + kibibytes("VmSwap:")) * 1024
}

fn status_number(pid: i32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

fn foreign_namespace(pid: i32) -> Option<&'static str> {
    let link =
        |who: &str, name: &str| fs::read_link(Path::new("/proc").join(who).join("ns").join(name));
    SHARED_NAMESPACES.into_iter().find(|name| {
        match (link("self", name), link(&pid.to_string(), name)) {
            (Ok(own), Ok(its)) => own != its,
            _ => false,
        }
    })
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

fn gone_or(error: io::Error, gone: TreeError, pid: i32) -> TreeError {
    if is_gone(&error) {
        gone
    } else {
        read_error(pid, error)
    }
}

fn read_error(pid: i32, source: io::Error) -> TreeError {
    TreeError::Read {
        path: PathBuf::from(format!("/proc/{pid}/stat")),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_tree_is_read_with_its_children_and_numbers() {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 60 & sleep 60 & echo ready; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let root = child.id() as i32;
        let tree = ProcessTree::read(root).unwrap();
        assert_eq!(tree.root(), root);
        assert_eq!(tree.processes.len(), 3, "{tree:?}");
        assert!(
            tree.processes[1..]
                .iter()
                .all(|process| process.parent == root)
        );
        assert!(tree.session_is_outside());
        assert!(tree.pids().iter().all(|pid| tree.numbers().contains(pid)));
        assert!(!tree.numbers().contains(&tree.processes[0].session));
        assert!(tree.memory_bytes() > 0);
        for pid in tree.pids() {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        child.wait().unwrap();
        assert!(matches!(
            ProcessTree::read(root),
            Err(TreeError::NoSuchProcess(_))
        ));
    }

    #[test]
    fn the_tree_that_haulier_runs_in_is_an_obstacle() {
        let tree = ProcessTree::read(std::process::id() as i32).unwrap();
        assert!(
            tree.obstacles()
                .iter()
                .any(|(what, _)| what.contains("haulier itself"))
        );
    }
}
