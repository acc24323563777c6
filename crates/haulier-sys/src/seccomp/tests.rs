use std::io::Read;
use std::process::{Child, Stdio};

use super::*;
use crate::pagemap::category::{FILE, GUARD, PFNZERO, PRESENT, SWAPPED};

/// Asks twice for the pages of itself that are there, and prints number, end of the walk and first
/// region of each answer.
const ASKS: &str = r#"
import ctypes, fcntl, mmap, struct
room = 2
vec = ctypes.create_string_buffer(24 * room)
memory = mmap.mmap(-1, 8 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:4096] = b"x" * 4096
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with open("/proc/self/pagemap") as pagemap:
    for _ in range(2):
        ask = bytearray(struct.pack("12Q", 96, 0, start, start + 8 * 4096, 0,
            ctypes.addressof(vec), room, 0, 0x24, 0x24, 0x18, 0x18))
        found = fcntl.ioctl(pagemap, 0xc0606610, ask)
        end = struct.unpack("12Q", ask)[4]
        first = struct.unpack("3Q", vec.raw[:24])
        print(found, (end - start) // 4096, (first[0] - start) // 4096, (first[1] - start) // 4096)
"#;

fn asker() -> (Child, Option<Listener>) {
    let mut command = Command::new("python3");
    command.args(["-c", ASKS]).stdout(Stdio::piped());
    let arming = hold_scans(&mut command).unwrap();
    let child = command.spawn().unwrap();
    (child, arming.listener())
}

fn printed(mut child: Child) -> String {
    let mut text = String::new();
    let output = child.stdout.as_mut().unwrap();
    output.read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    text
}

#[test]
fn what_is_answered_is_what_the_program_sees() {
    let (child, listener) = asker();
    let listener = listener.expect("seccomp's user notification (root, Linux 5.19)");

    let held = listener.receive().unwrap();
    assert_eq!(held.subject(), Some(child.id() as i32));
    let request = held.request().unwrap();
    assert_eq!(
        request.any_but_none(),
        Some((PRESENT | SWAPPED, FILE | PFNZERO))
    );
    let (start, end) = request.addresses();
    assert_eq!(end - start, 8 * 4096);
    let at = |page: u64| Region {
        start: start + page * 4096,
        end: start + (page + 1) * 4096,
        categories: PRESENT,
    };
    // One more than there is room for.
    listener
        .answer(&held, &request, &[at(2), at(4), at(6)])
        .unwrap();

    let held = listener.receive().unwrap();
    listener.let_through(&held).unwrap();
    assert_eq!(printed(child), "2 5 2 3\n1 8 0 1\n");
}

#[test]
fn a_listener_that_is_closed_fails_the_requests() {
    let (mut child, listener) = asker();
    drop(listener);
    assert!(!child.wait().unwrap().success());
}

#[test]
fn the_end_of_the_program_hangs_up() {
    let mut command = Command::new("true");
    let arming = hold_scans(&mut command).unwrap();
    let mut child = command.spawn().unwrap();
    let listener = arming.listener().unwrap();
    child.wait().unwrap();
    let mut fds = [rustix::event::PollFd::new(
        &listener,
        rustix::event::PollFlags::IN,
    )];
    assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
    assert!(fds[0].revents().contains(rustix::event::PollFlags::HUP));
}

#[test]
fn what_asks_for_more_is_told_apart() {
    let plain = ScanArg {
        size: 96,
        flags: 0,
        start: 0,
        end: 4096,
        walk_end: 0,
        vec: 0,
        vec_len: 1,
        max_pages: 0,
        category_inverted: 0,
        category_mask: GUARD,
        category_anyof_mask: 0,
        return_mask: GUARD,
    };
    assert_eq!(Request(plain).any_but_none(), None);
}
