//! Filling a Redis server with data that can be told from a seed, and checking all of it.

use super::random::Random;
use super::redis::{Answer, Connection, encode};
use crate::Result;
use std::net::SocketAddr;
use std::time::Duration;

/// Size of each value.
const VALUE: usize = 4096;

/// Commands on their way at once: 256 KiB of values.
const WINDOW: u64 = 64;

const PATIENCE: Duration = Duration::from_secs(60);

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RedisCheck {
    /// Keys looked at.
    pub keys: u64,
    /// How many were missing or held something else.
    pub wrong: u64,
    /// The first of them.
    pub first_wrong: Option<String>,
}

/// Stores `bytes` (rounded up to 4 KiB) of incompressible values under `fill:0`, `fill:1`, ...
///
/// # Errors
/// If the server cannot be reached, or refuses.
pub fn fill_redis(server: SocketAddr, seed: u64, bytes: u64) -> Result<()> {
    let mut connection = Connection::open(server, PATIENCE)?;
    let mut value = vec![0; VALUE];
    for window in windows(bytes) {
        let mut commands = Vec::new();
        for index in window.clone() {
            Random::nth(seed, index).fill(&mut value);
            encode(&[b"SET", key(index).as_bytes(), &value], &mut commands);
        }
        connection.send(&commands)?;
        for index in window {
            let answer = connection.answer()?;
            if answer != Answer::Simple("OK".into()) {
                return Err(connection.wrong(format!("SET {}: {answer:?}", key(index))));
            }
        }
    }
    Ok(())
}

/// Reads back what [`fill_redis`] stored with the same seed and size, and compares every byte.
///
/// # Errors
/// If the server cannot be reached or breaks off. Wrong values are no error but a finding.
pub fn check_redis(server: SocketAddr, seed: u64, bytes: u64) -> Result<RedisCheck> {
    let mut connection = Connection::open(server, PATIENCE)?;
    let mut check = RedisCheck {
        keys: 0,
        wrong: 0,
        first_wrong: None,
    };
    let mut value = vec![0; VALUE];
    for window in windows(bytes) {
        let mut commands = Vec::new();
        for index in window.clone() {
            encode(&[b"GET", key(index).as_bytes()], &mut commands);
        }
        connection.send(&commands)?;
        for index in window {
            Random::nth(seed, index).fill(&mut value);
            let answer = connection.answer()?;
            check.keys += 1;
            if matches!(&answer, Answer::Bulk(Some(found)) if *found == value) {
                continue;
            }
            check.wrong += 1;
            check.first_wrong.get_or_insert_with(|| match answer {
                Answer::Bulk(Some(_)) => format!("{} holds something else", key(index)),
                _ => format!("{} is missing", key(index)),
            });
        }
    }
    Ok(check)
}

fn windows(bytes: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    let keys = bytes.div_ceil(VALUE as u64);
    (0..keys)
        .step_by(WINDOW as usize)
        .map(move |start| start..keys.min(start + WINDOW))
}

fn key(index: u64) -> String {
    format!("fill:{index}")
}

#[cfg(test)]
mod tests {
    use super::windows;

    #[test]
    fn windows_cover_every_key_once() {
        let keys: Vec<u64> = windows(4096 * 130 + 1).flatten().collect();
        assert_eq!(keys, (0..131).collect::<Vec<_>>());
        assert_eq!(windows(0).count(), 0);
    }
}
