//! Finding a CRIU that haulier can work with.

use std::env;
use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use haulier_sys::wait::Wait;
use thiserror::Error;

use crate::messages::{Features, Kind, Request};
use crate::swrk::{RpcError, Swrk};

/// Where `scripts/criu` installs a CRIU of its own.
pub const PRIVATE_PREFIX: &str = "/opt/haulier/criu/sbin/criu";
/// The variable that names the CRIU to use.
pub const VARIABLE: &str = "HAULIER_CRIU";
/// How long CRIU may take to tell its version.
const PROBE_TIME: Duration = Duration::from_secs(20);

/// The oldest CRIU that will do: kernels from 6.13 on need it (their vvar layout), and the hooks
/// and options that haulier uses exist since 3.19.
pub const OLDEST: Version = Version {
    major: 4,
    minor: 1,
    sublevel: 0,
};

/// A version of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Sub-level, zero if there is none.
    pub sublevel: u32,
}

impl Version {
    /// The version as one number, as it stands in haulier's messages.
    pub fn number(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.sublevel
    }

    /// The version from [`Version::number`].
    pub fn from_number(number: u32) -> Version {
        Version {
            major: number / 10_000,
            minor: number / 100 % 100,
            sublevel: number % 100,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel > 0 {
            write!(f, ".{}", self.sublevel)
        } else {
            Ok(())
        }
    }
}

/// A CRIU program that answers and is new enough.
#[derive(Debug, Clone)]
pub struct Criu {
    path: PathBuf,
    version: Version,
    found_by: &'static str,
    lazy_pages: bool,
}

/// Why no CRIU can be used.
#[derive(Debug, Error)]
pub enum FindError {
    /// The one that was named does not do.
    #[error("{path}, named by {named_by}, cannot be used: {reason}")]
    Named {
        /// The program.
        path: PathBuf,
        /// Who named it.
        named_by: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// None was found that does.
    #[error(
        "no usable CRIU (at least {OLDEST}) was found{tried}. Install one, or run scripts/criu, \
         which builds one into /opt/haulier/criu, or name one with --criu or {VARIABLE}"
    )]
    None {
        /// What was tried and why it does not do.
        tried: String,
    },
}

impl Criu {
    /// Finds a CRIU: `named` on the command line, else the variable [`VARIABLE`], else `criu` in
    /// `PATH`, else the [`PRIVATE_PREFIX`]. One that is named is used or refused; of the others
    /// the first that is new enough is taken.
    ///
    /// # Errors
    /// See [`FindError`].
    pub fn find(named: Option<&Path>) -> Result<Criu, FindError> {
        if let Some(path) = named {
            return Criu::named(path, "--criu");
        }
        if let Some(path) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            return Criu::named(Path::new(&path), VARIABLE);
        }
        let mut tried = String::new();
        let in_path = search_path("criu").map(|path| (path, "PATH"));
        let private = Some((PathBuf::from(PRIVATE_PREFIX), "scripts/criu"));
        for (path, found_by) in in_path.into_iter().chain(private) {
            match Criu::probe(&path, found_by) {
                Ok(criu) => return Ok(criu),
                Err(reason) => tried += &format!("; {}: {reason}", path.display()),
            }
        }
        Err(FindError::None { tried })
    }

    /// The program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Who or what led to it.
    pub fn found_by(&self) -> &'static str {
        self.found_by
    }

    /// Whether it and this kernel can restore lazily, which every live mode needs.
    pub fn has_lazy_pages(&self) -> bool {
        self.lazy_pages
    }

    fn named(path: &Path, named_by: &'static str) -> Result<Criu, FindError> {
        Criu::probe(path, named_by).map_err(|reason| FindError::Named {
            path: path.to_owned(),
            named_by,
            reason,
        })
    }

    fn probe(path: &Path, found_by: &'static str) -> Result<Criu, String> {
        if !is_executable(path).map_err(|error| error.to_string())? {
            return Err("it is not an executable file".to_owned());
        }
        let unknown = Version {
            major: 0,
            minor: 0,
            sublevel: 0,
        };
        let mut criu = Criu {
            path: path.to_owned(),
            version: unknown,
            found_by,
            lazy_pages: false,
        };
        criu.version = ask_version(&criu).map_err(|error| describe(&error))?;
        if criu.version < OLDEST {
            return Err(format!("it is version {}", criu.version));
        }
        criu.lazy_pages = ask_lazy_pages(&criu).map_err(|error| describe(&error))?;
        Ok(criu)
    }
}

impl fmt::Display for Criu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CRIU {} ({}, by {})",
            self.version,
            self.path.display(),
            self.found_by
        )
    }
}

fn describe(error: &RpcError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn ask_version(criu: &Criu) -> Result<Version, RpcError> {
    let mut swrk = Swrk::start(criu.path(), Vec::new())?;
    swrk.send(&Request {
        kind: Kind::Version as i32,
        ..Request::default()
    })?;
    let response = swrk.receive(&Wait::uncancellable(PROBE_TIME))?;
    let numbers = response.version.ok_or(RpcError::Unexpected {
        got: format!("kind {}", response.kind),
        expected: "its version",
    })?;
    let part = |number: i32| u32::try_from(number).unwrap_or(0).min(99);
    Ok(Version {
        major: part(numbers.major),
        minor: part(numbers.minor),
        sublevel: part(numbers.sublevel.unwrap_or(0)),
    })
}

fn ask_lazy_pages(criu: &Criu) -> Result<bool, RpcError> {
    let mut swrk = Swrk::start(criu.path(), Vec::new())?;
    let features = Features {
        lazy_pages: Some(true),
        memory_tracking: None,
    };
    swrk.send(&Request {
        kind: Kind::FeatureCheck as i32,
        features: Some(features),
        ..Request::default()
    })?;
    let response = swrk.receive(&Wait::uncancellable(PROBE_TIME))?;
    Ok(response
        .features
        .and_then(|features| features.lazy_pages)
        .unwrap_or(false))
}

fn search_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|candidate| is_executable(candidate).unwrap_or(false))
}

fn is_executable(path: &Path) -> io::Result<bool> {
    let metadata = path.metadata()?;
    Ok(metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_and_survive_their_number() {
        let version = Version {
            major: 4,
            minor: 2,
            sublevel: 1,
        };
        assert_eq!(Version::from_number(version.number()), version);
        assert!(version > OLDEST);
        assert_eq!(version.to_string(), "4.2.1");
        assert_eq!(OLDEST.to_string(), "4.1");
    }

    #[test]
    fn a_named_program_that_is_not_criu_is_refused_by_name() {
        let error = Criu::find(Some(Path::new("/bin/true"))).unwrap_err();
        assert!(
            matches!(
                error,
                FindError::Named {
                    named_by: "--criu",
                    ..
                }
            ),
            "{error}"
        );
        let error = Criu::find(Some(Path::new("/nonexistent/criu"))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/criu"), "{error}");
    }
}
