//! Compression of the contents of a frame, as one piece.

use std::fmt;

use lz4_flex::block;
use zstd::bulk;

/// How the contents of a frame are encoded. The discriminant is the wire value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Codec {
    /// As they are.
    None = 0,
    /// An LZ4 block, without its length.
    Lz4 = 1,
    /// A Zstandard frame.
    Zstd = 2,
}

impl Codec {
    pub(super) fn from_wire(value: u32) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Zstd]
            .into_iter()
            .find(|codec| *codec as u32 == value)
    }
}

/// The fastest of the regular levels; the next one costs a third more for 2 % fewer bytes.
const ZSTD_LEVEL: i32 = 1;

/// Compresses for one channel.
#[derive(Default)]
pub(super) struct Compressor {
    zstd: Option<bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl Compressor {
    /// The contents compressed, or `None` if that saves less than a sixteenth: to decompress would
    /// cost the other side more.
    pub(super) fn compress(&mut self, codec: Codec, contents: &[u8]) -> Option<&[u8]> {
        let most = contents.len() - contents.len() / 16;
        let len = match codec {
            Codec::None => return None,
            Codec::Lz4 => {
                // The compressor wants room for the worst case.
                let room = block::get_maximum_output_size(contents.len());
                self.out.resize(room.max(self.out.len()), 0);
                block::compress_into(contents, &mut self.out).ok()?
            }
            Codec::Zstd => {
                self.out.resize(most.max(self.out.len()), 0);
                if self.zstd.is_none() {
                    self.zstd = bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                let zstd = self.zstd.as_mut()?;
                // Not enough room is an error: what does not fit is not worth it.
                zstd.compress_to_buffer(contents, &mut self.out[..most])
                    .ok()?
            }
        };
        (len < most).then(|| &self.out[..len])
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compressor")
    }
}

/// Decompresses for one channel.
#[derive(Default)]
pub(super) struct Decompressor {
    zstd: Option<bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Fills `out` exactly; false if the bytes are not valid, or less or more than that. Nothing
    /// beyond `out` is ever written, or allocated in proportion to what the bytes claim.
    pub(super) fn decompress(&mut self, codec: Codec, bytes: &[u8], out: &mut [u8]) -> bool {
        let len = match codec {
            Codec::None => return false,
            Codec::Lz4 => block::decompress_into(bytes, out).ok(),
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = bulk::Decompressor::new().ok();
                }
                let zstd = self.zstd.as_mut();
                zstd.and_then(|zstd| zstd.decompress_to_buffer(bytes, out).ok())
            }
        };
        len == Some(out.len())
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decompressor")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn codecs() -> impl Strategy<Value = Codec> {
        prop::sample::select(vec![Codec::Lz4, Codec::Zstd])
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(
            codec in codecs(),
            words in prop::collection::vec(0..40_u16, 1..3000),
        ) {
            let contents: Vec<u8> = words.iter().flat_map(|word| [7, *word as u8, 0, 0]).collect();
            let (mut compressor, mut decompressor) = (Compressor::default(), Decompressor::default());
            // A compressor is used many times over.
            for _ in 0..2 {
                let Some(bytes) = compressor.compress(codec, &contents) else {
                    prop_assert!(contents.len() < 500);
                    continue;
                };
                prop_assert!(bytes.len() < contents.len());
                let mut out = vec![1; contents.len()];
                prop_assert!(decompressor.decompress(codec, bytes, &mut out));
                prop_assert_eq!(&out, &contents);
                // A frame that says more, or less, than its runs.
                prop_assert!(!decompressor.decompress(codec, bytes, &mut out[1..]));
                out.push(0);
                prop_assert!(!decompressor.decompress(codec, bytes, &mut out));
            }
        }

        #[test]
        fn hostile_bytes_are_refused_or_harmless(
            codec in codecs(),
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = Decompressor::default().decompress(codec, &bytes, &mut [0; 4096]);
        }
    }

    #[test]
    fn what_does_not_compress_stays_as_it_is() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(1 << 16)
        .collect();
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
            assert_eq!(Compressor::default().compress(codec, &noise), None);
        }
    }
}
