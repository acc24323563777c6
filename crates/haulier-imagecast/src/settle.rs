//! Dumps whose memory follows their restore, as a person sees them: which there are, and what is to become
//! of one that has to stand frozen until somebody decides. Their keepers are asked, over a socket that each
//! has in the directory of its dump: they live on when the proxy is gone.

use std::fs;
use std::path::Path;
use std::time::Duration;

use haulier_sys::wait::Wait;
use serde::{Deserialize, Serialize};

use crate::control::{self, ControlError};
use crate::local;

/// How the sockets are named; the keeper's pid is between.
const PREFIX: &str = "settle-";
const SUFFIX: &str = ".sock";
/// How long a keeper may take to say how its dump stands.
const LOOK: Duration = Duration::from_secs(10);

/// How the tasks of a dump go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// They run on here. Whoever says so vouches for it that they run nowhere else and never will.
    RunHere,
    /// They are killed here. Whoever says so vouches for it that they run at the destination, with all
    /// of their memory, or are not needed.
    Discard,
}

/// A dump whose tasks stand frozen here and may run at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// What it is called in [`settle`]: the pid of its keeper.
    pub name: String,
    /// Its target.
    pub target: String,
    /// Its number in the cache.
    pub snapshot: u64,
    /// Seconds since its restore was allowed to begin.
    pub seconds: u64,
    /// Why a person has to decide. None if its memory moves.
    pub doubt: Option<String>,
}

/// What a keeper is asked.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Question {
    Standing,
    Settle(Verdict),
}

/// What it says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    Standing(Standing),
    Settled(Standing),
    No(String),
}

/// The socket of a keeper.
pub(crate) fn socket_of(name: &str) -> String {
    format!("{PREFIX}{name}{SUFFIX}")
}

/// The dumps of a directory whose memory follows their restore, or cannot any more.
///
/// # Errors
/// [`ControlError::Directory`] if it cannot be read. A keeper that does not answer is passed over.
pub fn list(directory: &Path) -> Result<Vec<Standing>, ControlError> {
    let unreadable = |source| ControlError::Directory {
        path: directory.to_owned(),
        source,
    };
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.file_name();
        let name = file.to_str().and_then(|file| file.strip_prefix(PREFIX));
        let Some(name) = name.and_then(|name| name.strip_suffix(SUFFIX)) else {
            continue;
        };
        match ask(
            directory,
            name,
            Question::Standing,
            &Wait::uncancellable(LOOK),
        ) {
            Ok(Answer::Standing(standing)) => all.push(standing),
            // One that was killed leaves its socket behind.
            other => tracing::debug!("{name} says nothing: {other:?}"),
        }
    }
    all.sort_by(|a, b| (a.snapshot, &a.name).cmp(&(b.snapshot, &b.name)));
    Ok(all)
}

/// Settles a dump of a directory that waits for a person: the one of that name, or the only one. Returns
/// when CRIU has ended, with what it was.
///
/// # Errors
/// [`ControlError::No`] if there is none such, or its memory still moves; any other [`ControlError`] if
/// what became of it is not known.
pub fn settle(
    directory: &Path,
    name: Option<&str>,
    verdict: Verdict,
    wait: &Wait,
) -> Result<Standing, ControlError> {
    let standing = one_of(list(directory)?, name).map_err(ControlError::No)?;
    match ask(directory, &standing.name, Question::Settle(verdict), wait)? {
        Answer::Settled(standing) => Ok(standing),
        Answer::No(why) => Err(ControlError::No(why)),
        Answer::Standing(_) => Err(ControlError::No("another answer than asked for".to_owned())),
    }
}

/// Picks what is meant.
fn one_of(all: Vec<Standing>, name: Option<&str>) -> Result<Standing, String> {
    let names: Vec<String> = all.iter().map(|standing| standing.name.clone()).collect();
    let mut meant: Vec<Standing> = match name {
        Some(name) => all.into_iter().filter(|s| s.name == name).collect(),
        None => all.into_iter().filter(|s| s.doubt.is_some()).collect(),
    };
    match (meant.pop(), meant.is_empty(), name) {
        (Some(standing), true, _) => Ok(standing),
        (Some(_), false, _) => Err(format!(
            "several dumps of this directory stand here, name one of them: {}",
            names.join(", ")
        )),
        (None, _, Some(name)) => Err(format!(
            "no dump of this directory that stands here is called {name}"
        )),
        (None, _, None) if names.is_empty() => {
            Err("no dump of this directory stands here for a person to decide".to_owned())
        }
        (None, _, None) => Err(MOVING.to_owned()),
    }
}

/// Nothing to be settled.
pub(crate) const MOVING: &str =
    "the memory of the dump follows its restore: nothing is to be settled";

fn ask(
    directory: &Path,
    name: &str,
    question: Question,
    wait: &Wait,
) -> Result<Answer, ControlError> {
    let socket = local::connect(directory, &socket_of(name))?;
    control::send(&socket, &question, &wait.at_most(LOOK)).map_err(ControlError::Silent)?;
    control::receive(&socket, wait).map_err(ControlError::Silent)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(name: &str, doubt: Option<&str>) -> Standing {
        Standing {
            name: name.to_owned(),
            target: "main".to_owned(),
            snapshot: 1,
            seconds: 2,
            doubt: doubt.map(str::to_owned),
        }
    }

    #[test]
    fn only_what_is_meant_without_a_doubt_is_settled() {
        let moving = standing("1", None);
        let lost = standing("2", Some("lost"));
        let both = || vec![moving.clone(), lost.clone()];
        assert_eq!(one_of(both(), None).unwrap(), lost);
        assert_eq!(one_of(both(), Some("1")).unwrap(), moving);
        assert!(one_of(both(), Some("3")).unwrap_err().contains("called 3"));
        let two = vec![lost.clone(), standing("4", Some("lost"))];
        assert!(one_of(two, None).unwrap_err().ends_with("2, 4"));
        assert_eq!(one_of(vec![moving], None).unwrap_err(), MOVING);
        assert!(one_of(Vec::new(), None).is_err());
    }

    #[test]
    fn the_socket_of_a_keeper_that_was_killed_is_no_dump() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(socket_of("7"));
        drop(std::os::unix::net::UnixListener::bind(path).unwrap());
        fs::write(directory.path().join("settle-x"), "").unwrap();
        assert_eq!(list(directory.path()).unwrap(), []);
        assert!(list(&directory.path().join("none")).is_err());
    }
}
