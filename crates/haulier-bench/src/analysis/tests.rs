use super::*;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

/// An answer every `every` ns within `time`.
fn steady(time: Range<u64>, every: u64) -> impl Iterator<Item = u64> {
    (time.start..time.end).step_by(every as usize)
}

fn near(value: f64, expected: f64) -> bool {
    (value - expected).abs() <= 0.02 * expected.abs() + 1e-3
}

#[test]
fn an_undisturbed_client_lost_nothing() {
    let answers: Vec<u64> = steady(0..5 * SECOND, MS).collect();
    let seen = service(&answers, 0..2 * SECOND).unwrap();
    assert!(near(seen.normal, 1000.0));
    assert_eq!(seen.usual_gap, MS);
    assert_eq!(seen.gap.end - seen.gap.start, MS);
    assert!(seen.back.is_some());
    assert!(near(seen.lost, 0.0), "{}", seen.lost);
    assert!(near(seen.usual_loss, 0.0), "{}", seen.usual_loss);
}

#[test]
fn what_is_lost_without_a_disturbance_is_told() {
    // Bins of 60 and of 40 answers in turn: of 50 a fifth is lost in every other.
    let bins = (0..5 * SECOND).step_by(2 * BIN as usize);
    let answers: Vec<u64> = bins
        .flat_map(|at| {
            steady(at..at + BIN, BIN / 60)
                .take(60)
                .chain(steady(at + BIN..at + 2 * BIN, BIN / 40))
        })
        .collect();
    let seen = service(&answers, 0..2 * SECOND).unwrap();
    assert!(near(seen.usual_loss, 0.1), "{}", seen.usual_loss);
}

#[test]
fn a_gap_is_lost_service_of_its_length() {
    let mut answers: Vec<u64> = steady(0..3 * SECOND, MS).collect();
    answers.extend(steady(3 * SECOND + 400 * MS..6 * SECOND, MS));
    let seen = service(&answers, 0..2 * SECOND).unwrap();
    assert_eq!(seen.gap, 3 * SECOND - MS..3 * SECOND + 400 * MS);
    assert_eq!(seen.back, Some(seen.gap.end));
    assert!(near(seen.lost, 0.4), "{}", seen.lost);
    assert!(near(seen.lost_since_gap, 0.4), "{}", seen.lost_since_gap);
}

#[test]
fn slow_service_after_the_gap_is_lost_in_part() {
    let mut answers: Vec<u64> = steady(0..2 * SECOND, MS).collect();
    answers.extend(steady(
        2 * SECOND + 300 * MS..6 * SECOND + 300 * MS,
        10 * MS,
    ));
    answers.extend(steady(6 * SECOND + 300 * MS..9 * SECOND, MS));
    let seen = service(&answers, 0..2 * SECOND).unwrap();
    // 0.3 s of nothing, and 4 s at a tenth.
    assert!(near(seen.lost, 0.3 + 0.9 * 4.0), "{}", seen.lost);
    // Ten bins with at most half a bin of slow service make 95 %.
    let back = seen.back.unwrap();
    assert!(back.abs_diff(6 * SECOND + 300 * MS) <= BIN, "{back}");
}

#[test]
fn slow_service_before_the_gap_is_told_apart() {
    let mut answers: Vec<u64> = steady(0..2 * SECOND, MS).collect();
    answers.extend(steady(2 * SECOND..4 * SECOND, 2 * MS));
    answers.extend(steady(4 * SECOND + 100 * MS..7 * SECOND, MS));
    let seen = service(&answers, 0..2 * SECOND).unwrap();
    assert!(near(seen.lost, 1.1), "{}", seen.lost);
    assert!(near(seen.lost_since_gap, 0.1), "{}", seen.lost_since_gap);
}

#[test]
fn a_service_that_never_came_back_is_told_as_such() {
    let mut answers: Vec<u64> = steady(0..2 * SECOND, MS).collect();
    answers.extend(steady(3 * SECOND..6 * SECOND, 5 * MS));
    let seen = service(&answers, 0..2 * SECOND).unwrap();
    assert_eq!(seen.back, None);
    assert!(near(seen.lost, 1.0 + 0.8 * 3.0), "{}", seen.lost);
}

#[test]
fn a_fast_bin_does_not_make_up_for_a_slow_one() {
    let mut answers: Vec<u64> = steady(0..2 * SECOND, MS).collect();
    answers.extend(steady(2 * SECOND..3 * SECOND, 2 * MS));
    answers.extend(steady(3 * SECOND..4 * SECOND, MS / 2));
    let lost = lost(&answers, 2 * SECOND..4 * SECOND, 1000.0);
    assert!(near(lost, 0.5), "{lost}");
}

#[test]
fn a_gap_that_reaches_over_an_edge_counts_whole() {
    let answers = [0, 10, 100, 110];
    assert_eq!(longest_gap(&answers, 50..60), Some(10..100));
    assert_eq!(longest_gap(&answers, 105..u64::MAX), Some(100..110));
    assert_eq!(longest_gap(&answers, 0..5), Some(0..10));
    assert_eq!(longest_gap(&[7], 0..9), None);
}

#[test]
fn no_answers_are_no_figures() {
    assert_eq!(service(&[], 0..SECOND), None);
    assert_eq!(service(&[1, 2], 10..SECOND), None);
}

#[test]
fn medians() {
    let odd = spread([3.0, 1.0, 2.0]).unwrap();
    assert_eq!((odd.min, odd.median, odd.max), (1.0, 2.0, 3.0));
    assert_eq!(spread([4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    assert_eq!(spread([]), None);
}
