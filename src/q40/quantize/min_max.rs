//! Clipping at a quantile of the magnitudes.

use super::signed_extreme::SignedExtreme;
use super::{Coded, Encode, grid};
use crate::q40::GROUP_SIZE;
use crate::q40::simd::{Group, Isa};

/// `scale = ±q / -8`, `q` a quantile of `|x|` and the sign that of the extreme; `SignedExtreme` where that is better.
#[derive(Clone, Copy)]
pub(super) struct MinMax {
    /// Rank in the sorted magnitudes below the quantile.
    rank: usize,
    /// Way from that rank to the next (linear interpolation, the default of `torch.quantile`).
    fraction: f32,
}

impl MinMax {
    /// `percentile` in `(0, 1)`.
    pub(super) fn new(percentile: f64) -> Self {
        let position = percentile * (GROUP_SIZE - 1) as f64;
        let rank = (position as usize).min(GROUP_SIZE - 2);
        Self { rank, fraction: (position - rank as f64) as f32 }
    }

    /// The quantile of the magnitudes.
    pub(super) fn quantile(self, x: &Group) -> f32 {
        let mut magnitudes = x.map(f32::abs);
        magnitudes.sort_unstable_by(f32::total_cmp);
        let (below, above) = (magnitudes[self.rank], magnitudes[self.rank + 1]);
        below + (above - below) * self.fraction
    }
}

impl Encode for MinMax {
    #[inline(always)]
    fn encode(self, isa: impl Isa, x: &Group) -> Coded {
        let whole = SignedExtreme.encode(isa, x);
        let clipped = grid::encode(isa, x, self.quantile(x).copysign(isa.extreme(x)) / -8.0);
        grid::better(isa, x, clipped, whole)
    }
}
