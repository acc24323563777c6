//! The last step before a program of a host runs: the haulier-lab program itself, started by PID 1
//! with a socket as its stdin. It gets the request over that socket, prepares what a child has to
//! prepare for itself, and executes the program, which inherits stdio and nothing else.
//!
//! Doing this in a program of its own rather than between fork and exec keeps it in safe Rust, and
//! lets PID 1 look at the PID before anything runs.

use crate::wire::{Received, Reply, SpawnRequest, Stream, receive, send};
use crate::{Error, Result, cgroup};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long PID 1 has to hand over the request.
const REQUEST: Duration = Duration::from_secs(10);

/// Runs it; returns only if the program could not be executed.
pub(crate) fn run() -> Result<()> {
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::system("duplicate the socket to PID 1"))?;
    let (request, descriptors) = match receive::<SpawnRequest>(&socket, REQUEST)? {
        Received::Message(request, descriptors) => (request, descriptors),
        // PID 1 did not like our PID.
        Received::Closed | Received::Nothing => return Ok(()),
    };
    let error = match prepare(&request, descriptors) {
        Ok(mut command) => {
            // The socket closes when the program runs, which is how PID 1 knows.
            let failed = command.exec();
            let program = command.get_program();
            Error::File {
                operation: "execute",
                path: program.into(),
                source: failed,
            }
        }
        Err(error) => error,
    };
    send(
        &socket,
        &Reply::Failed {
            message: error.chain(),
        },
        &[],
    )
}

fn prepare(request: &SpawnRequest, descriptors: Vec<OwnedFd>) -> Result<Command> {
    if let Some(name) = &request.cgroup {
        let path = Path::new("/sys/fs/cgroup").join(name.trim_start_matches('/'));
        cgroup::create(&path)?;
        cgroup::enter(&path)?;
    }
    if request.setsid {
        rustix::process::setsid().map_err(Error::system("start a session"))?;
    }
    let [program, arguments @ ..] = request.argv.as_slice() else {
        return Err(Error::System {
            operation: "run an empty command",
            source: std::io::ErrorKind::InvalidInput.into(),
        });
    };
    // Not Command::current_dir, whose failure looks like a missing program.
    std::env::set_current_dir(&request.cwd).map_err(Error::file("enter", &request.cwd))?;
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let [stdin, stdout, stderr] = &request.stdio;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(request.env.iter().map(|(name, value)| (name, value)))
        .stdin(open(stdin, false, &mut descriptors)?)
        .stdout(open(stdout, true, &mut descriptors)?)
        .stderr(open(stderr, true, &mut descriptors)?);
    // Last, so that nothing opened above escapes it.
    haulier_sys::namespaces::close_on_exec_from(3)
        .map_err(Error::system("mark descriptors close-on-exec"))?;
    Ok(command)
}

fn open(stream: &Stream, write: bool, descriptors: &mut [Option<OwnedFd>]) -> Result<Stdio> {
    match stream {
        // Opened here, inside the host's mount namespace: CRIU cannot find the mount of a
        // descriptor opened elsewhere. Stdio::null() would do the same but hides that it matters.
        Stream::Null => {
            let path = "/dev/null";
            let null = OpenOptions::new().read(!write).write(write).open(path);
            Ok(null.map_err(Error::file("open", path))?.into())
        }
        Stream::File(path) if write => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            Ok(file.map_err(Error::file("open", path))?.into())
        }
        Stream::File(path) => Ok(File::open(path).map_err(Error::file("open", path))?.into()),
        Stream::Descriptor(index) => {
            let taken = descriptors.get_mut(*index).and_then(Option::take);
            taken.map(Stdio::from).ok_or(Error::System {
                operation: "find a descriptor that should have come with the request",
                source: std::io::ErrorKind::NotFound.into(),
            })
        }
    }
}
