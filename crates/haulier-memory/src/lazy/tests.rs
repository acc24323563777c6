//! The daemon against real userfaultfds of our own process; the tests play CRIU.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use haulier_criu::lazy_socket::SOCKET_NAME;
use haulier_sys::userfaultfd::{CRIU_FEATURES, Region, Userfaultfd, features};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tempfile::TempDir;

use super::*;
use crate::page::{PAGE, PAGE_BYTES, PageRun};

/// Not with `EVENT_FORK`: a fork of our own process holds the allocator's locks until the daemon, in
/// the same process, has read the event. `tests/fork.rs` has a task of its own for it.
const FEATURES: u64 = CRIU_FEATURES & !features::EVENT_FORK;

/// Dropped in this order: the daemon's descriptors must go before the memory, whose unmapping would
/// otherwise wait for somebody to read the event.
struct Scene {
    handle: Option<LazyPagesHandle>,
    criu: Option<UnixStream>,
    store: Arc<PageStore>,
    regions: Vec<Arc<Region>>,
    _dir: TempDir,
}

/// With threads that fill, and with one that does everything.
macro_rules! either_way {
    ($($test:ident)+) => {$(
        mod $test {
            #[test]
            fn with_threads_that_fill() {
                super::$test(2);
            }

            #[test]
            fn with_one_that_does_everything() {
                super::$test(0);
            }
        }
    )+};
}

either_way! {
    everything_in_the_map_is_placed_and_the_descriptors_are_closed
    faults_are_answered_before_the_fill_and_parked_until_their_page_arrives
    pages_are_placed_while_they_arrive
    a_page_that_is_present_is_skipped_alone
    the_task_may_drop_and_unmap_and_move_its_memory
    a_restore_that_fails_or_forgets_a_task_is_an_error
    memory_that_was_never_registered_is_an_error_that_names_the_page
    stop_ends_a_daemon_with_parked_faults_and_lets_the_waiters_go
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

impl Scene {
    /// So many threads fill. One region of `pages` pages for each task 1, 2, ..., of which `lazy` are in the map.
    fn new(threads: usize, tasks: u32, pages: u64, lazy: &[(u64, u64)]) -> Self {
        let regions: Vec<_> = (0..tasks)
            .map(|_| Arc::new(Region::map(pages as usize * PAGE_BYTES).unwrap()))
            .collect();
        let map = LazyMap {
            tasks: regions
                .iter()
                .zip(1..)
                .map(|(region, vpid)| LazyTask {
                    vpid,
                    ranges: lazy
                        .iter()
                        .map(|(page, n)| range(region, *page, *n))
                        .collect(),
                    vmas: vec![(region.address(), region.address() + pages * PAGE)],
                })
                .collect(),
        };
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(PageStore::new(1 << 30));
        let daemon = LazyPages::listen(dir.path()).unwrap().fill_threads(threads);
        let criu = UnixStream::connect(dir.path().join(SOCKET_NAME)).unwrap();
        let handle = daemon.start(map, store.clone()).unwrap();
        Self {
            handle: Some(handle),
            criu: Some(criu),
            store,
            regions,
            _dir: dir,
        }
    }

    /// Registers a task's memory and sends its descriptor. The copy returned is for pages that
    /// somebody else places.
    fn send(&mut self, vpid: u32) -> Userfaultfd {
        let uffd = Userfaultfd::create(FEATURES).expect("userfaultfd (needs root)");
        uffd.register_missing(&self.regions[vpid as usize - 1])
            .unwrap();
        self.pass(vpid, &uffd);
        uffd
    }

    fn pass(&self, vpid: u32, uffd: &Userfaultfd) {
        let mut criu = self.criu.as_ref().unwrap();
        criu.write_all(&(vpid as i32).to_ne_bytes()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [uffd.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let byte = [IoSlice::new(&[0])];
        rustix::net::sendmsg(criu, &byte, &mut control, SendFlags::empty()).unwrap();
    }

    fn finish(&mut self) {
        self.criu
            .as_mut()
            .unwrap()
            .write_all(&0x5253_5446_u32.to_ne_bytes())
            .unwrap();
    }

    fn handle(&mut self) -> &mut LazyPagesHandle {
        self.handle.as_mut().unwrap()
    }

    /// Puts contents for pages of a task into the store; see [`value`].
    fn arrive(&self, vpid: u32, page: u64, pages: u64) {
        let mut data = self.store.buffer(pages as usize * PAGE_BYTES).unwrap();
        for (bytes, page) in data.chunks_exact_mut(PAGE_BYTES).zip(page..) {
            bytes.fill(value(vpid, page));
        }
        let range = range(&self.regions[vpid as usize - 1], page, pages);
        self.store
            .insert(vpid, 0, &[PageRun { range, zero: false }], data)
            .unwrap();
    }

    fn read(&self, vpid: u32, page: u64) -> u8 {
        self.regions[vpid as usize - 1].read(page as usize * PAGE_BYTES + 1234)
    }

    /// Reads a page in another thread, which a missing page stops.
    fn reader(&self, vpid: u32, page: u64) -> JoinHandle<u8> {
        let region = self.regions[vpid as usize - 1].clone();
        thread::spawn(move || region.read(page as usize * PAGE_BYTES + 1234))
    }

    fn wait_stats(&mut self, until: impl Fn(&FillStats) -> bool) {
        let deadline = soon();
        while !until(&self.handle().stats()) {
            assert!(
                Instant::now() < deadline,
                "stuck at {:?}",
                self.handle().stats()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn range(region: &Region, page: u64, pages: u64) -> PageRange {
    PageRange {
        start: region.address() + page * PAGE,
        pages,
    }
}

/// What a page of a task contains; never zero.
fn value(vpid: u32, page: u64) -> u8 {
    (page * 7 + u64::from(vpid) * 31) as u8 | 1
}

fn everything_in_the_map_is_placed_and_the_descriptors_are_closed(threads: usize) {
    let mut scene = Scene::new(threads, 2, 2000, &[(0, 1200), (1500, 400)]);
    for vpid in 1..=2 {
        drop(scene.send(vpid));
        scene.arrive(vpid, 0, 700);
        let zero = range(&scene.regions[vpid as usize - 1], 700, 100);
        scene.store.insert_zero(vpid, 0, zero).unwrap();
        scene.arrive(vpid, 1500, 300);
        // Outside of the map: must not be placed, and not stand in the way either.
        scene.arrive(vpid, 1300, 50);
    }
    scene.store.seal();
    scene.handle().fill().unwrap();
    let stats = scene.handle().wait_filled(soon()).unwrap();
    assert_eq!((stats.copied, stats.zeroed), (2 * 1000, 2 * 600));
    assert_eq!((stats.present, stats.gone), (0, vec![]));
    for vpid in 1..=2 {
        for page in 0..2000 {
            let expected = if page < 700 || (1500..1800).contains(&page) {
                value(vpid, page)
            } else {
                0
            };
            assert_eq!(scene.read(vpid, page), expected, "task {vpid} page {page}");
        }
        // With a userfaultfd open nobody would answer this.
        scene.regions[0].discard(0..PAGE_BYTES).unwrap();
        assert_eq!(scene.read(1, 0), 0);
    }
    assert!(!scene.handle().restore_finished());
    scene.finish();
    scene.criu = None;
    let handle = scene.handle.take().unwrap();
    for thread in &handle.threads[..1] {
        let deadline = soon();
        while !thread.is_finished() {
            assert!(
                Instant::now() < deadline,
                "the serving thread outlived its work"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(handle.restore_finished());
    handle.stop();
}

fn faults_are_answered_before_the_fill_and_parked_until_their_page_arrives(threads: usize) {
    let mut scene = Scene::new(threads, 1, 100, &[(10, 50)]);
    drop(scene.send(1));
    scene.arrive(1, 10, 20);
    assert_eq!(
        scene.reader(1, 12).join().unwrap(),
        value(1, 12),
        "in the store"
    );
    assert_eq!(scene.reader(1, 5).join().unwrap(), 0, "not in the map");
    let early = [
        scene.reader(1, 40),
        scene.reader(1, 40),
        scene.reader(1, 59),
    ];
    scene.wait_stats(|stats| stats.faults >= 3 && stats.parked >= 2);
    assert!(early.iter().all(|reader| !reader.is_finished()));
    scene.arrive(1, 40, 1);
    let [first, second, last] = early;
    assert_eq!(first.join().unwrap(), value(1, 40));
    assert_eq!(second.join().unwrap(), value(1, 40));
    assert!(!last.is_finished());
    scene.handle().fill().unwrap();
    scene.arrive(1, 59, 1);
    assert_eq!(last.join().unwrap(), value(1, 59));
    let error = scene.handle().wait_filled(Instant::now()).unwrap_err();
    assert!(
        matches!(error, LazyError::Deadline { task: 1, .. }),
        "{error}"
    );
    scene.store.seal();
    scene.finish();
    let stats = scene.handle().wait_filled(soon()).unwrap();
    assert_eq!((stats.copied, stats.zeroed, stats.zero_faults), (22, 28, 1));
    assert_eq!(
        (10..60).filter(|page| scene.read(1, *page) != 0).count(),
        22
    );
}

fn pages_are_placed_while_they_arrive(threads: usize) {
    let mut scene = Scene::new(threads, 2, 4096, &[(0, 4096)]);
    for vpid in 1..=2 {
        drop(scene.send(vpid));
    }
    scene.handle().fill().unwrap();
    thread::scope(|scope| {
        for vpid in 1..=2 {
            let scene = &scene;
            // Backwards and interleaved, so that nothing arrives where it is looked for first.
            scope.spawn(move || {
                for chunk in (0..128).rev() {
                    scene.arrive(vpid, chunk % 2 * 2048 + chunk / 2 * 32, 32);
                }
            });
        }
        let readers: Vec<_> = (0..4)
            .map(|n| scene.reader(n % 2 + 1, u64::from(n) * 991))
            .collect();
        for (reader, n) in readers.into_iter().zip(0..) {
            assert_eq!(reader.join().unwrap(), value(n % 2 + 1, u64::from(n) * 991));
        }
    });
    scene.store.seal();
    let stats = scene.handle().wait_filled(soon()).unwrap();
    assert_eq!(stats.copied, 2 * 4096);
    for vpid in 1..=2 {
        assert!((0..4096).all(|page| scene.read(vpid, page) == value(vpid, page)));
    }
    assert_eq!(scene.store.used(), 0, "what was placed is not kept");
}

fn a_page_that_is_present_is_skipped_alone(threads: usize) {
    let mut scene = Scene::new(threads, 1, 300, &[(0, 300)]);
    let other = scene.send(1);
    for page in [0, 7, 8, 299] {
        other
            .copy(range(&scene.regions[0], page, 1).start, &[0xEE; PAGE_BYTES])
            .unwrap();
    }
    drop(other);
    scene.arrive(1, 0, 300);
    scene.store.seal();
    scene.handle().fill().unwrap();
    let stats = scene.handle().wait_filled(soon()).unwrap();
    assert_eq!((stats.copied, stats.present), (296, 4));
    for page in 0..300 {
        let expected = if [0, 7, 8, 299].contains(&page) {
            0xEE
        } else {
            value(1, page)
        };
        assert_eq!(scene.read(1, page), expected, "page {page}");
    }
}

fn the_task_may_drop_and_unmap_and_move_its_memory(threads: usize) {
    for fill_first in [false, true] {
        let mut scene = Scene::new(threads, 2, 64, &[(0, 64)]);
        for vpid in 1..=2 {
            drop(scene.send(vpid));
        }
        if fill_first {
            scene.handle().fill().unwrap();
        }
        // Each of these calls waits until the daemon has read its event.
        scene.regions[0]
            .discard(10 * PAGE_BYTES..20 * PAGE_BYTES)
            .unwrap();
        scene.regions[0]
            .unmap(30 * PAGE_BYTES..40 * PAGE_BYTES)
            .unwrap();
        let moved = Arc::into_inner(scene.regions.remove(1)).unwrap();
        let old = moved.address();
        let moved = moved.relocate().unwrap();
        scene.arrive(1, 0, 64);
        let mut data = scene.store.buffer(64 * PAGE_BYTES).unwrap();
        data.chunks_exact_mut(PAGE_BYTES)
            .zip(0..)
            .for_each(|(page, n)| page.fill(value(2, n)));
        let run = PageRun {
            range: PageRange {
                start: old,
                pages: 64,
            },
            zero: false,
        };
        scene.store.insert(2, 0, &[run], data).unwrap();
        scene.store.seal();
        scene.handle().fill().unwrap();
        let stats = scene.handle().wait_filled(soon()).unwrap();
        assert_eq!(stats.copied, 64 + 44, "{stats:?}");
        for page in (0..30).chain(40..64) {
            let expected = if (10..20).contains(&page) {
                0
            } else {
                value(1, page)
            };
            assert_eq!(scene.read(1, page), expected, "page {page}");
        }
        for page in 0..64 {
            assert_eq!(
                moved.read(page as usize * PAGE_BYTES),
                value(2, page),
                "moved {page}"
            );
        }
        drop(scene);
    }
}

fn a_restore_that_fails_or_forgets_a_task_is_an_error(threads: usize) {
    let mut scene = Scene::new(threads, 1, 4, &[(0, 4)]);
    scene.criu = None;
    let error = scene.handle().wait_filled(soon()).unwrap_err();
    assert!(
        matches!(error, LazyError::Socket(LazySocketError::RestoreFailed)),
        "{error:?}"
    );
    assert!(matches!(
        scene.handle().wait_filled(soon()),
        Err(LazyError::Failed)
    ));

    let mut scene = Scene::new(threads, 1, 4, &[(0, 4)]);
    scene.finish();
    let error = scene.handle().wait_filled(soon()).unwrap_err();
    assert!(
        matches!(error, LazyError::NoDescriptor { task: 1, pages: 4 }),
        "{error:?}"
    );

    let mut scene = Scene::new(threads, 1, 4, &[(0, 4)]);
    let uffd = scene.send(1);
    scene.pass(1, &uffd);
    drop(uffd);
    let error = scene.handle().wait_filled(soon()).unwrap_err();
    assert!(matches!(error, LazyError::Twice { task: 1 }), "{error:?}");
}

fn memory_that_was_never_registered_is_an_error_that_names_the_page(threads: usize) {
    let mut scene = Scene::new(threads, 1, 8, &[(0, 8)]);
    let uffd = scene.send(1);
    let page = range(&scene.regions[0], 4, 1);
    uffd.unregister(page.start, page.bytes()).unwrap();
    drop(uffd);
    scene.store.seal();
    scene.handle().fill().unwrap();
    let error = scene.handle().wait_filled(soon()).unwrap_err();
    assert!(
        matches!(error, LazyError::Unregistered { task: 1, address } if address == page.start),
        "{error:?}"
    );
}

fn stop_ends_a_daemon_with_parked_faults_and_lets_the_waiters_go(threads: usize) {
    let mut scene = Scene::new(threads, 1, 4, &[(0, 4)]);
    drop(scene.send(1));
    scene.handle().fill().unwrap();
    let reader = scene.reader(1, 2);
    scene.wait_stats(|stats| stats.parked > 0);
    scene.handle.take().unwrap().stop();
    assert_eq!(
        reader.join().unwrap(),
        0,
        "missing pages read as zero once all is closed"
    );
}

#[test]
fn a_map_that_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let start = |tasks: Vec<LazyTask>| {
        let store = Arc::new(PageStore::new(1 << 20));
        LazyPages::listen(dir.path())
            .unwrap()
            .start(LazyMap { tasks }, store)
            .unwrap_err()
    };
    let task = |pages| LazyTask {
        vpid: 3,
        ranges: vec![PageRange {
            start: 0x1000,
            pages,
        }],
        vmas: vec![(0x1000, 0x3000)],
    };
    assert!(matches!(
        start(vec![task(3)]),
        LazyError::Map { task: 3, .. }
    ));
    assert!(matches!(
        start(vec![task(2), task(1)]),
        LazyError::Twice { task: 3 }
    ));
}
