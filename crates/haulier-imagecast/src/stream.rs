//! CRIU's own protocol for images over a socket, the side that CRIU connects to.
//!
//! CRIU sends a request for every image it opens: u32 length, then a protobuf with the file name.
//! At a dump one byte follows that carries the reading end of a pipe, and nothing is answered. At a
//! restore the answer says whether there is such an image, and if so that byte follows with the
//! writing end. The end of the connection means that no more images will be opened.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use haulier_criu::lazy_socket::SOCKET_NAME;
use haulier_images::name::{BadName, ImageName};
use prost::Message;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use thiserror::Error;

/// The socket that a dump connects to.
pub(crate) const CAPTURE_SOCKET: &str = "streamer-capture.sock";
/// The socket that a restore connects to.
pub(crate) const SERVE_SOCKET: &str = "streamer-serve.sock";

/// Longest request: a name and its tag.
const LONGEST: usize = 4096;

/// What CRIU did wrong.
#[derive(Debug, Error)]
pub(crate) enum StreamError {
    /// The connection broke.
    #[error("the connection to CRIU broke")]
    Broken(#[source] io::Error),
    /// It ended where more was due.
    #[error("CRIU closed the connection in the middle of a request")]
    Cut,
    /// It is no request.
    #[error("CRIU sent something that is no request for an image: {0}")]
    Request(String),
    /// It asks for what cannot be an image.
    #[error("CRIU asked for a file that cannot be an image")]
    Name(#[from] BadName),
    /// The pipe is missing.
    #[error("CRIU sent no pipe for {0}")]
    Pipe(ImageName),
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, required, tag = "1")]
    filename: String,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Reply {
    #[prost(bool, required, tag = "1")]
    exists: bool,
}

/// A connection of CRIU's.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    buffer: Vec<u8>,
    /// The image whose pipe comes next.
    announced: Option<ImageName>,
}

/// What has come.
#[derive(Debug)]
pub(crate) enum Incoming<T> {
    /// Something.
    Some(T),
    /// Nothing yet.
    NotYet,
    /// Nothing will.
    End,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    /// A connection over a socket that does not block.
    pub(crate) fn new(socket: OwnedFd) -> Connection {
        Connection {
            socket,
            buffer: Vec::new(),
            announced: None,
        }
    }

    /// The next image that a dump opens, and the pipe to read it from. Never blocks.
    pub(crate) fn opened(&mut self) -> Result<Incoming<(ImageName, OwnedFd)>, StreamError> {
        if self.announced.is_none() {
            match self.requested()? {
                Incoming::Some(name) => self.announced = Some(name),
                Incoming::NotYet => return Ok(Incoming::NotYet),
                Incoming::End => return Ok(Incoming::End),
            }
        }
        let Some(pipe) = self.pipe()? else {
            return Ok(Incoming::NotYet);
        };
        Ok(self
            .announced
            .take()
            .map_or(Incoming::NotYet, |name| Incoming::Some((name, pipe))))
    }

    /// The next image that a restore asks for. Never blocks.
    pub(crate) fn requested(&mut self) -> Result<Incoming<ImageName>, StreamError> {
        loop {
            let wanted = match self.buffer.first_chunk::<4>() {
                None => 4,
                Some(length) => 4 + u32::from_le_bytes(*length) as usize,
            };
            if wanted > LONGEST {
                return Err(StreamError::Request(format!("{wanted} bytes")));
            }
            if wanted > 4 && self.buffer.len() == wanted {
                let request = Request::decode(&self.buffer[4..])
                    .map_err(|error| StreamError::Request(error.to_string()))?;
                self.buffer.clear();
                return Ok(Incoming::Some(ImageName::new(&request.filename)?));
            }
            if wanted == 4 && self.buffer.len() == 4 {
                return Err(StreamError::Request("an empty message".to_owned()));
            }
            // Never beyond the request: the byte behind it may carry a descriptor.
            let have = self.buffer.len();
            self.buffer.resize(wanted, 0);
            let got = rustix::net::recv(&self.socket, &mut self.buffer[have..], RecvFlags::empty());
            let count = got.as_ref().map_or(0, |(_, count)| *count);
            self.buffer.truncate(have + count);
            match got {
                Ok((_, 0)) if have == 0 => return Ok(Incoming::End),
                Ok((_, 0)) => return Err(StreamError::Cut),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Incoming::NotYet),
                // A CRIU that died with an answer unread.
                Err(Errno::CONNRESET) if have == 0 => return Ok(Incoming::End),
                Err(errno) => return Err(StreamError::Broken(errno.into())),
            }
        }
    }

    /// Tells a restore whether there is such an image. If so, [`Connection::pipe`] follows.
    pub(crate) fn answer(&self, exists: bool) -> Result<(), StreamError> {
        let body = Reply { exists }.encode_to_vec();
        let mut message = (body.len() as u32).to_le_bytes().to_vec();
        message.extend_from_slice(&body);
        // One answer is due at a time, so it always fits the socket's buffer.
        let sent = rustix::net::send(&self.socket, &message, SendFlags::NOSIGNAL)
            .map_err(|errno| StreamError::Broken(errno.into()))?;
        if sent == message.len() {
            Ok(())
        } else {
            Err(StreamError::Cut)
        }
    }

    /// The end of a pipe that CRIU sends behind a request or an answer; `None` if it has not come
    /// yet. Never blocks.
    pub(crate) fn pipe(&self) -> Result<Option<OwnedFd>, StreamError> {
        let mut byte = [0_u8; 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Ok(message) if message.bytes == 0 => return Err(StreamError::Cut),
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(StreamError::Broken(errno.into())),
        }
        let pipe = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        match pipe {
            Some(pipe) => {
                rustix::io::ioctl_fionbio(&pipe, true)
                    .map_err(|errno| StreamError::Broken(errno.into()))?;
                Ok(Some(pipe))
            }
            None => Err(self.announced.clone().map_or_else(
                || StreamError::Request("no pipe".to_owned()),
                StreamError::Pipe,
            )),
        }
    }

    /// CRIU's pid.
    pub(crate) fn peer(&self) -> Option<i32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.socket).ok()?;
        Some(peer.pid.as_raw_nonzero().get())
    }

    /// The directory that CRIU works in by now, as this process may open it; `None` if it cannot be told.
    pub(crate) fn work_directory(&self) -> Option<PathBuf> {
        let path = format!("/proc/{}/cwd", self.peer()?);
        // Of another PID namespace there is nothing to be seen.
        std::fs::metadata(&path).ok()?;
        Some(path.into())
    }

    /// Whether CRIU was told to leave memory where it is, as far as its command line shows: that of one
    /// that is driven by RPC, or in another PID namespace, shows nothing.
    pub(crate) fn is_told_lazy(&self) -> bool {
        let command = self.peer().and_then(|pid| {
            // One that has gone needs nothing any more.
            std::fs::read(format!("/proc/{pid}/cmdline")).ok()
        });
        command
            .unwrap_or_default()
            .split(|byte| *byte == 0)
            .any(|word| word == b"--lazy-pages")
    }

    /// Whether there is no lazy-pages daemon where CRIU, told of one, looks for it.
    pub(crate) fn lacks_daemon(&self) -> bool {
        let socket = self
            .work_directory()
            .map(|directory| directory.join(SOCKET_NAME));
        self.is_told_lazy() && socket.is_some_and(|socket| !socket.exists())
    }

    /// Whether the peer has gone.
    pub(crate) fn is_closed(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().intersects(gone)
    }
}

/// CRIU's side of the protocol, for tests.
#[cfg(test)]
pub(crate) mod criu {
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};

    use super::*;

    /// A request without its pipe.
    pub(crate) fn request(socket: &mut UnixStream, name: &str) {
        let body = Request {
            filename: name.to_owned(),
        }
        .encode_to_vec();
        let mut message = (body.len() as u32).to_le_bytes().to_vec();
        message.extend_from_slice(&body);
        socket.write_all(&message).unwrap();
    }

    /// Sends a pipe's end.
    pub(crate) fn send_pipe(socket: &UnixStream, pipe: BorrowedFd<'_>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [pipe];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(
            socket,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    /// Opens an image as a dump does.
    pub(crate) fn open(socket: &mut UnixStream, name: &str) -> File {
        let (read, write) = rustix::pipe::pipe().unwrap();
        request(socket, name);
        send_pipe(socket, read.as_fd());
        File::from(write)
    }

    /// Opens an image as a restore does; `None` if there is none.
    pub(crate) fn fetch(socket: &mut UnixStream, name: &str) -> io::Result<Option<File>> {
        request(socket, name);
        let mut head = [0; 4];
        socket.read_exact(&mut head)?;
        let mut body = vec![0; u32::from_le_bytes(head) as usize];
        socket.read_exact(&mut body)?;
        if !Reply::decode(&body[..]).unwrap().exists {
            return Ok(None);
        }
        let (read, write) = rustix::pipe::pipe().unwrap();
        send_pipe(socket, write.as_fd());
        Ok(Some(File::from(read)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (criu, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (criu, Connection::new(ours.into()))
    }

    #[test]
    fn a_dump_opens_images_whose_bytes_come_by_pipes() {
        let (mut criu, mut ours) = pair();
        assert!(matches!(ours.opened().unwrap(), Incoming::NotYet));
        criu::request(&mut criu, "core-7.img");
        assert!(matches!(ours.opened().unwrap(), Incoming::NotYet));
        let (read, write) = rustix::pipe::pipe().unwrap();
        criu::send_pipe(&criu, read.as_fd());
        // Everything that follows is there before it is read: no byte may be read too far.
        let mut second = criu::open(&mut criu, "mm-7.img");
        let Incoming::Some((name, pipe)) = ours.opened().unwrap() else {
            panic!("no image")
        };
        assert_eq!(name.as_str(), "core-7.img");
        rustix::io::write(&write, b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(&pipe, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        second.write_all(b"y").unwrap();
        assert!(
            matches!(ours.opened().unwrap(), Incoming::Some((name, _)) if name.as_str() == "mm-7.img")
        );
        assert!(!ours.is_closed());
        drop(criu);
        assert!(ours.is_closed());
        assert!(matches!(ours.opened().unwrap(), Incoming::End));
    }

    #[test]
    fn a_restore_is_told_what_there_is() {
        let (mut criu, mut ours) = pair();
        let restore = std::thread::spawn(move || {
            let mut pipe = criu::fetch(&mut criu, "inventory.img").unwrap().unwrap();
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).unwrap();
            let absent = criu::fetch(&mut criu, "netns-1.img").unwrap().is_none();
            (bytes, absent)
        });
        let mut next = || loop {
            if let Incoming::Some(name) = ours.requested().unwrap() {
                let exists = name.as_str() == "inventory.img";
                ours.answer(exists).unwrap();
                if !exists {
                    return;
                }
                loop {
                    if let Some(pipe) = ours.pipe().unwrap() {
                        rustix::io::write(&pipe, b"inventory").unwrap();
                        return;
                    }
                }
            }
        };
        next();
        next();
        assert_eq!(restore.join().unwrap(), (b"inventory".to_vec(), true));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let refused = |bytes: &[u8]| {
            let (mut criu, mut ours) = pair();
            criu.write_all(bytes).unwrap();
            drop(criu);
            loop {
                match ours.opened() {
                    Ok(Incoming::NotYet) => {}
                    Ok(_) => return false,
                    Err(_) => return true,
                }
            }
        };
        assert!(refused(&u32::MAX.to_le_bytes()), "an absurd length");
        assert!(refused(&0_u32.to_le_bytes()), "an empty message");
        assert!(refused(b"\x02\x00\x00\x00\xff"), "a cut message");
        assert!(refused(b"\x01\x00\x00\x00\xff"), "no protobuf");
        let (mut criu, mut ours) = pair();
        criu::request(&mut criu, "../etc/passwd");
        assert!(matches!(ours.opened(), Err(StreamError::Name(_))));
        let (mut criu, mut ours) = pair();
        criu::request(&mut criu, "core-7.img");
        criu.write_all(&[0]).unwrap();
        assert!(matches!(ours.opened(), Err(StreamError::Pipe(_))));
    }
}
