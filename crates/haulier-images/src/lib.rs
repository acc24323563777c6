//! The image store: CRIU's images from the dump's directory to the restore's.
//!
//! On the wire an image is a header (number, name, size if known), data in bounded chunks led by
//! the number, and an end with length and BLAKE3; after the last one comes a closing message with
//! their count. Numbers let several images be under way at once. [`directory`] is the front end
//! for CRIU driven by RPC, which can only write and read a directory.
//!
//! Before the images, while the target still runs, pages that they will contain may be sent ahead
//! ([`sender`]): numbered from zero, each content once. The data of an image of pages
//! (`pages-*.img`) is then runs: pages by number, zero pages, and pages that are new; its BLAKE3 is
//! that of the BLAKE3s of its pages, which both sides know anyway.

pub mod account;
mod bank;
pub mod directory;
pub mod error;
pub mod name;
mod outgoing;
pub mod page;
mod pages;
mod receiver;
pub mod runs;
pub mod sender;
