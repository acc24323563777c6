//! Drives an unmodified CRIU: RPC, image formats, lazy-pages protocol, discovery, error digging.
//!
//! CRIU captures and rebuilds kernel state; memory, transport and safety are haulier's. What a
//! CRIU does at which hook was measured with 4.1.1 and 4.2; [`find`] refuses older ones.

pub mod dump;
pub mod failure;
pub mod find;
pub mod image;
pub mod inspect;
pub mod lazy_socket;
pub mod log;
pub mod messages;
pub mod page_server;
pub mod pagemap;
pub mod restore;
pub mod skeleton;
mod swrk;
mod veil;

pub use failure::CriuFailure;
pub use find::Criu;
pub use swrk::RpcError;
