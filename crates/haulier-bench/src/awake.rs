//! Keeping the processors from sleeping.
//!
//! On a virtual machine an idle processor takes tens of microseconds to wake up. A closed-loop client
//! of an idle machine is then slower than the same client beside a migration, and "normal" is less
//! than what is measured during the rounds. A kernel that is asked for no latency at all polls
//! instead (seen with the haltpoll driver), for all phases and all contenders, and takes no time from
//! anybody. On request only: with source, destination and client on the same two processors, a
//! closed loop then uses both, and every moment of a migration is taken from it.

use std::fs::File;
use std::io::Write;

/// The kernel's file: the wish counts while it is open.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Processors stay awake until it is dropped.
#[derive(Debug)]
pub(crate) struct Awake {
    _wish: Option<File>,
}

impl Awake {
    /// Asks the kernel; says so if it cannot be asked, and goes on.
    pub(crate) fn keep() -> Awake {
        let microseconds = 0_i32.to_ne_bytes();
        let wish = File::options().write(true).open(LATENCY);
        let wish = wish.and_then(|mut file| file.write_all(&microseconds).map(|()| file));
        if let Err(error) = &wish {
            eprintln!(
                "bench: processors may sleep, which distorts closed loops: {LATENCY}: {error}"
            );
        }
        Awake { _wish: wish.ok() }
    }
}
