//! Against the kernel, in memory of this process's own.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

const PAGE: usize = 4096;

fn wait_events(uffd: &Userfaultfd) -> Vec<Event> {
    let mut events = Vec::new();
    let limit = Timespec::try_from(Duration::from_secs(10)).unwrap();
    let ready =
        poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&limit)).expect("poll of the uffd");
    assert_eq!(ready, 1, "no event within the limit");
    uffd.read_events(&mut events).unwrap();
    events
}

/// Not with `EVENT_FORK`: any fork by another test would wait for this one to read the event.
/// The descriptor comes second to be dropped first: with it open, `munmap` waits for a reader.
fn registered(pages: usize) -> (Arc<Region>, Userfaultfd) {
    with_features(pages, CRIU_FEATURES & !features::EVENT_FORK)
}

fn with_features(pages: usize, features: u64) -> (Arc<Region>, Userfaultfd) {
    let uffd = Userfaultfd::create(features).expect("userfaultfd (needs root)");
    let region = Arc::new(Region::map(pages * PAGE).unwrap());
    uffd.register_missing(&region).unwrap();
    (region, uffd)
}

#[test]
fn a_fault_is_reported_and_answered() {
    let (region, uffd) = registered(2);
    let reader = {
        let region = region.clone();
        thread::spawn(move || region.read(PAGE + 5))
    };
    let events = wait_events(&uffd);
    let [Event::Pagefault { address, .. }] = events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(address & !0xFFF, region.address() + PAGE as u64);
    uffd.copy(region.address() + PAGE as u64, &[7; PAGE])
        .unwrap();
    assert_eq!(reader.join().unwrap(), 7);
}

#[test]
fn a_present_page_stops_a_copy_exactly_there() {
    let (region, uffd) = registered(4);
    uffd.zero(region.address() + 2 * PAGE as u64, PAGE).unwrap();
    let error = uffd.copy(region.address(), &[9; 4 * PAGE]).unwrap_err();
    assert_eq!(
        error,
        PlaceError {
            done: 2 * PAGE,
            obstacle: Obstacle::Exists
        }
    );
    uffd.copy(region.address() + 3 * PAGE as u64, &[9; PAGE])
        .unwrap();
    let bytes: Vec<u8> = (0..4).map(|page| region.read(page * PAGE)).collect();
    assert_eq!(bytes, [9, 9, 0, 9]);
}

#[test]
fn an_unregistered_range_refuses_pages_and_reads_as_zero() {
    let (region, uffd) = registered(2);
    uffd.unregister(region.address(), PAGE as u64).unwrap();
    assert_eq!(region.read(0), 0);
    let error = uffd.copy(region.address(), &[1; PAGE]).unwrap_err();
    assert_eq!(error.obstacle, Obstacle::NotRegistered);
}

#[test]
fn unmap_remove_and_remap_are_reported() {
    let (region, uffd) = registered(8);
    let start = region.address();
    let moving = Region::map(8 * PAGE).unwrap();
    uffd.register_missing(&moving).unwrap();
    let old = moving.address();
    let actor = thread::spawn(move || {
        region.unmap(0..PAGE).unwrap();
        region.discard(PAGE..3 * PAGE).unwrap();
        (region, moving.relocate().unwrap())
    });
    let mut events = Vec::new();
    // The move ends with an unmap event for the old range.
    while events.len() < 4 {
        events.extend(wait_events(&uffd));
    }
    let (region, moved) = actor.join().unwrap();
    let page = PAGE as u64;
    assert!(
        matches!(events[0], Event::Unmap { start: s, end } if s == start && end == start + page),
        "{events:?}"
    );
    assert!(
        matches!(events[1], Event::Remove { start: s, end }
            if s == start + page && end == start + 3 * page),
        "{events:?}"
    );
    assert!(
        matches!(events[2], Event::Remap { from, to, len }
            if from == old && to == moved.address() && len == 8 * page),
        "{events:?}"
    );
    assert!(
        matches!(events[3], Event::Unmap { start: s, .. } if s == old),
        "{events:?}"
    );
    drop(uffd);
    drop((region, moved));
}

#[test]
fn a_fork_brings_a_descriptor() {
    use std::os::unix::process::CommandExt;
    let (region, uffd) = with_features(2, CRIU_FEATURES);
    // Setting a group makes the standard library fork (rather than vfork), which is what copies
    // the address space and so reports an event.
    let forker = thread::spawn(|| {
        std::process::Command::new("true")
            .gid(rustix::process::getgid().as_raw())
            .status()
    });
    let events = wait_events(&uffd);
    assert!(matches!(events[..], [Event::Fork { .. }, ..]), "{events:?}");
    // Closing it lets go whoever else forks meanwhile.
    drop(uffd);
    assert!(forker.join().unwrap().unwrap().success());
    drop(region);
}
