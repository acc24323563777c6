//! Frames and messages between the agents of haulier. No IO.
//!
//! A connection carries [`frame`]s: a fixed header and a body. The first frame of every connection
//! is a [`message::Hello`] that names the migration and the connection's [`message::Role`]; what
//! may follow depends on the role:
//!
//! | role | frames |
//! |---|---|
//! | command | [`frame::Kind::Control`]: a [`message::Control`] each |
//! | images | [`frame::Kind::ImageHeader`], [`frame::Kind::ImageData`], [`frame::Kind::ImageEnd`], [`frame::Kind::ImagesDone`] |
//! | memory | [`frame::Kind::Pages`], [`frame::Kind::RoundEnd`] |
//!
//! Integers of the header are little-endian; message bodies are protobuf, so that a field can be
//! added without a new version. [`version`] says when the version itself has to change.

pub mod frame;
pub mod id;
pub mod message;
pub mod text;
pub mod version;
