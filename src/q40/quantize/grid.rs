//! The 16 values a given scale can express, and how far a group is from them.

use super::Coded;
use crate::q40::CODE_BYTES;
use crate::q40::simd::{Codes, Group, Isa};

/// Codes of the grid values nearest to `x`, half away from zero; all 8 if `scale` is 0.
#[inline(always)]
pub(super) fn round(isa: impl Isa, x: &Group, scale: f32) -> Codes {
    if scale == 0.0 { [0x88; CODE_BYTES] } else { isa.rounded_codes(x, scale) }
}

/// `x` on the grid of `scale` as it will be stored.
#[inline(always)]
pub(super) fn encode(isa: impl Isa, x: &Group, scale: f32) -> Coded {
    let scale = stored(scale);
    Coded { scale, codes: round(isa, x, scale) }
}

/// Squared error of `coded` as it will decode.
#[inline(always)]
fn squared_error(isa: impl Isa, x: &Group, coded: &Coded) -> f64 {
    isa.squared_error(x, &isa.decode(&coded.codes, stored(coded.scale)))
}

/// `challenger`, unless its squared error is above that of `reference`.
#[inline(always)]
pub(super) fn better(isa: impl Isa, x: &Group, challenger: Coded, reference: Coded) -> Coded {
    if squared_error(isa, x, &challenger) <= squared_error(isa, x, &reference) { challenger } else { reference }
}

/// `scale` rounded to f16, half to even, for magnitudes up to 65504. In plain arithmetic: adding and taking away a
/// shift 3 * 2^12 times the power of two below leaves the 10 bits of fraction of f16, fewer for subnormals.
#[inline(always)]
pub(super) fn stored(scale: f32) -> f32 {
    const SMALLEST_NORMAL: f32 = 1.0 / (1 << 14) as f32;
    let power = f32::from_bits(scale.to_bits() & 0x7f80_0000);
    let shift = (if power > SMALLEST_NORMAL { power } else { SMALLEST_NORMAL }) * 12288.0;
    (scale + shift) - shift
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "exactness is what is tested")]

    use half::f16;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stored_is_f16_rounding_on_every_f16_and_between() {
        for bits in 0..f16::MAX.to_bits() {
            let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let middle = f32::midpoint(low, high);
            for v in [low, low.next_up(), middle.next_down(), middle, middle.next_up(), high.next_down(), high] {
                assert_eq!(stored(v), f16::from_f32(v).to_f32(), "{v:e}");
                assert_eq!(stored(-v), -stored(v), "{v:e}");
            }
        }
    }

    proptest! {
        #[test]
        fn stored_is_f16_rounding(bits: u32) {
            let v = f32::from_bits(bits);
            prop_assume!(v.abs() <= 65504.0);
            prop_assert_eq!(stored(v), f16::from_f32(v).to_f32());
        }
    }
}
