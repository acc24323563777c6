//! All unsafe code of haulier: userfaultfd, remote memory, packets, descriptors.

pub mod breakpoints;
pub mod datagram;
pub mod inherited;
pub mod namespaces;
mod option;
pub mod packet;
pub mod pagemap;
pub mod pages;
pub mod pidfd;
pub mod priority;
pub mod process_memory;
pub mod random;
pub mod remote;
pub mod seccomp;
pub mod seclusion;
pub mod session;
pub mod socket;
pub mod tcp;
pub mod userfaultfd;
pub mod wait;
