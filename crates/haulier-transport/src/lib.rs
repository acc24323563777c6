//! Channels by role over connected sockets, with deadlines and cancellation.
//!
//! A [`channel::Channel`] sends and receives [`haulier_proto::frame`]s over any connected stream
//! socket; every call takes a [`wait::Wait`], which says until when it may wait and what cancels
//! it. [`tcp`] makes such sockets; TLS, ssh and handed-over descriptors will be its siblings.
//! [`greeting`] exchanges the first frames.

pub mod channel;
pub mod error;
pub mod greeting;
pub mod tcp;

pub use haulier_sys::wait;
