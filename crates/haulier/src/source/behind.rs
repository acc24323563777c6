//! Pages that are left behind: served from the frozen tasks until the destination has all of them.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use haulier_memory::page::PageRange;
use haulier_memory::post::{PageServer, ServeError, ServeOptions, ServeStats, TaskOrder};
use haulier_memory::ranges::RangeSet;
use haulier_memory::reader::ReadError;
use haulier_memory::stream::StreamOptions;
use haulier_proto::message::{Missing, MissingPages};
use haulier_sys::wait::Cancel;
use haulier_transport::channel::Channel;
use haulier_transport::tcp::LinkTime;

use crate::report::PostCopy;

/// The pages, and the thread that serves them.
#[derive(Debug)]
pub(super) struct Behind {
    server: Arc<PageServer>,
    options: StreamOptions,
    /// How long a connection may be silent. Both sides speak each second.
    silence: Duration,
    running: Option<Running>,
    totals: PostCopy,
    served: bool,
}

#[derive(Debug)]
struct Running {
    stop: Cancel,
    thread: JoinHandle<Result<ServeStats, ServeError>>,
}

/// How the serving goes.
#[derive(Debug)]
pub(super) enum Serving {
    /// Pages are being sent.
    Going,
    /// All have been sent.
    Over,
    /// The connections broke, or were never there.
    Broken(Option<ServeError>),
    /// The pages are gone.
    Lost(ServeError),
}

impl Behind {
    /// Pages of frozen tasks, each task's in the order in which they are to be pushed.
    pub(super) fn new(
        tasks: Vec<(u32, Vec<PageRange>)>,
        options: StreamOptions,
        link_time: LinkTime,
    ) -> Result<Behind, ReadError> {
        let order = |(task, ranges): (u32, Vec<PageRange>)| TaskOrder {
            pid: task as i32,
            task,
            ranges,
        };
        let server = PageServer::new(tasks.into_iter().map(order).collect())?;
        let totals = PostCopy {
            pages: server.progress().remaining,
            ..PostCopy::default()
        };
        Ok(Behind {
            server: Arc::new(server),
            options,
            silence: link_time.whole(),
            running: None,
            totals,
            served: false,
        })
    }

    /// Pages that have not been sent.
    pub(super) fn remaining(&self) -> u64 {
        self.server.progress().remaining
    }

    /// Begins to serve over these connections.
    pub(super) fn start(
        &mut self,
        mut faults: Channel,
        mut memory: Vec<Channel>,
        round: u32,
    ) -> std::io::Result<()> {
        self.stop();
        let stop = Cancel::new()?;
        let (server, wait) = (Arc::clone(&self.server), stop.wait_idle(self.silence));
        let mut options = ServeOptions::new(round);
        options.stream = self.options.clone();
        let serve = move || server.serve(&mut faults, &mut memory, &options, &wait);
        let thread = thread::Builder::new()
            .name("serve".to_owned())
            .spawn(serve)?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// After a break: what the destination says is missing is what is to be sent.
    pub(super) fn resume(&mut self, missing: &Missing) -> Result<(), ServeError> {
        self.stop();
        self.served = false;
        self.totals.reconnects += 1;
        let set = |(task, ranges): (u32, Vec<PageRange>)| (task, ranges.into_iter().collect());
        let missing: Vec<(u32, RangeSet)> = missing_ranges(missing).into_iter().map(set).collect();
        self.server.resume(&missing)
    }

    /// How it goes.
    pub(super) fn look(&mut self) -> Serving {
        if self.served {
            return Serving::Over;
        }
        match &self.running {
            None => return Serving::Broken(None),
            Some(running) if !running.thread.is_finished() => return Serving::Going,
            Some(_) => {}
        }
        match self.running.take().map(|running| running.thread.join()) {
            Some(Ok(Ok(stats))) => {
                self.add(&stats);
                self.served = true;
                Serving::Over
            }
            Some(Ok(Err(error))) if matches!(error, ServeError::Read(_)) => Serving::Lost(error),
            Some(Ok(Err(error))) => Serving::Broken(Some(error)),
            // A panic of the thread: its connections are closed like broken ones.
            Some(Err(_)) | None => Serving::Broken(None),
        }
    }

    /// Ends the serving, whatever has been sent.
    pub(super) fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.cancel();
            let _ = running.thread.join();
        }
    }

    /// What was sent.
    pub(super) fn totals(&mut self) -> PostCopy {
        // The last connection's thread ends with it.
        self.look();
        self.totals.clone()
    }

    fn add(&mut self, stats: &ServeStats) {
        self.totals.pushed += stats.pushed;
        self.totals.on_demand += stats.answered + stats.neighbours;
        self.totals.wire_bytes += stats.wire_bytes;
    }
}

/// What a destination says it lacks, by task; what is no range is left out.
pub(super) fn missing_ranges(missing: &Missing) -> Vec<(u32, Vec<PageRange>)> {
    let ranges = |task: &MissingPages| {
        let ranges = task.starts.iter().zip(&task.lengths);
        let range = |(start, pages): (&u64, &u64)| PageRange {
            start: start.saturating_mul(4096),
            pages: *pages,
        };
        let valid = ranges.map(range).filter(PageRange::is_valid);
        (task.task, valid.collect())
    };
    missing.tasks.iter().map(ranges).collect()
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.stop();
    }
}
