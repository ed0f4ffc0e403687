//! Least squared error over candidate scales.

use super::signed_extreme::{SignedExtreme, extreme};
use super::{Coded, Encode, Group, grid};

/// Candidate scales tried for each group.
const CANDIDATES: usize = 24;
/// Each candidate sends the extreme to this position of the grid (-8..=7), those beyond clip it: mostly around ggml's
/// -8; a third of them on the other side, which wins where the rest of the group leans that way.
const POSITIONS: [f32; CANDIDATES] = positions();
/// Below, no f16 scale is better than zeros: the smallest one is twice this.
const VANISHING: f32 = 1.0 / (1 << 25) as f32;

const fn positions() -> [f32; CANDIDATES] {
    let mut table = [0.0; CANDIDATES];
    let mut i = 0;
    while i < CANDIDATES {
        table[i] = if i < 16 { -7.2 - 0.25 * i as f32 } else { 6.2 + 0.4 * (i - 16) as f32 };
        i += 1;
    }
    table
}

/// For each candidate: codes nearest on its grid, then the scale that fits these codes best (`Σxq / Σq²`), rounded to
/// f16. The one of least squared error is kept, its codes chosen anew; `SignedExtreme` where that is better still.
#[derive(Clone, Copy)]
pub(super) struct ScaleSearch;

impl Encode for ScaleSearch {
    #[inline(always)]
    fn encode(self, x: &Group) -> Coded {
        let extreme = extreme(x);
        if extreme.abs() <= VANISHING {
            return grid::encode(x, 0.0);
        }
        let found = grid::encode(x, best_scale(x, extreme));
        let reference = SignedExtreme.encode(x);
        if grid::squared_error(x, &found) <= grid::squared_error(x, &reference) { found } else { reference }
    }
}

/// Candidates are the lanes: sums need no reduction across lanes, and run over the elements in order.
#[inline(always)]
fn best_scale(x: &Group, extreme: f32) -> f32 {
    let inverse = POSITIONS.map(|position| position / extreme);
    let mut xq = [0.0; CANDIDATES];
    let mut qq = [0.0; CANDIDATES];
    for value in x {
        for c in 0..CANDIDATES {
            let q = nearest_integer(clamp(value * inverse[c], -8.0, 7.0));
            xq[c] += value * q;
            qq[c] += q * q;
        }
    }
    let mut best = (0.0, 0.0);
    for c in 0..CANDIDATES {
        let scale = round_to_f16(xq[c] / qq[c]);
        // Squared error less the constant Σx², with the codes the scale was fitted to; zeros cost 0.
        let cost = scale * (scale * qq[c] - 2.0 * xq[c]);
        if cost < best.0 && scale.abs() <= 65504.0 {
            best = (cost, scale);
        }
    }
    best.1
}

#[inline(always)]
fn clamp(v: f32, low: f32, high: f32) -> f32 {
    let v = if v > low { v } else { low };
    if v < high { v } else { high }
}

/// Half to even, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
#[inline(always)]
fn nearest_integer(v: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (v + SHIFT) - SHIFT
}

/// To the nearest f16, half to even, subnormals included; without f16's overflow. The same trick as
/// `nearest_integer`, with the shift scaled so that it leaves f16's 10 bits of fraction.
#[inline(always)]
fn round_to_f16(v: f32) -> f32 {
    const SMALLEST_NORMAL: f32 = 1.0 / (1 << 14) as f32;
    let power = f32::from_bits(v.to_bits() & 0x7f80_0000);
    let shift = (if power > SMALLEST_NORMAL { power } else { SMALLEST_NORMAL }) * 12288.0;
    (v + shift) - shift
}
