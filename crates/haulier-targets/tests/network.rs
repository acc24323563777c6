//! The network identity against a real kernel: two network namespaces with a cable between.

#[path = "network/addresses.rs"]
mod addresses;
#[path = "network/announce.rs"]
mod announce;
#[path = "network/lock.rs"]
mod lock;
#[path = "network/packets.rs"]
mod packets;
#[path = "network/repair.rs"]
mod repair;
#[path = "network/world.rs"]
mod world;
