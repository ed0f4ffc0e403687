//! Least squared error over candidate scales.

use super::signed_extreme::SignedExtreme;
use super::{Coded, Encode, grid};
use crate::q40::simd::{Candidates, Group, Isa};

/// Each candidate sends the extreme to this position of the grid (-8..=7), those beyond clip it: two thirds around
/// ggml's -8, the others on the far side, which wins where the rest of the group leans that way.
pub(super) const POSITIONS: Candidates = positions();
/// Up to here, no f16 scale is better than zeros: the smallest one is twice this.
const VANISHING: f32 = 1.0 / (1 << 25) as f32;

const fn positions() -> Candidates {
    let mut table = [0.0; 24];
    let mut c = 0;
    while c < table.len() {
        table[c] = if c < 16 { -7.2 - 0.25 * c as f32 } else { 6.2 + 0.4 * (c - 16) as f32 };
        c += 1;
    }
    table
}

/// For each candidate: codes nearest on its grid, then the scale that fits these codes best (`Σxq / Σq²`), rounded to
/// f16. The one of least squared error is kept, its codes chosen anew; `SignedExtreme` where that is better still.
#[derive(Clone, Copy)]
pub(super) struct ScaleSearch;

impl Encode for ScaleSearch {
    #[inline(always)]
    fn encode(self, isa: impl Isa, x: &Group) -> Coded {
        let extreme = isa.extreme(x);
        if extreme.abs() <= VANISHING {
            return grid::encode(isa, x, 0.0);
        }
        let found = grid::encode(isa, x, best_scale(isa, x, extreme));
        grid::better(isa, x, found, SignedExtreme.encode(isa, x))
    }
}

#[inline(always)]
fn best_scale(isa: impl Isa, x: &Group, extreme: f32) -> f32 {
    // Loops of the same few operations on whole arrays, which the compiler turns into vector code.
    let mut inverse = POSITIONS;
    for position in &mut inverse {
        *position /= extreme;
    }
    let (xq, qq) = isa.fit(x, &inverse);
    let mut scales = Candidates::default();
    let mut costs = Candidates::default();
    for c in 0..POSITIONS.len() {
        let scale = grid::stored(xq[c] / qq[c]);
        // Squared error with the codes the scale was fitted to, less Σx²: what zeros would cost is 0.
        let cost = scale * (scale * qq[c] - 2.0 * xq[c]);
        costs[c] = if scale.abs() <= 65504.0 { cost } else { 0.0 };
        scales[c] = scale;
    }
    let mut best = (0.0, 0.0);
    for (cost, scale) in costs.into_iter().zip(scales) {
        best = if cost < best.0 { (cost, scale) } else { best };
    }
    best.1
}
