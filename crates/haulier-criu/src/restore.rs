//! A restore, by the points at which it is held.
//!
//! ```text
//! start ──▶ Starting ──wait_for_images──▶ Waiting ──restore──▶ Parked ──proceed──▶ AtResume ──detach──▶ tasks run (or stand in
//!              └──────────restore─────────────│──────────────────┘│                                      their frozen cgroup)
//!                                             └──drop──▶ nothing  └──drop──▶ tasks killed
//! ```
//! A CRIU that is [`Waiting`] has been linked, has read its options and has probed the kernel. It
//! stands in its first look at the images, which is one at the inventory: that name belonged to a
//! FIFO when CRIU opened it, and CRIU reads until we close our end. It is read once, from its
//! beginning to its end (seen with 4.2.1, read in 4.1 and 4.2).
//!
//! Until [`Parked`] no code of the target has run and a "no" kills what was restored. At
//! [`AtResume`] CRIU only sets registers and detaches, whatever it is answered, even by its death:
//! whoever does not want the tasks to run freezes their cgroup before that.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use haulier_sys::wait::{Wait, WaitError};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;

use crate::failure::CriuFailure;
use crate::find::Criu;
use crate::messages::{CGROUPS_IGNORE, Kind, NETWORK_LOCK_SKIP, Options, Request};
use crate::swrk::{RpcError, Swrk};

/// Name of the log in the image directory.
pub const LOG: &str = "restore.log";
const LOG_LEVEL: i32 = 3;
/// The image that CRIU reads first.
const INVENTORY: &str = "inventory.img";
/// CRIU's own are some hundred bytes.
const LONGEST_INVENTORY: u64 = 1 << 20;
/// How often it is looked whether CRIU has come to the inventory.
const LOOK: Duration = Duration::from_millis(1);
const FAILED: &str = "CRIU could not restore the process tree";

/// What is restored, and from where.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory of the images; the lazy-pages daemon listens in it.
    pub directory: PathBuf,
    /// As at the dump.
    pub shell_job: bool,
}

/// A restore failed.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The inventory, by which CRIU is held, could not be handled.
    #[error("cannot {doing} {path}", path = path.display())]
    Inventory {
        /// What was being done.
        doing: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// CRIU failed.
    #[error("the restore failed")]
    Failed(#[from] CriuFailure),
}

/// CRIU has been started and waits for its request.
#[derive(Debug)]
pub struct Starting {
    swrk: Swrk,
    log: PathBuf,
}

/// CRIU has its request, is ready, and waits for the images.
#[derive(Debug)]
pub struct Waiting {
    // Dropped first: CRIU reads from its other end, and ends when that does.
    gate: OwnedFd,
    swrk: Swrk,
    log: PathBuf,
    inventory: PathBuf,
}

/// The tasks are restored and parked in CRIU's restorer: memory mapped and registered with
/// userfaultfd, sockets in repair mode.
#[derive(Debug)]
pub struct Parked {
    swrk: Swrk,
    log: PathBuf,
    root: i32,
}

/// Every task stands before its first own instruction, its sockets are live.
#[derive(Debug)]
pub struct AtResume {
    swrk: Swrk,
    log: PathBuf,
    root: i32,
}

/// Starts a CRIU for a restore. It does nothing before [`Starting::restore`], so that the caller
/// can put it into a cgroup first, where the restored tasks will be born.
///
/// # Errors
/// See [`CriuFailure`].
pub fn start(criu: &Criu, options: &RestoreOptions) -> Result<Starting, CriuFailure> {
    let log = options.directory.join(LOG);
    let swrk =
        Swrk::start(criu.path(), Vec::new()).map_err(|e| CriuFailure::from_rpc(FAILED, e, &log))?;
    Ok(Starting { swrk, log })
}

impl Starting {
    /// The CRIU process.
    pub fn criu_pid(&self) -> i32 {
        self.swrk.pid()
    }

    /// Restores the tree, whose images are all there, up to the point where its memory can be
    /// filled.
    ///
    /// # Errors
    /// See [`CriuFailure`]; nothing is left of the tree.
    pub fn restore(mut self, options: &RestoreOptions, wait: &Wait) -> Result<Parked, CriuFailure> {
        self.request(options)?;
        run_to_parked(self.swrk, self.log, wait)
    }

    /// Has CRIU get ready before there are any images: the directory must have none yet. Returns
    /// when it has, and the directory is empty again but for its log.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn wait_for_images(
        mut self,
        options: &RestoreOptions,
        wait: &Wait,
    ) -> Result<Waiting, RestoreError> {
        let inventory = options.directory.join(INVENTORY);
        let failed = |doing| {
            let path = inventory.clone();
            move |errno: Errno| RestoreError::Inventory {
                doing,
                path,
                source: errno.into(),
            }
        };
        rustix::fs::mknodat(CWD, &inventory, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .map_err(failed("make the FIFO"))?;
        let opened = self
            .request(options)
            .map_err(RestoreError::from)
            .and_then(|()| {
                loop {
                    // It has no reader, and cannot be opened, before CRIU waits in opening it.
                    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                    match rustix::fs::open(&inventory, flags, Mode::empty()) {
                        Ok(gate) => return Ok(gate),
                        Err(Errno::NXIO) => self.expect_silence(wait)?,
                        Err(errno) => return Err(failed("open the FIFO")(errno)),
                    }
                }
            });
        // The name is for the image that comes.
        let removed = rustix::fs::unlink(&inventory).map_err(failed("remove the FIFO"));
        let gate = opened?;
        removed?;
        Ok(Waiting {
            gate,
            swrk: self.swrk,
            log: self.log,
            inventory,
        })
    }

    fn request(&mut self, options: &RestoreOptions) -> Result<(), CriuFailure> {
        let request = Request {
            kind: Kind::Restore as i32,
            options: Some(rpc_options(options)),
            ..Request::default()
        };
        let sent = self.swrk.send(&request);
        sent.map_err(|e| CriuFailure::from_rpc(FAILED, e, &self.log))
    }

    /// Waits for a moment in which CRIU says nothing: whatever it says before it has seen an image
    /// is that it failed.
    fn expect_silence(&mut self, wait: &Wait) -> Result<(), CriuFailure> {
        match self.swrk.receive(&wait.at_most(LOOK)) {
            Ok(response) => Err(CriuFailure::from_response(FAILED, &response, &self.log)),
            Err(RpcError::Deadline) if !wait.remaining().is_zero() => Ok(()),
            Err(error) => Err(CriuFailure::from_rpc(FAILED, error, &self.log)),
        }
    }
}

impl Waiting {
    /// The CRIU process.
    pub fn criu_pid(&self) -> i32 {
        self.swrk.pid()
    }

    /// Whether CRIU still waits. One that was killed meanwhile can be replaced: it has made
    /// nothing.
    pub fn is_alive(&mut self) -> bool {
        self.swrk.is_alive()
    }

    /// Restores the tree, whose images are all there now, up to the point where its memory can be
    /// filled.
    ///
    /// # Errors
    /// See [`RestoreError`]; nothing is left of the tree.
    pub fn restore(self, wait: &Wait) -> Result<Parked, RestoreError> {
        let failed = |doing, source| RestoreError::Inventory {
            doing,
            path: self.inventory.clone(),
            source,
        };
        let mut contents = Vec::new();
        let mut read = || {
            let file = File::open(&self.inventory)?;
            file.take(LONGEST_INVENTORY + 1).read_to_end(&mut contents)
        };
        let length = read().map_err(|source| failed("read", source))?;
        if length as u64 > LONGEST_INVENTORY {
            return Err(failed("take all of", Errno::FBIG.into()));
        }
        match pour(&self.gate, &contents, wait) {
            Ok(()) => {}
            // What happened to it, CRIU's answer tells.
            Err(WaitError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(WaitError::Io(source)) => return Err(failed("hand CRIU", source)),
            Err(WaitError::Deadline) => return Err(self.given_up(RpcError::Deadline)),
            Err(WaitError::Cancelled) => return Err(self.given_up(RpcError::Cancelled)),
        }
        drop(self.gate);
        Ok(run_to_parked(self.swrk, self.log, wait)?)
    }

    fn given_up(&self, error: RpcError) -> RestoreError {
        CriuFailure::from_rpc(FAILED, error, &self.log).into()
    }
}

/// Writes all of it into a pipe that does not block.
fn pour(pipe: &OwnedFd, mut contents: &[u8], wait: &Wait) -> Result<(), WaitError> {
    while !contents.is_empty() {
        match rustix::io::write(pipe, contents) {
            Ok(count) => contents = &contents[count..],
            Err(Errno::AGAIN) => wait.writable(pipe)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(WaitError::Io(errno.into())),
        }
    }
    Ok(())
}

fn run_to_parked(mut swrk: Swrk, log: PathBuf, wait: &Wait) -> Result<Parked, CriuFailure> {
    match swrk.run_to("post-restore", wait) {
        Ok(Some(root)) => Ok(Parked { swrk, log, root }),
        Ok(None) => Err(no_pid(&log)),
        Err(error) => {
            swrk.kill_children();
            Err(CriuFailure::from_run(FAILED, error, &log))
        }
    }
}

impl Parked {
    /// Root task of the tree.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// Lets CRIU go on to the point where it would let the tasks run.
    ///
    /// # Errors
    /// See [`CriuFailure`]; CRIU has killed the tasks, or will when it is dropped.
    pub fn proceed(mut self, wait: &Wait) -> Result<AtResume, CriuFailure> {
        self.swrk
            .answer(true)
            .map_err(|e| CriuFailure::from_rpc(FAILED, e, &self.log))?;
        if let Err(error) = self.swrk.run_to("pre-resume", wait) {
            self.swrk.kill_children();
            return Err(CriuFailure::from_run(FAILED, error, &self.log));
        }
        Ok(AtResume {
            swrk: self.swrk,
            log: self.log,
            root: self.root,
        })
    }
}

impl AtResume {
    /// The CRIU process.
    pub fn criu_pid(&self) -> i32 {
        self.swrk.pid()
    }

    /// Root task of the tree.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// Lets CRIU detach and end.
    ///
    /// # Errors
    /// See [`CriuFailure`].
    pub fn detach(mut self, wait: &Wait) -> Result<(), CriuFailure> {
        self.swrk
            .answer(true)
            .map_err(|e| CriuFailure::from_rpc(FAILED, e, &self.log))?;
        let response = self
            .swrk
            .run_to_end(wait)
            .map_err(|error| CriuFailure::from_rpc(FAILED, error, &self.log))?;
        if response.success {
            Ok(())
        } else {
            Err(CriuFailure::from_response(FAILED, &response, &self.log))
        }
    }
}

fn no_pid(log: &Path) -> CriuFailure {
    let error = RpcError::Unexpected {
        got: "a post-restore hook without a process number".to_owned(),
        expected: "one with it",
    };
    CriuFailure::from_rpc(FAILED, error, log)
}

fn rpc_options(options: &RestoreOptions) -> Options {
    Options {
        images_dir_fd: -1,
        images_dir: Some(options.directory.to_string_lossy().into_owned()),
        tcp_established: Some(true),
        shell_job: Some(options.shell_job),
        file_locks: Some(true),
        link_remap: Some(true),
        log_level: Some(LOG_LEVEL),
        log_file: Some(LOG.to_owned()),
        notify_scripts: Some(true),
        manage_cgroups_mode: Some(CGROUPS_IGNORE),
        network_lock: Some(NETWORK_LOCK_SKIP),
        lazy_pages: Some(true),
        ..Options::default()
    }
}
