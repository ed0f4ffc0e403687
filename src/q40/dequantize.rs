//! Codes and scales back to floats.

use std::sync::atomic::AtomicBool;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::simd::{Isa, Kernel, dispatch};
use super::{CODE_BYTES, FloatType, GROUP_SIZE, MIN_TILES, SCALE_BYTES, TILE, alive, check_planes};
use crate::error::Result;
use crate::pool;

/// `data[i] = (code[i] - 8) * scale`, computed in f32 and rounded once to `float`.
pub fn dequantize(codes: &[u8], scales: &[u8], float: FloatType, data: &mut [u8], stop: &AtomicBool) -> Result<()> {
    check_planes(float, data.len(), codes.len(), scales.len())?;
    let tiles = data
        .par_chunks_mut(TILE * float.size())
        .zip(codes.par_chunks(TILE / GROUP_SIZE * CODE_BYTES))
        .zip(scales.par_chunks(TILE / GROUP_SIZE * SCALE_BYTES));
    let tile = |buffer: &mut [f32; TILE], ((data, codes), scales)| {
        alive(stop)?;
        dispatch(Tile { codes, scales, float, data, buffer });
        Ok(())
    };
    pool::install(|| tiles.with_min_len(MIN_TILES).try_for_each_init(|| [0.0; TILE], tile))
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
    fn run(self, isa: impl Isa) {
        let groups = self.codes.len() / CODE_BYTES;
        let mut scales = [0.0; TILE / GROUP_SIZE];
        let scales = &mut scales[..groups];
        load_scales(self.scales, scales);
        if self.float == FloatType::F32
            && let Ok(values) = bytemuck::try_cast_slice_mut(self.data)
        {
            return decode(isa, self.codes, scales, values);
        }
        let values = &mut self.buffer[..groups * GROUP_SIZE];
        decode(isa, self.codes, scales, values);
        self.float.store(values, self.data);
    }
}

/// f16 bytes, at most those of a tile, to f32.
pub(super) fn load_scales(bytes: &[u8], scales: &mut [f32]) {
    let mut halves = [f16::ZERO; TILE / GROUP_SIZE];
    let halves = &mut halves[..scales.len()];
    bytemuck::cast_slice_mut(halves).copy_from_slice(bytes);
    halves.convert_to_f32_slice(scales);
}

#[inline(always)]
pub(super) fn decode(isa: impl Isa, codes: &[u8], scales: &[f32], values: &mut [f32]) {
    let groups = values.as_chunks_mut().0.iter_mut().zip(codes.as_chunks().0);
    for ((values, codes), scale) in groups.zip(scales) {
        *values = isa.decode(codes, *scale);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use crate::error::Error;

    use half::bf16;

    use super::*;

    /// Every code with every scale, NaN and infinities included, rounded once to each float type.
    #[test]
    fn all_values_are_the_formula() {
        let ramp: Vec<u8> = (0..16_u8).map(|i| i | (15 - i) << 4).collect();
        let scales: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let codes = ramp.repeat(1 << 16);
        let stop = AtomicBool::new(false);
        let n = codes.len() * 2;
        let run = |float: FloatType, shift: usize| {
            let mut data = vec![0; shift + n * float.size()];
            dequantize(&codes, &scales, float, &mut data[shift..], &stop).unwrap();
            data.split_off(shift)
        };
        let singles = run(FloatType::F32, 0);
        let halves = run(FloatType::F16, 0);
        let brains = run(FloatType::Bf16, 0);
        let values = singles.as_chunks().0.iter().zip(halves.as_chunks().0).zip(brains.as_chunks().0);
        for (i, ((single, half), brain)) in values.enumerate() {
            let code = if i % 32 < 16 { i % 16 } else { 15 - i % 16 };
            let value = (code as f32 - 8.0) * f16::from_bits((i / 32) as u16).to_f32();
            let (single, half, brain) =
                (f32::from_le_bytes(*single), f16::from_le_bytes(*half), bf16::from_le_bytes(*brain));
            if value.is_nan() {
                assert!(single.is_nan() && half.is_nan() && brain.is_nan(), "{i}");
            } else {
                assert_eq!(single.to_bits(), value.to_bits(), "{i}");
                assert_eq!(half.to_bits(), f16::from_f32(value).to_bits(), "{i}");
                assert_eq!(brain.to_bits(), bf16::from_f32(value).to_bits(), "{i}");
            }
        }
        assert!(run(FloatType::F32, 1) == singles && run(FloatType::F16, 1) == halves);
    }

    #[test]
    fn lengths_are_checked() {
        let stop = AtomicBool::new(false);
        for (codes, scales, data) in [(16, 2, 127), (16, 2, 64), (15, 2, 128), (16, 1, 128)] {
            let outcome = dequantize(&vec![0; codes], &vec![0; scales], FloatType::F32, &mut vec![0; data], &stop);
            assert!(matches!(outcome, Err(Error::InvalidArgument(_))), "{outcome:?}");
        }
    }
}
