//! Proxy and cache together, with a CRIU that is played, and with peers that mean no good.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use haulier_images::name::ImageName;
use haulier_sys::wait::{Cancel, Wait};
use haulier_transport::greeting::Identity;
use haulier_transport::tcp;
use tempfile::TempDir;

use crate::compress::Compression;
use crate::link::{self, Key, Way};
use crate::message::Begin;
use crate::message::session::Body;
use crate::store::INVENTORY;
use crate::stream::{CAPTURE_SOCKET, SERVE_SOCKET, criu};
use crate::{cache, inventory, proxy};

const LONG: Duration = Duration::from_secs(60);

fn me() -> Identity {
    Identity {
        software: "haulier test".to_owned(),
        host: "here".to_owned(),
    }
}

fn targets(count: usize, home: &TempDir) -> Vec<(ImageName, PathBuf)> {
    (0..count)
        .map(|number| {
            let directory = home.path().join(format!("t{number}"));
            std::fs::create_dir(&directory).unwrap();
            (ImageName::new(&format!("t{number}")).unwrap(), directory)
        })
        .collect()
}

/// A side that runs until it is dropped.
pub(crate) struct Running {
    stop: Cancel,
    thread: Option<JoinHandle<Result<(), String>>>,
    home: TempDir,
    address: Option<String>,
}

impl Running {
    fn start(
        home: TempDir,
        run: impl FnOnce(&Cancel, mpsc::Sender<Option<String>>) -> Result<(), String> + Send + 'static,
    ) -> Running {
        let stop = Cancel::new().unwrap();
        let (ready, is_ready) = mpsc::channel();
        let token = stop.clone();
        let thread = thread::spawn(move || run(&token, ready));
        let address = is_ready.recv_timeout(LONG).unwrap();
        Running {
            stop,
            thread: Some(thread),
            home,
            address,
        }
    }

    pub(crate) fn cache(
        way: Way,
        count: usize,
        change: impl FnOnce(&mut cache::Options),
    ) -> Running {
        let home = tempfile::tempdir().unwrap();
        let mut options = cache::Options {
            way,
            targets: targets(count, &home),
            max_memory: 512 << 20,
            spill: None,
            keep: 10,
            reconnect: LONG,
            lazy_pages: None,
            key: Key::from_secret(b""),
            me: me(),
        };
        change(&mut options);
        Running::start(home, |stop, ready| {
            let said = |address: Option<&str>| ready.send(address.map(str::to_owned)).unwrap();
            cache::run(options, stop, said).map_err(|error| error.to_string())
        })
    }

    fn proxy(way: Way, count: usize, change: impl FnOnce(&mut proxy::Options)) -> Running {
        let home = tempfile::tempdir().unwrap();
        let mut options = proxy::Options {
            way,
            targets: targets(count, &home),
            // As little as there may be.
            max_memory: 0,
            compression: Compression::None,
            reconnect: LONG,
            lazy_pages: None,
            key: Key::from_secret(b""),
            me: me(),
        };
        change(&mut options);
        Running::start(home, |stop, ready| {
            let said = |address: Option<&str>| ready.send(address.map(str::to_owned)).unwrap();
            proxy::run(options, stop, said).map_err(|error| error.to_string())
        })
    }

    fn pair(count: usize) -> (Running, Running) {
        let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), count, |_| {});
        let proxy = Running::proxy(cache.reach(), count, |_| {});
        (cache, proxy)
    }

    fn reach(&self) -> Way {
        Way::To(self.address.clone().unwrap())
    }

    pub(crate) fn directory(&self, target: usize) -> PathBuf {
        self.home.path().join(format!("t{target}"))
    }

    /// A dump as CRIU does it: images one after the other, the inventory last.
    fn dump(&self, target: usize, images: &[(&str, Vec<u8>)]) -> io::Result<UnixStream> {
        let mut socket = UnixStream::connect(self.directory(target).join(CAPTURE_SOCKET))?;
        for (name, bytes) in images {
            write(criu::open(&mut socket, name), bytes)?;
        }
        write(criu::open(&mut socket, INVENTORY), b"inventory")?;
        Ok(socket)
    }

    /// A restore as CRIU does it: the inventory first.
    fn restore(&self, directory: &str, target: usize, names: &[&str]) -> io::Result<Vec<Vec<u8>>> {
        let path = self.directory(target).join(directory).join(SERVE_SOCKET);
        let mut socket = UnixStream::connect(path)?;
        let mut fetch = |name: &str| {
            let mut bytes = Vec::new();
            criu::fetch(&mut socket, name)?
                .ok_or(io::ErrorKind::NotFound)?
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let inventory: io::Result<Vec<u8>> = fetch(INVENTORY);
        assert_eq!(inventory?, b"inventory");
        names.iter().map(|name| fetch(name)).collect()
    }

    fn wait(&self, target: usize) -> Result<u64, String> {
        let wait = Wait::uncancellable(LONG);
        proxy::wait(&self.directory(target), false, &wait)
            .map(|delivered| delivered.snapshot)
            .map_err(|error| error.to_string())
    }

    fn end(mut self) -> Result<(), String> {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

fn write(mut pipe: File, bytes: &[u8]) -> io::Result<()> {
    pipe.write_all(bytes)
}

fn pages(seed: u8) -> Vec<u8> {
    (0..700_u32)
        .flat_map(|page| {
            let fill = if page % 5 == 0 { 0 } else { seed };
            let mut bytes = vec![fill; 4096];
            if fill > 0 {
                bytes[..4].copy_from_slice(&page.to_le_bytes());
            }
            bytes
        })
        .collect()
}

fn images(seed: u8) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("pages-1.img", pages(seed)),
        ("core-1.img", vec![seed; 3_000_000]),
        ("empty-1.img", Vec::new()),
    ]
}

const NAMES: [&str; 3] = ["pages-1.img", "core-1.img", "empty-1.img"];

fn right(seed: u8, got: &[Vec<u8>]) -> bool {
    images(seed).iter().zip(got).all(|((_, a), b)| a == b)
}

#[test]
fn thirty_two_dumps_at_once_go_through_one_connection_each_to_its_restores() {
    let (cache, proxy) = Running::pair(32);
    thread::scope(|scope| {
        for target in 0..32 {
            let (cache, proxy) = (&cache, &proxy);
            for _ in 0..2 {
                scope.spawn(move || {
                    let got = cache.restore("", target, &NAMES).unwrap();
                    assert!(right(target as u8 + 1, &got), "{target}");
                });
            }
            scope.spawn(move || {
                let dump = proxy.dump(target, &images(target as u8 + 1));
                assert_eq!(proxy.wait(target), Ok(1), "{dump:?}");
            });
        }
    });
    // Also after the restores, and again for an image that was asked for before.
    let got = cache
        .restore("1", 7, &["core-1.img", "core-1.img"])
        .unwrap();
    assert!(got.iter().all(|bytes| bytes == &vec![8; 3_000_000]));
    let missing = cache.restore("", 7, &["netns-1.img"]).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    proxy.end().unwrap();
    cache.end().unwrap();
}

#[test]
fn the_cache_may_be_the_one_that_connects() {
    let proxy = Running::proxy(Way::Listen("127.0.0.1:0".to_owned()), 1, |_| {});
    let cache = Running::cache(proxy.reach(), 1, |_| {});
    proxy.dump(0, &images(1)).unwrap();
    assert!(right(1, &cache.restore("", 0, &NAMES).unwrap()));
}

#[test]
fn a_connection_may_be_given() {
    let (a, b) = UnixStream::pair().unwrap();
    let cache = Running::cache(Way::Given(a.into()), 1, |_| {});
    let proxy = Running::proxy(Way::Given(b.into()), 1, |_| {});
    drop(proxy.dump(0, &images(1)).unwrap());
    assert!(right(1, &cache.restore("", 0, &NAMES).unwrap()));
    // What the cache has can be restored when the proxy is gone.
    proxy.end().unwrap();
    assert!(right(1, &cache.restore("", 0, &NAMES).unwrap()));
}

#[test]
fn a_proxy_whose_only_connection_ends_says_so() {
    let (a, b) = UnixStream::pair().unwrap();
    let proxy = Running::proxy(Way::Given(a.into()), 1, |_| {});
    drop(b);
    let mut proxy = proxy;
    let ended = proxy.thread.take().unwrap().join().unwrap();
    assert!(ended.unwrap_err().contains("connection"));
}

#[test]
fn who_does_not_know_the_secret_is_turned_away() {
    let listen = Way::Listen("127.0.0.1:0".to_owned());
    let secret = |secret: &'static [u8]| Key::from_secret(secret);
    let cache = Running::cache(listen, 1, |options| options.key = secret(b"right"));
    let stranger = Running::proxy(cache.reach(), 1, |options| {
        options.key = secret(b"wrong");
        options.reconnect = Duration::from_millis(500);
    });
    let failed = stranger.dump(0, &images(1));
    drop(failed);
    assert!(stranger.wait(0).unwrap_err().contains("no connection"));
    let friend = Running::proxy(cache.reach(), 1, |options| options.key = secret(b"right"));
    drop(friend.dump(0, &images(2)).unwrap());
    assert!(right(2, &cache.restore("", 0, &NAMES).unwrap()));
}

#[test]
fn a_dump_without_an_inventory_is_no_dump() {
    let (cache, proxy) = Running::pair(1);
    let mut socket = UnixStream::connect(proxy.directory(0).join(CAPTURE_SOCKET)).unwrap();
    let restore = thread::scope(|scope| {
        let restore = scope.spawn(|| cache.restore("1", 0, &[]));
        write(criu::open(&mut socket, "core-1.img"), b"x").unwrap();
        drop(socket);
        assert!(
            proxy
                .wait(0)
                .unwrap_err()
                .contains("before it was complete")
        );
        restore.join().unwrap()
    });
    assert!(restore.is_err());
    // Nor is one whose pages are not whole.
    let cut = [("pages-1.img", vec![1; 5000])];
    let dump = proxy.dump(0, &cut);
    assert!(proxy.wait(0).unwrap_err().contains("whole pages"));
    drop(dump);
    // The next one is.
    drop(proxy.dump(0, &images(1)).unwrap());
    assert!(proxy.wait(0).is_ok());
    assert!(right(1, &cache.restore("", 0, &NAMES).unwrap()));
}

#[test]
fn a_pre_dump_is_refused_and_does_not_stand_before_the_dump() {
    let (cache, proxy) = Running::pair(1);
    let mut socket = UnixStream::connect(proxy.directory(0).join(CAPTURE_SOCKET)).unwrap();
    for (name, bytes) in [
        ("pages-1.img", pages(1)),
        (INVENTORY, inventory::example(true)),
    ] {
        write(criu::open(&mut socket, name), &bytes).unwrap();
    }
    drop(socket);
    assert!(proxy.wait(0).unwrap_err().contains("pre-dump"));
    drop(proxy.dump(0, &images(2)).unwrap());
    assert_eq!(proxy.wait(0), Ok(2));
    assert!(right(2, &cache.restore("", 0, &NAMES).unwrap()));
}

#[test]
fn a_vote_that_is_taken_back_fails_the_dump() {
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 1, |_| {});
    let proxy = Running::proxy(cache.reach(), 1, |_| {});
    let mut socket = UnixStream::connect(proxy.directory(0).join(CAPTURE_SOCKET)).unwrap();
    let open = criu::open(&mut socket, "core-1.img");
    // The script that waits is killed, since the dump goes on for too long.
    let short = Wait::uncancellable(Duration::from_millis(100));
    assert!(proxy::wait(&proxy.directory(0), false, &short).is_err());
    // CRIU is told by its pipes and its connection.
    let deadline = Instant::now() + LONG;
    while write(open.try_clone().unwrap(), b"x").is_ok() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(proxy.wait(0).is_err());
    assert!(
        cache::list(&cache.directory(0), &Wait::uncancellable(LONG))
            .unwrap()
            .snapshots
            .iter()
            .all(|listed| listed.state.starts_with("failed"))
    );
}

#[test]
fn spilled_images_are_served_like_others() {
    let spill = tempfile::tempdir().unwrap();
    let directory = spill.path().to_owned();
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 1, |options| {
        options.max_memory = 2 << 20;
        options.spill = Some((directory, 64 << 20));
    });
    let proxy = Running::proxy(cache.reach(), 1, |_| {});
    for seed in 1..3 {
        drop(proxy.dump(0, &images(seed)).unwrap());
        proxy.wait(0).unwrap();
    }
    for (number, seed) in [("1", 1), ("2", 2), ("", 2)] {
        assert!(right(seed, &cache.restore(number, 0, &NAMES).unwrap()));
    }
    let list = cache::list(&cache.directory(0), &Wait::uncancellable(LONG)).unwrap();
    assert!(list.peak <= 2 << 20 && list.spilled > 5 << 20, "{list:?}");
}

#[test]
fn strangers_on_the_port_do_not_keep_a_dump_from_being_delivered() {
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 1, |_| {});
    let address = cache.address.clone().unwrap();
    let say = |bytes: &[u8]| {
        let mut socket = TcpStream::connect(&address).unwrap();
        // It may be closed before all is said.
        let _ = socket.write_all(bytes);
        socket
    };
    let mut frame = b"HLR1\x01\0\0\0".to_vec();
    frame.extend_from_slice(&u32::MAX.to_le_bytes());
    frame.extend_from_slice(&[0; 4]);
    let mut open = Vec::new();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: web2\r\n\r\n"[..],
        &[0; 100_000],
        &frame,
        b"HLR1",
        b"",
    ] {
        drop(say(bytes));
        open.push(say(bytes));
    }
    // Ten that say a byte now and then, as long as they may.
    let stop = Cancel::new().unwrap();
    thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                let mut socket = say(b"");
                for byte in b"HLR1\x01\0\0\0\xff\0\0\0".iter().cycle() {
                    if stop.is_cancelled() || socket.write_all(&[*byte]).is_err() {
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
        }
        let proxy = Running::proxy(cache.reach(), 1, |_| {});
        drop(proxy.dump(0, &images(3)).unwrap());
        assert!(right(3, &cache.restore("", 0, &NAMES).unwrap()));
        stop.cancel();
    });
    drop(open);
}

#[test]
fn a_reader_that_goes_away_or_asks_nonsense_harms_no_other() {
    let (cache, proxy) = Running::pair(1);
    drop(proxy.dump(0, &images(1)).unwrap());
    let connect = || UnixStream::connect(cache.directory(0).join(SERVE_SOCKET)).unwrap();
    for bytes in [&[255_u8; 64][..], &[1, 0, 0, 0], &[0; 64]] {
        connect().write_all(bytes).unwrap();
    }
    let mut gone = connect();
    let pipe = criu::fetch(&mut gone, "pages-1.img").unwrap();
    drop((pipe, gone));
    let mut outside = connect();
    criu::request(&mut outside, "../../../../etc/passwd");
    let mut answer = Vec::new();
    assert_eq!(outside.read_to_end(&mut answer).unwrap_or(0), 0);
    assert!(right(1, &cache.restore("", 0, &NAMES).unwrap()));
}

/// A way to the cache that breaks after so many bytes, each time, until it is left alone.
fn fragile_way(to: String, bytes: u64, breaks: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for number in 0.. {
            let (Ok((mut near, _)), Ok(mut far)) = (listener.accept(), TcpStream::connect(&to))
            else {
                return;
            };
            let limit = if number < breaks { bytes } else { u64::MAX };
            let (mut back_from, mut back_to) =
                (far.try_clone().unwrap(), near.try_clone().unwrap());
            let back = thread::spawn(move || io::copy(&mut back_from, &mut back_to));
            // The rest of what is on its way is lost with the connection.
            let _ = io::copy(&mut (&mut near).take(limit), &mut far);
            let _ = near.shutdown(Shutdown::Both);
            let _ = far.shutdown(Shutdown::Both);
            let _ = back.join();
        }
    });
    address
}

#[test]
fn dumps_go_on_over_connections_that_break_again_and_again() {
    const BREAKS: usize = 4;
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 3, |_| {});
    let way = fragile_way(cache.address.clone().unwrap(), 1_500_000, BREAKS);
    let proxy = Running::proxy(Way::To(way), 3, |_| {});
    thread::scope(|scope| {
        for target in 0..3 {
            let (cache, proxy) = (&cache, &proxy);
            scope.spawn(move || {
                let seed = target as u8 + 1;
                let dump = proxy.dump(target, &images(seed)).unwrap();
                assert_eq!(proxy.wait(target), Ok(1));
                drop(dump);
                assert!(right(seed, &cache.restore("", target, &NAMES).unwrap()));
            });
        }
    });
}

#[test]
fn a_proxy_that_begins_anew_ends_the_session_it_had_before() {
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 1, |_| {});
    let wait = Wait::uncancellable(LONG);
    let address = cache.address.clone().unwrap();
    let open = |session: u8, sender: &[u8], resume| {
        let mut channel = tcp::connect(&address, &wait).unwrap();
        let (key, which) = (Key::from_secret(b""), (&[session; 16], sender));
        link::open(&mut channel, &me(), &key, which, resume, &wait).map(|_| channel)
    };
    // The first is killed in the middle of a dump, and the cache need not have noticed.
    let mut first = open(1, b"proxy", false).unwrap();
    let begin = Begin {
        snapshot: 1,
        target: "t0".to_owned(),
    };
    link::send(&mut first, Body::Begin(begin), &wait).unwrap();
    let other = open(2, b"other", false).unwrap();
    let nameless = [open(3, b"", false).unwrap(), open(4, b"", false).unwrap()];
    let states = || -> Vec<String> {
        let listing = cache::list(&cache.directory(0), &wait).unwrap();
        listing.snapshots.into_iter().map(|s| s.state).collect()
    };
    let deadline = Instant::now() + LONG;
    while states() != ["arriving"] {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }

    let _second = open(5, b"proxy", false).unwrap();
    assert_eq!(states(), ["failed: the image-proxy has begun anew"]);
    assert!(matches!(
        open(1, b"proxy", true),
        Err(link::LinkError::Denied { unknown: true, .. })
    ));
    drop((other, nameless));
    for (session, sender) in [(2, &b"other"[..]), (3, b""), (4, b"")] {
        open(session, sender, true).unwrap();
    }
}

#[test]
fn a_link_that_lets_nothing_through_fails_the_dump_and_the_restore() {
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 1, |options| {
        options.reconnect = Duration::from_secs(1);
    });
    let way = fragile_way(cache.address.clone().unwrap(), 100_000, usize::MAX);
    // It comes back every time, and nothing gets through.
    let proxy = Running::proxy(Way::To(way), 1, |options| {
        options.reconnect = Duration::from_secs(1);
    });
    thread::scope(|scope| {
        let restore = scope.spawn(|| cache.restore("1", 0, &NAMES));
        let dump = proxy.dump(0, &images(1));
        assert!(proxy.wait(0).is_err(), "{dump:?}");
        assert!(restore.join().unwrap().is_err());
    });
}

#[test]
fn compressed_images_arrive_as_they_were() {
    let cache = Running::cache(Way::Listen("127.0.0.1:0".to_owned()), 1, |_| {});
    for (seed, compression) in [(1, Compression::Lz4), (2, Compression::Zstd)] {
        let proxy = Running::proxy(cache.reach(), 1, |options| {
            options.compression = compression;
        });
        drop(proxy.dump(0, &images(seed)).unwrap());
        proxy.wait(0).unwrap();
        assert!(right(seed, &cache.restore("", 0, &NAMES).unwrap()));
    }
}
