//! Codes and scales back to floats.

use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::simd::{Kernel, vectorized};
use super::{CODE_BYTES, FloatType, GROUP_SIZE, MIN_TILES, SCALE_BYTES, TILE, check_planes};
use crate::error::{Error, Result};

/// `data[i] = (code[i] - 8) * scale`, computed in f32 and rounded once to `float`.
pub fn dequantize(codes: &[u8], scales: &[u8], float: FloatType, data: &mut [u8], stop: &AtomicBool) -> Result<()> {
    check_planes(float, data.len(), codes.len(), scales.len())?;
    let tiles = data
        .par_chunks_mut(TILE * float.size())
        .zip(codes.par_chunks(TILE / GROUP_SIZE * CODE_BYTES))
        .zip(scales.par_chunks(TILE / GROUP_SIZE * SCALE_BYTES));
    tiles.with_min_len(MIN_TILES).try_for_each_init(
        || [0.0; TILE],
        |buffer, ((data, codes), scales)| {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            vectorized(Tile { codes, scales, float, data, buffer });
            Ok(())
        },
    )
}

struct Tile<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    float: FloatType,
    data: &'a mut [u8],
    buffer: &'a mut [f32; TILE],
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let groups = self.codes.len() / CODE_BYTES;
        let mut scales = [0.0; TILE / GROUP_SIZE];
        let scales = &mut scales[..groups];
        load_scales(self.scales, scales);
        if self.float == FloatType::F32
            && let Ok(values) = bytemuck::try_cast_slice_mut(self.data)
        {
            return decode(self.codes, scales, values);
        }
        let values = &mut self.buffer[..groups * GROUP_SIZE];
        decode(self.codes, scales, values);
        self.float.store(values, self.data);
    }
}

/// f16 bytes, at most those of a tile, to f32.
#[inline(always)]
pub(super) fn load_scales(bytes: &[u8], scales: &mut [f32]) {
    let mut halves = [f16::ZERO; TILE / GROUP_SIZE];
    let halves = &mut halves[..scales.len()];
    bytemuck::cast_slice_mut(halves).copy_from_slice(bytes);
    halves.convert_to_f32_slice(scales);
}

#[inline(always)]
fn decode(codes: &[u8], scales: &[f32], values: &mut [f32]) {
    let groups = values.as_chunks_mut::<GROUP_SIZE>().0.iter_mut().zip(codes.as_chunks::<CODE_BYTES>().0);
    for ((values, codes), scale) in groups.zip(scales) {
        let (low, high) = values.split_at_mut(CODE_BYTES);
        for i in 0..CODE_BYTES {
            low[i] = (i32::from(codes[i] & 15) - 8) as f32 * scale;
            high[i] = (i32::from(codes[i] >> 4) - 8) as f32 * scale;
        }
    }
}
