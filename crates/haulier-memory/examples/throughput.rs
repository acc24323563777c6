//! Measures the stages of a page's way: reading, streaming over TCP into a store by each codec,
//! filling through a userfaultfd, beside what a bare socket carries.
//!
//! - `throughput local [MIB [CHANNELS [FILL_THREADS]]]`: all in one process, over loopback
//! - `throughput serve ADDRESS MIB`: the receiving end of the next, until it is ended
//! - `throughput send ADDRESS MIB [CHANNELS [REPEATS [short]]]`: from one host to another
//!
//! Memory is touched beforehand: what a virtual machine has never used is slow the first time.

use std::error::Error;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
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
use haulier_memory::stream::{
    Compression, PageSender, ReceiveStats, RoundStats, StreamError, StreamOptions, receive_pages,
};
use haulier_sys::userfaultfd::{Region, Userfaultfd};
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

type AnyError = Box<dyn Error + Send + Sync>;

const TASK: u32 = 1;

fn main() -> Result<(), AnyError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| -> Result<usize, AnyError> {
        Ok(arguments.get(index).map_or(Ok(default), |a| a.parse())?)
    };
    match arguments.first().map(String::as_str) {
        Some("local") => local(number(1, 1024)?, number(2, 1)?, number(3, 2)?),
        Some("serve") if arguments.len() == 3 => {
            let listener = TcpListener::bind(&arguments[1])?;
            warm_up(number(2, 0)?)?;
            let store = Arc::new(PageStore::new(1 << 40));
            loop {
                answer(&listener, &store)?;
            }
        }
        Some("send") if arguments.len() >= 3 => {
            let (mib, channels) = (number(2, 1024)?, number(3, 1)?);
            (0..number(4, 1)?).try_for_each(|_| send_all(&arguments[1], mib, channels))
        }
        _ => Err("see the head of examples/throughput.rs for the arguments".into()),
    }
}

/// Touches so much memory and gives it back: what a virtual machine has never used measures its host.
fn warm_up(mib: usize) -> Result<(), AnyError> {
    let memory = Region::map(mib << 20)?;
    for offset in (0..memory.len()).step_by(PAGE_BYTES) {
        memory.write(offset, 1);
    }
    Ok(())
}

fn local(mib: usize, channels: usize, threads: usize) -> Result<(), AnyError> {
    warm_up(mib + 64)?;
    let store = Arc::new(PageStore::new(1 << 40));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    // Never ends, but with the process.
    thread::spawn(move || -> Result<(), AnyError> {
        loop {
            answer(&listener, &store)?;
        }
    });
    send_all(&address, mib, channels)?;
    fill_all(mib, threads)
}

/// A line of the result.
fn print(what: &str, bytes: usize, start: &Start, more: &str) {
    let seconds = start.wall.elapsed().as_secs_f64();
    let gigabytes = bytes as f64 / 1e9;
    let cpu = (cpu_time() - start.cpu) / gigabytes;
    let rate = gigabytes * 1e3 / seconds;
    println!("{what:<42} {rate:6.0} MB/s {cpu:5.2} CPU s/GB {more}");
}

/// Reads memory of both kinds, and sends it in every way.
fn send_all(address: &str, mib: usize, channels: usize) -> Result<(), AnyError> {
    let len = mib << 20;
    let start = Start::now();
    command(address, &format!("bare {len}"), 1, |mut sockets| {
        let block = vec![1; 1 << 20];
        (0..len >> 20).try_for_each(|_| sockets[0].write_all(&block))?;
        Ok(())
    })?;
    print("bare socket, 1 MiB writes", len, &start, "");
    // One word more, and only the uncompressed ways are measured.
    let short = std::env::args().nth(6).is_some();
    let compressions = [
        Compression::None,
        Compression::Auto,
        Compression::Lz4,
        Compression::Zstd,
    ];
    for (kind, write) in [("random", random as Writer), ("text", text as Writer)] {
        let memory = Region::map(len)?;
        write(&memory);
        let pages = task(&memory);
        let start = Start::now();
        let (reader, mut chunk) = (PageReader::new(vec![pages.clone()])?, Chunk::default());
        while reader.read(&mut chunk)? {}
        print(&format!("{kind}: read only"), len, &start, "");
        if short && kind == "text" {
            break;
        }
        for compression in compressions.into_iter().take(if short { 2 } else { 4 }) {
            let options = StreamOptions {
                compression,
                ..StreamOptions::default()
            };
            let start = Start::now();
            let stats = stream(address, &options, pages.clone(), channels)?;
            let name = format!("{kind}: {channels} stream(s), {compression}");
            let by = stats.by_codec;
            let more = format!(
                "wire {:.2}, {} duplicates, none/lz4/zstd {}/{}/{} MiB",
                stats.wire_bytes as f64 / len as f64,
                stats.duplicates,
                by.none >> 20,
                by.lz4 >> 20,
                by.zstd >> 20,
            );
            print(&name, len, &start, &more);
        }
    }
    Ok(())
}

fn stream(
    address: &str,
    options: &StreamOptions,
    pages: TaskPages,
    channels: usize,
) -> Result<RoundStats, AnyError> {
    let wait = Wait::uncancellable(Duration::from_secs(600));
    let mut stats = RoundStats::default();
    let what = format!("stream {channels}");
    command(address, &what, channels, |sockets| {
        let channel = |socket| Channel::new(socket, "there");
        let channels = sockets.into_iter().map(channel).collect::<Result<_, _>>()?;
        let mut sender = PageSender::new(channels, options.clone())?;
        stats = sender.send_round(vec![pages], &[], 0, false, &wait)?;
        sender.finish(&wait)?;
        Ok(())
    })?;
    Ok(stats)
}

/// Has the other side expect so many connections, does something with them, and waits until the
/// other side has everything.
fn command(
    address: &str,
    what: &str,
    connections: usize,
    act: impl FnOnce(Vec<TcpStream>) -> Result<(), AnyError>,
) -> Result<(), AnyError> {
    let mut control = TcpStream::connect(address)?;
    writeln!(control, "{what}")?;
    let connect = |_| -> Result<TcpStream, std::io::Error> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        Ok(socket)
    };
    act((0..connections).map(connect).collect::<Result<_, _>>()?)?;
    let mut line = String::new();
    BufReader::new(control).read_line(&mut line)?;
    match line.as_str() {
        "done\n" => Ok(()),
        other => Err(format!("the other side says {other:?}").into()),
    }
}

/// The other side of [`command`], once.
fn answer(listener: &TcpListener, store: &Arc<PageStore>) -> Result<(), AnyError> {
    let mut control = BufReader::new(listener.accept()?.0);
    let mut line = String::new();
    control.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let result = match words[..] {
        ["bare", len] => sink(listener, len.parse()?),
        ["stream", channels] => receive(listener, channels.parse()?, store),
        _ => Err(format!("no command: {line:?}").into()),
    };
    match result {
        Ok(()) => writeln!(control.get_mut(), "done")?,
        Err(error) => writeln!(control.get_mut(), "{error}")?,
    }
    Ok(())
}

fn sink(listener: &TcpListener, len: usize) -> Result<(), AnyError> {
    let mut source = listener.accept()?.0;
    let mut block = vec![0; 1 << 20];
    for _ in 0..len >> 20 {
        source.read_exact(&mut block)?;
    }
    Ok(())
}

fn receive(
    listener: &TcpListener,
    channels: usize,
    store: &Arc<PageStore>,
) -> Result<(), AnyError> {
    let wait = Wait::uncancellable(Duration::from_secs(600));
    let mut receivers = Vec::new();
    for _ in 0..channels {
        let mut channel = Channel::new(listener.accept()?.0, "here")?;
        let (store, wait) = (store.clone(), wait.clone());
        let receive = move || -> Result<ReceiveStats, StreamError> {
            receive_pages(&mut channel, &store, &wait)
        };
        receivers.push(thread::spawn(receive));
    }
    for receiver in receivers {
        receiver.join().map_err(|_| "a receiver panicked")??;
    }
    store.retain_tasks(|_| false);
    Ok(())
}

type Writer = fn(&Region);

/// Fresh random bytes: nothing compresses, no two pages are the same.
fn random(memory: &Region) {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for offset in (0..memory.len()).step_by(8) {
        // xorshift
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for (index, byte) in state.to_le_bytes().into_iter().enumerate() {
            memory.write(offset + index, byte);
        }
    }
}

/// Words from a small vocabulary: compresses as text does.
fn text(memory: &Region) {
    const WORDS: [&[u8]; 16] = [
        b"page ", b"store ", b"round ", b"dirty ", b"frame ", b"task ", b"wait ", b"kernel ",
        b"memory", b" moved", b", and ", b"the ", b"0x7fff", b"1234567", b".\n", b"zero ",
    ];
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut offset = 0;
    while offset < memory.len() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for byte in WORDS[(state >> 32) as usize % 16]
            .iter()
            .take(memory.len() - offset)
        {
            memory.write(offset, *byte);
            offset += 1;
        }
        memory.write(offset.min(memory.len() - 1), state as u8);
        offset += 1;
    }
}

fn task(memory: &Region) -> TaskPages {
    TaskPages {
        pid: std::process::id() as i32,
        task: TASK,
        ranges: vec![range(memory)],
    }
}

fn range(memory: &Region) -> PageRange {
    PageRange {
        start: memory.address(),
        pages: (memory.len() / PAGE_BYTES) as u64,
    }
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

/// Fills a memory from a store, which has it page by page.
fn fill_all(mib: usize, threads: usize) -> Result<(), AnyError> {
    let memory = Region::map(mib << 20)?;
    random(&memory);
    let store = Arc::new(PageStore::new(1 << 40));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let wait = Wait::uncancellable(Duration::from_secs(600));
    let receiver = {
        let (store, wait) = (store.clone(), wait.clone());
        thread::spawn(move || -> Result<ReceiveStats, AnyError> {
            let mut channel = Channel::new(listener.accept()?.0, "here")?;
            Ok(receive_pages(&mut channel, &store, &wait)?)
        })
    };
    let channel = Channel::new(TcpStream::connect(address)?, "there")?;
    let mut sender = PageSender::new(vec![channel], StreamOptions::default())?;
    sender.send_round(vec![task(&memory)], &[], 0, false, &wait)?;
    sender.finish(&wait)?;
    receiver.join().map_err(|_| "the receiver panicked")??;
    store.seal();
    memory.discard(0..memory.len())?;
    let start = fill(&store, &memory, range(&memory), threads)?;
    print(
        &format!("fill by {threads} thread(s)"),
        memory.len(),
        &start,
        "",
    );
    Ok(())
}

/// Fills the memory from the store. Returns when that began.
fn fill(
    store: &Arc<PageStore>,
    memory: &Region,
    range: PageRange,
    threads: usize,
) -> Result<Start, AnyError> {
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
