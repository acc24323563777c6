//! How long each phase took.

use std::time::{Duration, Instant};

use haulier_engine::phase::Phase;
use haulier_proto::message::PhaseTime;

use crate::checkpoint;

/// Measures phases one after the other.
#[derive(Debug)]
pub struct Timeline {
    begun: Instant,
    current: Option<(Phase, Instant)>,
    done: Vec<(Phase, Duration)>,
    stopped: Option<Instant>,
    resumed: Option<Instant>,
}

impl Timeline {
    /// Begins now.
    pub fn new() -> Timeline {
        Timeline {
            begun: Instant::now(),
            current: None,
            done: Vec::new(),
            stopped: None,
            resumed: None,
        }
    }

    /// Ends the phase that was going on, if any, and begins another.
    pub fn enter(&mut self, phase: Phase) {
        self.finish();
        checkpoint::reach("source phase", phase);
        let now = Instant::now();
        if phase.is_downtime() && self.stopped.is_none() {
            self.stopped = Some(now);
        }
        if !phase.is_downtime() && self.stopped.is_some() {
            self.resumed.get_or_insert(now);
        }
        self.current = Some((phase, now));
    }

    /// Ends the phase that is going on.
    pub fn finish(&mut self) {
        if let Some((phase, since)) = self.current.take() {
            self.done.push((phase, since.elapsed()));
        }
    }

    /// The phase that is going on, or else the last.
    pub fn phase(&self) -> Phase {
        let last = self.done.last().map(|(phase, _)| *phase);
        self.current
            .map(|(phase, _)| phase)
            .or(last)
            .unwrap_or(Phase::Examine)
    }

    /// The phases that have ended, in order.
    pub fn phases(&self) -> &[(Phase, Duration)] {
        &self.done
    }

    /// From the beginning until now.
    pub fn total(&self) -> Duration {
        self.begun.elapsed()
    }

    /// From the freeze at the source until the source heard that the target runs.
    pub fn downtime(&self) -> Option<Duration> {
        Some(self.resumed?.duration_since(self.stopped?))
    }
}

impl Default for Timeline {
    fn default() -> Timeline {
        Timeline::new()
    }
}

/// Measures the destination's steps, for its messages.
#[derive(Debug)]
pub struct Stopwatch {
    since: Instant,
    steps: Vec<PhaseTime>,
}

impl Stopwatch {
    /// Begins now.
    pub fn new() -> Stopwatch {
        Stopwatch {
            since: Instant::now(),
            steps: Vec::new(),
        }
    }

    /// Ends a step, and begins the next.
    pub fn lap(&mut self, name: &str) {
        let micros = self.since.elapsed().as_micros() as u64;
        self.steps.push(PhaseTime {
            name: name.to_owned(),
            micros,
        });
        self.since = Instant::now();
    }

    /// Takes the steps that have ended.
    pub fn take(&mut self) -> Vec<PhaseTime> {
        std::mem::take(&mut self.steps)
    }
}

impl Default for Stopwatch {
    fn default() -> Stopwatch {
        Stopwatch::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downtime_runs_from_the_first_to_after_the_last_phase_of_it() {
        let mut timeline = Timeline::new();
        for phase in Phase::ALL {
            timeline.enter(phase);
            if !phase.is_downtime() && phase < Phase::Freeze {
                assert_eq!(timeline.downtime(), None);
            }
        }
        timeline.finish();
        let down: Duration = timeline
            .phases()
            .iter()
            .filter(|(phase, _)| phase.is_downtime())
            .map(|(_, time)| *time)
            .sum();
        assert!(timeline.downtime().unwrap() >= down);
        assert_eq!(timeline.phase(), Phase::Release);
    }
}
