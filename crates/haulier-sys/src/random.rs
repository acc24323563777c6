//! Random bytes of the system.

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills an array with random bytes.
///
/// # Panics
/// If the kernel has no generator, which no supported one lacks.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("getrandom: {errno}"),
        }
    }
    bytes
}
