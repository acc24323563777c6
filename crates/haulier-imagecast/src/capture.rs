//! A dump's connection to the proxy: what CRIU writes, read from its pipes as it comes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use haulier_criu::skeleton::LeftBehind;
use haulier_images::name::ImageName;
use haulier_images::page::{self, PAGE, PagesHasher, ZERO_HASH};
use haulier_sys::wait::Cancel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use thiserror::Error;

use crate::desk::{Desk, DumpFailed, Ticket};
use crate::fetch::Fetcher;
use crate::inventory;
use crate::outbox::Item;
use crate::shelf::{Bytes, CHUNK, Shelf};
use crate::store::INVENTORY;
use crate::stream::{Connection, Incoming, StreamError};
use crate::turned_away::turn_away;

/// Of less than that a copy is kept, not the whole buffer it came in.
const SMALL: usize = CHUNK / 4;
/// What a pipe of pages should hold.
const PIPE_SIZE: usize = 1 << 20;
/// Most images that CRIU may have open at once.
const MOST_OPEN: usize = 4096;
/// Longest pagemap that is read. What is left out of a longer one makes it invalid.
const LONGEST_PAGEMAP: usize = 256 << 20;
/// A dump may be silent for that long: CRIU waits for the kernel, or for a script of its user.
const SILENCE_SECONDS: i64 = 3600;

/// A dump cannot be taken any further.
#[derive(Debug, Error)]
pub(crate) enum CaptureError {
    /// It was given up.
    #[error(transparent)]
    Failed(#[from] DumpFailed),
    /// CRIU did something wrong.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A pipe failed.
    #[error("cannot read {name} from CRIU: {source}")]
    Pipe {
        name: ImageName,
        #[source]
        source: io::Error,
    },
    /// The kernel refused to wait.
    #[error("cannot wait for CRIU: {0}")]
    Wait(#[source] io::Error),
    /// It is of no use without files that a later dump could refer to, and the process runs on.
    #[error(
        "this was a pre-dump, which nothing can be restored from; dumps with --leave-running, of which \
         the later ones send only what has changed, do what it is for"
    )]
    PreDump,
    /// Nobody would fetch the rest of it.
    #[error(
        "the dump leaves memory behind (criu dump --lazy-pages), but the image-proxy runs without \
         --lazy-pages"
    )]
    NotLazy,
    /// What came is not a dump.
    #[error("{0}")]
    Wrong(String),
}

/// Takes a dump, and stays until CRIU closes its connection. On an error connection and pipes are
/// closed, which ends CRIU's dump with the process alive, and what it may have become is turned away.
pub(crate) fn capture(
    connection: Connection,
    ticket: &Ticket,
    desk: &Desk,
    fetcher: Option<&Fetcher>,
    stop: &Cancel,
) -> Result<(), CaptureError> {
    let criu = connection.peer();
    if let Err(error) = desk.begin(ticket.dump) {
        drop(connection);
        turn_away(criu);
        return Err(error.into());
    }
    let mut dump = Capture {
        connection,
        ticket,
        desk,
        fetcher,
        images: Vec::new(),
        count: 0,
        bytes: 0,
        inventory: false,
        connected: true,
        taken: false,
        fetched: false,
    };
    let result = dump.take(stop);
    let fetched = dump.fetched;
    drop(dump);
    if result.is_err() && !fetched {
        if let Some(fetcher) = fetcher {
            fetcher.refuse_given();
        }
        turn_away(criu);
    }
    // Until the next one the memory may be of use to others.
    desk.shelf().clear();
    result
}

struct Capture<'a> {
    connection: Connection,
    ticket: &'a Ticket,
    desk: &'a Desk,
    /// For what the dump leaves behind.
    fetcher: Option<&'a Fetcher>,
    images: Vec<Taking>,
    count: u64,
    bytes: u64,
    inventory: bool,
    connected: bool,
    taken: bool,
    /// Whether a thread fetches what it leaves behind, and so decides how it ends.
    fetched: bool,
}

/// An image that CRIU is writing.
struct Taking {
    number: u32,
    name: ImageName,
    pipe: OwnedFd,
    length: u64,
    form: Form,
    ready: bool,
}

enum Form {
    Plain(Box<blake3::Hasher>),
    /// With what has come: it tells whether this is a dump.
    Inventory(Box<blake3::Hasher>, Vec<u8>),
    /// The pagemap of this task, kept to be read.
    Pagemap(Box<blake3::Hasher>, u32, Vec<u8>),
    /// With the bytes of a page that has not come whole.
    Pages(Box<PagesHasher>, Vec<u8>),
}

impl Capture<'_> {
    fn take(&mut self, stop: &Cancel) -> Result<(), CaptureError> {
        let (desk, dump) = (self.desk, self.ticket.dump);
        // Before anything is frozen, if it can be told.
        if self.fetcher.is_none() && self.connection.is_told_lazy() {
            return Err(CaptureError::NotLazy);
        }
        while self.connected || !self.taken {
            self.wait(stop)?;
            let asked = desk.is_asked_to_finish(dump)?;
            self.accept()?;
            self.read()?;
            // A dump that leaves pages behind stays connected until they are fetched.
            // Its inventory is the last image.
            let served = self.inventory && desk.is_serving(dump);
            let complete = asked || !self.connected || served;
            if !self.taken && self.images.is_empty() && complete {
                if !self.inventory {
                    let what = "CRIU ended the dump before it was complete; its log says why";
                    return Err(CaptureError::Wrong(what.to_owned()));
                }
                desk.taken(dump, self.count, self.bytes)?;
                self.taken = true;
            }
        }
        Ok(())
    }

    /// Waits until there is something to do.
    fn wait(&mut self, stop: &Cancel) -> Result<(), CaptureError> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.ticket.wake(), PollFlags::IN)];
        fds.extend(
            self.images
                .iter()
                .map(|image| PollFd::from_borrowed_fd(image.pipe.as_fd(), PollFlags::IN)),
        );
        if self.connected {
            fds.push(PollFd::from_borrowed_fd(
                self.connection.as_fd(),
                PollFlags::IN,
            ));
        }
        // In steps, to see the proxy being stopped.
        let step = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        let mut silent = 0;
        loop {
            match poll(&mut fds, Some(&step)) {
                Ok(0) if stop.is_cancelled() || silent >= SILENCE_SECONDS * 5 => break,
                Ok(0) | Err(Errno::INTR) => silent += 1,
                Ok(_) => break,
                Err(errno) => return Err(CaptureError::Wait(errno.into())),
            }
        }
        if silent >= SILENCE_SECONDS * 5 {
            return Err(CaptureError::Wrong("CRIU fell silent".to_owned()));
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        for (image, ready) in self.images.iter_mut().zip(&ready[1..]) {
            image.ready = *ready;
        }
        if ready[0] {
            let mut count = [0; 8];
            // It is only there to wake us.
            let _ = rustix::io::read(self.ticket.wake(), &mut count);
        }
        Ok(())
    }

    /// Takes the images that CRIU has opened.
    fn accept(&mut self) -> Result<(), CaptureError> {
        while self.connected {
            match self.connection.opened()? {
                Incoming::NotYet => return Ok(()),
                Incoming::End => self.connected = false,
                Incoming::Some((name, pipe)) => self.open(name, pipe)?,
            }
        }
        Ok(())
    }

    fn open(&mut self, name: ImageName, pipe: OwnedFd) -> Result<(), CaptureError> {
        if self.taken {
            let what = format!("CRIU opened {name} when the dump was said to be over");
            return Err(CaptureError::Wrong(what));
        }
        if self.images.len() >= MOST_OPEN {
            let what = format!("CRIU has more than {MOST_OPEN} images open");
            return Err(CaptureError::Wrong(what));
        }
        let form = if name.is_of_pages() {
            // Less will do, if the system allows no more.
            let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_SIZE);
            Form::Pages(Box::default(), Vec::new())
        } else if name.as_str() == INVENTORY {
            Form::Inventory(Box::default(), Vec::new())
        } else if let Some(task) = task_of(&name) {
            Form::Pagemap(Box::default(), task, Vec::new())
        } else {
            Form::Plain(Box::default())
        };
        self.images.push(Taking {
            number: self.desk.open(self.ticket.dump, &name)?,
            name,
            pipe,
            length: 0,
            form,
            ready: true,
        });
        self.count += 1;
        Ok(())
    }

    /// Reads a piece of every image that has one.
    fn read(&mut self) -> Result<(), CaptureError> {
        let mut index = 0;
        while index < self.images.len() {
            let image = &mut self.images[index];
            if !image.ready {
                index += 1;
                continue;
            }
            image.ready = false;
            let shelf = self.desk.shelf();
            let mut buffer = shelf.take();
            let (count, end) = match image.fill(&mut buffer) {
                Ok(filled) => filled,
                Err(source) => {
                    let name = image.name.clone();
                    return Err(CaptureError::Pipe { name, source });
                }
            };
            let (number, dump) = (image.number, self.ticket.dump);
            if let Some(item) = image.take(buffer, count, shelf) {
                self.desk.push(dump, number, item)?;
            }
            if !end {
                index += 1;
                continue;
            }
            let image = self.images.swap_remove(index);
            self.bytes += image.length;
            self.inventory |= image.name.as_str() == INVENTORY && image.length > 0;
            if let Form::Pagemap(_, task, pagemap) = &image.form {
                let left = LeftBehind::of(image.name.as_str(), pagemap.clone())
                    .map_err(|error| CaptureError::Wrong(error.to_string()))?;
                self.left_behind(*task, &left)?;
            }
            let end = image.end()?;
            self.desk.push(dump, number, end)?;
        }
        Ok(())
    }
}

impl Capture<'_> {
    /// Pages of a task are not in the images.
    fn left_behind(&mut self, task: u32, left: &LeftBehind) -> Result<(), CaptureError> {
        // A task with a thread whose stack pointer is at the beginning of a page leaves nothing (CRIU 4.2.1
        // takes all of it for stack), but CRIU becomes a page server all the same.
        let lazy = self.connection.is_told_lazy() || self.fetcher.is_some_and(Fetcher::is_given);
        if left.ranges.is_empty() && !lazy {
            return Ok(());
        }
        let Some(fetcher) = self.fetcher else {
            return Err(CaptureError::NotLazy);
        };
        let dump = self.ticket.dump;
        if self.desk.left_behind(dump, task, left)? {
            let server = fetcher.prepare(self.connection.peer());
            let server = server.map_err(CaptureError::Wrong)?;
            let fetcher = fetcher.clone();
            thread::Builder::new()
                .name("fetch".to_owned())
                .spawn(move || fetcher.run(dump, server))
                .map_err(CaptureError::Wait)?;
            self.fetched = true;
        }
        Ok(())
    }
}

/// The task whose pagemap this is.
fn task_of(name: &ImageName) -> Option<u32> {
    let task = name.as_str().strip_prefix("pagemap-")?;
    task.strip_suffix(".img")?.parse().ok()
}

impl Taking {
    /// Reads what there is, up to the length of the buffer, behind what is left from before. How many
    /// bytes that are, and whether no more will come.
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
        let mut filled = 0;
        if let Form::Pages(_, rest) = &mut self.form {
            filled = rest.len();
            buffer[..filled].copy_from_slice(rest);
            rest.clear();
        }
        while filled < buffer.len() {
            match rustix::io::read(&self.pipe, &mut buffer[filled..]) {
                Ok(0) => return Ok((filled, true)),
                Ok(count) => {
                    filled += count;
                    self.length += count as u64;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok((filled, false))
    }

    /// What is to be sent now that these bytes have come, if anything.
    fn take(&mut self, buffer: Vec<u8>, count: usize, shelf: &Arc<Shelf>) -> Option<Item> {
        let bytes = &buffer[..count];
        match &mut self.form {
            Form::Plain(hasher) => {
                hasher.update(bytes);
            }
            Form::Inventory(hasher, seen) => {
                hasher.update(bytes);
                let room = inventory::LONGEST.saturating_sub(seen.len());
                seen.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
            Form::Pagemap(hasher, _, pagemap) => {
                hasher.update(bytes);
                if pagemap.len() + bytes.len() <= LONGEST_PAGEMAP {
                    pagemap.extend_from_slice(bytes);
                }
            }
            Form::Pages(hasher, rest) => {
                let (pages, left) = bytes.split_at(count / PAGE * PAGE);
                rest.extend_from_slice(left);
                let hashes = page::hash_all_unless_zero(pages);
                for hash in &hashes {
                    hasher.update(hash.as_ref().unwrap_or(&ZERO_HASH));
                }
                let length = pages.len();
                let data = keep(buffer, length, shelf)?;
                return Some(Item::Pages { data, hashes });
            }
        }
        keep(buffer, count, shelf).map(Item::Plain)
    }

    fn end(self) -> Result<Item, CaptureError> {
        let blake3 = match self.form {
            Form::Inventory(_, seen) if inventory::is_of_pre_dump(&seen) => {
                return Err(CaptureError::PreDump);
            }
            Form::Plain(hasher) | Form::Inventory(hasher, _) | Form::Pagemap(hasher, ..) => {
                *hasher.finalize().as_bytes()
            }
            Form::Pages(hasher, rest) if rest.is_empty() => hasher.finalize(),
            Form::Pages(..) => {
                let what = format!("{} is not made of whole pages", self.name);
                return Err(CaptureError::Wrong(what));
            }
        };
        Ok(Item::End {
            length: self.length,
            blake3,
        })
    }
}

/// The first `length` bytes of a buffer of the shelf; `None` if that is nothing.
fn keep(buffer: Vec<u8>, length: usize, shelf: &Arc<Shelf>) -> Option<Bytes> {
    if length >= SMALL {
        return Some(Bytes::of(shelf, buffer, length));
    }
    let copy = buffer[..length].to_vec();
    shelf.put(buffer);
    (length > 0).then(|| copy.into())
}
