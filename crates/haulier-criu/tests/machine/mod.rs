//! What the tests need of the machine.

use std::time::Duration;

use haulier_criu::Criu;
use haulier_sys::wait::Wait;

pub(crate) fn soon() -> Wait {
    Wait::uncancellable(Duration::from_secs(30))
}

/// The CRIU to test with, or `None`, loudly, where there is none and nobody promised one.
pub(crate) fn criu() -> Option<Criu> {
    match Criu::find(None) {
        Ok(criu) => Some(criu),
        Err(error) if std::env::var_os("CI").is_none() => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
