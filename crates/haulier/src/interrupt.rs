//! Ctrl-C and its kind: they cancel what can be cancelled.

use std::io;
use std::thread;

use haulier_sys::wait::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// A token that SIGINT, SIGTERM and SIGHUP cancel. They no longer end the process by themselves.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn cancel_on_signals() -> io::Result<Cancel> {
    let cancel = Cancel::new()?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let token = cancel.clone();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for _ in &mut signals {
                token.cancel();
            }
        })?;
    Ok(cancel)
}
