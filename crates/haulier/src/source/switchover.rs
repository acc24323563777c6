//! What is sent while the target stands still.

use std::thread;

use haulier_criu::skeleton::Skeleton;
use haulier_engine::phase::Phase;
use haulier_engine::source::Event;
use haulier_memory::ranges::RangeSet;
use haulier_memory::stream::StreamOptions;
use haulier_proto::message::PUSH_ROUND;

use super::behind::Behind;
use super::rounds::ranges_by_task;
use super::{Migration, Setback, pages};
use crate::timeline::Stopwatch;

impl Migration<'_> {
    /// Has CRIU write the skeleton, while what was written last is already on its way.
    pub(super) fn dump(&mut self) -> Result<Skeleton, Setback> {
        let wait = self.step();
        let (Some(target), Some(rounds), Some(streams)) =
            (&mut self.target, &mut self.rounds, &mut self.streams)
        else {
            unreachable!("dumped before prepared")
        };
        streams.hurry();
        let mut clock = Stopwatch::new();
        let dirty = rounds.finish();
        clock.lap("last look");
        self.timeline.enter(Phase::Dump);
        let plan = &self.plan;
        let behind = self.leave_behind;
        let result = dirty.and_then(|dirty| {
            let (skeleton, sent) = thread::scope(|scope| {
                let sent = scope.spawn(|| match behind || dirty.is_empty() {
                    true => Ok(None),
                    false => streams
                        .send_round(dirty.clone(), &[], false, &wait)
                        .map(Some),
                });
                let skeleton = target.capture(plan, &wait);
                clock.lap("skeleton");
                (skeleton, sent.join())
            });
            clock.lap("last round");
            let skeleton = skeleton?;
            let sent = sent.map_err(|_| "the sender of pages panicked")??;
            if sent.is_some() {
                rounds.sent(&dirty);
            }
            Ok((skeleton, sent))
        });
        let (skeleton, sent) = result.map_err(|e| self.setback(&*e))?;
        self.report.here(&clock.take());
        if let Some(stats) = &sent {
            self.report.sent_round(stats, true);
        }
        self.report.processes = skeleton.tasks.len();
        self.report.threads = skeleton.tasks.iter().map(|task| task.threads.len()).sum();
        Ok(skeleton)
    }

    /// Sends the skeleton and, unless they are left behind, the pages that the destination lacks.
    /// It restores them as they come.
    pub(super) fn send(&mut self, skeleton: &Skeleton) -> Result<Event, Setback> {
        self.timeline.enter(Phase::Send);
        let wait = self.step();
        let (Some(rounds), Some(streams)) = (&self.rounds, &mut self.streams) else {
            unreachable!("sent before prepared");
        };
        let lazy = pages::lazy_pages(skeleton);
        let missing: Vec<(u32, RangeSet)> = lazy
            .iter()
            .map(|(task, pages)| (*task, rounds.missing(*task, pages)))
            .collect();
        let behind = self.leave_behind && missing.iter().any(|(_, pages)| !pages.is_empty());
        // The destination may have any of them in an old version, which it would place as soon as it
        // has the images.
        let stale = |(task, pages): &(u32, RangeSet)| (*task, rounds.stale(*task, pages));
        let mut stale: Vec<(u32, RangeSet)> = missing.iter().map(stale).collect();
        stale.retain(|(_, pages)| !pages.is_empty());
        if streams.rounds() > 0 && !stale.is_empty() {
            let discard = ranges_by_task(stale);
            let dropped = streams.send_round(Vec::new(), &discard, false, &wait);
            let dropped = dropped.map_err(|e| self.setback(&e))?;
            self.report.sent_round(&dropped, true);
        }
        let (Some(target), Some(rounds), Some(streams)) =
            (&self.target, &self.rounds, &mut self.streams)
        else {
            unreachable!("sent before prepared");
        };
        let pages = |(task, set): &(u32, RangeSet)| pages::task_pages(*task, set.iter().collect());
        let tasks = match behind {
            true => Vec::new(),
            false => missing.iter().map(pages).collect(),
        };
        let directory = target.directory().path();
        let sent = streams.send_last(directory, tasks, &wait);
        let hot = |(task, set): &(u32, RangeSet)| (*task, rounds.by_heat(*task, set));
        let left = behind.then(|| missing.iter().map(hot).collect());
        let images_wire_bytes = streams.images.wire_bytes();
        let line = streams.line();
        let ahead = rounds.ahead();
        let (images, stats) = sent.map_err(|e| self.setback(&*e))?;
        self.report.sent_round(&stats, true);
        self.report.sent.images = images.images;
        self.report.sent.image_bytes = images.bytes;
        self.report.sent.images_wire_bytes = images_wire_bytes;
        self.report.sent.ahead_pages = ahead.sent;
        self.report.sent.line_bytes_per_second = line;
        self.report.sent.line_share = self.line_share;
        let Some(left) = left else {
            return Ok(Event::AllSent);
        };
        let options = StreamOptions {
            compression: self.options.compression,
            line_share: self.line_share,
            line,
            ..StreamOptions::default()
        };
        let behind =
            Behind::new(left, options, self.options.link_time).map_err(|e| self.setback(&e))?;
        self.report.left_behind = behind.remaining();
        self.behind = Some(behind);
        Ok(Event::AllSent)
    }

    /// The destination's CRIU itself waits for pages that are left here: they are served before the
    /// commit already.
    pub(super) fn serve_from_now_on(&mut self) -> Result<(), Setback> {
        let (Some(behind), Some(streams)) = (&mut self.behind, &mut self.streams) else {
            return Ok(());
        };
        let memory = streams.take_memory();
        let Some(faults) = streams.faults.take() else {
            unreachable!("pages are left behind without a connection for faults")
        };
        let started = behind.start(faults, memory, PUSH_ROUND);
        started.map_err(|e| self.setback(&e))
    }
}
