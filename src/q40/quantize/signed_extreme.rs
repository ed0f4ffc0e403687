//! ggml's `quantize_row_q4_0_ref`, bit for bit.

use super::grid::to_code;
use super::{Coded, Encode, Group};

/// `d = m / -8` where `m` is the first element of largest magnitude; `code = min(15, trunc(x / d + 8.5))`.
///
/// Where ggml divides by a `d` so small that `1 / d` overflows, codes are all 8: the stored scale is 0 anyway.
#[derive(Clone, Copy)]
pub(super) struct SignedExtreme;

impl Encode for SignedExtreme {
    #[inline(always)]
    fn encode(self, x: &Group) -> Coded {
        let scale = extreme(x) / -8.0;
        let inverse = 1.0 / scale;
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        Coded { scale, codes: x.map(|value| to_code(value * inverse + 8.5)) }
    }
}

/// The first element of largest magnitude; 0 for a group of zeros of either sign.
#[inline(always)]
pub(super) fn extreme(x: &Group) -> f32 {
    // The bits of floats order positives as i32 and, among negatives, magnitudes as u32.
    let positive = x.iter().fold(0, |most, value| (value.to_bits() as i32).max(most)) as u32;
    let negative = x.iter().fold(0, |most, value| value.to_bits().max(most));
    let negative = if negative > f32::INFINITY.to_bits() { negative & 0x7fff_ffff } else { 0 };
    if positive == negative {
        let magnitude = f32::from_bits(positive);
        return x.iter().find(|value| value.abs() == magnitude && magnitude > 0.0).copied().unwrap_or(0.0);
    }
    if positive > negative { f32::from_bits(positive) } else { -f32::from_bits(negative) }
}
