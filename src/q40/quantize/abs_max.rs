//! The symmetric rule of older exporters.

use super::signed_extreme::extreme;
use super::{Coded, Encode, Group, grid};

/// `scale = max|x| / 8`: codes reach -8 but not +8, so a positive extreme is clipped to 7/8 of its value.
#[derive(Clone, Copy)]
pub(super) struct AbsMax;

impl Encode for AbsMax {
    #[inline(always)]
    fn encode(self, x: &Group) -> Coded {
        grid::encode(x, extreme(x).abs() / 8.0)
    }
}
