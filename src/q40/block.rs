//! The 18-byte block of GGUF and NNEF `.dat` files, and its way from and to planes.

use std::sync::atomic::AtomicBool;

use bytemuck::{Pod, Zeroable};
use half::f16;
use rayon::prelude::*;

use super::{CODE_BYTES, SCALE_BYTES, alive};
use crate::error::{Error, Result};
use crate::pool;

/// One group of 32 as GGUF stores it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct BlockQ4_0 {
    /// Scale.
    pub d: f16,
    /// Byte `i`: code of element `i` low, of element `i + 16` high.
    pub qs: [u8; CODE_BYTES],
}

/// Bytes of a block.
pub const BLOCK_BYTES: usize = size_of::<BlockQ4_0>();

const _: () = {
    assert!(BLOCK_BYTES == 18 && align_of::<BlockQ4_0>() == 2);
    assert!(std::mem::offset_of!(BlockQ4_0, d) == 0 && std::mem::offset_of!(BlockQ4_0, qs) == 2);
};

/// Blocks a thread takes at least, between two looks at whether to stop.
const MIN_BLOCKS: usize = 4096;

/// Interleaves planes into `blocks`.
pub fn join(codes: &[u8], scales: &[u8], blocks: &mut [u8], stop: &AtomicBool) -> Result<()> {
    check(codes, scales, blocks)?;
    let codes = codes.as_chunks::<CODE_BYTES>().0.par_chunks(MIN_BLOCKS);
    let scales = scales.as_chunks::<SCALE_BYTES>().0.par_chunks(MIN_BLOCKS);
    let blocks = blocks.as_chunks_mut::<BLOCK_BYTES>().0.par_chunks_mut(MIN_BLOCKS);
    pool::install(|| {
        blocks.zip(codes).zip(scales).try_for_each(|((blocks, codes), scales)| {
            for ((block, codes), scale) in blocks.iter_mut().zip(codes).zip(scales) {
                block[..SCALE_BYTES].copy_from_slice(scale);
                block[SCALE_BYTES..].copy_from_slice(codes);
            }
            alive(stop)
        })
    })
}

/// Inverse of [`join`].
pub fn split(blocks: &[u8], codes: &mut [u8], scales: &mut [u8], stop: &AtomicBool) -> Result<()> {
    check(codes, scales, blocks)?;
    let codes = codes.as_chunks_mut::<CODE_BYTES>().0.par_chunks_mut(MIN_BLOCKS);
    let scales = scales.as_chunks_mut::<SCALE_BYTES>().0.par_chunks_mut(MIN_BLOCKS);
    let blocks = blocks.as_chunks::<BLOCK_BYTES>().0.par_chunks(MIN_BLOCKS);
    pool::install(|| {
        blocks.zip(codes).zip(scales).try_for_each(|((blocks, codes), scales)| {
            for ((block, codes), scale) in blocks.iter().zip(codes).zip(scales) {
                scale.copy_from_slice(&block[..SCALE_BYTES]);
                codes.copy_from_slice(&block[SCALE_BYTES..]);
            }
            alive(stop)
        })
    })
}

fn check(codes: &[u8], scales: &[u8], blocks: &[u8]) -> Result<()> {
    let groups = codes.len() / CODE_BYTES;
    if [codes.len(), scales.len(), blocks.len()] != [CODE_BYTES, SCALE_BYTES, BLOCK_BYTES].map(|bytes| groups * bytes) {
        return Err(Error::InvalidArgument(format!(
            "a Q40 group is {CODE_BYTES} bytes of codes, {SCALE_BYTES} of scale and {BLOCK_BYTES} of block; got {}, {} and {} bytes",
            codes.len(),
            scales.len(),
            blocks.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_layout_is_scale_then_codes() {
        let codes: Vec<u8> = (0..32).collect();
        let mut blocks = [0; 36];
        join(&codes, &[0xaa, 0xbb, 0xcc, 0xdd], &mut blocks, &AtomicBool::new(false)).unwrap();
        assert_eq!(blocks[..2], [0xaa, 0xbb]);
        assert_eq!(blocks[2..18], codes[..16]);
        assert_eq!(blocks[18..20], [0xcc, 0xdd]);
        assert_eq!(blocks[20..], codes[16..]);
        let second: BlockQ4_0 = bytemuck::pod_read_unaligned(&blocks[18..]);
        assert_eq!((second.d.to_bits(), &second.qs[..]), (0xddcc, &codes[16..]));
    }

    #[test]
    fn lengths_are_checked() {
        for (codes, scales, blocks) in [(16, 2, 17), (16, 4, 18), (17, 2, 18), (0, 2, 0), (32, 4, 18)] {
            let (mut codes, mut scales, mut blocks) = (vec![0; codes], vec![0; scales], vec![0; blocks]);
            let stop = AtomicBool::new(false);
            assert!(matches!(join(&codes, &scales, &mut blocks, &stop), Err(Error::InvalidArgument(_))));
            assert!(matches!(split(&blocks, &mut codes, &mut scales, &stop), Err(Error::InvalidArgument(_))));
        }
    }

    proptest! {
        #[test]
        fn split_undoes_join(seed: [u8; 36], groups in 0_usize..9000) {
            let codes: Vec<u8> = (0..groups * 16).map(|i| seed[i % 35].wrapping_add((i >> 8) as u8)).collect();
            let scales: Vec<u8> = (0..groups * 2).map(|i| seed[i % 31] ^ (i >> 7) as u8).collect();
            let mut blocks = vec![0; groups * 18];
            let stop = AtomicBool::new(false);
            join(&codes, &scales, &mut blocks, &stop).unwrap();
            let (mut codes_back, mut scales_back) = (vec![1; codes.len()], vec![1; scales.len()]);
            split(&blocks, &mut codes_back, &mut scales_back, &stop).unwrap();
            prop_assert!(codes == codes_back && scales == scales_back);
        }
    }
}
