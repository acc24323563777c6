//! Finding the haulier-lab program, which plays supervisor and PID 1.

use crate::{Error, Result};
use std::env;
use std::path::{Path, PathBuf};

/// Where the haulier-lab program is: `HAULIER_LAB_BIN`, else beside the running program or in one
/// of the folders above it (a test runs from `target/<profile>/deps`, the program lies in
/// `target/<profile>`).
///
/// # Errors
/// [`Error::ProgramNotFound`], which says how to build it.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = env::var_os("HAULIER_LAB_BIN").map(PathBuf::from) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Error::ProgramOverride { path })
        };
    }
    let running = env::current_exe().map_err(Error::system("find the running program"))?;
    beside(&running).ok_or(Error::ProgramNotFound { beside: running })
}

fn beside(running: &Path) -> Option<PathBuf> {
    running
        .ancestors()
        .skip(1)
        .take(3)
        .map(|folder| folder.join("haulier-lab"))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::beside;
    use std::fs;

    #[test]
    fn a_test_finds_the_program_above_its_own_folder() {
        let target = tempfile::tempdir().unwrap();
        let debug = target.path().join("debug");
        fs::create_dir_all(debug.join("deps")).unwrap();
        assert_eq!(beside(&debug.join("deps/some_test-1234")), None);
        fs::write(debug.join("haulier-lab"), "").unwrap();
        let found = beside(&debug.join("deps/some_test-1234"));
        assert_eq!(found, Some(debug.join("haulier-lab")));
    }
}
