//! The image store: CRIU's images from the dump's directory to the restore's.
//!
//! On the wire an image is a header (number, name, size if known), data in bounded chunks led by
//! the number, and an end with length and BLAKE3; after the last one comes a closing message with
//! their count. Numbers let several images be under way at once. [`directory`] is the front end
//! for CRIU driven by RPC, which can only write and read a directory.

pub mod directory;
pub mod name;
