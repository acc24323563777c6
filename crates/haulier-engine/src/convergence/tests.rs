use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
/// 10 000 pages per second: 100 µs a page.
const PAGE_TIME: Duration = Duration::from_micros(100);

fn round(pages: u64, found: u64) -> Round {
    let time = PAGE_TIME * pages as u32;
    Round {
        pages,
        zero: 0,
        send_time: time,
        length: time,
        found,
        throttle: 0,
        shared: false,
    }
}

/// Rounds of which each sends what the one before left, with the given throttles.
fn chain(first: u64, left: &[(u64, u8)]) -> Vec<Round> {
    let mut pages = first;
    let mut rounds = Vec::new();
    for (found, throttle) in left {
        let mut next = round(pages, *found);
        next.throttle = *throttle;
        rounds.push(next);
        pages = *found;
    }
    rounds
}

fn plain(first: u64, left: &[u64]) -> Vec<Round> {
    chain(
        first,
        &left.iter().map(|found| (*found, 0)).collect::<Vec<_>>(),
    )
}

fn measured(rounds: Vec<Round>) -> Measurements {
    let elapsed = rounds.iter().map(|round| round.length).sum();
    Measurements {
        rounds,
        fixed: 100 * MS,
        elapsed,
    }
}

fn policy(on_stall: OnStall) -> Policy {
    Policy {
        on_stall,
        ..Policy::default()
    }
}

fn frozen(decision: Decision) -> Option<(bool, Reason)> {
    match decision {
        Decision::Freeze {
            left_behind, why, ..
        } => Some((left_behind, why)),
        _ => None,
    }
}

#[test]
fn modes_without_rounds_freeze_at_once() {
    let nothing = Measurements {
        fixed: 70 * MS,
        ..Measurements::default()
    };
    assert_eq!(
        decide(&Policy::default(), Mode::StopAndCopy, &nothing),
        Decision::Freeze {
            left_behind: false,
            why: Reason::NoRounds,
            predicted: None
        }
    );
    assert_eq!(
        decide(&Policy::default(), Mode::PostCopy, &nothing),
        Decision::Freeze {
            left_behind: true,
            why: Reason::NoRounds,
            predicted: Some(70 * MS)
        }
    );
}

#[test]
fn the_first_round_is_always_made() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        let decision = decide(&Policy::default(), mode, &measured(Vec::new()));
        assert_eq!(decision, Decision::Another);
    }
}

#[test]
fn the_rounds_end_when_what_is_left_fits() {
    // 10 000 pages a second, 100 ms of fixed cost, a limit of 300 ms: 2000 pages fit.
    let table = [
        (vec![9000], Decision::Another),
        (vec![5000, 2100], Decision::Another),
    ];
    for (left, expected) in table {
        let decision = decide(
            &Policy::default(),
            Mode::PreCopy,
            &measured(plain(20_000, &left)),
        );
        assert_eq!(decision, expected, "{left:?}");
    }
    let decision = decide(
        &Policy::default(),
        Mode::PreCopy,
        &measured(plain(20_000, &[2100, 1900])),
    );
    assert_eq!(
        decision,
        Decision::Freeze {
            left_behind: false,
            why: Reason::Converged,
            predicted: Some(290 * MS)
        }
    );
}

#[test]
fn what_fits_but_can_still_be_made_much_less_gets_another_round() {
    let decide = |left: &[u64]| {
        decide(
            &Policy::default(),
            Mode::PreCopy,
            &measured(plain(200_000, left)),
        )
    };
    // A twentieth is written each time: 1000 pages, 100 ms, would become 5 ms.
    assert_eq!(decide(&[20_000, 1000]), Decision::Another);
    // 50 pages take 5 ms: little beside 100 ms that nothing makes less.
    assert_eq!(
        frozen(decide(&[20_000, 1000, 50])),
        Some((false, Reason::Converged))
    );
    // Hardly less: waiting for more is not worth it.
    assert_eq!(
        frozen(decide(&[20_000, 2500, 2000])),
        Some((false, Reason::Converged))
    );
}

#[test]
fn nothing_left_is_the_end() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        let decision = decide(&Policy::default(), mode, &measured(plain(1000, &[0])));
        assert_eq!(
            decision,
            Decision::Freeze {
                left_behind: false,
                why: Reason::Converged,
                predicted: Some(100 * MS)
            }
        );
    }
}

#[test]
fn an_empty_target_needs_no_bandwidth() {
    let decision = decide(&Policy::default(), Mode::PreCopy, &measured(plain(0, &[0])));
    assert_eq!(frozen(decision), Some((false, Reason::Converged)));
}

#[test]
fn rounds_that_do_not_shrink_are_a_stall_after_two() {
    let left = [9000, 8900, 8800];
    let table = [
        (
            OnStall::Force,
            Mode::PreCopy,
            Some((false, Reason::Stalled)),
        ),
        (
            OnStall::PostCopy,
            Mode::PreCopy,
            Some((true, Reason::Stalled)),
        ),
        (OnStall::Abort, Mode::Hybrid, Some((true, Reason::Stalled))),
        (OnStall::Force, Mode::Hybrid, Some((true, Reason::Stalled))),
    ];
    for (on_stall, mode, expected) in table {
        let early = measured(plain(20_000, &left[..2]));
        assert_eq!(decide(&policy(on_stall), mode, &early), Decision::Another);
        let late = measured(plain(20_000, &left));
        let decision = decide(&policy(on_stall), mode, &late);
        assert_eq!(frozen(decision), expected, "{on_stall} {mode}");
    }
    assert_eq!(
        decide(
            &policy(OnStall::Abort),
            Mode::PreCopy,
            &measured(plain(20_000, &left))
        ),
        Decision::GiveUp {
            why: Reason::Stalled
        }
    );
}

#[test]
fn one_bad_round_among_good_ones_is_no_stall() {
    let left = [90_000, 60_000, 70_000, 40_000, 41_000, 30_000, 33_000];
    for count in 1..=left.len() {
        let decision = decide(
            &policy(OnStall::Abort),
            Mode::PreCopy,
            &measured(plain(200_000, &left[..count])),
        );
        assert_eq!(decision, Decision::Another, "{count}");
    }
}

#[test]
fn writing_faster_than_sending_is_a_stall_although_the_first_round_says_nothing() {
    let rounds = plain(20_000, &[20_000, 20_000]);
    let decision = decide(&policy(OnStall::Force), Mode::PreCopy, &measured(rounds));
    assert_eq!(frozen(decision), Some((false, Reason::Stalled)));
}

#[test]
fn throttling_goes_in_steps_and_ends_in_a_freeze() {
    let policy = policy(OnStall::Throttle);
    let mut left: Vec<(u64, u8)> = vec![(9000, 0); 3];
    let mut steps = Vec::new();
    let end = loop {
        match decide(&policy, Mode::PreCopy, &measured(chain(20_000, &left))) {
            Decision::Throttle { percent, .. } => {
                steps.push(percent);
                left.push((9000, percent));
            }
            other => break other,
        }
    };
    assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    assert_eq!(frozen(end), Some((false, Reason::ThrottledToTheEnd)));
}

#[test]
fn a_throttle_that_helps_is_kept() {
    let left = [(9000, 0), (9000, 0), (9000, 0), (9000, 20), (7000, 30)];
    let decision = decide(
        &policy(OnStall::Throttle),
        Mode::PreCopy,
        &measured(chain(20_000, &left)),
    );
    assert_eq!(decision, Decision::Another);
}

#[test]
fn without_a_way_to_throttle_the_target_is_frozen() {
    let policy = Policy {
        may_throttle: false,
        ..policy(OnStall::Throttle)
    };
    let decision = decide(
        &policy,
        Mode::PreCopy,
        &measured(plain(20_000, &[9000, 9000, 9000])),
    );
    assert_eq!(frozen(decision), Some((false, Reason::Stalled)));
}

#[test]
fn the_limits_end_rounds_that_shrink() {
    let rounds = plain(2_000_000, &[1_000_000, 500_000, 250_000]);
    let by_rounds = Policy {
        max_rounds: 3,
        ..policy(OnStall::Throttle)
    };
    let by_time = Policy {
        max_time: Some(Duration::from_secs(1)),
        ..policy(OnStall::Abort)
    };
    assert_eq!(
        frozen(decide(&by_rounds, Mode::PreCopy, &measured(rounds.clone()))),
        Some((false, Reason::RoundLimit))
    );
    assert_eq!(
        decide(&by_time, Mode::PreCopy, &measured(rounds)),
        Decision::GiveUp {
            why: Reason::TimeLimit
        }
    );
}

#[test]
fn a_fixed_cost_beyond_the_limit_is_not_waited_for() {
    let big = Measurements {
        fixed: 400 * MS,
        ..measured(plain(2_000_000, &[100_000, 5000, 200]))
    };
    // 200 pages are 20 ms, less than a tenth of it.
    let decision = decide(&policy(OnStall::PostCopy), Mode::PreCopy, &big);
    assert_eq!(frozen(decision), Some((false, Reason::FixedCost)));
    assert_eq!(
        decide(&policy(OnStall::Abort), Mode::PreCopy, &big),
        Decision::GiveUp {
            why: Reason::FixedCost
        }
    );
    let early = Measurements {
        rounds: plain(2_000_000, &[100_000]),
        ..big
    };
    let decision = decide(&policy(OnStall::PostCopy), Mode::PreCopy, &early);
    assert_eq!(decision, Decision::Another);
}

#[test]
fn a_bandwidth_rests_on_as_much_as_it_is_asked_about() {
    // 100 000 pages at 10 000 a second, then ten pages that took a round trip of 10 ms.
    let mut rounds = plain(100_000, &[10, 50_000]);
    rounds[1].send_time = 10 * MS;
    let of_many = bandwidth(&rounds, 50_000).unwrap() / PAGE as f64;
    assert!((9_900.0..=10_000.0).contains(&of_many), "{of_many}");
    // A slower link later on counts more than what was before, once it has carried as much.
    let mut rounds = plain(100_000, &[50_000, 50_000]);
    rounds[1].send_time *= 10;
    let now = bandwidth(&rounds, 50_000).unwrap() / PAGE as f64;
    assert!((999.0..1001.0).contains(&now), "{now}");
}

#[test]
fn zero_pages_say_nothing_about_the_bandwidth() {
    let mut rounds = plain(20_000, &[1000]);
    rounds[0].zero = 15_000;
    let rate = bandwidth(&rounds, 1000).unwrap() / PAGE as f64;
    assert!((2499.0..2501.0).contains(&rate), "{rate}");
    rounds[0].zero = 20_000;
    assert_eq!(bandwidth(&rounds, 1000), None);
    let decision = decide(&Policy::default(), Mode::PreCopy, &measured(rounds));
    assert_eq!(decision, Decision::Another);
}

#[test]
fn phaul_counts_rounds_pages_and_growth() {
    let policy = Policy {
        kind: PolicyKind::Phaul,
        ..policy(OnStall::Abort)
    };
    let table: [(&[u64], Option<Reason>); 6] = [
        (&[], None),
        (&[1000], None),
        (&[1000, 63, 5], Some(Reason::FewPages)),
        (&[1000, 1100, 9], None),
        (&[1000, 1101, 9], Some(Reason::Growth)),
        (&[1000; 8], Some(Reason::RoundLimit)),
    ];
    for (left, expected) in table {
        let measured = measured(plain(1_000_000, left));
        let decision = decide(&policy, Mode::PreCopy, &measured);
        // Never "give up", and never left behind.
        let expected = expected.map(|why| (false, why));
        assert_eq!(frozen(decision), expected, "{left:?}");
        if expected.is_none() {
            assert_eq!(decision, Decision::Another, "{left:?}");
        }
    }
}

#[test]
fn the_fixed_cost_grows_with_memory() {
    let cost = FixedCost {
        base: 80 * MS,
        per_gib: 60 * MS,
    };
    assert_eq!(cost.of(0), 80 * MS);
    assert_eq!(cost.of(4 << 30), 320 * MS);
    assert_eq!(cost.of(512 << 20), 110 * MS);
    assert!(FixedCost::VEILED.of(1 << 30) < FixedCost::default().of(1 << 30));
}

#[test]
fn words_are_read_as_they_are_written() {
    for mode in Mode::ALL {
        assert_eq!(mode.to_string().parse(), Ok(*mode));
        assert_eq!(serde_json::to_value(mode).unwrap(), mode.name());
    }
    for kind in PolicyKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(*kind));
    }
    for on_stall in OnStall::ALL {
        assert_eq!(on_stall.to_string().parse(), Ok(*on_stall));
    }
    let error = "live".parse::<Mode>().unwrap_err().to_string();
    assert_eq!(
        error,
        "\"live\" is none of stop-and-copy, pre-copy, post-copy, hybrid"
    );
}

fn any_round() -> impl Strategy<Value = Round> {
    let pages = || prop_oneof![Just(0_u64), 0..100_u64, 0..10_000_000_u64, Just(u64::MAX)];
    let time = || prop_oneof![Just(0_u64), 0..1000_u64, 0..100_000_000_u64];
    let rest = (pages(), 0..=100_u8, any::<bool>());
    (pages(), pages(), time(), time(), rest).prop_map(
        |(pages, zero, send, length, (found, throttle, shared))| Round {
            pages,
            zero,
            send_time: Duration::from_micros(send),
            length: Duration::from_micros(length),
            found,
            throttle,
            shared,
        },
    )
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (
        prop::sample::select(PolicyKind::ALL),
        0..2000_u64,
        0..40_u32,
        prop::option::of(0..100_000_u64),
        prop::sample::select(OnStall::ALL),
        any::<bool>(),
    )
        .prop_map(
            |(kind, downtime, max_rounds, time, on_stall, may_throttle)| Policy {
                kind,
                max_downtime: Duration::from_millis(downtime),
                max_rounds,
                max_time: time.map(Duration::from_millis),
                on_stall,
                may_throttle,
            },
        )
}

fn any_measurements() -> impl Strategy<Value = Measurements> {
    let rounds = prop::collection::vec(any_round(), 0..12);
    (rounds, 0..1000_u64, 0..100_000_u64).prop_map(|(rounds, fixed, elapsed)| Measurements {
        rounds,
        fixed: Duration::from_millis(fixed),
        elapsed: Duration::from_millis(elapsed),
    })
}

#[test]
fn all_of_the_line_is_taken_before_anything_else_and_once() {
    for mode in [Mode::PreCopy, Mode::Hybrid] {
        for on_stall in OnStall::ALL {
            let policy = policy(*on_stall);
            // As fast as it is sent, while others have their part.
            let mut rounds = plain(100_000, &[50_000, 40_000]);
            rounds.iter_mut().for_each(|round| round.shared = true);
            let decision = decide(&policy, mode, &measured(rounds.clone()));
            assert_eq!(decision, Decision::TakeLine);
            // One such round without them says nothing yet, and is not asked for again.
            rounds.extend(plain(40_000, &[40_000]));
            let decision = decide(&policy, mode, &measured(rounds.clone()));
            assert_eq!(decision, Decision::Another);
            rounds.extend(plain(40_000, &[40_000]));
            let decision = decide(&policy, mode, &measured(rounds));
            assert!(
                !matches!(decision, Decision::Another | Decision::TakeLine),
                "{decision:?}"
            );
        }
    }
}

#[test]
fn what_converges_beside_others_leaves_them_their_part() {
    for left in [
        &[5_000][..],
        &[50_000],
        &[50_000, 30_000],
        &[50_000, 30_000, 20_000],
    ] {
        let mut rounds = plain(100_000, left);
        rounds.iter_mut().for_each(|round| round.shared = true);
        let decision = decide(&policy(OnStall::Force), Mode::PreCopy, &measured(rounds));
        assert!(!matches!(decision, Decision::TakeLine), "{decision:?}");
    }
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop::sample::select(Mode::ALL)
}

proptest! {
    #[test]
    fn there_are_never_more_rounds_than_allowed(
        policy in any_policy(),
        mode in any_mode(),
        rounds in prop::collection::vec(any_round(), 40),
    ) {
        let mut seen = Measurements::default();
        let mut takes_line = false;
        for mut round in rounds {
            match decide(&policy, mode, &seen) {
                Decision::Another => {}
                Decision::TakeLine => takes_line = true,
                Decision::Throttle { percent, .. } => round.throttle = percent,
                _ => return Ok(()),
            }
            round.shared &= !takes_line;
            seen.rounds.push(round);
            prop_assert!(seen.rounds.len() <= policy.max_rounds as usize);
        }
    }

    #[test]
    fn pages_are_left_behind_only_if_that_was_asked_for(
        policy in any_policy(),
        mode in any_mode(),
        measured in any_measurements(),
    ) {
        if let Decision::Freeze { left_behind: true, why, .. } = decide(&policy, mode, &measured) {
            let asked = mode == Mode::PreCopy && policy.on_stall == OnStall::PostCopy;
            prop_assert!(mode == Mode::PostCopy || mode == Mode::Hybrid || asked);
            prop_assert!(!asked || why != Reason::Converged);
        }
    }

    #[test]
    fn only_pre_copy_gives_up_and_only_if_that_was_asked_for(
        policy in any_policy(),
        mode in any_mode(),
        measured in any_measurements(),
    ) {
        if let Decision::GiveUp { .. } = decide(&policy, mode, &measured) {
            prop_assert!(mode == Mode::PreCopy && policy.on_stall == OnStall::Abort);
            prop_assert_eq!(policy.kind, PolicyKind::Downtime);
        }
    }

    #[test]
    fn a_throttle_only_ever_tightens_and_leaves_something(
        policy in any_policy(),
        mode in any_mode(),
        measured in any_measurements(),
    ) {
        if let Decision::Throttle { percent, .. } = decide(&policy, mode, &measured) {
            prop_assert!(percent > measured.rounds.last().map_or(0, |round| round.throttle));
            prop_assert!(percent <= 99);
            prop_assert!(policy.on_stall == OnStall::Throttle && policy.may_throttle);
        }
    }

    #[test]
    fn what_converged_keeps_the_promise_and_a_longer_limit_is_met_no_later(
        policy in any_policy(),
        mode in any_mode(),
        measured in any_measurements(),
        more in 0..10_000_u64,
    ) {
        let decision = decide(&policy, mode, &measured);
        let longer = Policy {
            max_downtime: policy.max_downtime + Duration::from_millis(more),
            ..policy.clone()
        };
        if let Decision::Freeze { why, predicted, .. } = decision {
            if why == Reason::Converged {
                prop_assert!(predicted.unwrap() <= policy.max_downtime);
            }
            prop_assert!(frozen(decide(&longer, mode, &measured)).is_some());
        }
    }
}
