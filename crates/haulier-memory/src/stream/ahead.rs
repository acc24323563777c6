//! Reading ahead: while one chunk is sent, the next is read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use haulier_sys::priority;

use super::StreamError;
use crate::reader::{Chunk, PageReader};

/// Chunks under way: one that is sent, one that is ready, one that is read. More would not stay in
/// the processor's cache.
const CHUNKS: usize = 3;

/// Hands over each chunk, while another thread reads those that follow. Ends early when `stop` is
/// set.
pub(super) fn for_each_chunk(
    reader: &PageReader,
    stop: &AtomicBool,
    mut act: impl FnMut(&Chunk) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    let (ready, take) = mpsc::channel();
    let (give_back, empty) = mpsc::channel();
    for _ in 0..CHUNKS {
        // The other end is in our hands.
        let _ = give_back.send(Chunk::default());
    }
    thread::scope(|scope| {
        scope.spawn(move || {
            let _ = priority::bulk();
            // Either end is gone when the other side has failed.
            while let Ok(mut chunk) = empty.recv() {
                let outcome = match reader.read(&mut chunk) {
                    Ok(true) => Ok(chunk),
                    Ok(false) => return,
                    Err(error) => Err(error),
                };
                let failed = outcome.is_err();
                if ready.send(outcome).is_err() || failed {
                    return;
                }
            }
        });
        // Dropped at the end, whatever the outcome: that ends the thread.
        let give_back = give_back;
        while let Ok(outcome) = take.recv() {
            let chunk = outcome?;
            act(&chunk)?;
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let _ = give_back.send(chunk);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use haulier_sys::userfaultfd::Region;

    use super::*;
    use crate::page::{PAGE, PAGE_BYTES, PageRange};
    use crate::reader::{ReadError, TaskPages};

    fn reader(region: &Region, pages: u64) -> PageReader {
        let range = PageRange {
            start: region.address(),
            pages,
        };
        let task = TaskPages {
            pid: std::process::id() as i32,
            task: 1,
            ranges: vec![range],
        };
        PageReader::new(vec![task]).unwrap()
    }

    #[test]
    fn every_chunk_comes_once_and_in_order() {
        let region = Region::map(1000 * PAGE_BYTES).unwrap();
        let mut next = region.address();
        let stop = AtomicBool::new(false);
        for_each_chunk(&reader(&region, 1000), &stop, |chunk| {
            assert_eq!(chunk.runs[0].range.start, next);
            next += chunk.pages() * PAGE;
            Ok(())
        })
        .unwrap();
        assert_eq!(next, region.address() + 1000 * PAGE);
    }

    #[test]
    fn a_failure_on_either_side_ends_it() {
        let region = Region::map(1000 * PAGE_BYTES).unwrap();
        let stop = AtomicBool::new(false);
        let failing = for_each_chunk(&reader(&region, 1000), &stop, |_| {
            Err(StreamError::NoChannel)
        });
        assert!(matches!(failing, Err(StreamError::NoChannel)));
        let task = TaskPages {
            pid: std::process::id() as i32,
            task: 1,
            ranges: vec![PageRange {
                start: 1 << 46,
                pages: 100,
            }],
        };
        let reader = PageReader::new(vec![task]).unwrap();
        let failing = for_each_chunk(&reader, &stop, |_| Ok(()));
        assert!(matches!(
            failing,
            Err(StreamError::Read(ReadError::Page { .. }))
        ));
        stop.store(true, Ordering::Relaxed);
        let mut chunks = 0;
        let region = self::reader(&region, 1000);
        for_each_chunk(&region, &stop, |_| {
            chunks += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(chunks, 1);
    }
}
