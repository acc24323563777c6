//! The connections that carry the target: images, memory, faults.

use std::error::Error;
use std::net::IpAddr;
use std::path::Path;
use std::thread;

use haulier_criu::skeleton::{Skeleton, Task};
use haulier_images::directory::ImageCount;
use haulier_images::sender::ImageSender;
use haulier_memory::page::PageRange;
use haulier_memory::ranges::RangeSet;
use haulier_memory::stream::{PageSender, RoundStats, StreamError, StreamOptions, TaskPages};
use haulier_proto::message::Role;
use haulier_targets::network::MoveIp;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::wait::Wait;

use super::link::Dialer;

pub(super) type AnyError = Box<dyn Error + Send + Sync>;

/// Most memory connections that are opened unasked: more gain nothing on links that haulier was
/// tried on.
const MOST_STREAMS: usize = 4;
/// Links up to this speed, in Mbit/s, are filled by one connection.
const SLOW_LINK: u32 = 1000;
/// Percent of a full line for memory, if the target's users are on it, and if nobody else is known to be.
pub(super) const SHARED: u8 = 90;
const ALONE: u8 = 98;
/// Most that is sent ahead of memory which CRIU dumps itself: unless it changes all the time, the
/// target's own size bounds it.
const MOST_AHEAD: u64 = 64 << 30;

/// The connections that carry the target.
#[derive(Debug)]
pub(super) struct Streams {
    pub(super) images: ImageSender,
    memory: Memory,
    /// For pages that are left behind.
    pub(super) faults: Option<Channel>,
    /// For packets that reach this host too late.
    pub(super) packets: Option<Channel>,
    rounds: u32,
    /// Pages of all rounds.
    pages: u64,
}

/// Connections beside those that every migration has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Also {
    pub(super) faults: bool,
    pub(super) packets: bool,
}

#[derive(Debug)]
enum Memory {
    /// Rounds may follow.
    Open(Box<PageSender>),
    /// No round follows; the connections are free for the push.
    Finished {
        channels: Vec<Channel>,
        line: Option<u64>,
    },
}

impl Streams {
    /// Opens them: before the freeze, so that no handshake falls into it.
    pub(super) fn open(
        dialer: &Dialer,
        options: StreamOptions,
        streams: u32,
        also: &Also,
        wait: &Wait,
    ) -> Result<Streams, AnyError> {
        let (images, _) = dialer.open(Role::Images, 0, wait)?;
        let memory = open_memory(dialer, streams, wait)?;
        let open = |wanted: bool, role| match wanted {
            true => dialer.open(role, 0, wait).map(|(channel, _)| Some(channel)),
            false => Ok(None),
        };
        let faults = open(also.faults, Role::Faults)?;
        let packets = open(also.packets, Role::Packets)?;
        Ok(Streams {
            images: ImageSender::new(images, MOST_AHEAD),
            memory: Memory::Open(Box::new(PageSender::new(memory, options)?)),
            faults,
            packets,
            rounds: 0,
            pages: 0,
        })
    }

    /// Sends a round: what is gone, and pages.
    pub(super) fn send_round(
        &mut self,
        tasks: Vec<TaskPages>,
        discard: &[(u32, Vec<PageRange>)],
        running: bool,
        wait: &Wait,
    ) -> Result<RoundStats, StreamError> {
        let round = self.rounds;
        let Memory::Open(sender) = &mut self.memory else {
            return Err(StreamError::NoChannel);
        };
        let stats = sender.send_round(tasks, discard, round, running, wait)?;
        self.rounds += 1;
        self.pages += stats.pages;
        Ok(stats)
    }

    /// Sends memory as fast as it goes: its users wait now.
    pub(super) fn hurry(&mut self) {
        if let Memory::Open(sender) = &mut self.memory {
            sender.hurry();
        }
    }

    /// Takes all of the line, if it did not.
    pub(super) fn take_line(&mut self) {
        if let Memory::Open(sender) = &mut self.memory {
            sender.take_line();
        }
    }

    /// Whether others are left a part of a line that is full.
    pub(super) fn is_paced(&self) -> bool {
        matches!(&self.memory, Memory::Open(sender) if sender.is_paced())
    }

    /// Bytes per second of the line, if it was found full.
    pub(super) fn line(&self) -> Option<u64> {
        match &self.memory {
            Memory::Open(sender) => sender.line(),
            Memory::Finished { line, .. } => *line,
        }
    }

    /// Sends the images in `directory`, and at the same time the last round of pages, read from the
    /// frozen tasks.
    pub(super) fn send_last(
        &mut self,
        directory: &Path,
        tasks: Vec<TaskPages>,
        wait: &Wait,
    ) -> Result<(ImageCount, RoundStats), AnyError> {
        let round = self.rounds;
        let Memory::Open(mut sender) = std::mem::replace(&mut self.memory, Memory::none()) else {
            return Err(StreamError::NoChannel.into());
        };
        // The destination places pages from now on.
        sender.send_whole();
        let images = &mut self.images;
        let (images, memory) = thread::scope(|scope| {
            let images = scope.spawn(|| images.send_directory(directory, wait));
            let memory = sender.send_round(tasks, &[], round, false, wait);
            (images.join(), memory)
        });
        let images = images.map_err(|_| "the sender of images panicked")??;
        let stats = memory?;
        let line = sender.line();
        let channels = sender.finish(wait)?;
        self.memory = Memory::Finished { channels, line };
        self.rounds += 1;
        self.pages += stats.pages;
        Ok((images, stats))
    }

    /// Rounds sent so far.
    pub(super) fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Pages of them.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// The memory connections, once no round follows.
    pub(super) fn take_memory(&mut self) -> Vec<Channel> {
        match std::mem::replace(&mut self.memory, Memory::none()) {
            Memory::Finished { channels, .. } => channels,
            Memory::Open(_) => Vec::new(),
        }
    }
}

impl Memory {
    fn none() -> Memory {
        Memory::Finished {
            channels: Vec::new(),
            line: None,
        }
    }
}

/// Opens memory connections.
pub(super) fn open_memory(
    dialer: &Dialer,
    streams: u32,
    wait: &Wait,
) -> Result<Vec<Channel>, TransportError> {
    (0..streams)
        .map(|index| Ok(dialer.open(Role::Memory, index, wait)?.0))
        .collect()
}

/// How many memory connections suit the link that `local`, an address of this host, is on.
pub(super) fn suitable_streams(local: Option<IpAddr>) -> u32 {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    match local.and_then(link_speed) {
        Some(speed) if speed <= SLOW_LINK => 1,
        _ => processors.min(MOST_STREAMS) as u32,
    }
}

/// How much of a full line suits memory, in percent, if its connection is at `local`: the target's users
/// are left room if they come by the same interface.
pub(super) fn suitable_share(local: Option<IpAddr>, moved: &[MoveIp], has_users: bool) -> u8 {
    let addresses = haulier_targets::network::addresses().unwrap_or_default();
    let own = addresses
        .iter()
        .find(|address| Some(address.ip) == local)
        .map(|address| &*address.interface);
    // What is not known is taken to be shared.
    let theirs = |moved: &MoveIp| own.is_none_or(|own| own == moved.interface());
    match has_users && (moved.is_empty() || moved.iter().any(theirs)) {
        true => SHARED,
        false => ALONE,
    }
}

/// What the interface with this address says of itself, in Mbit/s; virtual ones say little.
fn link_speed(local: IpAddr) -> Option<u32> {
    let addresses = haulier_targets::network::addresses().ok()?;
    let found = addresses.into_iter().find(|address| address.ip == local)?;
    let path = Path::new("/sys/class/net")
        .join(found.interface)
        .join("speed");
    let speed = std::fs::read_to_string(path).ok()?;
    speed.trim().parse().ok().filter(|speed| *speed > 0)
}

/// What CRIU left out of its images, by task.
pub(super) fn lazy_pages(skeleton: &Skeleton) -> Vec<(u32, RangeSet)> {
    let lazy = |task: &Task| {
        let mut set = RangeSet::new();
        for range in &task.lazy {
            set.insert(PageRange {
                start: range.start,
                pages: range.pages,
            });
        }
        (task.pid, set)
    };
    skeleton.tasks.iter().map(lazy).collect()
}

/// Pages of a task of this host's PID namespace, where a task has the same number everywhere.
pub(super) fn task_pages(task: u32, ranges: Vec<PageRange>) -> TaskPages {
    TaskPages {
        pid: task as i32,
        task,
        ranges,
    }
}
