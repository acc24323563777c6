//! Page reader, page streams, page store and lazy-pages daemon.
//!
//! The way of a page: [`reader`] takes it from a frozen task, [`stream`] carries it over one of N
//! memory channels into its final buffer in the [`store`], [`lazy`] places it in the restored task,
//! by fault or in bulk. Tasks are named by the pid they have in their own PID namespace, which is
//! what CRIU's images and its lazy-pages socket use.

pub mod lazy;
pub mod ledger;
pub mod mappings;
mod pace;
pub mod page;
pub mod post;
pub mod present;
pub mod ranges;
pub mod reader;
pub mod shared;
pub mod store;
pub mod stream;
pub mod tracker;

pub use haulier_sys::wait;
