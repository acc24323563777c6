//! CRIU's images over sockets: `criu dump --stream` at one host, `criu restore --stream` at another,
//! in either order, and nothing on disk.
//!
//! ```text
//!  criu dump ── socket ─▶ proxy ════ one connection ════▶ cache ── socket ─▶ criu restore
//!               pipes                                              pipes
//! ```
//!
//! [`proxy`] takes what a dump writes and sends it; [`cache`] keeps it and serves restores.

mod archive;
pub mod cache;
mod capture;
mod chunks;
pub mod compress;
pub mod control;
mod desk;
mod directory;
mod fetch;
mod front;
mod history;
pub mod inspect;
mod intake;
mod inventory;
mod keeper;
mod lazy;
mod left;
pub mod link;
mod local;
pub mod message;
mod outbox;
mod pages;
pub mod proxy;
mod reading;
mod receive;
mod serve;
mod sessions;
pub mod settle;
mod shelf;
mod store;
mod stream;
mod turned_away;

#[cfg(test)]
mod tests;

pub use local::LocalError;
pub use store::StoreError;
