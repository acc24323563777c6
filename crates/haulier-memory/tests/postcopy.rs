//! Pages follow a task that runs already: by fault, by push, over links that break.

mod far;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use far::{Link, Source, TASK, Target, cut, patience, serve, until, whole};
use haulier_memory::page::{PAGE, PAGE_BYTES, PageRange};
use haulier_memory::post::{PageServer, ServeError, ServeOptions};
use haulier_memory::ranges::RangeSet;
use haulier_proto::frame::Kind;
use haulier_sys::userfaultfd::Region;
use haulier_transport::channel::Channel;

/// So slow that nothing but the first chunk is pushed while a test lasts.
fn stuck(round: u32) -> ServeOptions {
    let mut options = ServeOptions::new(round);
    options.stream.bandwidth = Some(1);
    options
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn scene(pages: u64, limit: u64) -> (Source, Target, PageServer) {
    let region = Region::map(pages as usize * PAGE_BYTES).unwrap();
    let source = Source::start(region.address(), pages, 3);
    let server = PageServer::new(vec![source.order(vec![whole(&region)])]).unwrap();
    (source, Target::new(region, limit), server)
}

#[test]
fn a_fault_is_answered_before_the_push_gets_there_and_every_page_is_sent_once() {
    const PAGES: u64 = 2000;
    let (source, target, server) = scene(PAGES, 1 << 30);
    let link = Link::new(2);
    let scissors = link.scissors();
    let asked = [1990, 800, 1990, 804, 1001];
    let (outcome, ()) = serve(&server, &target.client, link, &stuck(4), || {
        for page in asked {
            // The next is asked for when this one is here, with its neighbours.
            let value = target.reader(page).join().unwrap();
            assert_eq!(value, source.value(page), "page {page}");
        }
        until("neighbours", || server.progress().sent >= 32 + 10 + 2 * 16);
        cut(&scissors);
    });
    assert!(outcome.served.unwrap_err().is_broken_link());
    // The first chunk, the last ten pages, and twice a page with its neighbours.
    let sent = 32 + 10 + 2 * 16;
    assert_eq!(server.progress().sent, sent);
    assert_eq!(server.progress().remaining, PAGES - sent);
    let missing = target.handle.missing();
    assert_eq!(missing.len(), 1);
    assert_eq!(missing[0].0, TASK);
    assert_eq!(missing[0].1.pages(), PAGES - target.store.received());
    let stats = target.handle.stats();
    assert_eq!(
        stats.remote_latency.count(),
        stats.remote_faults,
        "{stats:?}"
    );
    assert!((3..=4).contains(&stats.remote_faults), "{stats:?}");
    assert_eq!(target.client.outstanding(), 0);

    // The rest, by faults and push together.
    server.resume(&missing).unwrap();
    let rest = server.progress().remaining;
    let readers: Vec<_> = (0..PAGES).step_by(37).map(|n| target.reader(n)).collect();
    let (outcome, ()) = serve(
        &server,
        &target.client,
        Link::new(3),
        &ServeOptions::new(5),
        || (),
    );
    let served = outcome.served.as_ref().unwrap();
    assert_eq!(served.pages, rest);
    assert_eq!(served.pushed + served.answered + served.neighbours, rest);
    assert_eq!(outcome.pages(), rest);
    assert_eq!(target.store.received(), PAGES);
    for (reader, page) in readers.into_iter().zip((0..PAGES).step_by(37)) {
        assert_eq!(reader.join().unwrap(), source.value(page));
    }
    assert!(target.handle.missing().is_empty());
    target.store.seal();
    let stats = target.handle.wait_filled(soon()).unwrap();
    assert_eq!(stats.copied + stats.zeroed, PAGES, "{stats:?}");
    assert_eq!(stats.remote_latency.count(), stats.remote_faults);
    assert_eq!(target.store.used(), 0);
    target.check(&source);
}

/// Receives a frame of pages: where they begin.
fn pages(channel: &mut Channel) -> (u64, u64) {
    let (header, body) = channel.receive(&patience()).unwrap();
    assert_eq!(header.kind, Kind::Pages);
    let run = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
    let count = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
    let runs = u32::from_le_bytes(body[8..12].try_into().unwrap()) as usize;
    let counts = (0..runs).map(|n| u64::from(count(16 + n * 16 + 8)));
    (run(16), counts.sum())
}

fn ask(channel: &mut Channel, pages: &[u64]) {
    let mut body = Vec::new();
    for page in pages {
        body.extend(TASK.to_le_bytes());
        body.extend(page.to_le_bytes());
    }
    channel
        .send(Kind::FaultRequest, &[&body], &patience())
        .unwrap();
}

#[test]
fn a_page_that_is_on_its_way_is_not_sent_again() {
    let region = Region::map(500 * PAGE_BYTES).unwrap();
    let at = |page: u64| region.address() + page * PAGE;
    let source = Source::start(region.address(), 500, 1);
    // The push begins in the middle.
    let order = vec![
        PageRange::between(at(200), at(500)),
        PageRange::between(at(0), at(200)),
    ];
    let server = PageServer::new(vec![source.order(order)]).unwrap();
    let mut link = Link::new(2);
    let (mut faults, mut memory) = (link.destination.remove(0), link.destination.remove(0));
    let mut ends = std::mem::take(&mut link.source);
    std::thread::scope(|scope| {
        let (server, ends) = (&server, &mut ends);
        let serving = scope.spawn(move || {
            let (faults, memory) = ends.split_first_mut().unwrap();
            server.serve(faults, memory, &stuck(0), &patience())
        });
        assert_eq!(pages(&mut memory), (at(200), 32));
        ask(&mut faults, &[at(200), at(231), at(100), at(300)]);
        assert_eq!(pages(&mut faults), (at(100), 1), "the very pages first");
        assert_eq!(pages(&mut faults), (at(300), 1));
        assert_eq!(pages(&mut faults), (at(101), 15));
        assert_eq!(pages(&mut faults), (at(301), 15));
        ask(&mut faults, &[at(100), at(105), at(300), at(107)]);
        ask(&mut faults, &[at(90)]);
        assert_eq!(pages(&mut faults), (at(90), 1));
        assert_eq!(pages(&mut faults), (at(91), 9), "up to what is sent");
        // Counted a moment after it was sent.
        until("all counted", || {
            server.progress().sent >= 32 + 16 + 16 + 10
        });
        assert_eq!(server.progress().sent, 32 + 16 + 16 + 10);
        cut(&[faults.try_clone().unwrap()]);
        let error = serving.join().unwrap().unwrap_err();
        assert!(error.is_broken_link(), "{error:?}");
        assert_eq!(server.progress().remaining, 500 - 32 - 16 - 16 - 10);
    });
    let nobody = [(77, RangeSet::new())];
    let error = server.resume(&nobody).unwrap_err();
    assert!(matches!(error, ServeError::NoTask { task: 77 }), "{error}");
}

#[test]
fn faults_wait_while_there_is_no_link_and_are_asked_for_again() {
    let (source, target, server) = scene(600, 1 << 30);
    let readers: Vec<_> = [599, 300].map(|page| target.reader(page)).into();
    until("both wait", || target.client.outstanding() == 2);
    for round in 0..3 {
        // A link that breaks before anything is answered.
        let mut link = Link::new(1);
        cut(&link.scissors());
        let mut channel = link.destination.remove(0);
        let result = target.client.run(&mut channel, round, &patience());
        assert!(result.is_err());
        assert_eq!(target.client.outstanding(), 2);
    }
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    // Without memory channels everything goes over the one.
    let (outcome, ()) = serve(
        &server,
        &target.client,
        Link::new(1),
        &ServeOptions::new(3),
        || (),
    );
    assert_eq!(outcome.pages(), 600);
    assert_eq!(outcome.served.unwrap().answered, 2);
    for (reader, page) in readers.into_iter().zip([599, 300]) {
        assert_eq!(reader.join().unwrap(), source.value(page));
    }
    target.store.seal();
    target.handle.wait_filled(soon()).unwrap();
    target.check(&source);
}

#[test]
fn a_push_that_is_faster_than_the_fill_waits_for_room() {
    // 16 MiB through a store of 3.
    let (source, target, server) = scene(4096, 3 << 20);
    let (outcome, ()) = serve(
        &server,
        &target.client,
        Link::new(2),
        &ServeOptions::new(0),
        || (),
    );
    assert_eq!(outcome.pages(), 4096);
    target.store.seal();
    target.handle.wait_filled(soon()).unwrap();
    target.check(&source);
}

#[test]
fn links_that_break_at_any_point_lose_and_repeat_nothing() {
    const PAGES: u64 = 6000;
    let (source, target, server) = scene(PAGES, 1 << 30);
    let mut seed = 20_261_121_u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let mut readers = Vec::new();
    let mut seen = BTreeSet::new();
    for round in 0..40 {
        for _ in 0..random(4) {
            let page = random(PAGES);
            readers.push((page, target.reader(page)));
        }
        let link = Link::new(3);
        let scissors = link.scissors();
        let mut options = ServeOptions::new(round);
        options.chunk_pages = 1 + random(8);
        let enough = server.progress().sent + random(PAGES / 12);
        // One channel alone breaks, or all.
        let scissors = &scissors[random(3) as usize..];
        let (outcome, ()) = serve(&server, &target.client, link, &options, || {
            let done = || {
                let progress = server.progress();
                progress.sent >= enough || progress.remaining == 0
            };
            until("some progress", done);
            cut(scissors);
        });
        let missing = target.handle.missing();
        let pages: u64 = missing.iter().map(|(_, set)| set.pages()).sum();
        // What has arrived counts once, whatever became of the link.
        assert_eq!(target.store.received() + pages, PAGES, "round {round}");
        seen.insert(pages);
        if let Err(error) = outcome.served {
            assert!(error.is_broken_link(), "{error:?}");
        }
        server.resume(&missing).unwrap();
        if pages == 0 {
            break;
        }
    }
    // How often depends on how far a push gets before it is cut.
    assert!(seen.len() > 1, "{seen:?}");
    let (outcome, ()) = serve(
        &server,
        &target.client,
        Link::new(2),
        &ServeOptions::new(99),
        || (),
    );
    outcome.served.unwrap();
    assert_eq!(target.store.received(), PAGES);
    target.store.seal();
    for (page, reader) in readers {
        assert_eq!(reader.join().unwrap(), source.value(page), "page {page}");
    }
    target.handle.wait_filled(soon()).unwrap();
    target.check(&source);
}
