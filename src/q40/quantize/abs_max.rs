//! The symmetric rule of older exporters.

use super::{Coded, Encode, grid};
use crate::q40::simd::{Group, Isa};

/// `scale = max|x| / 8`: codes reach -8 but not +8, so a positive extreme is clipped to 7/8 of its value.
#[derive(Clone, Copy)]
pub(super) struct AbsMax;

impl Encode for AbsMax {
    #[inline(always)]
    fn encode(self, isa: impl Isa, x: &Group) -> Coded {
        grid::encode(isa, x, isa.extreme(x).abs() / 8.0)
    }
}
