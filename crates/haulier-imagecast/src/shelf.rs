//! Buffers that are used again: to touch fresh memory costs more than to fill it.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use haulier_images::page::PAGE;
use haulier_images::runs::FRAME_PAGES;

/// Bytes of a buffer: what fits a frame.
pub(crate) const CHUNK: usize = FRAME_PAGES * PAGE;
/// Buffers without a use that are kept.
const MOST: usize = 16;

/// Buffers that nobody uses. The one that was used last is used first, while the processor still has it.
#[derive(Debug, Default)]
pub(crate) struct Shelf(Mutex<Vec<Vec<u8>>>);

impl Shelf {
    /// A buffer of [`CHUNK`] bytes. What is in it is of no meaning.
    pub(crate) fn take(&self) -> Vec<u8> {
        self.free().pop().unwrap_or_else(|| vec![0; CHUNK])
    }

    /// Lets others use a buffer.
    pub(crate) fn put(&self, buffer: Vec<u8>) {
        let mut free = self.free();
        if buffer.len() == CHUNK && free.len() < MOST {
            free.push(buffer);
        }
    }

    /// Gives the memory back.
    pub(crate) fn clear(&self) {
        let free = std::mem::take(&mut *self.free());
        drop(free);
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that do not change. Their buffer goes back to its shelf with them.
pub(crate) struct Bytes {
    buffer: Vec<u8>,
    length: usize,
    shelf: Option<Arc<Shelf>>,
}

impl Bytes {
    /// The first `length` bytes of a buffer of the shelf.
    pub(crate) fn of(shelf: &Arc<Shelf>, buffer: Vec<u8>, length: usize) -> Bytes {
        Bytes {
            length: length.min(buffer.len()),
            buffer,
            shelf: Some(Arc::clone(shelf)),
        }
    }

    /// Bytes of memory that it takes.
    pub(crate) fn cost(&self) -> usize {
        self.buffer.len()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(buffer: Vec<u8>) -> Bytes {
        Bytes {
            length: buffer.len(),
            buffer,
            shelf: None,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Some(shelf) = &self.shelf {
            shelf.put(std::mem::take(&mut self.buffer));
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(shelf: &Arc<Shelf>, with: u8, length: usize) -> Bytes {
        let mut buffer = shelf.take();
        buffer[..length].fill(with);
        Bytes::of(shelf, buffer, length)
    }

    #[test]
    fn a_buffer_is_used_again_only_when_its_last_reader_is_gone() {
        let shelf = Arc::<Shelf>::default();
        let first = Arc::new(filled(&shelf, 1, CHUNK));
        let reader = Arc::clone(&first);
        let place = first.as_ptr();
        drop(first);
        let second = filled(&shelf, 2, 100);
        assert_ne!(second.as_ptr(), place);
        assert!(reader.iter().all(|byte| *byte == 1));
        drop(reader);
        let third = filled(&shelf, 3, 10);
        assert_eq!(third.as_ptr(), place);
        assert_eq!(&*third, &[3; 10], "nothing of what was there before");
        assert!(second.iter().all(|byte| *byte == 2));
    }

    #[test]
    fn only_so_many_are_kept() {
        let shelf = Arc::<Shelf>::default();
        let all: Vec<_> = (0..2 * MOST).map(|_| filled(&shelf, 1, 1)).collect();
        assert_eq!(all[0].cost(), CHUNK);
        drop(all);
        assert_eq!(shelf.free().len(), MOST);
        shelf.put(vec![1]);
        assert_eq!(shelf.free().len(), MOST);
        shelf.clear();
        assert!(shelf.free().is_empty());
    }
}
