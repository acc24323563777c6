//! Descriptors of other processes: rustix has both calls, they are named here so that all of
//! haulier's ways into another process are found in one crate.
//!
//! `pidfd_getfd` needs the right to ptrace the process, and gives a duplicate: offset, flags
//! and socket state are shared with the process, the descriptor number is ours.

pub use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
