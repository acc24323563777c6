//! BLAKE3 of many pages at once.
//!
//! A page is four chunks of BLAKE3, and wide processors hash up to sixteen chunks in the time of one. So
//! the same chunk of sixteen pages is hashed together, then their parents, then their roots. The hashes
//! are those that BLAKE3 has for each page.
//!
//! The chunks are copied, one behind the other, since that is how the crate has them itself: its code for
//! AVX-512 reads a few bytes beyond an input that it takes another one to follow.

use blake3::IncrementCounter;
// Not a part of the crate's promises: the version is pinned in Cargo.toml, and a test compares.
use blake3::platform::Platform;

use super::{PAGE, PageHash};

/// Pages that are hashed together: as many as the widest registers have room for.
const TOGETHER: usize = 16;
const CHUNK: usize = blake3::CHUNK_LEN;
const CHUNKS: usize = PAGE / CHUNK;
const BLOCK: usize = blake3::BLOCK_LEN;
const HASH: usize = blake3::OUT_LEN;

// Of BLAKE3's specification.
const IV: [u32; 8] = [
    0x6A09_E667,
    0xBB67_AE85,
    0x3C6E_F372,
    0xA54F_F53A,
    0x510E_527F,
    0x9B05_688C,
    0x1F83_D9AB,
    0x5BE0_CD19,
];
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;

/// The hashes of pages, in their order, behind what `hashes` has.
pub fn hash_many(pages: &[&[u8; PAGE]], hashes: &mut Vec<PageHash>) {
    let platform = Platform::detect();
    // One more than is hashed: nothing that is read lies beyond.
    let mut chunks = [[0; CHUNK]; TOGETHER + 1];
    for group in pages.chunks(TOGETHER) {
        hash_group(platform, group, &mut chunks, hashes);
    }
}

fn hash_group(
    platform: Platform,
    pages: &[&[u8; PAGE]],
    chunks: &mut [[u8; CHUNK]; TOGETHER + 1],
    hashes: &mut Vec<PageHash>,
) {
    let count = pages.len();
    // Of each page the chaining values of its chunks, one behind the other.
    let mut leaves = [[[0; HASH]; CHUNKS]; TOGETHER + 1];
    let mut out = [[0; HASH]; 2 * TOGETHER + 2];
    for number in 0..CHUNKS {
        for (chunk, page) in chunks.iter_mut().zip(pages) {
            chunk.copy_from_slice(&page[number * CHUNK..][..CHUNK]);
        }
        let mut inputs = [&[0; CHUNK]; TOGETHER];
        for (input, chunk) in inputs.iter_mut().zip(&*chunks) {
            *input = chunk;
        }
        platform.hash_many(
            &inputs[..count],
            &IV,
            number as u64,
            IncrementCounter::No,
            0,
            CHUNK_START,
            CHUNK_END,
            out[..count].as_flattened_mut(),
        );
        for (leaves, leaf) in leaves.iter_mut().zip(&out[..count]) {
            leaves[number] = *leaf;
        }
    }
    let parents = leaves[..count].as_flattened().as_flattened();
    combine(platform, parents, PARENT, &mut out[..2 * count]);
    let mut roots = [[0; HASH]; TOGETHER];
    let parents = out[..2 * count].as_flattened();
    combine(platform, parents, PARENT | ROOT, &mut roots[..count]);
    hashes.extend_from_slice(&roots[..count]);
}

/// The parents of chaining values, two by two.
fn combine(platform: Platform, children: &[u8], flags: u8, parents: &mut [[u8; HASH]]) {
    let mut inputs = [&[0; BLOCK]; 2 * TOGETHER];
    let mut count = 0;
    for (input, block) in inputs.iter_mut().zip(children.chunks_exact(BLOCK)) {
        if let Some(block) = block.first_chunk() {
            *input = block;
            count += 1;
        }
    }
    platform.hash_many(
        &inputs[..count],
        &IV,
        0,
        IncrementCounter::No,
        flags,
        0,
        0,
        parents.as_flattened_mut(),
    );
}
