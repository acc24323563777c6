//! Image names, as a peer may send them.

use std::fmt;

use thiserror::Error;

/// Longest name: CRIU's are some 30 characters.
const LONGEST: usize = 128;

/// The name of an image: one component of a path, of harmless characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName(String);

/// A name that could lead out of the image directory, or that no CRIU uses.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not the name of an image")]
pub struct BadName(String);

impl ImageName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`BadName`] for anything but letters, digits, `.`, `-`, `_` (not leading with a dot).
    pub fn new(name: &str) -> Result<ImageName, BadName> {
        let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let good = !name.is_empty()
            && name.len() <= LONGEST
            && !name.starts_with('.')
            && name.chars().all(harmless);
        if good {
            Ok(ImageName(name.to_owned()))
        } else {
            Err(BadName(name.to_owned()))
        }
    }

    /// Whether it is one of CRIU's images that are pages and nothing else.
    pub fn is_of_pages(&self) -> bool {
        self.0
            .strip_prefix("pages-")
            .and_then(|rest| rest.strip_suffix(".img"))
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_lead_out_of_the_directory() {
        for good in ["pages-1.img", "core-4242.img", "tmpfs-dev-12.tar.gz.img"] {
            assert_eq!(ImageName::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(LONGEST + 1);
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/etc/passwd",
            "a\0b",
            ".hidden",
            &long,
        ] {
            assert!(ImageName::new(bad).is_err(), "{bad:?}");
        }
    }
}
