//! The oracle.

use super::{Candidates, Codes, Group, Isa, LANES, Panel, Terms};
use crate::q40::CODE_BYTES;

/// Plain Rust.
#[derive(Clone, Copy)]
pub(in crate::q40) struct Scalar;

impl Isa for Scalar {
    #[inline(always)]
    fn extreme(self, x: &Group) -> f32 {
        x.iter().fold(0.0, |extreme: f32, value| if value.abs() > extreme.abs() { *value } else { extreme })
    }

    #[inline(always)]
    fn magnitude_bits(self, x: &Group) -> u32 {
        x.iter().fold(0, |most, value| value.abs().to_bits().max(most))
    }

    #[inline(always)]
    fn scaled_codes(self, x: &Group, inverse: f32) -> Codes {
        pack(|i| x[i] * inverse + 8.5)
    }

    #[inline(always)]
    fn rounded_codes(self, x: &Group, scale: f32) -> Codes {
        pack(|i| (x[i] / scale).round() + 8.0)
    }

    #[inline(always)]
    fn decode(self, codes: &Codes, scale: f32) -> Group {
        std::array::from_fn(|i| {
            let code = if i < CODE_BYTES { codes[i] & 15 } else { codes[i - CODE_BYTES] >> 4 };
            (f32::from(code) - 8.0) * scale
        })
    }

    #[inline(always)]
    fn squared_error(self, x: &Group, y: &Group) -> f64 {
        let mut sums = [0.0; 4];
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            let error = f64::from(*x) - f64::from(*y);
            sums[i % 4] += error * error;
        }
        (sums[0] + sums[1]) + (sums[2] + sums[3])
    }

    #[inline(always)]
    fn fit(self, x: &Group, inverse: &Candidates) -> (Candidates, Candidates) {
        let mut xq = Candidates::default();
        let mut qq = Candidates::default();
        for value in x {
            for (c, inverse) in inverse.iter().enumerate() {
                let q = (value * inverse).clamp(-8.0, 7.0).round_ties_even();
                xq[c] += value * q;
                qq[c] += q * q;
            }
        }
        (xq, qq)
    }

    #[inline(always)]
    fn accumulate(self, sums: &mut [f32; LANES], terms: &Terms, panel: &Panel) {
        for (row, factor) in terms.iter() {
            for (sum, value) in sums.iter_mut().zip(&panel[row]) {
                *sum = factor.mul_add(*value, *sum);
            }
        }
    }
}

/// Codes `clamp(trunc(v(i)), 0, 15)`.
#[inline(always)]
fn pack(v: impl Fn(usize) -> f32) -> Codes {
    std::array::from_fn(|i| {
        let (low, high) = (v(i).clamp(0.0, 15.0) as u8, v(i + CODE_BYTES).clamp(0.0, 15.0) as u8);
        low | high << 4
    })
}
