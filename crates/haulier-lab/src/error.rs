//! What can go wrong in a lab.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Why a lab or one of its hosts could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which path; for a file of a host, the path inside the host.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A system call that concerns no file failed.
    #[error("cannot {operation}")]
    System {
        /// What was tried, as a verb with its object.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The program that plays the hosts' PID 1 was not found.
    #[error(
        "the haulier-lab program is not beside {} nor in the folders above; \
         build it with `cargo build -p haulier-lab`, or set HAULIER_LAB_BIN to it",
        beside.display()
    )]
    ProgramNotFound {
        /// The running program, from which the search started.
        beside: PathBuf,
    },
    /// `HAULIER_LAB_BIN` names something that is not a file.
    #[error("HAULIER_LAB_BIN is {}, which is not a file", path.display())]
    ProgramOverride {
        /// The value of the variable.
        path: PathBuf,
    },
    /// A lab needs root: it makes namespaces, mounts and cgroups.
    #[error("a lab needs root (it makes namespaces, mounts and cgroups); use sudo")]
    NotRoot,
    /// No cgroup v2 hierarchy is mounted.
    #[error("no cgroup2 file system is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")]
    NoCgroup2,
    /// The number of hosts asked for is out of range.
    #[error("{asked} hosts asked for; a lab has 1 to {limit}", limit = crate::MAX_HOSTS)]
    HostCount {
        /// What was asked for.
        asked: usize,
    },
    /// The name of a lab cannot be used for files and cgroups.
    #[error("`{name}` is no name for a lab: 1 to 40 letters, digits, `-` or `_`")]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// There is no running lab of that name.
    #[error("no lab named `{name}` is running; start one with `haulier-lab up --name {name}`")]
    NotRunning {
        /// The name asked for.
        name: String,
    },
    /// A lab of that name is running already.
    #[error(
        "a lab named `{name}` is running already; stop it with `haulier-lab down --name {name}`"
    )]
    AlreadyRunning {
        /// The name asked for.
        name: String,
    },
    /// The lab has no host of that number or name.
    #[error("lab `{lab}` has no host `{host}`")]
    NoSuchHost {
        /// Name of the lab.
        lab: String,
        /// What was asked for.
        host: String,
    },
    /// The supervisor ended before the lab was ready.
    #[error("the lab did not start: {log}")]
    Start {
        /// What the supervisor said.
        log: String,
    },
    /// A tool such as `ip` or `tc` failed.
    #[error("`{command}` failed with {status}: {stderr}")]
    Tool {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// PID 1 of a host refused a request.
    #[error("{host}: {message}")]
    Refused {
        /// The host.
        host: String,
        /// PID 1's reason.
        message: String,
    },
    /// PID 1 of a host answered something that does not belong here.
    #[error("{host}: PID 1 answered out of turn: {answer}")]
    Protocol {
        /// The host.
        host: String,
        /// What came.
        answer: String,
    },
    /// The host is gone: its PID 1 ended.
    #[error("{host} is down")]
    HostDown {
        /// The host.
        host: String,
    },
    /// Something took longer than it was given.
    #[error("{what}: not within {deadline:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        deadline: Duration,
    },
    /// A link rate that cannot be read.
    #[error("`{text}` is no rate; write for example 100mbit, 1gbit or 2.5gbit")]
    BadRate {
        /// What was given.
        text: String,
    },
    /// A server answered a checking client with an error or with something unexpected.
    #[error("{server}: {problem}")]
    Answer {
        /// The server's address.
        server: std::net::SocketAddr,
        /// What was expected and what came.
        problem: String,
    },
    /// A message between the library and a host's PID 1 could not be written or read as JSON.
    #[error("a lab message is malformed")]
    Message(#[from] serde_json::Error),
}

/// `Result` with the lab's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Adds operation and path to an I/O error; for `map_err`.
    pub(crate) fn file(
        operation: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::File {
            operation,
            path,
            source,
        }
    }

    /// As [`Error::file`] for rustix's errors.
    pub(crate) fn file_errno(
        operation: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(rustix::io::Errno) -> Error {
        let with = Error::file(operation, path);
        move |errno| with(errno.into())
    }

    /// Adds what was tried; for `map_err`.
    pub(crate) fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::System {
            operation,
            source: source.into(),
        }
    }

    /// The error with all its causes on one line, for a log or a message to another process.
    pub(crate) fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            line.push_str(": ");
            line.push_str(&cause.to_string());
            next = cause.source();
        }
        line
    }
}
