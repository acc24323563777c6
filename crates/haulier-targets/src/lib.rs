//! What is migrated: the process driver, its files and its network identity.
//!
//! The one kind of target so far is a tree of processes in the namespaces of the host
//! ([`process`]): [`files`] it needs, [`cgroup`]s it is frozen and lives in, [`network`] identity
//! it takes along; [`host`] is what it comes from and goes to.

pub mod cgroup;
pub mod descriptors;
pub mod files;
pub mod host;
pub mod network;
pub mod process;
