//! Real tasks are tracked, and end up at the destination as they are.

use haulier_memory::tracker::{TrackerChoice, TrackerKind, choose};

#[macro_use]
mod tracked;

use tracked::{Stage, calls, changes, tasks};

fn check(check: fn(&Stage)) {
    for choice in [TrackerChoice::WriteProtect, TrackerChoice::SoftDirty] {
        match choose(choice) {
            Ok(Some(kind)) => {
                let directory = tempfile::tempdir().unwrap();
                let program = tracked::compile(directory.path());
                check(&Stage { program, kind });
            }
            Ok(None) => unreachable!("one was asked for"),
            // Soft-dirty bits are rare; write protection is what CI has to have.
            Err(reason) if choice == TrackerChoice::SoftDirty => println!("{reason}"),
            Err(reason) => {
                assert!(std::env::var_os("CI").is_none(), "{reason}");
                println!("{reason}");
            }
        }
    }
    assert_eq!(TrackerKind::WriteProtect.to_string(), "write-protect");
}

macro_rules! checks {
    ($($group:ident::$name:ident)*) => {
        $(#[test]
        fn $name() {
            check($group::$name);
        })*
    };
}

all_checks!(checks);
