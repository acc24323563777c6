//! A model of a target, a link and rounds, run through the rule, ends where theory says: with
//! ρ = dirty rate ÷ bandwidth, what is left after n rounds is M ρⁿ, and what was sent M (1 - ρⁿ) ÷ (1 - ρ).

use proptest::prelude::*;

use super::*;

/// A target that writes pages of a working set evenly at random, and a link.
struct Model {
    memory: u64,
    working_set: u64,
    /// Pages per second, written and sent.
    writes: f64,
    link: f64,
    /// Of each round, beside the sending.
    round_trip: f64,
}

#[derive(Debug)]
struct Outcome {
    decision: Decision,
    rounds: Vec<Round>,
}

impl Model {
    fn new(memory: u64, rho: f64) -> Model {
        Model {
            memory,
            working_set: memory,
            writes: 25_000.0 * rho,
            link: 25_000.0,
            round_trip: 0.0005,
        }
    }

    fn fixed(&self) -> Duration {
        FixedCost::default().of(self.memory * PAGE)
    }

    /// Distinct pages of the working set that so many seconds of writing hit.
    fn written(&self, seconds: f64, throttle: u8) -> u64 {
        let writes = self.writes * seconds * f64::from(100 - throttle) / 100.0;
        let set = self.working_set as f64;
        (set * -(-writes / set).exp_m1()) as u64
    }

    fn run(&self, policy: &Policy, mode: Mode) -> Outcome {
        let mut measured = Measurements {
            fixed: self.fixed(),
            ..Measurements::default()
        };
        let mut throttle = 0;
        loop {
            match decide(policy, mode, &measured) {
                Decision::Another => {}
                Decision::TakeLine => unreachable!("it is alone on the line"),
                Decision::Throttle { percent, .. } => throttle = percent,
                decision => {
                    return Outcome {
                        decision,
                        rounds: measured.rounds,
                    };
                }
            }
            let pages = measured
                .rounds
                .last()
                .map_or(self.memory, |last| last.found);
            let seconds = pages as f64 / self.link + self.round_trip;
            let time = Duration::from_secs_f64(seconds);
            measured.elapsed += time;
            measured.rounds.push(Round {
                pages,
                zero: 0,
                send_time: time,
                length: time,
                found: self.written(seconds, throttle),
                throttle,
                shared: false,
            });
        }
    }

    /// What the target would really stand for.
    fn downtime(&self, outcome: &Outcome) -> Duration {
        let left = outcome.rounds.last().map_or(self.memory, |last| last.found);
        self.fixed() + Duration::from_secs_f64(left as f64 / self.link + self.round_trip)
    }
}

fn why(decision: Decision) -> Reason {
    match decision {
        Decision::Freeze { why, .. } | Decision::GiveUp { why } => why,
        other => panic!("the rounds do not end with {other:?}"),
    }
}

#[test]
fn a_quiet_target_needs_one_round() {
    let model = Model::new(1 << 18, 0.0);
    let outcome = model.run(&Policy::default(), Mode::PreCopy);
    assert_eq!(outcome.rounds.len(), 1);
    assert_eq!(why(outcome.decision), Reason::Converged);
}

#[test]
fn a_write_rate_beyond_the_bandwidth_never_converges() {
    let model = Model::new(1 << 20, 2.0);
    for on_stall in OnStall::ALL {
        let policy = Policy {
            on_stall: *on_stall,
            max_downtime: Duration::from_secs(1),
            ..Policy::default()
        };
        let outcome = model.run(&policy, Mode::PreCopy);
        match on_stall {
            OnStall::Throttle => {
                // 2.0 (1 - t) < 1 from 60 % on.
                let last = outcome.rounds.last().unwrap();
                assert!(last.throttle >= 50, "{last:?}");
                assert_eq!(why(outcome.decision), Reason::Converged);
                assert!(model.downtime(&outcome) <= policy.max_downtime * 11 / 10);
            }
            OnStall::Abort => {
                assert_eq!(
                    outcome.decision,
                    Decision::GiveUp {
                        why: Reason::Stalled
                    }
                );
            }
            OnStall::PostCopy | OnStall::Force => {
                assert_eq!(why(outcome.decision), Reason::Stalled);
                assert!(outcome.rounds.len() <= 4, "{}", outcome.rounds.len());
            }
        }
    }
}

#[test]
fn a_working_set_that_does_not_fit_is_left_behind_by_a_hybrid_once_it_is_all_that_is_left() {
    let model = Model {
        working_set: 20_000,
        ..Model::new(1 << 18, 4.0)
    };
    let outcome = model.run(&Policy::default(), Mode::Hybrid);
    assert!(matches!(
        outcome.decision,
        Decision::Freeze {
            left_behind: true,
            why: Reason::Stalled,
            ..
        }
    ));
    assert!(outcome.rounds.last().unwrap().found <= model.working_set);
    assert!(outcome.rounds.len() <= 4, "{}", outcome.rounds.len());
}

#[test]
fn memory_so_large_that_the_limit_cannot_be_met_comes_close_to_the_best_there_is() {
    // 16 GiB: 1040 ms of fixed cost.
    let model = Model::new(16 << 18, 0.1);
    let outcome = model.run(&Policy::default(), Mode::PreCopy);
    assert_eq!(why(outcome.decision), Reason::FixedCost);
    assert!(model.downtime(&outcome) <= model.fixed() * 12 / 10);
}

proptest! {
    #[test]
    fn below_the_bandwidth_it_converges_within_the_limit_and_sends_what_theory_says(
        memory in 20_000_u64..700_000,
        rho in 0.0..0.7_f64,
    ) {
        let model = Model::new(memory, rho);
        let policy = Policy { max_rounds: 60, ..Policy::default() };
        let outcome = model.run(&policy, Mode::PreCopy);
        prop_assert_eq!(why(outcome.decision), Reason::Converged);
        prop_assert!(model.downtime(&outcome) <= policy.max_downtime + Duration::from_millis(10));

        // Pages written twice count once, so theory is a bound; a round trip adds a few pages.
        let count = outcome.rounds.len() as i32;
        let slack = f64::from(count) * 100.0;
        let left = outcome.rounds.last().unwrap().found as f64;
        prop_assert!(left <= memory as f64 * rho.powi(count) + slack);
        let sent: u64 = outcome.rounds.iter().map(|round| round.pages).sum();
        let most = memory as f64 * (1.0 - rho.powi(count)) / (1.0 - rho);
        prop_assert!(sent as f64 <= most + slack);

        // And no more rounds than it takes until hardly anything is left beside the fixed cost.
        let small = model.fixed().as_secs_f64() / 4.0 * model.link;
        let needed = (small / memory as f64).ln() / rho.max(0.001).ln();
        prop_assert!(f64::from(count) <= needed.max(0.0) + 2.0, "{count} rounds, {needed}");
    }

    #[test]
    fn it_ends_for_every_target(
        memory in 0_u64..3_000_000,
        share in 0.0..1.0_f64,
        rho in 0.0..20.0_f64,
        downtime in 0_u64..2000,
        on_stall in prop::sample::select(OnStall::ALL),
        mode in prop::sample::select(Mode::ALL),
    ) {
        let model = Model {
            working_set: ((memory as f64 * share) as u64).max(1),
            ..Model::new(memory, rho)
        };
        let policy = Policy {
            on_stall,
            max_downtime: Duration::from_millis(downtime),
            ..Policy::default()
        };
        let outcome = model.run(&policy, mode);
        prop_assert!(outcome.rounds.len() <= policy.max_rounds as usize);
        if why(outcome.decision) == Reason::Converged && mode == Mode::PreCopy {
            let stood = model.downtime(&outcome);
            prop_assert!(stood <= policy.max_downtime + Duration::from_millis(10), "{stood:?} {outcome:?}");
        }
    }
}
