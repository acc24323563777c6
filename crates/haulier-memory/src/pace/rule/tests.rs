use super::*;

const TICK: Duration = Duration::from_millis(20);
const WAY: Duration = Duration::from_micros(100);
const GIGABIT: f64 = 125e6;

/// A line with a token bucket and a queue in front of it, that others use as well.
struct Line {
    rate: f64,
    /// What the sender could do at most.
    sender: f64,
    /// Bytes that may pass at once after a rest.
    burst: f64,
    tokens: f64,
    queue: f64,
    most_queued: f64,
    /// A queue that somebody else keeps, whatever we do.
    others: Duration,
    /// Round trips grow for another reason.
    noise: Duration,
    rule: Rule,
}

impl Line {
    fn new(rate: f64, sender: f64) -> Line {
        Line {
            rate,
            sender,
            burst: rate * 0.004,
            tokens: rate * 0.004,
            queue: 0.0,
            most_queued: rate * 0.02,
            others: Duration::ZERO,
            noise: Duration::ZERO,
            rule: Rule::new(0.9, None),
        }
    }

    /// One look's time. Returns what was delivered, as a rate.
    fn tick(&mut self) -> f64 {
        let seconds = TICK.as_secs_f64();
        let paced = self.rule.rate().map_or(f64::MAX, |rate| rate as f64);
        let offered = self.sender.min(paced) * seconds;
        let room = self.most_queued - self.queue + self.rate * seconds + self.tokens;
        let offered = offered.min(room);
        let through = (self.queue + offered).min(self.rate * seconds + self.tokens);
        self.tokens = (self.tokens + self.rate * seconds - through).min(self.burst);
        self.queue += offered - through;
        let queued = Duration::from_secs_f64(self.queue / self.rate);
        self.rule.take(&Look {
            length: TICK,
            delivered: through as u64,
            way: WAY,
            now: WAY + queued + self.others + self.noise,
        });
        through / seconds
    }

    fn ticks(&mut self, count: usize) -> f64 {
        (0..count).map(|_| self.tick()).sum::<f64>() / count as f64
    }
}

fn near(seen: f64, wanted: f64) -> bool {
    (seen / wanted - 1.0).abs() < 0.02
}

#[test]
fn a_full_line_is_found_soon_and_left_its_share_and_an_empty_queue() {
    let mut line = Line::new(GIGABIT, 1e9);
    line.ticks(5);
    assert!(line.rule.rate().is_some());
    line.ticks(3);
    assert_eq!(line.queue, 0.0);
    let paced = line.rule.rate().unwrap() as f64;
    assert!(near(paced, 0.9 * GIGABIT), "{paced}");
    let mut full = 0;
    let rate = (0..1000).map(|_| {
        let rate = line.tick();
        full += u32::from(line.queue > 0.0);
        rate
    });
    let rate = rate.sum::<f64>() / 1000.0;
    assert!((0.88..0.95).contains(&(rate / GIGABIT)), "{rate}");
    // Four looks for more in 20 s.
    assert!(full < 100, "a queue in {full} of 1000");
}

#[test]
fn who_is_slower_than_the_line_is_left_alone_whatever_round_trips_do() {
    let mut line = Line::new(10.0 * GIGABIT, GIGABIT);
    let rate = line.ticks(500);
    assert!(near(rate, GIGABIT), "{rate}");
    assert_eq!(line.rule.rate(), None);
    // A sender that is interrupted all the time, on a machine whose round trips show it.
    line.noise = Duration::from_millis(3);
    for tick in 0..500 {
        line.sender = GIGABIT * f64::from(tick % 3 + 2) / 4.0;
        line.tick();
        assert_eq!(line.rule.rate(), None, "at {tick}");
    }
}

#[test]
fn what_changes_is_followed() {
    let mut line = Line::new(GIGABIT, 1e9);
    line.ticks(50);
    line.rate = GIGABIT / 2.0;
    line.ticks(100);
    let rate = line.ticks(100);
    assert!(rate < 0.5 * GIGABIT, "{rate}");
    line.rate = 2.0 * GIGABIT;
    line.ticks(300);
    let rate = line.ticks(100);
    assert!((1.75..1.95).contains(&(rate / GIGABIT)), "{rate}");
}

#[test]
fn a_queue_that_others_keep_full_is_no_reason_to_give_way_for_ever() {
    let mut line = Line::new(GIGABIT, 1e9);
    line.ticks(20);
    line.others = Duration::from_millis(10);
    let rate = line.ticks(1000);
    assert!(rate > 0.8 * GIGABIT, "{rate}");
}

#[test]
fn a_line_that_is_known_is_not_filled_first() {
    let mut line = Line::new(GIGABIT, 1e9);
    line.rule = Rule::new(0.9, Some(GIGABIT as u64));
    line.ticks(200);
    assert_eq!(line.queue, 0.0);
    assert_eq!(line.rule.line(), Some(GIGABIT as u64));
}

#[test]
fn looks_with_a_pause_between_them_are_not_in_a_row() {
    let mut line = Line::new(GIGABIT, 1e9);
    for _ in 0..50 {
        line.ticks(3);
        line.rule.pause();
        assert_eq!(line.rule.rate(), None);
    }
}

#[test]
fn a_moment_in_which_nothing_comes_through_is_no_line() {
    let mut line = Line::new(GIGABIT, 1e9);
    line.rule = Rule::new(0.9, Some(GIGABIT as u64));
    for _ in 0..LOOKS {
        line.rule.take(&Look {
            length: TICK,
            delivered: 0,
            way: WAY,
            now: 100 * WAY,
        });
    }
    assert_eq!(line.rule.line(), Some(GIGABIT as u64 / 2));
}

#[test]
fn a_rate_is_never_nothing() {
    assert_eq!(Rule::new(0.9, Some(0)).rate(), Some(1024));
}
