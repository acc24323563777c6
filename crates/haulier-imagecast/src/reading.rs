//! A reader of a snapshot that looks into it, but restores nothing: `haulier inspect`.
//!
//! It is not asked over CRIU's own socket: what is read there begins a restore, which a snapshot whose
//! memory is still at its source has only one of.

use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use haulier_criu::inspect::ImageSize;
use haulier_images::name::ImageName;
use haulier_sys::wait::Cancel;

use crate::archive::ImageReader;
use crate::chunks::ChunkWriter;
use crate::control::{self, Opened, ReadImage, Reply};
use crate::directory::CHUNK;
use crate::front::describe;
use crate::store::{Info, Reading, State, Store};

/// How long a reader may take to ask for the next image, or to take one.
const IDLE: Duration = Duration::from_secs(60);

/// Serves a reader of the snapshot of that number, or of the newest that is complete. An error is why it
/// is told no; once it was not, it sees where the connection ends.
pub(crate) fn serve(
    socket: &OwnedFd,
    store: &Store,
    target: &ImageName,
    number: Option<u64>,
    stop: &Cancel,
) -> Result<(), String> {
    let (reading, info) = pick(store, target, number)?;
    let opened = Opened {
        snapshot: info.key.number,
        state: describe(store, &info),
    };
    if let Err(error) = answer(socket, store, &reading, opened, stop) {
        tracing::debug!("who looks into {target} has gone: {error}");
    }
    Ok(())
}

/// A snapshot that is complete, and stays for as long as it is read.
fn pick<'a>(
    store: &'a Store,
    target: &ImageName,
    number: Option<u64>,
) -> Result<(Reading<'a>, Info), String> {
    let mut all = store.list();
    all.retain(|info| &info.key.target == target);
    let complete = |info: &&Info| matches!(info.state, State::Held | State::Released);
    let number = match number {
        Some(number) => number,
        None => {
            let newest = all.iter().rev().find(complete);
            let newest = newest.ok_or("there is no complete dump yet")?;
            newest.key.number
        }
    };
    // The one that is picked is the one that was looked at, or is gone.
    let reading = store.pick(target, Some(number), || false);
    let info = all.into_iter().find(|info| info.key.number == number);
    match (reading, info) {
        (Some(reading), Some(info)) if complete(&&info) => Ok((reading, info)),
        (_, Some(info)) => {
            let how = describe(store, &info);
            Err(format!("dump {number} cannot be looked into: {how}"))
        }
        (_, None) => Err(format!("there is no dump {number}")),
    }
}

fn answer(
    socket: &OwnedFd,
    store: &Store,
    reading: &Reading<'_>,
    opened: Opened,
    stop: &Cancel,
) -> io::Result<()> {
    let wait = stop.wait_idle(IDLE);
    control::send(socket, &Reply::Opened(opened), &wait)?;
    let images = store.images(reading.key());
    let sizes = images.iter().map(|(name, image)| ImageSize {
        name: name.to_string(),
        bytes: image.length(),
    });
    let sizes: Vec<ImageSize> = sizes.collect();
    let mut chunks = ChunkWriter::new(socket, &wait);
    chunks.write_all(&serde_json::to_vec(&sizes)?)?;
    chunks.finish()?;
    loop {
        let ReadImage { name } = match control::receive(socket, &wait) {
            Ok(wanted) => wanted,
            // That was all.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let found = images.binary_search_by(|(known, _)| known.as_str().cmp(&name));
        let (_, image) = &images[found.map_err(|_| io::ErrorKind::NotFound)?];
        let mut chunks = BufWriter::with_capacity(CHUNK, ChunkWriter::new(socket, &wait));
        io::copy(&mut ImageReader::new(image, stop), &mut chunks)?;
        chunks.into_inner()?.finish()?;
    }
}

#[cfg(test)]
mod tests;
