//! Programs to migrate, and clients that notice when a migration was not perfect.
//!
//! | program on the host | checked by |
//! |---|---|
//! | Redis ([`start_redis`]) | [`RedisClient`] all the while; [`fill_redis`] and [`check_redis`] before and after |
//! | `haulier-lab workload threads` ([`threads`]) | itself, and [`threads::read_report`] for what it wrote |
//! | `haulier-lab workload connections` ([`connections`]) | [`connections::Client`] |
//! | `haulier-lab workload echo` ([`echo`]) | [`OpenLoopClient`] all the while, and itself |

mod open_loop;
mod random;
mod redis;
mod redis_client;
mod redis_data;

pub mod connections;
pub mod echo;
pub mod threads;

pub use open_loop::{
    ClientReport, Kind, OpenLoop, OpenLoopClient, OpenLoopReport, Protocol, Summary,
};
pub use redis::start_redis;
pub use redis_client::{Gap, RedisClient, Report};
pub use redis_data::{RedisCheck, check_redis, fill_redis};
