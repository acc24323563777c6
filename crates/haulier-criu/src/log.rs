//! Digging the cause out of a CRIU log.
//!
//! CRIU logs errors from the inside out: where something fails first, then each caller. So the
//! first error line is the cause, once the lines are left out that it logs as errors although
//! nothing is wrong (it complains about resource limits on every start without CAP_SYS_RESOURCE,
//! and that is also what its RPC answer gives as the message).

use std::fs;
use std::path::Path;

/// Parts of error lines that CRIU logs although it goes on without harm (seen with CRIU 4.2).
const HARMLESS: &[&str] = &[
    "rlimit",
    "RLIMIT_NOFILE",
    "Can't read link on fd",
    "Unable to get sockopt",
    "libcap",
    "image streaming",
    "inconsistent time",
    "could not open /dev/kfd",
    "Could not load plugin",
];

/// Longest part of a log that is searched, from its end: a log of level 4 may be large.
const LONGEST: usize = 4 << 20;

/// Why CRIU failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// CRIU's line that names the cause, without time and source position.
    pub line: String,
    /// The error lines after it, the same way.
    pub consequences: Vec<String>,
    /// What to do about it, if the line is a known one.
    pub remedy: Option<&'static str>,
}

/// Known causes: a part of CRIU's line, and what to do. The first that fits counts.
const REMEDIES: &[(&str, &str)] = &[
    (
        "has bad size",
        "make the file the same on both hosts, or share it between them",
    ),
    (
        "has bad build-ID",
        "install the same build of the program and its libraries on both hosts",
    ),
    (
        "has bad mode",
        "give the file the same permissions on both hosts",
    ),
    (
        "has bad checksum",
        "install the same build of the program and its libraries on both hosts",
    ),
    (
        "Can't open file",
        "put the file at the same path on the destination, or share it",
    ),
    (
        "Can't open dir",
        "create the directory at the same path on the destination",
    ),
    (
        "Can't fork for",
        "free the number on the destination, or run the target in a PID namespace",
    ),
    (
        "tcp-established",
        "its connections need --move-ip with the address they are bound to",
    ),
    (
        "Can't bind inet socket",
        "have its address move along with --move-ip, or, if it does, see that address and port are \
         free there",
    ),
    (
        "Can't connect inet socket",
        "have its address move along with --move-ip, or, if it does, try again",
    ),
    (
        "In-flight connection",
        "a client was just connecting: try again",
    ),
    (
        "external socket is used",
        "it talks to a process outside of the tree by a Unix socket",
    ),
    (
        "half of stream unix connection",
        "it talks to a process outside of the tree by a Unix socket",
    ),
    (
        "Can't lookup mount",
        "it has a file open that no mount of this host leads to: close it",
    ),
    (
        "ghost file",
        "an unlinked file it has open is too large for the images",
    ),
    (
        "userfaultfd",
        "it uses userfaultfd itself, which CRIU cannot save",
    ),
    ("io_uring", "it uses io_uring, which CRIU cannot save"),
    (
        "perf_event",
        "it has a performance counter open, which CRIU cannot save",
    ),
    (
        "is not a terminal",
        "start it without a terminal, with setsid",
    ),
    ("tty", "start it without a terminal, with setsid"),
    (
        "already being traced",
        "stop the debugger or tracer that holds it",
    ),
    (
        "seize task",
        "stop the debugger or tracer that holds it, or check that it is not a zombie",
    ),
    (
        "stacked on dumpee",
        "it is under ptrace or seccomp supervision that CRIU cannot lift",
    ),
    ("No space left", "free memory or disk space on that host"),
    ("Cannot allocate memory", "free memory on that host"),
];

/// The cause in the log at `path`; `None` if there is no log or no error in it.
pub fn reason_in(path: &Path) -> Option<Reason> {
    let bytes = fs::read(path).ok()?;
    let tail = &bytes[bytes.len().saturating_sub(LONGEST)..];
    reason(&String::from_utf8_lossy(tail))
}

fn reason(log: &str) -> Option<Reason> {
    let mut errors = log
        .lines()
        .filter_map(error_text)
        .filter(|text| !HARMLESS.iter().any(|harmless| text.contains(harmless)));
    let line = errors.next()?.to_owned();
    let consequences: Vec<String> = errors.map(str::to_owned).collect();
    let remedy = std::iter::once(&line)
        .chain(&consequences)
        .find_map(|text| REMEDIES.iter().find(|(part, _)| text.contains(part)))
        .map(|(_, remedy)| *remedy);
    Some(Reason {
        line,
        consequences,
        remedy,
    })
}

/// The text of `(00.01)  1234: Error (criu/file.c:99): text`, `None` for another line.
fn error_text(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("Error (")?;
    let (_, text) = rest.split_once("): ")?;
    Some(text.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESTORE_LOG: &str = "\
(00.000012) Error (criu/util.c:1200): Can't set rlimit RLIMIT_NOFILE: Operation not permitted
(00.004) pie: 5: Warn something
(00.005017)   4242: Error (criu/files-reg.c:2330): File srv/data has bad size 5 (expect 9)
(00.005100)   4242: Error (criu/files.c:1210): Unable to open fd=3 id=0x1
(00.006000) Error (criu/cr-restore.c:2345): Restoring FAILED.
";

    #[test]
    fn the_first_error_that_means_something_is_the_cause() {
        let reason = reason(RESTORE_LOG).unwrap();
        assert_eq!(reason.line, "File srv/data has bad size 5 (expect 9)");
        assert_eq!(reason.consequences.len(), 2);
        assert_eq!(
            reason.remedy,
            Some("make the file the same on both hosts, or share it between them")
        );
    }

    #[test]
    fn a_log_without_a_cause_has_none() {
        assert_eq!(reason(RESTORE_LOG.lines().next().unwrap()), None);
        assert_eq!(reason(""), None);
        assert_eq!(reason_in(Path::new("/nonexistent/log")), None);
    }
}
