//! Bodies of frames as they are received: pages go straight to where they will stay.

use haulier_proto::frame::{Header, Kind};
use haulier_sys::pages::PagesMut;
use haulier_sys::wait::Wait;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;

use crate::intake::PagesAhead;

/// Receives the body announced by `header`, and checks it. Pages at its end go into the room that
/// there is for them; the rest of the body, all of it if there is no such room, is in `buffer`.
pub(crate) fn body<'a>(
    channel: &mut Channel,
    header: &Header,
    buffer: &'a mut Vec<u8>,
    room: impl FnOnce(&PagesAhead) -> Option<Vec<PagesMut>>,
    wait: &Wait,
) -> Result<(&'a [u8], Vec<PagesMut>), TransportError> {
    let length = header.length as usize;
    if header.kind != Kind::ImageData || length <= PagesAhead::HEAD {
        let body = part(buffer, length);
        channel.receive_body(header, &mut [&mut *body], wait)?;
        return Ok((body, Vec::new()));
    }
    let mut head = [0; PagesAhead::HEAD];
    channel.receive_part(&mut [&mut head], wait)?;
    let ahead = PagesAhead::of(head, length);
    let mut pages = ahead.and_then(|ahead| room(&ahead)).unwrap_or_default();
    let paged: usize = pages.iter().map(|run| run.len()).sum();
    let body = part(buffer, length - paged);
    body[..head.len()].copy_from_slice(&head);
    let mut parts = vec![&mut body[head.len()..]];
    parts.extend(pages.iter_mut().map(|run| &mut run[..]));
    channel.receive_part(&mut parts, wait)?;
    let mut parts = vec![&body[..]];
    parts.extend(pages.iter().map(|run| &run[..]));
    let checked = header.verify(&parts);
    checked.map_err(|error| channel.frame_error(error))?;
    Ok((body, pages))
}

/// The beginning of the buffer, which is made longer if need be.
fn part(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::Duration;

    use haulier_images::page::PAGE;
    use haulier_images::runs::{self, Run};
    use haulier_proto::frame::FrameError;

    use super::*;
    use crate::compress::COMPRESSED;
    use crate::store::Pool;

    fn soon() -> Wait {
        Wait::uncancellable(Duration::from_secs(10))
    }

    /// Sends a body as it is and receives it, with room for pages in a pool of 64 MiB. The bytes of the
    /// pool that the pages take, and the body again.
    fn through(kind: Kind, body: &[u8], damage: bool) -> Result<(u64, Vec<u8>), TransportError> {
        let (sender, receiver) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(receiver, "the sender").unwrap();
        let header = Header::for_body(kind, &[body]).unwrap();
        let pool = Arc::new(Pool::new(64 << 20));
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut bytes = body.to_vec();
                if damage {
                    *bytes.last_mut().unwrap() ^= 1;
                }
                std::io::Write::write_all(&mut &sender, &bytes).unwrap();
            });
            let mut buffer = Vec::new();
            let room = |pages: &PagesAhead| pool.pages(pages.count).unwrap();
            let (body, pages) = super::body(&mut channel, &header, &mut buffer, room, &soon())?;
            let used = pool.used().0;
            let mut all = body.to_vec();
            pages.iter().for_each(|run| all.extend_from_slice(run));
            Ok((used, all))
        });
        assert_eq!(pool.used().0, 0);
        result
    }

    fn paged(number: u32, pages: u32) -> Vec<u8> {
        let runs = [Run::Zero { pages: 3 }, Run::Literal { pages }];
        let mut body = runs::encode(number, &runs);
        body.extend((0..pages as usize * PAGE).map(|place| (place / 100) as u8));
        body
    }

    #[test]
    fn pages_go_where_they_stay() {
        let body = paged(7, 200);
        let (used, got) = through(Kind::ImageData, &body, false).unwrap();
        assert_eq!(used, 200 * PAGE as u64);
        assert!(got == body, "contents differ");
    }

    #[test]
    fn what_is_no_frame_of_pages_goes_to_the_buffer() {
        let mut compressed = paged(7, 2);
        compressed[3] |= (COMPRESSED >> 24) as u8;
        let mut absurd = paged(7, 2);
        absurd[4..8].fill(255);
        let bodies = [
            compressed,
            absurd,
            paged(7, 2)[..5000].to_vec(),
            vec![1; 9000],
            vec![1; 8],
            vec![1; 3],
        ];
        for body in bodies {
            assert_eq!(through(Kind::ImageData, &body, false).unwrap(), (0, body));
        }
        let body = paged(7, 2);
        assert_eq!(through(Kind::LazyPages, &body, false).unwrap(), (0, body));
    }

    #[test]
    fn damaged_pages_are_refused_and_given_back() {
        let error = through(Kind::ImageData, &paged(7, 9), true).unwrap_err();
        assert!(matches!(
            error,
            TransportError::Frame {
                source: FrameError::Checksum { .. },
                ..
            }
        ));
    }
}
