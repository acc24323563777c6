//! Real tasks are tracked, and end up at the destination as they are.

use haulier_memory::tracker::{TrackerChoice, TrackerKind, choose};

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

checks! {
    changes::writes_are_seen_once
    changes::writes_of_the_kernel_are_seen
    changes::discarded_pages_are_written_when_they_come_back
    changes::pages_discarded_before_the_end_are_not_kept
    changes::a_moved_mapping_is_written_and_its_old_place_is_gone
    changes::a_new_mapping_at_an_old_place_is_written
    changes::mappings_without_access_and_reservations_cost_nothing
    changes::locked_memory_is_not_tracked
    changes::huge_pages_are_tracked_as_small_ones
    changes::ten_thousand_mappings_are_tracked
    changes::a_task_that_does_anything_is_the_same_at_the_end
    changes::threads_that_write_all_the_time_lose_nothing
    tasks::a_forked_child_is_wholly_written
    tasks::an_exec_begins_anew
    tasks::a_task_that_ends_is_gone
    tasks::tasks_that_end_while_they_are_looked_at_are_no_error
    tasks::a_task_with_a_userfaultfd_of_its_own_is_sent_whole
    tasks::a_task_of_another_user_is_tracked
    tasks::a_task_under_seccomp_survives_and_is_tracked
    tasks::a_task_that_is_traced_by_another_is_sent_whole
    tasks::nothing_of_the_tracker_is_left
    calls::blocking_calls_go_on
    calls::signals_that_come_meanwhile_are_delivered
    calls::a_timer_of_a_thousand_signals_a_second_goes_on
    calls::running_threads_are_not_disturbed
    calls::a_stopped_task_stays_stopped
}
