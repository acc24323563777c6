//! Redis with values of 1 KB, and the client that overwrites them one after the other.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::analysis::BIN;

/// Longer than any peer keeps the client waiting.
const PATIENCE: Duration = Duration::from_secs(120);

/// With its header, a value fills an allocation of 1 KiB.
const VALUE: usize = 1000;

/// Commands under way at once while filling.
const WINDOW: usize = 256;

/// How many values make up so much memory.
pub(crate) fn keys_for(bytes: u64) -> u64 {
    bytes / 1024
}

/// Stores random values under all keys.
pub(crate) fn fill(server: SocketAddr, keys: u64) -> Result<()> {
    let mut stream = connect(server)?;
    let mut random = Random(1);
    let mut commands = Vec::new();
    let mut answers = vec![0; WINDOW * 5];
    for start in (0..keys).step_by(WINDOW) {
        commands.clear();
        let window = start..keys.min(start + WINDOW as u64);
        let count = window.clone().count();
        window.for_each(|key| set(key, &mut random, &mut commands));
        stream.write_all(&commands)?;
        let answers = answers.get_mut(..count * 5).unwrap_or_default();
        stream.read_exact(answers)?;
        ensure!(
            answers.chunks(5).all(|answer| answer == b"+OK\r\n"),
            "Redis refused a value: {}",
            String::from_utf8_lossy(answers)
        );
    }
    Ok(())
}

/// A client that sets random keys to random values in a closed loop over one connection.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    worker: JoinHandle<Result<Vec<u64>>>,
}

struct Shared {
    stop: AtomicBool,
    count: AtomicU64,
}

impl Writer {
    /// Starts; times are nanoseconds since `clock`.
    pub(crate) fn start(server: SocketAddr, keys: u64, clock: Instant) -> Result<Writer> {
        let stream = connect(server)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            count: AtomicU64::new(0),
        });
        let theirs = Arc::clone(&shared);
        let worker = thread::spawn(move || write(stream, keys, clock, &theirs));
        Ok(Writer { shared, worker })
    }

    /// Answers so far.
    pub(crate) fn count(&self) -> u64 {
        self.shared.count.load(Ordering::Relaxed)
    }

    /// Waits until ten bins in a row had 95 % of `normal` answers per second together, at most
    /// until the deadline. Whether they had is seen in the answers.
    pub(crate) fn wait_until_normal(&self, normal: f64, deadline: Duration) {
        let until = Instant::now() + deadline;
        let mut recent: Vec<(Instant, u64)> = Vec::new();
        while Instant::now() < until && !self.worker.is_finished() {
            let now = (Instant::now(), self.count());
            recent.push(now);
            // A little more than the analysis asks for, since its bins begin elsewhere.
            if let Some((at, count)) = recent.iter().rev().nth(12) {
                let seconds = (now.0 - *at).as_secs_f64();
                if (now.1 - count) as f64 >= 0.96 * normal * seconds {
                    break;
                }
            }
            thread::sleep(Duration::from_nanos(BIN));
        }
    }

    /// Stops it; the times of all answers.
    pub(crate) fn stop(self) -> Result<Vec<u64>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.worker.join() {
            Ok(answers) => answers.context("the writing client failed"),
            Err(_) => bail!("the writing client panicked"),
        }
    }

    /// Whether it lost its connection.
    pub(crate) fn has_ended(&self) -> bool {
        self.worker.is_finished()
    }
}

fn write(mut stream: TcpStream, keys: u64, clock: Instant, shared: &Shared) -> Result<Vec<u64>> {
    // Room for a minute, so that growing does not look like a gap.
    let mut answers = Vec::with_capacity(4 << 20);
    let mut random = Random(u64::from(std::process::id()) ^ clock.elapsed().as_nanos() as u64);
    let mut command = Vec::with_capacity(2 * VALUE);
    let mut answer = [0; 5];
    while !shared.stop.load(Ordering::Relaxed) {
        command.clear();
        set(random.next() % keys.max(1), &mut random, &mut command);
        stream.write_all(&command).context("send")?;
        stream.read_exact(&mut answer).context("receive")?;
        ensure!(answer == *b"+OK\r\n", "Redis answered {answer:?}");
        answers.push(clock.elapsed().as_nanos() as u64);
        shared.count.fetch_add(1, Ordering::Relaxed);
    }
    Ok(answers)
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)
        .with_context(|| format!("connect to Redis at {server}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Appends `SET key <random value>` in RESP2.
fn set(key: u64, random: &mut Random, command: &mut Vec<u8>) {
    let key = format!("value:{key}");
    let head = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${VALUE}\r\n", key.len());
    command.extend_from_slice(head.as_bytes());
    for _ in 0..VALUE / 8 {
        command.extend_from_slice(&random.next().to_le_bytes());
    }
    command.extend_from_slice(b"\r\n");
}

/// The splitmix64 generator of Steele, Lea and Flood (2014); no compressor gains on its output.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_whole_and_its_value_random() {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let mut random = Random(7);
        set(12, &mut random, &mut first);
        set(12, &mut random, &mut second);
        let head = b"*3\r\n$3\r\nSET\r\n$8\r\nvalue:12\r\n$1000\r\n";
        assert!(first.starts_with(head) && first.ends_with(b"\r\n"));
        assert_eq!(first.len(), head.len() + VALUE + 2);
        assert_ne!(first, second);
    }
}
