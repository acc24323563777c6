//! What a task does to its memory between two looks.

use super::*;

pub(crate) fn writes_are_seen_once(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 64);
    task.write(0, 32, 1);
    stage.expect(&destination.written(&task), &[(0, 32)]);
    assert!(destination.written(&task).is_empty());
    task.write(3, 2, 2);
    task.write(40, 1, 3);
    stage.expect(&destination.written(&task), &[(3, 2), (40, 1)]);
    assert!(destination.written(&task).is_empty());
    task.write(4, 1, 4);
    let last = destination.settle(&[task.id()]);
    stage.expect(&within(&last.tasks[0].written), &[(4, 1)]);
}

pub(crate) fn writes_of_the_kernel_are_seen(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 8);
    task.write(0, 8, 1);
    destination.written(&task);
    task.on("read", 2, 3, 0);
    stage.expect(&destination.written(&task), &[(2, 3)]);
    destination.settle(&[task.id()]);
}

pub(crate) fn discarded_pages_are_written_when_they_come_back(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 16);
    task.write(0, 16, 1);
    destination.written(&task);
    task.on("discard", 4, 8, 0);
    assert!(destination.written(&task).is_empty());
    task.on("touch", 4, 1, 0);
    task.write(6, 2, 9);
    let found = destination.written(&task);
    assert!(found.covers(pages(6, 2)), "{found:?}");
    destination.settle(&[task.id()]);
}

pub(crate) fn pages_discarded_before_the_end_are_not_kept(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 16);
    task.write(0, 16, 1);
    destination.written(&task);
    task.on("discard", 0, 4, 0);
    task.on("touch", 1, 1, 0);
    destination.settle(&[task.id()]);
    assert_eq!(within(&populated(task.pid())), set(&[(4, 12)]));
}

pub(crate) fn a_moved_mapping_is_written_and_its_old_place_is_gone(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 16);
    task.write(0, 16, 1);
    destination.written(&task);
    task.on("move", 4, 4, at(100));
    let found = destination.look(&task);
    stage.expect(&within(&found.written), &[(100, 4)]);
    assert_eq!(within(&found.mapped), set(&[(0, 4), (8, 8), (100, 4)]));
    task.write(101, 1, 2);
    task.write(2, 1, 2);
    stage.expect(&destination.written(&task), &[(2, 1), (101, 1)]);
    destination.settle(&[task.id()]);
}

pub(crate) fn a_new_mapping_at_an_old_place_is_written(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 16);
    task.write(0, 16, 1);
    destination.written(&task);
    task.on("unmap", 4, 4, 0);
    task.map(4, 4);
    task.write(5, 1, 7);
    task.write(12, 1, 7);
    stage.expect(&destination.written(&task), &[(5, 1), (12, 1)]);
    assert!(destination.written(&task).is_empty());
    destination.settle(&[task.id()]);
}

pub(crate) fn mappings_without_access_and_reservations_cost_nothing(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    // 64 GiB that nobody may touch, and pages that were written before that was forbidden.
    task.on("map", 1000, 16 << 20, 0);
    task.map(0, 8);
    task.write(0, 8, 1);
    task.on("protect", 2, 4, 0);
    stage.expect(&destination.written(&task), &[(0, 8)]);
    task.on("protect", 2, 4, RW);
    task.write(3, 1, 5);
    task.on("protect", 2, 4, 0);
    stage.expect(&destination.written(&task), &[(3, 1)]);
    let before = page_tables(&task);
    destination.written(&task);
    assert_eq!(page_tables(&task), before);
    destination.settle(&[task.id()]);
}

/// KiB of page tables.
fn page_tables(task: &Task) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", task.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    line.unwrap().trim_end_matches("kB").trim().parse().unwrap()
}

pub(crate) fn locked_memory_is_not_tracked(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 8);
    task.write(0, 8, 1);
    destination.written(&task);
    task.on("lock", 0, 2, 0);
    let found = destination.look(&task);
    assert_eq!(within(&found.mapped), set(&[(2, 6)]));
    destination.settle(&[task.id()]);
}

pub(crate) fn huge_pages_are_tracked_as_small_ones(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 2048);
    task.on("huge", 0, 2048, 0);
    task.write(0, 2048, 1);
    stage.expect(&destination.written(&task), &[(0, 2048)]);
    task.write(700, 1, 2);
    let found = destination.written(&task);
    assert!(
        found.covers(pages(700, 1)) && found.pages() <= 512,
        "{found:?}"
    );
    task.on("discard", 512, 512, 0);
    task.on("touch", 512, 1, 0);
    task.write(600, 3, 3);
    destination.settle(&[task.id()]);
}

pub(crate) fn ten_thousand_mappings_are_tracked(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.on("pieces", 0, 10_000, 0);
    task.on("scatter", 20_000, 10_000, 0);
    task.write(0, 10_000, 1);
    let first = Instant::now();
    assert_eq!(destination.tracker_look(&task).pages(), 20_000);
    let first = first.elapsed();
    task.write(5000, 3, 2);
    task.write(20_000 + 2 * 777, 1, 2);
    let second = Instant::now();
    let found = destination.tracker_look(&task);
    println!(
        "20 000 mappings: first look {first:?}, next {:?}",
        second.elapsed()
    );
    stage.expect(&found, &[(5000, 3), (20_000 + 2 * 777, 1)]);
}

pub(crate) fn four_gibibytes_are_looked_at_in_one_go(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    let all = 1 << 20;
    task.map(0, all);
    task.write(0, all, 1);
    let times: Vec<Duration> = (0..4)
        .map(|round| {
            for page in 0..round * 100 {
                task.write(page * 1000, 1, round);
            }
            let begin = Instant::now();
            let found = destination.tracker_look(&task);
            let time = begin.elapsed();
            assert_eq!(found.pages(), if round == 0 { all } else { round * 100 });
            time
        })
        .collect();
    println!("4 GiB: {times:?}");
}

impl Destination {
    /// A look of which nothing is sent.
    fn tracker_look(&mut self, task: &Task) -> RangeSet {
        let tasks = [task.id()];
        let mut scan = self.tracker.scan(&tasks, &mut Stopped(&tasks)).unwrap();
        let found = scan.tasks.remove(0);
        assert_eq!(found.untracked, None);
        within(&found.written)
    }
}

/// A generator of numbers that depend on the seed alone.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// What the seed makes the task do; all of it is within 512 pages.
fn random_order(random: &mut Random) -> String {
    let (first, count) = (random.below(480), 1 + random.below(32));
    let (place, seed) = (at(first), random.below(1 << 30));
    match random.below(14) {
        0 => format!("map {place:x} {count:x} 3"),
        1 => format!("unmap {place:x} {count:x}"),
        2 => format!("discard {place:x} {count:x}"),
        3 => format!("touch {place:x} {count:x}"),
        4 => format!("move {place:x} {count:x} {:x}", at(random.below(480))),
        5 => format!("read {place:x} {count:x}"),
        6 => format!(
            "protect {place:x} {count:x} {:x}",
            [1, 3][random.below(2) as usize]
        ),
        _ => format!("write {place:x} {count:x} {seed:x}"),
    }
}

/// Whether the task may do it without dying: it only touches what it mapped itself.
fn is_safe(access: &mut [u64], order: &str) -> bool {
    let words: Vec<&str> = order.split(' ').collect();
    let number = |at: usize| u64::from_str_radix(words[at], 16).unwrap();
    let first = ((number(1) - BASE) / PAGE) as usize;
    let range = first..first + number(2) as usize;
    let all = |wanted: u64, access: &[u64]| {
        access[range.clone()]
            .iter()
            .all(|has| has & wanted == wanted)
    };
    match words[0] {
        "map" => access[range].fill(RW),
        "unmap" => access[range].fill(0),
        "protect" if all(1, access) => access[range].fill(number(3)),
        "discard" | "touch" => return all(1, access),
        "write" | "read" => return all(RW, access),
        "move" => {
            let target = ((number(3) - BASE) / PAGE) as usize;
            let target = target..target + range.len();
            let apart = target.end <= range.start || range.end <= target.start;
            // One mapping only, which memory of one access is here.
            if !apart || !all(1, access) {
                return false;
            }
            access.copy_within(range.clone(), target.start);
            access[range].fill(0);
        }
        _ => return false,
    }
    true
}

pub(crate) fn a_task_that_does_anything_is_the_same_at_the_end(stage: &Stage) {
    let seed = std::env::var("TRACKED_SEED").map_or_else(
        |_| Instant::now().elapsed().as_nanos() as u64 ^ u64::from(std::process::id()),
        |seed| seed.parse().unwrap(),
    );
    println!("TRACKED_SEED={seed}");
    for seed in seed..seed + 4 {
        random_task(stage, seed);
    }
}

fn random_task(stage: &Stage, seed: u64) {
    println!("seed {seed}");
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 512);
    let id = task.id();
    let task = std::thread::scope(|scope| {
        let orders = scope.spawn(move || {
            let mut random = Random(seed);
            let mut access = vec![RW; 512];
            for _ in 0..1500 {
                let order = random_order(&mut random);
                if is_safe(&mut access, &order) {
                    task.send(&order);
                    let answer = task.answer();
                    // Moving pieces of several mappings is refused, and then nothing was done, or
                    // the target is unmapped: start over.
                    if !answer.starts_with("ok") {
                        assert!(
                            order.starts_with("move") || order.starts_with("read"),
                            "{order}: {answer}"
                        );
                        task.map(0, 512);
                        access.fill(RW);
                    }
                }
            }
            task
        });
        while !orders.is_finished() {
            destination.round(&[id]);
        }
        orders.join().unwrap()
    });
    destination.settle(&[task.id()]);
}

pub(crate) fn threads_that_write_all_the_time_lose_nothing(stage: &Stage) {
    let mut task = stage.task();
    let mut destination = stage.under_tracker();
    task.map(0, 4096);
    task.write(0, 4096, 1);
    task.on("threads", 0, 4096, 3);
    for _ in 0..30 {
        destination.look(&task);
    }
    destination.settle(&[task.id()]);
}
