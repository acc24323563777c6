//! Frames over a connected stream socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use haulier_proto::frame::{FrameError, HEADER_BYTES, Header, Kind};
use haulier_proto::message::{self, Control, control};
use prost::Message;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::error::TransportError;
use crate::wait::{Wait, WaitError};

/// Frames of [`Channel::send_all`] that go in one call: two buffers each, of the 1024 that the kernel takes.
const FRAMES_AT_ONCE: usize = 128;

/// One connection, by frames. Reading and writing may go on from two threads through
/// [`Channel::try_clone`].
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    peer: String,
    sent: u64,
    received: u64,
    blocked: Duration,
    piece: Option<usize>,
}

impl Channel {
    /// A channel over a connected stream socket. `peer` names the other side in errors.
    ///
    /// # Errors
    /// If the descriptor cannot be made non-blocking.
    pub fn new(socket: impl Into<OwnedFd>, peer: impl Into<String>) -> io::Result<Channel> {
        let socket = socket.into();
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Channel {
            socket,
            peer: peer.into(),
            sent: 0,
            received: 0,
            blocked: Duration::ZERO,
            piece: None,
        })
    }

    /// A second handle on the same connection, with byte counters of its own.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Channel> {
        let socket = self.socket.try_clone()?;
        Ok(Channel {
            socket,
            peer: self.peer.clone(),
            sent: 0,
            received: 0,
            blocked: Duration::ZERO,
            piece: None,
        })
    }

    /// The other side, as errors name it.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Bytes sent through this handle, headers included.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes received through this handle, headers included.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// How long this handle has waited for the peer, or the way to it, to take what it sends.
    pub fn blocked(&self) -> Duration {
        self.blocked
    }

    /// From now on what is sent through this handle goes in packets of at most so many bytes, before
    /// the network's own division of them: on a slow line the next one of somebody else waits less.
    pub fn send_in_pieces(&mut self, bytes: Option<usize>) {
        self.piece = bytes.filter(|bytes| *bytes > 0);
    }

    /// The socket, for polling beside other descriptors.
    pub fn socket(&self) -> impl AsFd + '_ {
        &self.socket
    }

    /// Ends the connection in both directions; whoever waits on it, on either side, is woken.
    pub fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Sends a frame whose body is the concatenation of `parts`.
    ///
    /// # Errors
    /// See [`TransportError`]; the frame may have been sent in part.
    pub fn send(&mut self, kind: Kind, parts: &[&[u8]], wait: &Wait) -> Result<(), TransportError> {
        let header = Header::for_body(kind, parts)
            .map_err(|e| self.frame_error(e))?
            .encode();
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        self.write_all(&mut slices, wait)
    }

    /// Sends a frame of this kind for each of the bodies, with as few calls as the kernel takes.
    ///
    /// # Errors
    /// See [`TransportError`]; any of the frames may have been sent.
    pub fn send_all(
        &mut self,
        kind: Kind,
        bodies: &[Vec<u8>],
        wait: &Wait,
    ) -> Result<(), TransportError> {
        for bodies in bodies.chunks(FRAMES_AT_ONCE) {
            let headers = bodies.iter().map(|body| Header::for_body(kind, &[body]));
            let headers: Vec<_> = headers
                .map(|header| header.map(|header| header.encode()))
                .collect::<Result<_, _>>()
                .map_err(|e| self.frame_error(e))?;
            let frames = headers.iter().zip(bodies);
            let mut slices: Vec<IoSlice<'_>> = frames
                .flat_map(|(header, body)| [IoSlice::new(header), IoSlice::new(body)])
                .collect();
            self.write_all(&mut slices, wait)?;
        }
        Ok(())
    }

    /// Sends a protobuf message.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn send_message(
        &mut self,
        kind: Kind,
        message: &impl Message,
        wait: &Wait,
    ) -> Result<(), TransportError> {
        self.send(kind, &[&message.encode_to_vec()], wait)
    }

    /// Sends a message of the command connection.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn send_control(&mut self, body: control::Body, wait: &Wait) -> Result<(), TransportError> {
        self.send_message(Kind::Control, &Control::from(body), wait)
    }

    /// Receives a header, checked for magic, kind and length. The body must be taken next, with
    /// [`Channel::receive_body`].
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn receive_header(&mut self, wait: &Wait) -> Result<Header, TransportError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut [&mut bytes], "waiting for its next message", wait)?;
        Header::decode(&bytes).map_err(|e| self.frame_error(e))
    }

    /// Receives the body announced by `header` into `parts`, which together have exactly its
    /// length, and checks it.
    ///
    /// # Errors
    /// See [`TransportError`].
    ///
    /// # Panics
    /// If the parts do not add up to the header's length.
    pub fn receive_body(
        &mut self,
        header: &Header,
        parts: &mut [&mut [u8]],
        wait: &Wait,
    ) -> Result<(), TransportError> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        assert_eq!(
            total, header.length as usize,
            "parts must have the body's length"
        );
        self.receive_part(parts, wait)?;
        let parts: Vec<&[u8]> = parts.iter().map(|part| &**part).collect();
        header.verify(&parts).map_err(|e| self.frame_error(e))
    }

    /// Receives some of a body without checking it: for a body whose first bytes tell where the
    /// rest belongs. Whoever uses it calls [`Header::verify`] over all parts in the end.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn receive_part(
        &mut self,
        parts: &mut [&mut [u8]],
        wait: &Wait,
    ) -> Result<(), TransportError> {
        self.read_exact(parts, "in the middle of a message", wait)
    }

    /// Receives a whole frame.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn receive(&mut self, wait: &Wait) -> Result<(Header, Vec<u8>), TransportError> {
        let header = self.receive_header(wait)?;
        let mut body = vec![0; header.length as usize];
        self.receive_body(&header, &mut [&mut body], wait)?;
        Ok((header, body))
    }

    /// Receives a protobuf message in a frame of the given kind. A frame of another kind is refused
    /// by its header: nothing is allocated for it, nor is its body received.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn receive_message<M: Message + Default>(
        &mut self,
        expected: Kind,
        wait: &Wait,
    ) -> Result<M, TransportError> {
        let header = self.receive_header(wait)?;
        // Before there is room for its body: what a stranger may send first is short.
        if header.kind != expected {
            return Err(self.frame_error(FrameError::UnexpectedKind {
                expected,
                got: header.kind,
            }));
        }
        let mut body = vec![0; header.length as usize];
        self.receive_body(&header, &mut [&mut body], wait)?;
        message::decode(expected, &body).map_err(|e| self.frame_error(e))
    }

    /// Receives a message of the command connection. `expected` says in errors what was due.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn receive_control(
        &mut self,
        expected: &'static str,
        wait: &Wait,
    ) -> Result<control::Body, TransportError> {
        let message: Control = self.receive_message(Kind::Control, wait)?;
        message.body.ok_or_else(|| TransportError::Unexpected {
            peer: self.peer.clone(),
            got: "a message unknown to this version".to_owned(),
            expected,
        })
    }

    /// The error for a frame of this peer that is not acceptable.
    pub fn frame_error(&self, source: FrameError) -> TransportError {
        TransportError::Frame {
            peer: self.peer.clone(),
            source,
        }
    }

    fn write_all(
        &mut self,
        mut slices: &mut [IoSlice<'_>],
        wait: &Wait,
    ) -> Result<(), TransportError> {
        const DOING: &str = "sending to it";
        while !slices.is_empty() {
            match self.write_some(slices) {
                Ok(count) => {
                    self.sent += count as u64;
                    IoSlice::advance_slices(&mut slices, count);
                }
                Err(Errno::AGAIN) => {
                    let start = Instant::now();
                    let ready = wait.writable(&self.socket);
                    self.blocked += start.elapsed();
                    ready.map_err(|e| self.wait_error(e, DOING))?;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.io_error(errno.into(), DOING)),
            }
            if wait.is_cancelled() {
                return Err(TransportError::Cancelled { doing: DOING });
            }
        }
        Ok(())
    }

    fn write_some(&self, slices: &[IoSlice<'_>]) -> rustix::io::Result<usize> {
        // NOSIGNAL: a broken connection is an error here, not the death of the agent.
        let mut flags = SendFlags::NOSIGNAL;
        let mut control = rustix::net::SendAncillaryBuffer::default();
        let Some(piece) = self.piece else {
            return rustix::net::sendmsg(&self.socket, slices, &mut control, flags);
        };
        // The end of a record is where the kernel does not join what is sent later.
        flags |= SendFlags::EOR;
        let slices = at_most(slices, piece);
        rustix::net::sendmsg(&self.socket, &slices, &mut control, flags)
    }

    fn read_exact(
        &mut self,
        parts: &mut [&mut [u8]],
        doing: &'static str,
        wait: &Wait,
    ) -> Result<(), TransportError> {
        let mut slices: Vec<IoSliceMut<'_>> = parts
            .iter_mut()
            .filter(|p| !p.is_empty())
            .map(|p| IoSliceMut::new(p))
            .collect();
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            let mut control = rustix::net::RecvAncillaryBuffer::default();
            match rustix::net::recvmsg(&self.socket, slices, &mut control, RecvFlags::empty()) {
                Ok(message) if message.bytes == 0 => {
                    return Err(TransportError::Closed {
                        peer: self.peer.clone(),
                        doing,
                    });
                }
                Ok(message) => {
                    self.received += message.bytes as u64;
                    IoSliceMut::advance_slices(&mut slices, message.bytes);
                }
                Err(Errno::AGAIN) => {
                    wait.readable(&self.socket)
                        .map_err(|e| self.wait_error(e, doing))?;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.io_error(errno.into(), doing)),
            }
            if wait.is_cancelled() {
                return Err(TransportError::Cancelled { doing });
            }
        }
        Ok(())
    }

    fn io_error(&self, source: io::Error, doing: &'static str) -> TransportError {
        TransportError::Broken {
            peer: self.peer.clone(),
            doing,
            source,
        }
    }

    fn wait_error(&self, error: WaitError, doing: &'static str) -> TransportError {
        match error {
            WaitError::Deadline => TransportError::Deadline {
                peer: self.peer.clone(),
                doing,
            },
            WaitError::Cancelled => TransportError::Cancelled { doing },
            WaitError::Io(source) => self.io_error(source, doing),
        }
    }
}

/// The first bytes of slices that are not empty.
fn at_most<'a>(slices: &'a [IoSlice<'_>], mut bytes: usize) -> Vec<IoSlice<'a>> {
    let mut first = Vec::new();
    for slice in slices {
        let part = slice.get(..bytes).unwrap_or(slice);
        first.push(IoSlice::new(part));
        bytes -= part.len();
        if bytes == 0 {
            break;
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use haulier_proto::message::{Begin, Commit, Hello};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a, "b").unwrap(), Channel::new(b, "a").unwrap())
    }

    fn soon() -> Wait {
        Wait::uncancellable(Duration::from_secs(10))
    }

    #[test]
    fn frames_larger_than_the_socket_buffer_arrive_whole() {
        let (mut a, mut b) = pair();
        let body: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
        let expected = body.clone();
        let sender = std::thread::spawn(move || {
            let (first, second) = body.split_at(12345);
            a.send(Kind::Pages, &[first, second], &soon()).unwrap();
            a.sent()
        });
        let (header, got) = b.receive(&soon()).unwrap();
        assert_eq!(header.kind, Kind::Pages);
        assert!(got == expected, "contents differ");
        assert_eq!(sender.join().unwrap(), b.received());
    }

    #[test]
    fn frames_that_are_sent_together_arrive_one_by_one() {
        let (mut a, mut b) = pair();
        let bodies: Vec<Vec<u8>> = (0..3 * FRAMES_AT_ONCE + 1)
            .map(|n| vec![n as u8; n % 7])
            .collect();
        a.send_all(Kind::Packet, &bodies, &soon()).unwrap();
        a.send_all(Kind::Packet, &[], &soon()).unwrap();
        a.send(Kind::Pages, &[b"end"], &soon()).unwrap();
        for body in &bodies {
            let (header, got) = b.receive(&soon()).unwrap();
            assert_eq!((header.kind, &got), (Kind::Packet, body));
        }
        assert_eq!(b.receive(&soon()).unwrap().1, b"end");
        assert_eq!(a.sent(), b.received());
    }

    #[test]
    fn what_is_sent_in_pieces_arrives_whole() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut a, mut b) = (
            Channel::new(near, "b").unwrap(),
            Channel::new(listener.accept().unwrap().0, "a").unwrap(),
        );
        let body: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let (first, rest) = body.split_at(7);
        for piece in [Some(1), Some(1448), Some(1 << 20), Some(0), None] {
            a.send_in_pieces(piece);
            // One byte at a time takes a while.
            let rest = &rest[..if piece == Some(1) { 500 } else { rest.len() }];
            std::thread::scope(|scope| {
                scope.spawn(|| a.send(Kind::Pages, &[first, &[], rest], &soon()).unwrap());
                let (_, got) = b.receive(&soon()).unwrap();
                assert!(got == [first, rest].concat(), "contents differ: {piece:?}");
            });
        }
    }

    #[test]
    fn pieces_are_cut_from_the_front() {
        let slices = [&b"abc"[..], b"", b"defg"].map(IoSlice::new);
        let cut = |bytes| -> Vec<u8> {
            at_most(&slices, bytes)
                .iter()
                .flat_map(|s| s.to_vec())
                .collect()
        };
        assert_eq!(cut(2), b"ab");
        assert_eq!(cut(3), b"abc");
        assert_eq!(cut(5), b"abcde");
        assert_eq!(cut(99), b"abcdefg");
    }

    #[test]
    fn a_silent_peer_meets_the_deadline_and_a_gone_one_is_noticed() {
        let (a, mut b) = pair();
        let error = b
            .receive(&Wait::uncancellable(Duration::from_millis(1)))
            .unwrap_err();
        assert!(matches!(error, TransportError::Deadline { .. }));
        drop(a);
        assert!(matches!(
            b.receive(&soon()),
            Err(TransportError::Closed { .. })
        ));
    }

    #[test]
    fn a_stranger_and_a_wrong_kind_are_refused() {
        let (a, b) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &a, b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        let mut b = Channel::new(b, "a").unwrap();
        assert!(matches!(
            b.receive(&soon()),
            Err(TransportError::Frame { .. })
        ));

        let (mut a, mut b) = pair();
        a.send_message(Kind::Hello, &Begin::default(), &soon())
            .unwrap();
        assert!(matches!(
            b.receive_control("commit", &soon()),
            Err(TransportError::Frame {
                source: FrameError::UnexpectedKind { .. },
                ..
            })
        ));
    }

    #[test]
    fn a_frame_that_is_not_due_is_refused_by_its_header() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = Channel::new(b, "a").unwrap();
        // The longest control message, of which nothing follows: who waited for it would wait long.
        let header = Header {
            kind: Kind::Control,
            length: Kind::Control.limit() as u32,
            checksum: 0,
        };
        std::io::Write::write_all(&mut &a, &header.encode()).unwrap();
        let error = b.receive_message::<Hello>(Kind::Hello, &soon());
        assert!(matches!(
            error,
            Err(TransportError::Frame {
                source: FrameError::UnexpectedKind { .. },
                ..
            })
        ));
    }

    #[test]
    fn the_first_frame_of_a_connection_is_a_few_kibibytes_at_most() {
        assert!(Kind::Hello.limit() <= 4 << 10);
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = Channel::new(b, "a").unwrap();
        let header = Header {
            kind: Kind::Hello,
            length: Kind::Hello.limit() as u32 + 1,
            checksum: 0,
        };
        std::io::Write::write_all(&mut &a, &header.encode()).unwrap();
        let error = b.receive_message::<Hello>(Kind::Hello, &soon());
        assert!(matches!(
            error,
            Err(TransportError::Frame {
                source: FrameError::TooLong { .. },
                ..
            })
        ));
    }

    #[test]
    fn control_messages_arrive() {
        let (mut a, mut b) = pair();
        a.send_control(control::Body::Commit(Commit {}), &soon())
            .unwrap();
        let got = b.receive_control("commit", &soon()).unwrap();
        assert_eq!(got, control::Body::Commit(Commit {}));
    }
}
