//! Image data in fewer bytes: see `docs/image-protocol.md`, section 5.

use std::fmt;
use std::io;
use std::str::FromStr;

use thiserror::Error;

/// Set in the image number that leads the data: what follows is compressed. Image numbers stay
/// below it.
pub(crate) const COMPRESSED: u32 = 1 << 30;
/// Longest data of a frame, as it was before: what a frame may have that is not compressed.
const LONGEST: usize = 1 << 20;
/// Less is not worth the processor's time.
const SHORTEST: usize = 512;
/// Codec and length in front of the compressed data.
const HEAD: usize = 5;
/// The level of zstd that keeps up with fast links.
const LEVEL: i32 = 1;

/// How image data is compressed on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By LZ4: fast.
    Lz4,
    /// By Zstandard: smaller.
    Zstd,
}

/// A text that names no [`Compression`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("expected none, lz4 or zstd, got {0:?}")]
pub struct BadCompression(String);

impl FromStr for Compression {
    type Err = BadCompression;

    fn from_str(text: &str) -> Result<Compression, BadCompression> {
        match text {
            "none" => Ok(Compression::None),
            "lz4" => Ok(Compression::Lz4),
            "zstd" => Ok(Compression::Zstd),
            other => Err(BadCompression(other.to_owned())),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::None => "none",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

/// The data of a frame behind the image number, compressed; `None` if that makes it no smaller.
pub(crate) fn compress(how: Compression, data: &[u8]) -> Option<Vec<u8>> {
    if data.len() < SHORTEST {
        return None;
    }
    let (codec, body) = match how {
        Compression::None => return None,
        Compression::Lz4 => (1, lz4_flex::block::compress(data)),
        // What it cannot compress goes as it is.
        Compression::Zstd => (2, zstd::bulk::compress(data, LEVEL).ok()?),
    };
    if body.len() + HEAD > data.len() / 16 * 15 {
        return None;
    }
    let mut all = Vec::with_capacity(HEAD + body.len());
    all.push(codec);
    all.extend_from_slice(&(data.len() as u32).to_le_bytes());
    all.extend_from_slice(&body);
    Some(all)
}

/// What [`compress`] was given. What is wrong, if something is.
pub(crate) fn decompress(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let Some(([codec, length @ ..], body)) = bytes.split_first_chunk::<HEAD>() else {
        return Err("compressed data without a head".to_owned());
    };
    let length = u32::from_le_bytes(*length) as usize;
    if length > LONGEST {
        return Err(format!("compressed data of {length} bytes"));
    }
    let mut data = vec![0; length];
    let got = match codec {
        1 => lz4_flex::block::decompress_into(body, &mut data).map_err(io::Error::other),
        2 => zstd::bulk::decompress_to_buffer(body, &mut data),
        other => return Err(format!("codec {other}")),
    };
    match got {
        Ok(got) if got == length => Ok(data),
        Ok(got) => Err(format!("{got} bytes where {length} were announced")),
        Err(error) => Err(format!("data that does not decompress: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(
            part in prop::collection::vec(any::<u8>(), 1..300),
            times in 1_usize..50,
            how in prop::sample::select(vec![Compression::Lz4, Compression::Zstd]),
        ) {
            let data = part.repeat(times);
            if let Some(small) = compress(how, &data) {
                prop_assert!(small.len() < data.len());
                prop_assert_eq!(decompress(&small), Ok(data));
            } else {
                prop_assert!(data.len() < SHORTEST || times < 4);
            }
        }

        #[test]
        fn nonsense_is_refused_or_bounded(bytes in prop::collection::vec(any::<u8>(), 0..200), codec in 0_u8..4) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = codec;
            }
            if let Ok(data) = decompress(&bytes) {
                prop_assert!(data.len() <= LONGEST);
            }
        }
    }

    #[test]
    fn absurd_lengths_and_cut_data_are_refused() {
        let good = compress(Compression::Zstd, &[7; 100_000]).unwrap();
        assert!(decompress(&good).is_ok());
        assert!(decompress(&good[..good.len() - 1]).is_err());
        let mut long = good.clone();
        long[1..5].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decompress(&long).is_err());
        let mut wrong = good;
        wrong[1] ^= 1;
        assert!(decompress(&wrong).is_err());
        assert!(decompress(&[1, 0, 0]).is_err());
    }
}
