//! Post-copy: pages that follow the tasks to the destination.
//!
//! At the source a [`PageServer`] has the set of pages that are still to be sent, and every page is
//! sent once: over the memory channels in a given order, or over the fault channel ahead of all
//! others, when a task at the destination waits for it. The set is the authority: a page that is
//! asked for and is not in it is on its way.
//!
//! At the destination a [`FaultClient`] asks for what the lazy-pages daemon misses, and receives the
//! answers; [`receive_push`] receives the rest. When the link breaks, the tasks wait. The destination
//! says what it misses ([`crate::lazy::LazyPagesHandle::missing`]), the source takes that for what
//! is to be sent ([`PageServer::resume`]), and both go on over new channels.
//!
//! Frames on the fault channel: towards the source `FaultRequest`; towards the destination `Pages`,
//! and one `RoundEnd` behind everything. Each side sends an empty `FaultRequest` when it has had
//! nothing to say for a second, so that a dead link is noticed.

mod client;
mod lending;
mod order;
mod push;
mod receive;
mod request;
mod server;

use std::time::Duration;

pub use client::FaultClient;
pub use receive::receive_push;
pub use request::RequestError;
pub use server::{PageServer, ServeError, ServeOptions, ServeProgress, ServeStats, TaskOrder};

/// After how long without a word each side of the fault channel says that it is there.
const KEEPALIVE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
