//! Runs the checks of the trackers on a kernel that is not the one tests run on, for instance in a
//! virtual machine: `tracker_check write-protect|soft-dirty PROGRAM [CHECK...]`.
//!
//! PROGRAM is `tests/tracked/tracked.c`, compiled (`cc -static -pthread`). Without names all checks
//! are run. The exit code is 0 if all passed, 1 if one failed, 2 if the kernel has no such tracker.

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use haulier_memory::tracker::{TrackerChoice, choose};

#[macro_use]
#[path = "../tests/tracked/mod.rs"]
mod tracked;

use tracked::{Stage, calls, changes, tasks};

macro_rules! list {
    ($($group:ident::$name:ident)*) => {
        &[$((stringify!($name), $group::$name)),*]
    };
}

/// A check and its name.
type Check = (&'static str, fn(&Stage));

const CHECKS: &[Check] = all_checks!(list);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [choice, program, names @ ..] = arguments.as_slice() else {
        eprintln!("usage: tracker_check write-protect|soft-dirty PROGRAM [CHECK...]");
        return ExitCode::from(2);
    };
    let kind = match choice.parse::<TrackerChoice>().map(choose) {
        Ok(Ok(Some(kind))) => kind,
        Ok(Ok(None)) => return ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let stage = Stage {
        program: program.into(),
        kind,
    };
    let big: Check = (
        "four_gibibytes_are_looked_at_in_one_go",
        changes::four_gibibytes_are_looked_at_in_one_go,
    );
    let named = |check: &&Check| names.iter().any(|name| name == check.0);
    let chosen: Vec<&Check> = if names.is_empty() {
        CHECKS.iter().collect()
    } else {
        // The one that needs much memory is only run by name.
        CHECKS.iter().chain([&big]).filter(named).collect()
    };
    let mut failed = 0;
    for (name, check) in &chosen {
        let passed = panic::catch_unwind(AssertUnwindSafe(|| check(&stage))).is_ok();
        println!("{} {name}", if passed { "ok    " } else { "FAILED" });
        failed += usize::from(!passed);
    }
    println!("{kind}: {} checks, {failed} failed", chosen.len());
    if failed == 0 && !chosen.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
