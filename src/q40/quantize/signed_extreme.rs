//! ggml's `quantize_row_q4_0_ref`, bit for bit.

use super::{Coded, Encode};
use crate::q40::simd::{Group, Isa};

/// `d = m / -8` where `m` is the first element of largest magnitude; `code = min(15, trunc(x / d + 8.5))`.
///
/// Where ggml divides by a `d` so small that `1 / d` overflows, codes are all 8: the stored scale is 0 anyway.
#[derive(Clone, Copy)]
pub(super) struct SignedExtreme;

impl Encode for SignedExtreme {
    #[inline(always)]
    fn encode(self, isa: impl Isa, x: &Group) -> Coded {
        let scale = isa.extreme(x) / -8.0;
        let inverse = 1.0 / scale;
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        Coded { scale, codes: isa.scaled_codes(x, inverse) }
    }
}
