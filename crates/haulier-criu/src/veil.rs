//! Memory that CRIU does not look at, because it is not to be in its images.
//!
//! A lazy dump lists every page of the target and takes hold of each by `vmsplice`, all while the
//! target stands still; 1 GiB of small pages costs it some 50 ms here. Whoever knows the pages
//! better and reads them himself needs neither. CRIU asks the kernel for the pages of a mapping by
//! `PAGEMAP_SCAN` (from 4.0 on, where the kernel has it, Linux 6.7); the veil has these requests
//! held by seccomp and answers, for the memory it is told to hide, that nothing is there. CRIU
//! itself is as it was, and so are its images but for their lists of lazy pages
//! ([`crate::pagemap`]).
//!
//! Whatever else is asked is let through, as is everything if something goes wrong: CRIU then finds
//! the pages, as it would without.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use haulier_sys::pagemap::category::{FILE, GUARD, PFNZERO, PRESENT, SWAPPED};
use haulier_sys::pagemap::{Pagemap, Query, Region};
use haulier_sys::seccomp::{Held, Listener, Request};
use rustix::event::{PollFd, PollFlags, poll};
use tracing::debug;

/// What CRIU asks when it wants to know which pages of a mapping are to be dumped.
const PAGES_TO_DUMP: (u64, u64) = (PRESENT | SWAPPED, PFNZERO | FILE);

/// Addresses by task, ascending and disjoint: the first, and the one after the last.
type Hidden = BTreeMap<i32, Vec<(u64, u64)>>;

/// Answers for one CRIU. Its requests fail once this is dropped.
#[derive(Debug)]
pub(crate) struct Veil {
    hidden: Arc<Mutex<Hidden>>,
    thread: Option<JoinHandle<()>>,
    /// Its closing ends the thread.
    stop: Option<UnixStream>,
}

impl Veil {
    /// Nothing is hidden yet.
    pub(crate) fn new(listener: Listener) -> io::Result<Veil> {
        let hidden = Arc::default();
        let (stop, stopped) = UnixStream::pair()?;
        let watcher = Watcher {
            listener,
            stopped,
            hidden: Arc::clone(&hidden),
            pagemap: None,
        };
        let thread = thread::Builder::new()
            .name("veil".into())
            .spawn(move || watcher.run())?;
        Ok(Veil {
            hidden,
            thread: Some(thread),
            stop: Some(stop),
        })
    }

    /// Hides ranges of a task's addresses.
    pub(crate) fn hide(&self, pid: i32, ranges: Vec<(u64, u64)>) {
        let mut hidden = self.hidden.lock().unwrap_or_else(PoisonError::into_inner);
        hidden.insert(pid, ranges);
    }
}

impl Drop for Veil {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Watcher {
    listener: Listener,
    stopped: UnixStream,
    hidden: Arc<Mutex<Hidden>>,
    /// Of the task that was asked for last.
    pagemap: Option<(i32, Pagemap)>,
}

impl Watcher {
    /// Until CRIU has ended, or nobody wants to hide anything from it.
    fn run(mut self) {
        loop {
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::new(&self.stopped, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return debug!(%error, "veil"),
            }
            let (asked, stopped) = (fds[0].revents(), fds[1].revents());
            if asked.contains(PollFlags::IN) {
                // What fails here failed because who asked was killed.
                if let Err(error) = self.serve() {
                    debug!(%error, "veil");
                }
            } else if !asked.is_empty() || !stopped.is_empty() {
                return;
            }
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let held = self.listener.receive()?;
        let answered = match self.answer_to(&held) {
            Ok(Some((request, found))) => self.listener.answer(&held, &request, &found),
            Ok(None) => self.listener.let_through(&held),
            Err(error) => Err(error),
        };
        // Nobody may be left waiting for an answer.
        answered.or_else(|error| {
            debug!(%error, "CRIU may look for itself");
            self.listener.let_through(&held)
        })
    }

    /// The answer to a request, if it is for memory of which anything is hidden.
    fn answer_to(&mut self, held: &Held) -> io::Result<Option<(Request, Vec<Region>)>> {
        let Some(pid) = held.subject() else {
            return Ok(None);
        };
        let request = held.request()?;
        if request.any_but_none() != Some(PAGES_TO_DUMP) {
            return Ok(None);
        }
        let hidden = self.hidden.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(hidden) = hidden.get(&pid) else {
            return Ok(None);
        };
        let asked = request.addresses();
        let visible = visible(asked, hidden);
        if visible == [asked] {
            return Ok(None);
        }
        let mut found = Vec::new();
        for (start, end) in visible {
            let pagemap = pagemap_of(&mut self.pagemap, pid)?;
            let (any, none) = PAGES_TO_DUMP;
            let none = match pagemap.knows_guards() {
                true => none | GUARD,
                false => none,
            };
            let query = Query {
                any,
                none,
                ..Query::default()
            };
            pagemap.scan(start..end, query, |pages| {
                found.push(Region {
                    start: pages.start,
                    end: pages.end,
                    categories: PRESENT,
                });
            })?;
        }
        Ok(Some((request, found)))
    }
}

fn pagemap_of(open: &mut Option<(i32, Pagemap)>, pid: i32) -> io::Result<&mut Pagemap> {
    let pagemap = match open.take() {
        Some((of, pagemap)) if of == pid => pagemap,
        _ => Pagemap::open(pid)?,
    };
    Ok(&mut open.insert((pid, pagemap)).1)
}

/// What of the addresses is not hidden.
fn visible(asked: (u64, u64), hidden: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut from, end) = asked;
    let mut parts = Vec::new();
    let first = hidden.partition_point(|(_, hidden_end)| *hidden_end <= from);
    for (start, stop) in hidden[first..].iter().take_while(|(start, _)| *start < end) {
        if from < *start {
            parts.push((from, *start));
        }
        from = *stop;
    }
    if from < end {
        parts.push((from, end));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::visible;

    #[test]
    fn what_is_hidden_is_cut_out() {
        let hidden = [(10, 20), (30, 40)];
        assert_eq!(visible((0, 50), &hidden), [(0, 10), (20, 30), (40, 50)]);
        assert_eq!(visible((12, 20), &hidden), []);
        assert_eq!(visible((15, 35), &hidden), [(20, 30)]);
        assert_eq!(visible((20, 30), &hidden), [(20, 30)]);
        assert_eq!(visible((40, 41), &hidden), [(40, 41)]);
        assert_eq!(visible((0, 5), &[]), [(0, 5)]);
    }
}
