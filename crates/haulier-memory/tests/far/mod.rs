//! A source and a destination for post-copy: memory of a process that stands, at the address of
//! memory of our own that lacks it, and links between the two that can be cut.

// Each user takes what it needs.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use haulier_memory::lazy::{LazyMap, LazyPages, LazyPagesHandle, LazyTask};
use haulier_memory::page::{PAGE, PAGE_BYTES, PageRange};
use haulier_memory::post::{
    FaultClient, PageServer, ServeError, ServeOptions, ServeStats, TaskOrder, receive_push,
};
use haulier_memory::store::PageStore;
use haulier_memory::stream::{ReceiveStats, StreamError};
use haulier_sys::userfaultfd::{CRIU_FEATURES, Region, Userfaultfd, features};
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tempfile::TempDir;

pub(crate) const TASK: u32 = 9;

pub(crate) fn patience() -> Wait {
    Wait::uncancellable(Duration::from_secs(60))
}

/// A task at the source; killed when dropped.
pub(crate) struct Source {
    process: Child,
    seed: u64,
}

impl Source {
    pub(crate) fn start(address: u64, pages: u64, seed: u64) -> Self {
        let mut process = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/far/source.py"))
            .args([address, pages, seed].map(|number| number.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 for the task");
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { process, seed }
    }

    pub(crate) fn order(&self, ranges: Vec<PageRange>) -> TaskOrder {
        TaskOrder {
            pid: self.process.id() as i32,
            task: TASK,
            ranges,
        }
    }

    /// What the byte 1234 of a page is, as `source.py` says.
    pub(crate) fn value(&self, page: u64) -> u8 {
        if page % 5 == 4 {
            0
        } else {
            ((page * 7 + self.seed) % 255 + 1) as u8
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Memory that lacks its pages, and the daemon that places them. Dropped in this order.
pub(crate) struct Target {
    pub(crate) handle: LazyPagesHandle,
    pub(crate) client: Arc<FaultClient>,
    pub(crate) store: Arc<PageStore>,
    pub(crate) region: Arc<Region>,
    criu: UnixStream,
    _dir: TempDir,
}

impl Target {
    /// All pages of the region are missing. `limit`: bytes of the store.
    pub(crate) fn new(region: Region, limit: u64) -> Self {
        let range = whole(&region);
        let store = Arc::new(PageStore::new(limit));
        let client = FaultClient::new(store.clone());
        let dir = tempfile::tempdir().unwrap();
        let daemon = LazyPages::listen(dir.path())
            .unwrap()
            .faults_to(client.clone());
        let map = LazyMap {
            tasks: vec![LazyTask {
                vpid: TASK,
                ranges: vec![range],
                vmas: vec![(range.start, range.end())],
            }],
        };
        let mut criu = UnixStream::connect(dir.path().join("lazy-pages.socket")).unwrap();
        let mut handle = daemon.start(map, store.clone()).unwrap();
        // Not with EVENT_FORK: a fork of our own would wait for a thread of our own.
        let uffd = Userfaultfd::create(CRIU_FEATURES & !features::EVENT_FORK).expect("needs root");
        uffd.register_missing(&region).unwrap();
        criu.write_all(&(TASK as i32).to_ne_bytes()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [uffd.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let byte = [IoSlice::new(&[0])];
        rustix::net::sendmsg(&criu, &byte, &mut control, SendFlags::empty()).unwrap();
        handle.fill().unwrap();
        Self {
            handle,
            client,
            store,
            region: Arc::new(region),
            criu,
            _dir: dir,
        }
    }

    pub(crate) fn read(&self, page: u64) -> u8 {
        self.region.read(page as usize * PAGE_BYTES + 1234)
    }

    /// Reads a page in another thread, which a missing page stops.
    pub(crate) fn reader(&self, page: u64) -> thread::JoinHandle<u8> {
        let region = self.region.clone();
        thread::spawn(move || region.read(page as usize * PAGE_BYTES + 1234))
    }

    pub(crate) fn check(&self, source: &Source) {
        for page in 0..self.region.len() as u64 / PAGE {
            assert_eq!(self.read(page), source.value(page), "page {page}");
        }
    }

    pub(crate) fn finish(&mut self) {
        self.criu.write_all(&0x5253_5446_u32.to_ne_bytes()).unwrap();
    }
}

pub(crate) fn whole(region: &Region) -> PageRange {
    PageRange::between(region.address(), region.address() + region.len() as u64)
}

/// Waits for something to become true.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Connected channels: the source's and the destination's ends.
pub(crate) struct Link {
    pub(crate) source: Vec<Channel>,
    pub(crate) destination: Vec<Channel>,
    cut: Vec<Channel>,
}

impl Link {
    pub(crate) fn new(channels: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut link = Self {
            source: Vec::new(),
            destination: Vec::new(),
            cut: Vec::new(),
        };
        for _ in 0..channels {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let far = listener.accept().unwrap().0;
            near.set_nodelay(true).unwrap();
            far.set_nodelay(true).unwrap();
            link.add(near, far);
        }
        link
    }

    pub(crate) fn add(&mut self, source: TcpStream, destination: TcpStream) {
        let source = Channel::new(source, "destination").unwrap();
        self.cut.push(source.try_clone().unwrap());
        self.source.push(source);
        self.destination
            .push(Channel::new(destination, "source").unwrap());
    }

    /// What cuts all of it.
    pub(crate) fn scissors(&self) -> Vec<Channel> {
        self.cut.iter().map(|c| c.try_clone().unwrap()).collect()
    }
}

pub(crate) fn cut(channels: &[Channel]) {
    channels.iter().for_each(Channel::shutdown);
}

/// How both ends of one link fared.
pub(crate) struct Outcome {
    pub(crate) served: Result<ServeStats, ServeError>,
    pub(crate) received: Vec<Result<ReceiveStats, StreamError>>,
}

impl Outcome {
    pub(crate) fn pages(&self) -> u64 {
        let pages = |stats: &Result<ReceiveStats, StreamError>| stats.as_ref().unwrap().pages;
        self.received.iter().map(pages).sum()
    }
}

/// Serves over a link, whose first channel is for faults, while `meanwhile` goes on.
pub(crate) fn serve<T>(
    server: &PageServer,
    client: &Arc<FaultClient>,
    link: Link,
    options: &ServeOptions,
    meanwhile: impl FnOnce() -> T,
) -> (Outcome, T) {
    let round = options.round;
    let mut source = link.source;
    let wait = patience();
    thread::scope(|scope| {
        let receivers: Vec<ScopedJoinHandle<'_, _>> = link
            .destination
            .into_iter()
            .enumerate()
            .map(|(index, mut channel)| {
                let wait = wait.clone();
                scope.spawn(move || {
                    let result = if index == 0 {
                        client.run(&mut channel, round, &wait)
                    } else {
                        receive_push(&mut channel, client, round, &wait)
                    };
                    // As an agent does when its channel fails.
                    if result.is_err() {
                        channel.shutdown();
                    }
                    result
                })
            })
            .collect();
        let serving = scope.spawn(|| {
            let (faults, memory) = source.split_first_mut().unwrap();
            server.serve(faults, memory, options, &patience())
        });
        let result = meanwhile();
        let served = serving.join().unwrap();
        let received = receivers.into_iter().map(|r| r.join().unwrap()).collect();
        (Outcome { served, received }, result)
    })
}
