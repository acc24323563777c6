//! Measures the stages of a page's way: reading, streaming over TCP loopback into the store, filling
//! through a userfaultfd. Arguments: MiB (1024), channels (1), fill threads (2).

use std::error::Error;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use haulier_memory::lazy::{LazyMap, LazyPages, LazyTask};
use haulier_memory::page::{PAGE_BYTES, PageRange};
use haulier_memory::reader::{Chunk, PageReader, TaskPages};
use haulier_memory::store::PageStore;
use haulier_memory::stream::{receive_pages, send_pages};
use haulier_sys::userfaultfd::{Region, Userfaultfd};
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

const TASK: u32 = 1;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|argument| argument.parse::<usize>());
    let mut next = |default| arguments.next().unwrap_or(Ok(default));
    let (mib, channels, threads) = (next(1024)?, next(1)?, next(2)?);
    let len = mib << 20;
    let wait = Wait::uncancellable(Duration::from_secs(120));
    let rate = |what: &str, start: Start| {
        let seconds = start.wall.elapsed().as_secs_f64();
        let gigabytes = len as f64 / 1e9;
        let cpu = (cpu_time() - start.cpu) / gigabytes;
        println!(
            "{what:<50} {:6.0} MB/s {cpu:6.2} CPU s/GB",
            gigabytes * 1e3 / seconds
        );
    };

    // Our own memory stands for a task's: reading it costs the same. Emptied, it is the target too.
    let memory = Region::map(len)?;
    write(&memory);
    let range = PageRange {
        start: memory.address(),
        pages: (len / PAGE_BYTES) as u64,
    };
    let pages = TaskPages {
        pid: std::process::id() as i32,
        task: TASK,
        ranges: vec![range],
    };

    let start = Start::now();
    let (reader, mut chunk) = (PageReader::new(vec![pages.clone()])?, Chunk::default());
    while reader.read(&mut chunk)? {}
    rate("read, and look for zero pages", start);

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let start = Start::now();
    bare(&listener, len)?;
    rate("bare socket, 1 MiB writes, for comparison", start);
    for pass in ["fresh memory", "memory used before"] {
        let store = Arc::new(PageStore::new(2 * len as u64));
        let mut sources = Vec::new();
        let mut receivers = Vec::new();
        for _ in 0..channels {
            sources.push(Channel::new(
                TcpStream::connect(listener.local_addr()?)?,
                "there",
            )?);
            let mut channel = Channel::new(listener.accept()?.0, "here")?;
            let (store, wait) = (store.clone(), wait.clone());
            receivers.push(thread::spawn(move || {
                receive_pages(&mut channel, &store, &wait)
            }));
        }
        let start = Start::now();
        send_pages(sources, vec![pages.clone()], &wait)?;
        for receiver in receivers {
            receiver.join().expect("a receiver")?;
        }
        store.seal();
        rate(
            &format!("stream over {channels} TCP channel(s), {pass}"),
            start,
        );
        memory.discard(0..len)?;
        let start = fill(&store, &memory, range, threads)?;
        rate(&format!("fill by {threads} thread(s), {pass}"), start);
        check(&memory);
    }
    Ok(())
}

/// Processor time beside the clock, because it says more on a machine that others use.
struct Start {
    wall: Instant,
    cpu: f64,
}

impl Start {
    fn now() -> Self {
        Self {
            wall: Instant::now(),
            cpu: cpu_time(),
        }
    }
}

fn cpu_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The same bytes without reading, checksums and storing: what the machine can do at this moment.
fn bare(listener: &TcpListener, len: usize) -> Result<(), Box<dyn Error>> {
    let mut source = TcpStream::connect(listener.local_addr()?)?;
    let mut destination = listener.accept()?.0;
    let sender = thread::spawn(move || {
        let block = vec![1; 1 << 20];
        (0..len >> 20).try_for_each(|_| source.write_all(&block))
    });
    let mut block = vec![0; 1 << 20];
    for _ in 0..len >> 20 {
        destination.read_exact(&mut block)?;
    }
    sender.join().expect("the sender")?;
    Ok(())
}

/// Marks each page with its number, so that a page in the wrong place is noticed too.
fn write(memory: &Region) {
    for page in 0..memory.len() / PAGE_BYTES {
        for (offset, byte) in mark(page).into_iter().enumerate() {
            memory.write(page * PAGE_BYTES + offset, byte);
        }
    }
}

fn check(memory: &Region) {
    for page in 0..memory.len() / PAGE_BYTES {
        for (offset, byte) in mark(page).into_iter().enumerate() {
            let found = memory.read(page * PAGE_BYTES + offset);
            assert_eq!(found, byte, "page {page}, byte {offset}");
        }
    }
}

fn mark(page: usize) -> [u8; 4] {
    (page as u32 + 1).to_le_bytes()
}

/// Fills the memory from the store. Returns when that began.
fn fill(
    store: &Arc<PageStore>,
    memory: &Region,
    range: PageRange,
    threads: usize,
) -> Result<Start, Box<dyn Error>> {
    let uffd = Userfaultfd::create(0)?;
    uffd.register_missing(memory)?;
    let dir = tempfile::tempdir()?;
    let map = LazyMap {
        tasks: vec![LazyTask {
            vpid: TASK,
            ranges: vec![range],
            vmas: vec![(range.start, range.end())],
        }],
    };
    let daemon = LazyPages::listen(dir.path())?.fill_threads(threads);
    let mut criu = UnixStream::connect(dir.path().join("lazy-pages.socket"))?;
    let mut handle = daemon.start(map, store.clone())?;
    criu.write_all(&(TASK as i32).to_ne_bytes())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [uffd.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        &criu,
        &[IoSlice::new(&[0])],
        &mut control,
        SendFlags::empty(),
    )?;
    drop(uffd);
    let start = Start::now();
    handle.fill()?;
    handle.wait_filled(start.wall + Duration::from_secs(120))?;
    Ok(start)
}
