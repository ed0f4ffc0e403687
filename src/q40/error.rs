//! What rounding to Q40 costs: codes and scales against the floats they stand for.

use std::sync::atomic::AtomicBool;

use rayon::prelude::*;

use super::dequantize::{decode, load_scales};
use super::simd::{Isa, Kernel, dispatch};
use super::{CODE_BYTES, FloatType, GROUP_SIZE, MIN_TILES, SCALE_BYTES, TILE, alive, check_planes};
use crate::error::Result;
use crate::pool;

/// `(sum of x^2, sum of (value - x)^2)` over `data`, where `value` is what the planes decode to, rounded once to
/// `shown`. Summed in f64, in an order that does not depend on the number of threads.
pub fn squared_error(
    codes: &[u8],
    scales: &[u8],
    float: FloatType,
    data: &[u8],
    shown: FloatType,
    stop: &AtomicBool,
) -> Result<(f64, f64)> {
    check_planes(float, data.len(), codes.len(), scales.len())?;
    let tiles = data
        .par_chunks(TILE * float.size())
        .zip(codes.par_chunks(TILE / GROUP_SIZE * CODE_BYTES))
        .zip(scales.par_chunks(TILE / GROUP_SIZE * SCALE_BYTES));
    let tile = |buffers: &mut [[f32; TILE]; 2], ((data, codes), scales)| {
        alive(stop)?;
        Ok(dispatch(Tile { codes, scales, float, data, shown, buffers }))
    };
    let tiles = tiles.with_min_len(MIN_TILES).map_init(|| [[0.0; TILE]; 2], tile);
    let sums: Vec<_> = pool::install(|| tiles.collect::<Result<_>>())?;
    Ok(sums.iter().fold((0.0, 0.0), |(signal, noise), (s, n)| (signal + s, noise + n)))
}

struct Tile<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    float: FloatType,
    data: &'a [u8],
    shown: FloatType,
    buffers: &'a mut [[f32; TILE]; 2],
}

impl Kernel for Tile<'_> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run(self, isa: impl Isa) -> (f64, f64) {
        let groups = self.codes.len() / CODE_BYTES;
        let mut scales = [0.0; TILE / GROUP_SIZE];
        let scales = &mut scales[..groups];
        load_scales(self.scales, scales);
        let [exact, values] = self.buffers;
        let exact = self.float.load(self.data, exact);
        decode(isa, self.codes, scales, &mut values[..exact.len()]);
        if self.shown != FloatType::F32 {
            let mut rounded = [0; TILE * 2];
            let rounded = &mut rounded[..exact.len() * self.shown.size()];
            self.shown.store(&values[..exact.len()], rounded);
            self.shown.load(rounded, values);
        }
        let (mut signal, mut noise) = (0.0, 0.0);
        for (exact, values) in exact.as_chunks().0.iter().zip(values.as_chunks().0) {
            signal += isa.squared_error(exact, &[0.0; GROUP_SIZE]);
            noise += isa.squared_error(values, exact);
        }
        (signal, noise)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use crate::error::Error;

    use super::*;
    use crate::q40::{Encoder, dequantize, quantize};

    #[test]
    fn sums_are_those_of_the_decoded_values() {
        let stop = AtomicBool::new(false);
        let n = 5 * TILE + 32;
        let wave: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
        for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
            let mut data = vec![0; n * float.size()];
            for (values, bytes) in wave.chunks(TILE).zip(data.chunks_mut(TILE * float.size())) {
                float.store(values, bytes);
            }
            let (mut codes, mut scales) = (vec![0; n / 2], vec![0; n / 16]);
            quantize(&data, float, Encoder::SignedExtreme, "", &mut codes, &mut scales, &stop).unwrap();
            let mut decoded = vec![0; data.len()];
            dequantize(&codes, &scales, float, &mut decoded, &stop).unwrap();
            let mut wanted = (0.0, 0.0);
            for (exact, values) in data.chunks(TILE * float.size()).zip(decoded.chunks(TILE * float.size())) {
                let (mut a, mut b) = ([0.0; TILE], [0.0; TILE]);
                for (x, value) in float.load(exact, &mut a).iter().zip(float.load(values, &mut b)) {
                    wanted.0 += f64::from(*x).powi(2);
                    wanted.1 += f64::from(value - x).powi(2);
                }
            }
            let (signal, noise) = squared_error(&codes, &scales, float, &data, float, &stop).unwrap();
            let (_, unrounded) = squared_error(&codes, &scales, float, &data, FloatType::F32, &stop).unwrap();
            assert!((unrounded / noise - 1.0).abs() < 0.01);
            assert!((signal / wanted.0 - 1.0).abs() < 1e-12 && (noise / wanted.1 - 1.0).abs() < 1e-12, "{float:?}");
        }
    }

    #[test]
    fn lengths_are_checked() {
        let outcome =
            squared_error(&[0; 16], &[0; 2], FloatType::F32, &[0; 64], FloatType::F32, &AtomicBool::new(false));
        assert!(matches!(outcome, Err(Error::InvalidArgument(_))), "{outcome:?}");
    }
}
