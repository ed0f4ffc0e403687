//! Clipping at a quantile of the magnitudes.

use super::signed_extreme::{SignedExtreme, extreme};
use super::{Coded, Encode, Group, grid};
use crate::q40::GROUP_SIZE;

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

    fn quantile(self, x: &Group) -> f32 {
        let mut magnitudes = x.map(f32::abs);
        magnitudes.sort_unstable_by(f32::total_cmp);
        let (below, above) = (magnitudes[self.rank], magnitudes[self.rank + 1]);
        below + (above - below) * self.fraction
    }
}

impl Encode for MinMax {
    #[inline(always)]
    fn encode(self, x: &Group) -> Coded {
        let whole = SignedExtreme.encode(x);
        let clipped = grid::encode(x, self.quantile(x).copysign(extreme(x)) / -8.0);
        if grid::squared_error(x, &clipped) <= grid::squared_error(x, &whole) { clipped } else { whole }
    }
}
