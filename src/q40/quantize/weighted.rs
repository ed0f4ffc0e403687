//! Least squared error weighed by the importance of each element: what the diagonal of a Hessian knows.

use std::sync::atomic::AtomicBool;

use half::f16;
use rayon::prelude::*;

use super::signed_extreme::SignedExtreme;
use super::{Coded, Encode, grid};
use super::{check_range, scale_search::POSITIONS};
use crate::error::{Error, Result};
use crate::pool;
use crate::q40::simd::{Candidates, Group, Isa, Kernel, dispatch};
use crate::q40::{CODE_BYTES, FloatType, GROUP_SIZE, SCALE_BYTES, TILE, alive, check_planes};

/// Rounds of fitting the scale to the codes and the codes to the scale, at most.
const POLISH: usize = 4;

/// Quantizes rows of `width` floats, a multiple of 32, to the least `Σ importance * error²` of each group found.
///
/// `importance` (finite, not negative) holds `width` floats for each of its rows, which share the rows of `data` in
/// order and evenly. Never worse than [`super::Encoder::SignedExtreme`] by the same measure.
pub fn quantize_weighted(
    data: &[f32],
    width: usize,
    importance: &[f32],
    name: &str,
    codes: &mut [u8],
    scales: &mut [u8],
    stop: &AtomicBool,
) -> Result<()> {
    check_planes(FloatType::F32, size_of_val(data), codes.len(), scales.len())?;
    check_rows(data, width)?;
    let (rows, kinds) = (data.len() / width, importance.len() / width);
    if !importance.len().is_multiple_of(width) || kinds == 0 || !rows.is_multiple_of(kinds) {
        return Err(Error::InvalidArgument(format!(
            "tensor {name:?}: {} values of importance do not fit {rows} rows of {width}",
            importance.len()
        )));
    }
    if importance.iter().any(|v| !v.is_finite() || *v < 0.0) {
        return Err(Error::InvalidArgument(format!("tensor {name:?}: importance must be finite and not negative")));
    }
    let groups = width / GROUP_SIZE;
    let planes = codes.par_chunks_mut(groups * CODE_BYTES).zip(scales.par_chunks_mut(groups * SCALE_BYTES));
    pool::install(|| {
        check_range(data, name, stop)?;
        data.par_chunks(width).zip(planes).enumerate().try_for_each(|(row, (x, (codes, scales)))| {
            let first = row / (rows / kinds) * width;
            let inputs = x.chunks(TILE).zip(importance[first..first + width].chunks(TILE));
            let outputs = codes
                .chunks_mut(TILE / GROUP_SIZE * CODE_BYTES)
                .zip(scales.chunks_mut(TILE / GROUP_SIZE * SCALE_BYTES));
            inputs.zip(outputs).try_for_each(|((x, importance), (codes, scales))| {
                alive(stop)?;
                dispatch(Part { x, importance, codes, scales });
                Ok(())
            })
        })
    })
}

pub(super) fn check_rows(data: &[f32], width: usize) -> Result<()> {
    if width == 0 || !width.is_multiple_of(GROUP_SIZE) || !data.len().is_multiple_of(width) {
        return Err(Error::InvalidArgument(format!(
            "{} values are not rows of {width}: the width must be a positive multiple of {GROUP_SIZE}",
            data.len()
        )));
    }
    Ok(())
}

/// Of a row.
struct Part<'a> {
    x: &'a [f32],
    importance: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Kernel for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let groups = self.x.as_chunks().0.iter().zip(self.importance.as_chunks().0);
        let planes = self.codes.as_chunks_mut().0.iter_mut().zip(self.scales.as_chunks_mut().0);
        for ((x, importance), (codes, scale)) in groups.zip(planes) {
            let coded = encode(isa, x, importance);
            *codes = coded.codes;
            *scale = f16::from_f32(coded.scale).to_le_bytes();
        }
    }
}

/// `x` on the best grid found; its scale is as stored. All elements count the same where none is important.
#[inline(always)]
pub(super) fn encode(isa: impl Isa, x: &Group, importance: &Group) -> Coded {
    let most = importance.iter().fold(0.0_f32, |most, v| most.max(*v));
    // Relative weights, so that no product of theirs leaves the range of f32.
    let weights = if most > 0.0 { importance.map(|v| v / most) } else { [1.0; GROUP_SIZE] };
    let extreme = SignedExtreme.encode(isa, x);
    let mut best = Coded { scale: grid::stored(extreme.scale), codes: extreme.codes };
    let mut least = cost(isa, x, &weights, &best);
    let mut scale = search(isa, x, &weights);
    for _ in 0..POLISH {
        let found = grid::encode(isa, x, scale);
        let cost = cost(isa, x, &weights, &found);
        if cost >= least {
            break;
        }
        scale = fit(isa, x, &weights, &found);
        (best, least) = (found, cost);
    }
    best
}

/// `Σ weight * error²` of `coded` as it will decode.
#[inline(always)]
fn cost(isa: impl Isa, x: &Group, weights: &Group, coded: &Coded) -> f64 {
    let mut sum = 0.0;
    for ((x, weight), value) in x.iter().zip(weights).zip(isa.decode(&coded.codes, coded.scale)) {
        let error = f64::from(*x) - f64::from(value);
        sum += f64::from(*weight) * error * error;
    }
    sum
}

/// The scale that fits these codes best: `Σwxq / Σwq²`, 0 where f16 cannot hold it.
#[inline(always)]
fn fit(isa: impl Isa, x: &Group, weights: &Group, coded: &Coded) -> f32 {
    let (mut xq, mut qq) = (0.0, 0.0);
    for ((x, weight), q) in x.iter().zip(weights).zip(isa.decode(&coded.codes, 1.0)) {
        xq += weight * x * q;
        qq += weight * q * q;
    }
    let scale = xq / qq;
    if scale.abs() <= 65504.0 { scale } else { 0.0 }
}

/// As `scale_search`, weighed: the fitted scale of the best candidate.
#[inline(always)]
fn search(isa: impl Isa, x: &Group, weights: &Group) -> f32 {
    let extreme = isa.extreme(x);
    let mut inverse = POSITIONS;
    for position in &mut inverse {
        *position /= extreme;
        // Too small an extreme for f16: codes of 0, which cost what zeros cost.
        *position = if position.is_finite() { *position } else { 0.0 };
    }
    let (mut xq, mut qq) = (Candidates::default(), Candidates::default());
    for (value, weight) in x.iter().zip(weights) {
        for (c, inverse) in inverse.iter().enumerate() {
            let q = (value * inverse).clamp(-8.0, 7.0).round_ties_even();
            xq[c] += weight * value * q;
            qq[c] += weight * q * q;
        }
    }
    let mut best = (0.0, 0.0);
    for (xq, qq) in xq.into_iter().zip(qq) {
        let scale = grid::stored(xq / qq);
        // Less what zeros would cost.
        let cost = scale * (scale * qq - 2.0 * xq);
        best = if scale.abs() <= 65504.0 && cost < best.0 { (cost, scale) } else { best };
    }
    best.1
}
