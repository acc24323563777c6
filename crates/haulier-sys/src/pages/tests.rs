use super::*;

fn pool() -> (PagePool, Arc<AtomicU64>) {
    let used = Arc::new(AtomicU64::new(0));
    (PagePool::new(used.clone()), used)
}

fn take(pool: &PagePool, used: &AtomicU64, count: usize) -> Vec<PagesMut> {
    used.fetch_add((count * PAGE_BYTES) as u64, Ordering::Relaxed);
    pool.take(count).unwrap()
}

fn pages(used: &AtomicU64) -> u64 {
    used.load(Ordering::Relaxed) / PAGE_BYTES as u64
}

#[test]
fn a_page_is_free_when_its_last_holder_is_gone() {
    let (pool, used) = pool();
    let mut run = take(&pool, &used, 10).pop().unwrap();
    for (number, page) in run.chunks_exact_mut(PAGE_BYTES).enumerate() {
        page.fill(number as u8);
    }
    let mut front = run.freeze();
    let middle = front.share(3..6);
    let back = front.split_off(5);
    drop(front);
    assert_eq!(pages(&used), 7, "pages 0, 1 and 2 are free");
    assert_eq!((middle[0], middle[2 * PAGE_BYTES]), (3, 5));
    drop(back);
    assert_eq!(pages(&used), 3);
    assert_eq!((middle[0], middle[2 * PAGE_BYTES]), (3, 5));
    let again = take(&pool, &used, 7);
    let counts: Vec<usize> = again.iter().map(|run| run.len() / PAGE_BYTES).collect();
    assert_eq!(counts, [3, 4], "free pages are used before fresh ones");
    drop((middle, again));
    assert_eq!(pages(&used), 0);
}

#[test]
fn holes_are_used_before_memory_is_mapped() {
    let (pool, used) = pool();
    let all: Vec<Pages> = (0..4 * ARENA_PAGES)
        .map(|_| take(&pool, &used, 1).remove(0).freeze())
        .collect();
    let mapped = pool.mapped();
    assert_eq!(mapped, 4 * ARENA_BYTES as u64);
    let mut kept = Vec::new();
    for (number, page) in all.into_iter().enumerate() {
        if number % 2 == 0 {
            kept.push(page);
        }
    }
    let refilled = take(&pool, &used, 2 * ARENA_PAGES);
    assert_eq!(refilled.len(), 2 * ARENA_PAGES, "each page is a hole");
    assert_eq!(pool.mapped(), mapped);
}

#[test]
fn arenas_go_back_to_the_kernel_except_for_some() {
    let (pool, used) = pool();
    let runs = take(&pool, &used, 20 * ARENA_PAGES + 5);
    assert_eq!(runs.len(), 21);
    drop(runs);
    assert_eq!(pages(&used), 0);
    assert_eq!(pool.mapped(), (WARM * ARENA_BYTES) as u64);
    assert_eq!(take(&pool, &used, 2 * ARENA_PAGES).len(), 2);
}

#[test]
fn neighbours_join_and_others_do_not() {
    let (pool, used) = pool();
    let mut run = take(&pool, &used, 10).pop().unwrap();
    for (number, page) in run.chunks_exact_mut(PAGE_BYTES).enumerate() {
        page.fill(number as u8);
    }
    let run = run.freeze();
    let mut joined = run.share(2..3);
    assert!(joined.join(run.share(3..5)).is_none());
    assert_eq!(joined.count(), 3);
    let apart = joined.join(run.share(6..7)).unwrap();
    assert_eq!(apart[0], 6);
    assert!(joined.join(run.share(1..2)).is_some(), "the page before");
    drop((run, apart));
    assert_eq!(pages(&used), 3);
    assert_eq!((joined[0], joined[2 * PAGE_BYTES]), (2, 4));
    drop(joined);
    assert_eq!(pages(&used), 0);
}

#[test]
fn free_pages_of_the_pool_are_counted() {
    let (pool, used) = pool();
    let run = take(&pool, &used, 10);
    assert_eq!(pool.idle(), (ARENA_BYTES - 10 * PAGE_BYTES) as u64);
    drop(run);
    assert_eq!(pool.idle(), pool.mapped());
    drop(take(&pool, &used, 20 * ARENA_PAGES));
    assert_eq!(pool.idle(), (WARM * ARENA_BYTES) as u64);
}

#[test]
fn threads_share_and_drop_without_losing_a_page() {
    let (pool, used) = pool();
    std::thread::scope(|scope| {
        for seed in 0..4_u8 {
            let (pool, used) = (&pool, &used);
            scope.spawn(move || {
                for turn in 0..200_u8 {
                    let mut run = take(pool, used, 100);
                    run.iter_mut().for_each(|run| run.fill(seed ^ turn));
                    let run: Vec<Pages> = run.into_iter().map(PagesMut::freeze).collect();
                    let shared = run.clone();
                    let other = std::thread::spawn(move || drop(run));
                    let whole = |pages: &Pages| pages.iter().all(|byte| *byte == seed ^ turn);
                    assert!(shared.iter().all(whole));
                    drop(shared);
                    other.join().unwrap();
                }
            });
        }
    });
    assert_eq!(pages(&used), 0);
}

#[test]
fn memory_that_is_given_back_is_zero_when_it_is_used_again() {
    let (pool, used) = pool();
    let mut runs = take(&pool, &used, 8 * ARENA_PAGES);
    runs.iter_mut().for_each(|run| run.fill(7));
    let mut runs: Vec<Pages> = runs.into_iter().map(PagesMut::freeze).collect();
    let spare = runs.split_off(3);
    drop(spare);
    let idle = pool.idle();
    let mut first = runs.remove(0);
    let shared = first.share(10..11);
    let tail = first.split_off(300);
    first.give_back();
    assert_eq!(pool.idle(), idle, "nothing of what has no memory");
    assert_eq!(pages(&used), 2 * ARENA_PAGES as u64 + 213);
    assert!(shared.iter().chain(&*tail).all(|byte| *byte == 7));
    let again = take(&pool, &used, 300);
    let whole: Vec<&[u8]> = again.iter().map(|run| &run[..]).collect();
    assert_eq!(whole.concat().len(), 300 * PAGE_BYTES);
    // The lowest arena comes first.
    assert!(
        whole.concat()[..299 * PAGE_BYTES]
            .iter()
            .all(|byte| *byte == 0)
    );
    drop((again, shared, tail, runs));
    assert_eq!(pages(&used), 0);
    assert_eq!(pool.idle(), (WARM * ARENA_BYTES) as u64);
}

#[test]
fn only_pages_of_one_holder_are_written_again() {
    let (pool, used) = pool();
    let mut run = take(&pool, &used, 4).remove(0).freeze();
    let shared = run.share(3..4);
    assert!(run.unshared().is_none());
    let mut front = run;
    let back = front.split_off(3);
    front.unshared().unwrap().fill(9);
    assert_eq!(front[0], 9);
    drop(shared);
    let mut back = back;
    assert!(back.unshared().is_some());
}
