//! CRIU's side of lazy restore: the socket over which it hands out userfaultfds.
//!
//! `criu restore --lazy-pages` connects to `lazy-pages.socket` in its work directory before it
//! forks the tasks, and sends over that one stream, for each task in any order, its pid (a native
//! `int`) and one byte with the userfaultfd as `SCM_RIGHTS`; a zombie's pid comes negated and alone.
//! Once all tasks stand in the restorer and `post-restore` was answered it sends a last word
//! ([`Message::Finished`]). The stream's end without that word means that the restore failed.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

/// Name of the socket inside CRIU's work directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// CRIU's last word. Above any pid, so that one reader of 4 bytes tells them apart.
const FINISHED: i32 = 0x5253_5446;

/// What went wrong on the lazy-pages socket.
#[derive(Debug, thiserror::Error)]
pub enum LazySocketError {
    /// The socket could not be set up.
    #[error("cannot {operation} {path}")]
    Listen {
        /// What was tried.
        operation: &'static str,
        /// The socket, or its directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("cannot {operation} CRIU's lazy-pages connection")]
    Connection {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// CRIU closed the connection early: its log says why.
    #[error("CRIU closed the lazy-pages connection before the restore was complete; see its log")]
    RestoreFailed,
    /// What came is no message of this protocol.
    #[error("CRIU's lazy-pages connection carries {what}; is this CRIU newer than 4.2?")]
    Protocol {
        /// What came.
        what: String,
    },
}

/// One message of CRIU's restore.
#[derive(Debug)]
pub enum Message {
    /// A task, and the descriptor that serves its address space.
    Task {
        /// Its pid inside its own PID namespace, as in the image names.
        vpid: u32,
        /// Its pid as this process sees it; `None` if it is in no PID namespace that can be seen
        /// from here. It is the task itself that sends its descriptor.
        pid: Option<i32>,
        /// `UFFDIO_API` is done on it; ranges are registered later, by the restorer.
        uffd: OwnedFd,
    },
    /// A task without memory.
    Zombie {
        /// Its pid inside its own PID namespace.
        vpid: u32,
    },
    /// Every task is restored; no further message follows.
    Finished,
}

/// Listens for CRIU. The socket file goes with it.
#[derive(Debug)]
pub struct LazyListener {
    socket: OwnedFd,
    dir: OwnedFd,
}

impl AsFd for LazyListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl LazyListener {
    /// Listens in CRIU's work directory (which is the images directory unless told otherwise). Has
    /// to happen before the restore is asked for. A socket left there by someone else is replaced.
    pub fn bind(work_dir: &Path) -> Result<Self, LazySocketError> {
        let path = work_dir.join(SOCKET_NAME);
        let listen = |operation, path: &Path| {
            let path = path.to_path_buf();
            move |errno: Errno| LazySocketError::Listen {
                operation,
                path,
                source: errno.into(),
            }
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(work_dir, flags, Mode::empty())
            .map_err(listen("open the directory", work_dir))?;
        match rustix::fs::unlinkat(&dir, SOCKET_NAME, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(listen("replace", &path)(errno)),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(listen("make a socket for", &path))?;
        // CRIU reaches it by a relative name; ours must fit `sun_path` however deep the directory.
        let short = format!("/proc/self/fd/{}/{SOCKET_NAME}", dir.as_raw_fd());
        let address = SocketAddrUnix::new(short.as_str()).map_err(listen("name", &path))?;
        // Connections have it from their listener, so that nothing comes without its sender.
        rustix::net::sockopt::set_socket_passcred(&socket, true)
            .map_err(listen("ask for the senders of", &path))?;
        rustix::net::bind(&socket, &address).map_err(listen("bind", &path))?;
        let this = Self { socket, dir };
        rustix::net::listen(&this.socket, 1).map_err(listen("listen on", &path))?;
        Ok(this)
    }

    /// CRIU's connection, or `None` if it has not connected yet. Never blocks.
    pub fn accept(&self) -> Result<Option<LazyConnection>, LazySocketError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.socket, flags) {
            Ok(socket) => Ok(Some(LazyConnection::new(socket))),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(LazySocketError::Connection {
                operation: "accept",
                source: errno.into(),
            }),
        }
    }
}

impl Drop for LazyListener {
    fn drop(&mut self) {
        // Gone already if the directory was removed first.
        let _ = rustix::fs::unlinkat(&self.dir, SOCKET_NAME, AtFlags::empty());
    }
}

/// CRIU's connection.
#[derive(Debug)]
pub struct LazyConnection {
    socket: OwnedFd,
    word: [u8; 4],
    have: usize,
    /// The pid whose descriptor comes next.
    announced: Option<u32>,
    finished: bool,
}

impl AsFd for LazyConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl LazyConnection {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            word: [0; 4],
            have: 0,
            announced: None,
            finished: false,
        }
    }

    /// Whether CRIU has said its last word.
    pub fn finished(&self) -> bool {
        self.finished
    }

    /// The next message, or `None` if it has not arrived whole. Never blocks. Not to be called after
    /// [`Message::Finished`], behind which only the end of the stream comes.
    pub fn receive(&mut self) -> Result<Option<Message>, LazySocketError> {
        loop {
            if let Some(vpid) = self.announced {
                let Some((uffd, pid)) = self.receive_descriptor(vpid)? else {
                    return Ok(None);
                };
                self.announced = None;
                return Ok(Some(Message::Task { vpid, pid, uffd }));
            }
            if !self.receive_word()? {
                return Ok(None);
            }
            match i32::from_ne_bytes(self.word) {
                FINISHED => {
                    self.finished = true;
                    return Ok(Some(Message::Finished));
                }
                0 => {
                    return Err(LazySocketError::Protocol {
                        what: "pid 0".to_owned(),
                    });
                }
                pid if pid < 0 => {
                    return Ok(Some(Message::Zombie {
                        vpid: pid.unsigned_abs(),
                    }));
                }
                pid => self.announced = Some(pid.unsigned_abs()),
            }
        }
    }

    /// Fills `word`; false if bytes are still missing. Never reads beyond, because the byte behind
    /// it may carry a descriptor.
    fn receive_word(&mut self) -> Result<bool, LazySocketError> {
        while self.have < self.word.len() {
            let rest = &mut self.word[self.have..];
            match rustix::net::recv(&self.socket, rest, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(LazySocketError::RestoreFailed),
                Ok((_, len)) => self.have += len,
                Err(errno) => return not_yet(errno).map(|()| false),
            }
        }
        self.have = 0;
        Ok(true)
    }

    fn receive_descriptor(
        &self,
        vpid: u32,
    ) -> Result<Option<(OwnedFd, Option<i32>)>, LazySocketError> {
        let mut byte = [0_u8; 1];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Ok(message) if message.bytes == 0 => return Err(LazySocketError::RestoreFailed),
            Ok(_) => {}
            Err(errno) => return not_yet(errno).map(|()| None),
        }
        let (mut uffd, mut pid) = (None, None);
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(mut rights) => uffd = rights.next(),
                RecvAncillaryMessage::ScmCredentials(sender) => {
                    pid = Some(sender.pid.as_raw_nonzero().get());
                }
                _ => {}
            }
        }
        match uffd {
            Some(uffd) => Ok(Some((uffd, pid))),
            None => Err(LazySocketError::Protocol {
                what: format!("task {vpid} without a descriptor"),
            }),
        }
    }
}

/// Tells "nothing there yet" from a broken connection.
fn not_yet(errno: Errno) -> Result<(), LazySocketError> {
    match errno {
        Errno::AGAIN | Errno::INTR => Ok(()),
        Errno::CONNRESET => Err(LazySocketError::RestoreFailed),
        _ => Err(LazySocketError::Connection {
            operation: "read",
            source: errno.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;

    /// Plays CRIU: one byte with a descriptor.
    fn send_descriptor(stream: &UnixStream, fd: BorrowedFd<'_>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = rustix::net::sendmsg(
            stream,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::empty(),
        );
        assert_eq!(sent.unwrap(), 1);
    }

    fn connected() -> (tempfile::TempDir, UnixStream, LazyConnection) {
        let dir = tempfile::tempdir().unwrap();
        let listener = LazyListener::bind(dir.path()).unwrap();
        assert!(
            listener.accept().unwrap().is_none(),
            "nobody has connected yet"
        );
        let stream = UnixStream::connect(dir.path().join(SOCKET_NAME)).unwrap();
        let connection = listener.accept().unwrap().expect("a connection");
        (dir, stream, connection)
    }

    #[test]
    fn tasks_zombies_and_the_end() {
        let (dir, mut criu, mut connection) = connected();
        assert!(
            !dir.path().join(SOCKET_NAME).exists(),
            "the socket file outlived its listener"
        );
        let (file, other) = UnixStream::pair().unwrap();

        let pid = 7_i32.to_ne_bytes();
        criu.write_all(&pid[..3]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        criu.write_all(&pid[3..]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        send_descriptor(&criu, file.as_fd());
        // Everything that follows is there before it is read: no byte may be read too far.
        criu.write_all(&(-9_i32).to_ne_bytes()).unwrap();
        criu.write_all(&8_i32.to_ne_bytes()).unwrap();
        send_descriptor(&criu, file.as_fd());
        criu.write_all(&FINISHED.to_ne_bytes()).unwrap();
        drop((criu, file));

        let Some(Message::Task { vpid: 7, uffd, pid }) = connection.receive().unwrap() else {
            panic!("no task 7")
        };
        assert_eq!(pid, Some(std::process::id() as i32), "its sender");
        rustix::io::write(&uffd, b"x").unwrap();
        assert!(matches!(
            connection.receive().unwrap(),
            Some(Message::Zombie { vpid: 9 })
        ));
        assert!(matches!(
            connection.receive().unwrap(),
            Some(Message::Task { vpid: 8, .. })
        ));
        assert!(!connection.finished());
        assert!(matches!(
            connection.receive().unwrap(),
            Some(Message::Finished)
        ));
        assert!(connection.finished());
        let mut byte = [0];
        rustix::io::read(&other, &mut byte).unwrap();
        assert_eq!(&byte, b"x", "the descriptor is the one that was sent");
    }

    #[test]
    fn an_early_end_is_a_failed_restore() {
        let (_dir, criu, mut connection) = connected();
        drop(criu);
        assert!(matches!(
            connection.receive(),
            Err(LazySocketError::RestoreFailed)
        ));

        let (_dir, mut criu, mut connection) = connected();
        criu.write_all(&5_i32.to_ne_bytes()).unwrap();
        drop(criu);
        assert!(matches!(
            connection.receive(),
            Err(LazySocketError::RestoreFailed)
        ));
    }

    #[test]
    fn a_byte_without_a_descriptor_is_refused() {
        let (_dir, mut criu, mut connection) = connected();
        criu.write_all(&5_i32.to_ne_bytes()).unwrap();
        criu.write_all(&[0]).unwrap();
        let error = connection.receive().unwrap_err();
        assert!(error.to_string().contains("task 5"), "{error}");
    }

    #[test]
    fn a_deep_directory_and_a_left_over_socket_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join(SOCKET_NAME), "").unwrap();
        let listener = LazyListener::bind(&deep).unwrap();
        assert!(deep.join(SOCKET_NAME).exists());
        drop(listener);
        assert!(!deep.join(SOCKET_NAME).exists());
    }
}
