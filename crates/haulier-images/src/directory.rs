//! Images from a directory, and into one.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use haulier_proto::frame::{FrameError, Kind};
use haulier_proto::message::{self, ImageEnd, ImageHeader, ImagesDone};
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::wait::Wait;
use thiserror::Error;

use crate::name::{BadName, ImageName};

/// Bytes of image data in a frame.
const CHUNK: usize = 1 << 20;
/// Most images of one dump: CRIU writes some six per task and one per namespace.
const MOST_IMAGES: u32 = 1 << 20;

/// What went over the connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageCount {
    /// Number of images.
    pub images: u32,
    /// Their bytes.
    pub bytes: u64,
}

/// Images could not be sent or received.
#[derive(Debug, Error)]
pub enum ImagesError {
    /// A file of this host failed.
    #[error("cannot {doing} {path}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection failed.
    #[error("the images did not get through")]
    Transport(#[from] TransportError),
    /// The peer sent a name that is none.
    #[error("the peer sent a name that cannot be an image's")]
    Name(#[from] BadName),
    /// The peer sent something out of order or damaged.
    #[error("{peer} sent images wrongly: {what}")]
    Wrong {
        /// The peer.
        peer: String,
        /// What is wrong.
        what: String,
    },
    /// The images are larger than this host allows.
    #[error("the images are larger than the {limit} bytes that this host allows")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
}

/// Sends every image (`*.img`) of a directory, and that there are no more.
///
/// # Errors
/// See [`ImagesError`].
pub fn send(
    directory: &Path,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    let mut count = ImageCount::default();
    let mut buffer = vec![0; CHUNK];
    for path in images_in(directory)? {
        let sent = send_image(&path, count.images, &mut buffer, channel, wait)?;
        count.images += 1;
        count.bytes += sent;
    }
    let done = ImagesDone {
        images: count.images,
        snapshot: 0,
    };
    channel.send_message(Kind::ImagesDone, &done, wait)?;
    Ok(count)
}

/// Receives images into an empty directory until the peer says that there are no more. Names,
/// sizes, order and contents are checked; at most `limit` bytes are written.
///
/// # Errors
/// See [`ImagesError`]; some images may have been written.
pub fn receive(
    directory: &Path,
    limit: u64,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    let mut receiver = Receiver {
        directory,
        limit,
        open: HashMap::new(),
        count: ImageCount::default(),
        peer: channel.peer().to_owned(),
    };
    loop {
        let (header, body) = channel.receive(wait)?;
        let unwell = |source: FrameError| ImagesError::from(channel.frame_error(source));
        match header.kind {
            Kind::ImageHeader => {
                receiver.begin(message::decode(header.kind, &body).map_err(unwell)?)?;
            }
            Kind::ImageData => receiver.data(&body)?,
            Kind::ImageEnd => {
                receiver.end(&message::decode(header.kind, &body).map_err(unwell)?)?;
            }
            Kind::ImagesDone => {
                return receiver.done(message::decode(header.kind, &body).map_err(unwell)?);
            }
            got => {
                return Err(unwell(FrameError::UnexpectedKind {
                    expected: Kind::ImageData,
                    got,
                }));
            }
        }
    }
}

fn images_in(directory: &Path) -> Result<Vec<PathBuf>, ImagesError> {
    let failed = |source| file_error("list", directory, source);
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "img") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn send_image(
    path: &Path,
    number: u32,
    buffer: &mut [u8],
    channel: &mut Channel,
    wait: &Wait,
) -> Result<u64, ImagesError> {
    let failed = |source| file_error("read", path, source);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = ImageName::new(&name)?.as_str().to_owned();
    let header = ImageHeader {
        number,
        name,
        size: Some(size),
        snapshot: 0,
    };
    channel.send_message(Kind::ImageHeader, &header, wait)?;
    let mut hasher = blake3::Hasher::new();
    let mut length = 0;
    loop {
        let count = file.read(buffer).map_err(failed)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        length += count as u64;
        channel.send(
            Kind::ImageData,
            &[&number.to_le_bytes(), &buffer[..count]],
            wait,
        )?;
    }
    let end = ImageEnd {
        number,
        length,
        blake3: hasher.finalize().as_bytes().to_vec(),
    };
    channel.send_message(Kind::ImageEnd, &end, wait)?;
    Ok(length)
}

struct Receiver<'a> {
    directory: &'a Path,
    limit: u64,
    open: HashMap<u32, Incoming>,
    count: ImageCount,
    peer: String,
}

struct Incoming {
    path: PathBuf,
    file: File,
    length: u64,
    hasher: blake3::Hasher,
}

impl Receiver<'_> {
    fn begin(&mut self, header: ImageHeader) -> Result<(), ImagesError> {
        let name = ImageName::new(&header.name)?;
        // Numbers count up from zero, so an image can neither be begun twice nor reopened.
        if header.number != self.count.images || header.number >= MOST_IMAGES {
            return Err(self.wrong(format!("image number {} is out of order", header.number)));
        }
        let path = self.directory.join(name.as_str());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| file_error("create", &path, source))?;
        let incoming = Incoming {
            path,
            file,
            length: 0,
            hasher: blake3::Hasher::new(),
        };
        self.open.insert(header.number, incoming);
        self.count.images += 1;
        Ok(())
    }

    fn data(&mut self, body: &[u8]) -> Result<(), ImagesError> {
        let Some((number, data)) = body.split_first_chunk::<4>() else {
            return Err(self.wrong("image data without a number".to_owned()));
        };
        let number = u32::from_le_bytes(*number);
        self.count.bytes += data.len() as u64;
        if self.count.bytes > self.limit {
            return Err(ImagesError::TooLarge { limit: self.limit });
        }
        let Some(image) = self.open.get_mut(&number) else {
            return Err(self.wrong(format!("data for image {number}, which is not open")));
        };
        image
            .file
            .write_all(data)
            .map_err(|e| file_error("write", &image.path, e))?;
        image.length += data.len() as u64;
        image.hasher.update(data);
        Ok(())
    }

    fn end(&mut self, end: &ImageEnd) -> Result<(), ImagesError> {
        let Some(image) = self.open.remove(&end.number) else {
            return Err(self.wrong(format!("end of image {}, which is not open", end.number)));
        };
        let hash = image.hasher.finalize();
        if image.length != end.length || hash.as_bytes()[..] != end.blake3 {
            return Err(self.wrong(format!("{} was damaged on the way", image.path.display())));
        }
        Ok(())
    }

    fn done(self, done: ImagesDone) -> Result<ImageCount, ImagesError> {
        if !self.open.is_empty() || done.images != self.count.images {
            return Err(self.wrong(format!(
                "{} of {} images came, {} of them cut",
                self.count.images,
                done.images,
                self.open.len()
            )));
        }
        Ok(self.count)
    }

    fn wrong(&self, what: String) -> ImagesError {
        ImagesError::Wrong {
            peer: self.peer.clone(),
            what,
        }
    }
}

fn file_error(doing: &'static str, path: &Path, source: io::Error) -> ImagesError {
    ImagesError::File {
        doing,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn soon() -> Wait {
        Wait::uncancellable(Duration::from_secs(20))
    }

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a, "b").unwrap(), Channel::new(b, "a").unwrap())
    }

    #[test]
    fn a_directory_arrives_whole_and_only_its_images() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        let large: Vec<u8> = (0..CHUNK * 2 + 77).map(|n| (n % 253) as u8).collect();
        fs::write(from.path().join("pages-1.img"), &large).unwrap();
        fs::write(from.path().join("inventory.img"), b"").unwrap();
        fs::write(from.path().join("dump.log"), b"not an image").unwrap();
        let (mut a, mut b) = pair();
        let source = from.path().to_owned();
        let sender = thread::spawn(move || send(&source, &mut a, &soon()).unwrap());
        let received = receive(to.path(), u64::MAX, &mut b, &soon()).unwrap();
        assert_eq!(received, sender.join().unwrap());
        assert_eq!(
            received,
            ImageCount {
                images: 2,
                bytes: large.len() as u64
            }
        );
        assert_eq!(fs::read(to.path().join("pages-1.img")).unwrap(), large);
        assert_eq!(fs::read(to.path().join("inventory.img")).unwrap(), b"");
        assert!(!to.path().join("dump.log").exists());
    }

    /// What a receiver with a limit of 100 bytes says to frames sent by hand.
    fn receive_from(hand: impl FnOnce(&mut Channel) + Send + 'static) -> ImagesError {
        let to = tempfile::tempdir().unwrap();
        let (mut a, mut b) = pair();
        let sender = thread::spawn(move || hand(&mut a));
        let result = receive(to.path(), 100, &mut b, &soon());
        sender.join().unwrap();
        result.unwrap_err()
    }

    fn header(number: u32, name: &str) -> ImageHeader {
        ImageHeader {
            number,
            name: name.to_owned(),
            size: None,
            snapshot: 0,
        }
    }

    #[test]
    fn hostile_peers_are_refused() {
        let error = receive_from(|channel| {
            channel
                .send_message(Kind::ImageHeader, &header(0, "../x.img"), &soon())
                .unwrap();
        });
        assert!(matches!(error, ImagesError::Name(_)), "{error}");

        let error = receive_from(|channel| {
            channel
                .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
                .unwrap();
            channel
                .send(Kind::ImageData, &[&[0; 4], &[1; 101]], &soon())
                .unwrap();
        });
        assert!(
            matches!(error, ImagesError::TooLarge { limit: 100 }),
            "{error}"
        );

        let error = receive_from(|channel| {
            channel
                .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
                .unwrap();
            channel
                .send_message(Kind::ImageHeader, &header(1, "a.img"), &soon())
                .unwrap();
        });
        assert!(matches!(error, ImagesError::File { .. }), "{error}");

        let error = receive_from(|channel| {
            channel
                .send(Kind::ImageData, &[&[9, 0, 0, 0], &[1]], &soon())
                .unwrap();
        });
        assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");

        let error = receive_from(|channel| {
            channel.send(Kind::ImageData, &[&[9, 0]], &soon()).unwrap();
        });
        assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");
    }

    #[test]
    fn damaged_cut_and_missing_images_are_noticed() {
        let error = receive_from(|channel| {
            channel
                .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
                .unwrap();
            let end = ImageEnd {
                number: 0,
                length: 0,
                blake3: vec![0; 32],
            };
            channel.send_message(Kind::ImageEnd, &end, &soon()).unwrap();
        });
        assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");

        let error = receive_from(|channel| {
            channel
                .send_message(Kind::ImageHeader, &header(0, "a.img"), &soon())
                .unwrap();
            let done = ImagesDone {
                images: 1,
                snapshot: 0,
            };
            channel
                .send_message(Kind::ImagesDone, &done, &soon())
                .unwrap();
        });
        assert!(matches!(error, ImagesError::Wrong { .. }), "{error}");

        let error = receive_from(|_| {});
        assert!(
            matches!(error, ImagesError::Transport(TransportError::Closed { .. })),
            "{error}"
        );
    }
}
