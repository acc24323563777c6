//! The rounds, until the stop rule says how they end.

use haulier_engine::convergence::{self, Decision, FixedCost, Mode};
use haulier_engine::phase::Phase;

use super::rounds::Rounds;
use super::target::Target;
use super::{Migration, Setback};
use crate::failure::Failure;

impl Migration<'_> {
    /// Sends memory in rounds while the target runs, until the stop rule says how it ends.
    pub(super) fn pre_copy(&mut self) -> Result<(), Setback> {
        let mode = self.plan.mode;
        let tracker = self
            .plan
            .tracker
            .filter(|_| matches!(mode, Mode::PreCopy | Mode::Hybrid));
        let veiled = self.target.as_ref().is_some_and(Target::is_veiled);
        let fixed = match veiled {
            true => FixedCost::VEILED,
            false => FixedCost::default(),
        };
        let fixed = fixed.of(self.plan.memory_bytes);
        self.report.mode = mode;
        self.report.tracker = tracker.map(|tracker| tracker.to_string());
        self.rounds = Some(Rounds::new(self.plan.tree.root(), tracker, fixed));
        if tracker.is_some() {
            self.timeline.enter(Phase::PreCopy);
        }
        let end = self.rounds_until_the_end(mode);
        // A throttled target dumps slowly, and goes on at full speed whatever happens.
        if let Some(target) = &mut self.target {
            target.end_throttle();
        }
        self.leave_behind = end?;
        if self.leave_behind {
            self.drop_left()?;
        }
        Ok(())
    }

    /// What is left behind takes no part in the freeze: not even its old versions' end.
    fn drop_left(&mut self) -> Result<(), Setback> {
        let wait = self.stop.wait_idle(self.options.step_time);
        let (Some(rounds), Some(streams)) = (&mut self.rounds, &mut self.streams) else {
            unreachable!("a round before it was prepared")
        };
        let result = rounds.drop_left(streams, &wait);
        result.map_err(|e| self.setback(&*e))
    }

    /// Whether pages are to be left here.
    fn rounds_until_the_end(&mut self, mode: Mode) -> Result<bool, Setback> {
        let policy = &self.options.policy;
        loop {
            let Some(rounds) = &mut self.rounds else {
                unreachable!("rounds before they were prepared")
            };
            let decision = convergence::decide(policy, mode, rounds.measured());
            if !matches!(decision, Decision::Another) {
                self.progress.decided(&decision);
            }
            match decision {
                Decision::Another => {}
                Decision::TakeLine => {
                    if let Some(streams) = &mut self.streams {
                        streams.take_line();
                    }
                }
                Decision::Throttle { percent, .. } => self.throttle(percent)?,
                Decision::Freeze {
                    left_behind,
                    why,
                    predicted,
                } => {
                    self.report.frozen_because(why, predicted);
                    return Ok(left_behind);
                }
                Decision::GiveUp { why } => {
                    let what = format!("given up before the freeze: {why}");
                    let failure = Failure::new(&self.plan.host.name, Phase::PreCopy, what);
                    let remedy = "allow more with --max-downtime, or choose another --on-stall";
                    return Err(Setback::Here(failure.remedy(remedy)));
                }
            }
            self.round()?;
        }
    }

    fn round(&mut self) -> Result<(), Setback> {
        let wait = self.stop.wait_idle(self.options.step_time);
        let (Some(rounds), Some(streams), Some(target)) =
            (&mut self.rounds, &mut self.streams, &self.target)
        else {
            unreachable!("a round before it was prepared")
        };
        let result = rounds.round(streams, target.groups(), &wait);
        let (report, stats) = result.map_err(|e| self.setback(&*e))?;
        self.progress.round(&report);
        self.report.sent_round(&stats, false);
        self.report.rounds.push(report);
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), Setback> {
        let (Some(target), Some(journal)) = (&mut self.target, &mut self.journal) else {
            unreachable!("throttled before it was prepared")
        };
        let result = target.throttle(percent, journal);
        result.map_err(|e| self.setback(&*e))?;
        if let Some(rounds) = &mut self.rounds {
            rounds.throttled(percent);
        }
        Ok(())
    }
}
