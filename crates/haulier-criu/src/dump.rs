//! A dump, by the points at which it is held.
//!
//! ```text
//! start ──▶ Starting ──ready──▶ Ready ──freeze──▶ Frozen ──capture──▶ Captured ──release──▶ tasks dead
//!              │                  │                 │                    └──────abandon──▶ tasks go on (or stay in their frozen cgroup)
//!              └──────drop────────┴──▶ no task      └──drop──▶ tasks go on
//!                                      was touched
//! ```
//! A CRIU that is [`Ready`] waits at its first hook, `pre-dump`: it has been linked, has read its
//! options and has probed the kernel. Of the tasks it knows the number of the root and nothing
//! else, so it may wait there for as long as the rounds take; its timeout runs from the freeze on.
//!
//! The page server that CRIU would serve lazy pages with never carries a page: its socket is one
//! end of a pair of ours, and only how the end of the dump is told. CRIU takes the end of file on
//! it as success, and an unknown command as failure (seen with 4.1.1 and 4.2.1).
//!
//! Nor needs CRIU look at the pages that are not to be in its images: see [`crate::veil`].

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use haulier_sys::priority;
use haulier_sys::wait::Wait;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use thiserror::Error;

use crate::failure::CriuFailure;
use crate::find::Criu;
use crate::messages::{CGROUPS_IGNORE, Kind, NETWORK_LOCK_SKIP, Options, Request, Response};
use crate::swrk::{FIRST_INHERITED_FD, RpcError, Swrk};
use crate::veil::Veil;

/// Name of the log in the image directory.
pub const LOG: &str = "dump.log";
/// Level of detail of the log: errors, warnings and information. Everything (4) costs time while
/// the target is frozen.
const LOG_LEVEL: i32 = 3;
/// Unlinked files up to this size travel in the images.
const GHOST_LIMIT: u32 = 1 << 30;

/// What is dumped, and where to.
#[derive(Debug, Clone)]
pub struct DumpOptions {
    /// Root task of the tree.
    pub pid: i32,
    /// Directory for the images and the log: on a tmpfs, private, empty.
    pub directory: PathBuf,
    /// Whether the tree's session or terminal lies outside of it.
    pub shell_job: bool,
    /// Seconds that its tasks may take to freeze.
    pub freeze_seconds: u32,
    /// Whether memory will be hidden from CRIU, see [`Frozen::hide`].
    pub veil: bool,
}

/// The dump did not even begin, or failed.
#[derive(Debug, Error)]
pub enum DumpError {
    /// The image directory or the socket could not be set up.
    #[error("cannot prepare the dump: {doing}")]
    Setup {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// CRIU could not be started.
    #[error("CRIU does not run")]
    Start(#[source] RpcError),
    /// CRIU failed.
    #[error("the dump failed")]
    Failed(#[from] CriuFailure),
}

/// CRIU has its request and gets ready. No task is touched.
#[derive(Debug)]
pub struct Starting(Running);

/// CRIU is about to stop the tasks, and waits for the word. No task is touched.
#[derive(Debug)]
pub struct Ready(Running);

/// The tasks are stopped by CRIU, their memory and descriptors not yet read.
#[derive(Debug)]
pub struct Frozen(Running);

/// The images are written. The tasks are stopped by CRIU and hold nothing of it any more; their
/// TCP sockets are in repair mode.
#[derive(Debug)]
pub struct Captured(Running);

#[derive(Debug)]
struct Running {
    swrk: Swrk,
    page_socket: OwnedFd,
    log: PathBuf,
    /// Behind the process it answers, which it has to outlive.
    veil: Option<Veil>,
}

/// Starts a CRIU and sends it the request for a dump. Does not wait.
///
/// # Errors
/// See [`DumpError`].
pub fn start(criu: &Criu, options: &DumpOptions) -> Result<Starting, DumpError> {
    let setup = |doing| move |source: io::Error| DumpError::Setup { doing, source };
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| setup("socket pair")(errno.into()))?;
    // The page-server descriptor of the RPC is ignored for a lazy dump; the configuration file's
    // is not.
    let config = options.directory.join("haulier.conf");
    fs::write(&config, format!("ps-socket {FIRST_INHERITED_FD}\n"))
        .map_err(setup("configuration file"))?;
    let log = options.directory.join(LOG);
    let (mut swrk, veil) = match options.veil {
        true => {
            let started = Swrk::start_held(criu.path(), vec![theirs]);
            let (swrk, listener) = started.map_err(DumpError::Start)?;
            let veil = listener.map(Veil::new).transpose();
            (swrk, veil.map_err(setup("thread"))?)
        }
        false => {
            let started = Swrk::start(criu.path(), vec![theirs]);
            (started.map_err(DumpError::Start)?, None)
        }
    };
    let request = Request {
        kind: Kind::Dump as i32,
        options: Some(rpc_options(options, &config)),
        ..Request::default()
    };
    swrk.send(&request)
        .map_err(|error| CriuFailure::from_rpc(FAILED, error, &log))?;
    Ok(Starting(Running {
        swrk,
        page_socket: ours,
        log,
        veil,
    }))
}

const FAILED: &str = "CRIU could not dump the process tree";

impl Starting {
    /// Waits until nothing is left to be done before the tasks are stopped.
    ///
    /// # Errors
    /// See [`CriuFailure`]; the tasks run on.
    pub fn ready(self, wait: &Wait) -> Result<Ready, CriuFailure> {
        Ok(Ready(self.0.run_to("pre-dump", wait)?))
    }
}

impl Ready {
    /// The CRIU process.
    pub fn criu_pid(&self) -> i32 {
        self.0.swrk.pid()
    }

    /// Whether CRIU still waits. One that was killed meanwhile can be replaced: nothing has
    /// happened to the tasks.
    pub fn is_alive(&mut self) -> bool {
        self.0.swrk.is_alive()
    }

    /// Whether memory can be hidden from this CRIU, see [`Frozen::hide`].
    pub fn can_hide(&self) -> bool {
        self.0.veil.is_some()
    }

    /// Stops the tasks.
    ///
    /// # Errors
    /// See [`CriuFailure`]; the tasks run on.
    pub fn freeze(mut self, wait: &Wait) -> Result<Frozen, CriuFailure> {
        // The tasks stand still while it works. It ends with the dump, whatever comes of it.
        if let Err(error) = priority::hurry(self.criu_pid()) {
            tracing::debug!(%error, "CRIU dumps at the usual priority");
        }
        self.0.go_on()?;
        Ok(Frozen(self.0.run_to("query-ext-files", wait)?))
    }
}

impl Running {
    fn go_on(&mut self) -> Result<(), CriuFailure> {
        let result = self.swrk.answer(true);
        result.map_err(|error| CriuFailure::from_rpc(FAILED, error, &self.log))
    }

    fn run_to(mut self, hook: &'static str, wait: &Wait) -> Result<Running, CriuFailure> {
        match self.swrk.run_to(hook, wait) {
            Ok(_) => Ok(self),
            Err(error) => Err(CriuFailure::from_run(FAILED, error, &self.log)),
        }
    }
}

impl Frozen {
    /// The CRIU process that holds the tasks.
    pub fn criu_pid(&self) -> i32 {
        self.0.swrk.pid()
    }

    /// Whether memory can be hidden from this CRIU.
    pub fn can_hide(&self) -> bool {
        self.0.veil.is_some()
    }

    /// Has CRIU find nothing in these pages of a task, given as first address and the one after the
    /// last, ascending and disjoint. They must be of mappings that CRIU would dump lazily; what is
    /// in them is to be named to [`crate::pagemap::add_lazy`] afterwards.
    ///
    /// Where CRIU or the kernel does not go along ([`Frozen::can_hide`]), CRIU finds them itself.
    pub fn hide(&self, pid: i32, ranges: Vec<(u64, u64)>) {
        if let Some(veil) = &self.0.veil {
            veil.hide(pid, ranges);
        }
    }

    /// Lets CRIU write the images; returns when they are complete.
    ///
    /// # Errors
    /// See [`CriuFailure`]; the tasks run on.
    pub fn capture(mut self, wait: &Wait) -> Result<Captured, CriuFailure> {
        self.0.go_on()?;
        Ok(Captured(self.0.run_to("post-dump", wait)?))
    }
}

impl Captured {
    /// The CRIU process that holds the tasks.
    pub fn criu_pid(&self) -> i32 {
        self.0.swrk.pid()
    }

    /// Whether CRIU still holds the tasks, and so has held them ever since the images were
    /// written.
    pub fn is_held(&mut self) -> bool {
        self.0.swrk.is_alive()
    }

    /// Has CRIU kill the tasks, without a sign to their TCP peers.
    ///
    /// # Errors
    /// See [`CriuFailure`]; the tasks are dead only if there is none.
    pub fn release(self, wait: &Wait) -> Result<(), CriuFailure> {
        let Running {
            mut swrk,
            page_socket,
            log,
            veil: _veil,
        } = self.0;
        let failed = |error| CriuFailure::from_rpc(FAILED, error, &log);
        swrk.answer(true).map_err(failed)?;
        // Nobody asks for pages: the end of the file says that all were fetched.
        drop(page_socket);
        finished(swrk.run_to_end(wait), true, &log)
    }

    /// Has CRIU let the tasks go. Their own cgroup, if frozen, still holds them.
    ///
    /// # Errors
    /// See [`CriuFailure`]; the tasks are let go all the same, by CRIU's end.
    pub fn abandon(self, wait: &Wait) -> Result<(), CriuFailure> {
        let Running {
            mut swrk,
            page_socket,
            log,
            veil: _veil,
        } = self.0;
        let failed = |error| CriuFailure::from_rpc(FAILED, error, &log);
        swrk.answer(false).map_err(failed)?;
        // A "no" alone is not enough: CRIU serves pages nevertheless and would take the end of
        // the file for success. A header with an unknown command makes it fail.
        let garbage = [0xff; 64];
        let _ = rustix::net::send(&page_socket, &garbage, SendFlags::NOSIGNAL);
        finished(swrk.run_to_end(wait), false, &log)
    }

    /// Kills CRIU, which lets the tasks go (or leaves them to their frozen cgroup) but leaves
    /// their TCP sockets in repair mode.
    pub fn kill_criu(mut self) {
        self.0.swrk.kill();
    }
}

fn finished(
    response: Result<Response, RpcError>,
    expected: bool,
    log: &Path,
) -> Result<(), CriuFailure> {
    match response {
        Ok(response) if response.success == expected => Ok(()),
        Ok(response) => {
            let what = if expected {
                FAILED
            } else {
                "CRIU ended the dump that was given up"
            };
            Err(CriuFailure::from_response(what, &response, log))
        }
        Err(error) => Err(CriuFailure::from_rpc(FAILED, error, log)),
    }
}

fn rpc_options(options: &DumpOptions, config: &Path) -> Options {
    Options {
        images_dir_fd: -1,
        images_dir: Some(options.directory.to_string_lossy().into_owned()),
        pid: Some(options.pid),
        tcp_established: Some(true),
        shell_job: Some(options.shell_job),
        file_locks: Some(true),
        link_remap: Some(true),
        ghost_limit: Some(GHOST_LIMIT),
        log_level: Some(LOG_LEVEL),
        log_file: Some(LOG.to_owned()),
        notify_scripts: Some(true),
        manage_cgroups_mode: Some(CGROUPS_IGNORE),
        network_lock: Some(NETWORK_LOCK_SKIP),
        timeout: Some(options.freeze_seconds),
        lazy_pages: Some(true),
        config_file: Some(config.to_string_lossy().into_owned()),
    }
}
