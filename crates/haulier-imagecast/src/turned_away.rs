//! The end of a dump that nobody takes any further.
//!
//! One that leaves memory behind becomes a page server even if its images were not taken and its script
//! said no, and waits with its tasks frozen for somebody who fetches. Closed pipes end it before that, if
//! they come in time: what it writes without much memory fits into them.

use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use haulier_criu::page_server;
use haulier_targets::network::listeners_of;

use crate::keeper;

/// How often it is looked whether it listens.
const LOOK: Duration = Duration::from_millis(20);
/// How long its user's scripts may take.
const PATIENCE: Duration = Duration::from_secs(3600);
/// How long it may listen where it cannot be reached before that is said.
const REACH: Duration = Duration::from_secs(5);

/// Sees to it that a dump ends with its tasks running, however far it has come. `criu`: its pid, if it can
/// be seen from here. Returns at once.
pub(crate) fn turn_away(criu: Option<i32>) {
    // Not one within this process, whose listeners are not a dump's.
    let criu = criu.filter(|pid| *pid != std::process::id() as i32);
    let Some((pid, criu)) = criu.and_then(|pid| Some((pid, keeper::process(pid)?))) else {
        return;
    };
    let started = thread::Builder::new()
        .name("turned-away".to_owned())
        .spawn(move || see_off(pid, &criu));
    if let Err(error) = started {
        tracing::warn!("a dump that failed is not watched: {error}");
    }
}

/// Waits for its end. Only a page server listens.
fn see_off(pid: i32, criu: &OwnedFd) {
    let since = Instant::now();
    let mut listens: Option<Instant> = None;
    let mut said = false;
    while !keeper::has_ended(criu) && since.elapsed() < PATIENCE {
        // What cannot be read is that of one that ends.
        for address in listeners_of(&[pid]).unwrap_or_default() {
            if let Ok(Some(connection)) = page_server::connect(&address.to_string()) {
                page_server::refuse(connection);
                return;
            }
            let listens = *listens.get_or_insert_with(Instant::now);
            if !said && listens.elapsed() >= REACH {
                tracing::error!(
                    "the dump of CRIU {pid} failed, but it waits with its tasks frozen for somebody who \
                     fetches their memory, at {address}, which cannot be reached from here. To have \
                     them run on: kill -9 {pid}"
                );
                said = true;
            }
        }
        thread::sleep(LOOK);
    }
}
