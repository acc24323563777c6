//! A restore, by the points at which it is held.
//!
//! ```text
//! restore::start ──▶ Parked ──proceed──▶ AtResume ──detach──▶ tasks run (or stand in their frozen cgroup)
//!                      └──drop──▶ tasks killed
//! ```
//! Until [`Parked`] no code of the target has run and a "no" kills what was restored. At
//! [`AtResume`] CRIU only sets registers and detaches, whatever it is answered, even by its death:
//! whoever does not want the tasks to run freezes their cgroup before that.

use std::path::{Path, PathBuf};

use haulier_sys::wait::Wait;

use crate::failure::CriuFailure;
use crate::find::Criu;
use crate::messages::{CGROUPS_IGNORE, Kind, NETWORK_LOCK_SKIP, Options, Request};
use crate::swrk::{RpcError, Swrk};

/// Name of the log in the image directory.
pub const LOG: &str = "restore.log";
const LOG_LEVEL: i32 = 3;
const FAILED: &str = "CRIU could not restore the process tree";

/// What is restored, and from where.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory of the images; the lazy-pages daemon listens in it.
    pub directory: PathBuf,
    /// As at the dump.
    pub shell_job: bool,
}

/// CRIU has been started and waits for its request.
#[derive(Debug)]
pub struct Starting {
    swrk: Swrk,
    log: PathBuf,
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

    /// Restores the tree up to the point where its memory can be filled.
    ///
    /// # Errors
    /// See [`CriuFailure`]; nothing is left of the tree.
    pub fn restore(mut self, options: &RestoreOptions, wait: &Wait) -> Result<Parked, CriuFailure> {
        let request = Request {
            kind: Kind::Restore as i32,
            options: Some(rpc_options(options)),
            ..Request::default()
        };
        self.swrk
            .send(&request)
            .map_err(|e| CriuFailure::from_rpc(FAILED, e, &self.log))?;
        let root = match self.swrk.run_to("post-restore", wait) {
            Ok(Some(root)) => root,
            Ok(None) => return Err(no_pid(&self.log)),
            Err(error) => {
                self.swrk.kill_children();
                return Err(CriuFailure::from_run(FAILED, error, &self.log));
            }
        };
        Ok(Parked {
            swrk: self.swrk,
            log: self.log,
            root,
        })
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
