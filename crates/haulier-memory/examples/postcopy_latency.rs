//! Measures how long a task waits for pages in post-copy, while everything is pushed at full speed
//! over loopback: random touching of memory that another process has. Arguments: MiB (1024),
//! memory channels (2), touching threads (1), limit of the push in MB/s (0: none), seed.

#[path = "../tests/far/mod.rs"]
mod far;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use far::{Link, Source, Target, serve, whole};
use haulier_memory::page::PAGE_BYTES;
use haulier_memory::post::{PageServer, ServeOptions};
use haulier_sys::userfaultfd::Region;

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|argument| argument.parse::<u64>().expect("a number"));
    let mut next = |default| arguments.next().unwrap_or(default);
    let (mib, channels, threads, limit) = (next(1024), next(2), next(1), next(0));
    let seed = next(1);
    let pages = mib * 256;
    let region = Region::map(pages as usize * PAGE_BYTES).expect("memory");
    let source = Source::start(region.address(), pages, 3);
    let server = PageServer::new(vec![source.order(vec![whole(&region)])]).expect("valid ranges");
    let target = Target::new(region, 1 << 30);
    let mut options = ServeOptions::new(0);
    options.stream.bandwidth = (limit > 0).then_some(limit * 1_000_000);
    let over = AtomicBool::new(false);
    let start = Instant::now();
    let mut touched = thread::scope(|scope| {
        let touchers: Vec<_> = (0..threads)
            .map(|number| {
                let (region, over) = (&target.region, &over);
                let mut random = seed * 1000 + number;
                scope.spawn(move || {
                    let mut waits = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let page = (random >> 33) % pages;
                        let start = Instant::now();
                        region.read(page as usize * PAGE_BYTES + 1234);
                        waits.push(start.elapsed());
                        // Works on what it has read.
                        while start.elapsed() < Duration::from_micros(50) {
                            std::hint::spin_loop();
                        }
                    }
                    waits
                })
            })
            .collect();
        let link = Link::new(1 + channels as usize);
        let (outcome, ()) = serve(&server, &target.client, link, &options, || ());
        let served = outcome.served.expect("served");
        over.store(true, Ordering::Relaxed);
        println!("{served:#?}");
        touchers
            .into_iter()
            .flat_map(|toucher| toucher.join().expect("a toucher"))
            .collect::<Vec<_>>()
    });
    let took = start.elapsed();
    target.store.seal();
    let stats = target
        .handle
        .wait_filled(Instant::now() + Duration::from_secs(60))
        .expect("filled");
    println!("{stats:?}");
    println!(
        "{:.0} MB/s in {took:?}; remote faults {}: daemon's median {:?}, p99 {:?}, longest {} us",
        (mib << 20) as f64 / 1e6 / took.as_secs_f64(),
        stats.remote_faults,
        stats.remote_latency.quantile(0.5),
        stats.remote_latency.quantile(0.99),
        stats.remote_latency.longest_us,
    );
    // Those that met a missing page: a present one takes less than a microsecond or two.
    touched.retain(|wait| *wait > Duration::from_micros(5));
    touched.sort_unstable();
    let at = |part: f64| touched[((touched.len() - 1) as f64 * part) as usize];
    if !touched.is_empty() {
        println!(
            "as the task sees it, {} waits: median {:?}, p90 {:?}, p99 {:?}, longest {:?}",
            touched.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    }
    target.check(&source);
}
