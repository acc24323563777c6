//! Live migration of running process trees between Linux hosts, on top of an unmodified CRIU.
//!
//! [`source::migrate`] moves a tree to a host where [`destination::serve`] runs. The order of
//! things, and what is undone when one fails, is in those two modules; the decision who may run the
//! target is in `haulier_engine`; everything below is a crate of its own (see ARCHITECTURE.md).

pub mod cancel;
pub mod checkpoint;
mod claim;
mod commands;
pub mod destination;
pub mod directories;
pub mod failure;
pub mod guard;
pub mod interrupt;
pub mod journal;
mod packets;
pub mod recovery;
pub mod report;
pub mod source;
pub mod status;
pub mod timeline;
pub mod tracer;

/// Program and version, as the peer is told.
pub const SOFTWARE: &str = concat!("haulier ", env!("CARGO_PKG_VERSION"));
