//! Rows chosen by the error of what they compute: least `e H eᵀ` of each row's error `e`, where `H` is the second
//! moment of the inputs.
//!
//! Codes start as GPTQ rounds them (Frantar et al. 2022, with groups whose scales are chosen beforehand and columns
//! taken in a given order), then codes and scales take turns to descend, group by group: the best code of an element and the best scale
//! of a group, all else fixed, have closed forms.

use std::sync::atomic::AtomicBool;

use half::f16;
use rayon::prelude::*;

use super::panel::Rows;
use super::weighted::{self, check_rows};
use super::{Encode, check_range, grid, scale_search::ScaleSearch};
use crate::error::{Error, Result};
use crate::pool;
use crate::q40::simd::{Codes, Group, Isa, Kernel, Terms, dispatch};
use crate::q40::{CODE_BYTES, FloatType, GROUP_SIZE, SCALE_BYTES, alive, check_planes};

/// Rows that share what is read of the matrices.
const TILE_ROWS: usize = 32;
/// Turns of codes and scale within a group each time it is visited, at most.
const TURNS: usize = 4;

/// What is known of the inputs of rows of `width` elements. Matrices are `width` x `width`, row after row.
#[derive(Clone, Copy)]
pub struct Moments<'a> {
    /// `H`, symmetric, with `ridge` added to its diagonal.
    pub hessian: &'a [f32],
    /// Keeps the descent from trusting `H` where few inputs were seen; no part of the error that is judged.
    pub ridge: f32,
    /// Upper triangular `U` with `UᵀU` the inverse of `hessian`, its rows and columns taken in `order`.
    pub factor: &'a [f32],
    /// The columns in the order GPTQ rounds them.
    pub order: &'a [u32],
    /// What the first scales weigh each column's error by.
    pub importance: &'a [f32],
}

impl Moments<'_> {
    fn check(&self, width: usize, name: &str, stop: &AtomicBool) -> Result<()> {
        let wrong = |what: &str| Err(Error::InvalidArgument(format!("tensor {name:?}: {what}")));
        let square = width.checked_mul(width);
        if Some(self.hessian.len()) != square || Some(self.factor.len()) != square {
            return wrong(&format!("Hessian and factor must be {width} x {width}"));
        }
        let mut seen = vec![false; width];
        for column in self.order {
            if let Some(seen) = seen.get_mut(*column as usize) {
                *seen = true;
            }
        }
        if self.order.len() != width || seen.contains(&false) {
            return wrong(&format!("the order must name each of {width} columns once"));
        }
        let finite = |matrix: &[f32]| {
            let rows = matrix.par_chunks(width.max(1));
            let finite = rows.map(|row| alive(stop).map(|()| row.iter().all(|v| v.is_finite())));
            finite.try_reduce(|| true, |a, b| Ok(a && b))
        };
        if !(finite(self.hessian)? && finite(self.factor)? && self.ridge.is_finite() && self.ridge >= 0.0) {
            return wrong("Hessian, factor and ridge must be finite, and the ridge not negative");
        }
        let positive = |matrix: &[f32]| matrix.iter().step_by(width + 1).all(|v| *v > 0.0);
        if !positive(self.hessian) || !positive(self.factor) {
            return wrong("the diagonals of Hessian and factor must be positive");
        }
        if self.importance.len() != width || self.importance.iter().any(|v| !v.is_finite() || *v < 0.0) {
            return wrong(&format!("importance must be {width} finite values, none negative"));
        }
        Ok(())
    }
}

/// Quantizes rows of `width` floats, a multiple of 32, to little `Σ e H eᵀ`; at most `sweeps` times over the groups of
/// a row. No row is worse than what `Encoder::ScaleSearch` makes of it, up to the rounding of f32 sums.
#[expect(clippy::too_many_arguments, reason = "planes are separate slices everywhere")]
pub fn quantize_hessian(
    data: &[f32],
    width: usize,
    moments: Moments,
    sweeps: usize,
    name: &str,
    codes: &mut [u8],
    scales: &mut [u8],
    stop: &AtomicBool,
) -> Result<()> {
    check_planes(FloatType::F32, size_of_val(data), codes.len(), scales.len())?;
    check_rows(data, width)?;
    let groups = width / GROUP_SIZE * TILE_ROWS;
    let planes = codes.par_chunks_mut(groups * CODE_BYTES).zip(scales.par_chunks_mut(groups * SCALE_BYTES));
    let tiles = data.par_chunks(width * TILE_ROWS).zip(planes);
    pool::install(|| {
        moments.check(width, name, stop)?;
        check_range(data, name, stop)?;
        tiles.try_for_each(|(weights, (codes, scales))| {
            dispatch(Tile { weights, width, moments, sweeps, codes, scales, stop })
        })
    })
}

struct Tile<'a> {
    weights: &'a [f32],
    width: usize,
    moments: Moments<'a>,
    sweeps: usize,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    stop: &'a AtomicBool,
}

/// Quantized groups of a tile of rows, in the order of the weights.
#[derive(Clone)]
struct Grid {
    /// Codes less 8.
    levels: Vec<Group>,
    /// As stored.
    scales: Vec<f32>,
}

impl Kernel for Tile<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn run(self, isa: impl Isa) -> Result<()> {
        let importance = self.moments.importance.as_chunks().0;
        let per_row = self.width / GROUP_SIZE;
        let plain = self.choose(isa, |_, x| ScaleSearch.encode(isa, x));
        let mut found = self.choose(isa, |group, x| weighted::encode(isa, x, &importance[group % per_row]));
        self.round(isa, &mut found)?;
        let (plain_gradient, mut gradient) = (self.gradient(isa, &plain)?, self.gradient(isa, &found)?);
        for row in 0..self.rows() {
            if self.cost(&plain, &plain_gradient, row, 0.0) < self.cost(&found, &gradient, row, 0.0) {
                self.copy(&plain, &mut found, row);
                gradient.data[row * gradient.stride..][..gradient.stride]
                    .copy_from_slice(&plain_gradient.data[row * gradient.stride..][..gradient.stride]);
            }
        }
        self.descend(isa, &mut found, &mut gradient)?;
        let ridge = self.moments.ridge;
        for row in 0..self.rows() {
            if self.cost(&plain, &plain_gradient, row, ridge) < self.cost(&found, &gradient, row, ridge) {
                self.copy(&plain, &mut found, row);
            }
        }
        for (codes, levels) in self.codes.as_chunks_mut().0.iter_mut().zip(&found.levels) {
            *codes = pack(levels);
        }
        for (stored, scale) in self.scales.as_chunks_mut().0.iter_mut().zip(&found.scales) {
            *stored = f16::from_f32(*scale).to_le_bytes();
        }
        Ok(())
    }
}

impl Tile<'_> {
    fn rows(&self) -> usize {
        self.weights.len() / self.width
    }

    fn copy(&self, from: &Grid, to: &mut Grid, row: usize) {
        let groups = row * self.width / GROUP_SIZE..(row + 1) * self.width / GROUP_SIZE;
        to.levels[groups.clone()].copy_from_slice(&from.levels[groups.clone()]);
        to.scales[groups.clone()].copy_from_slice(&from.scales[groups]);
    }

    #[inline(always)]
    fn choose(&self, isa: impl Isa, encode: impl Fn(usize, &Group) -> super::Coded) -> Grid {
        let groups = self.weights.as_chunks().0.iter().enumerate();
        let (levels, scales) = groups
            .map(|(group, x)| {
                let coded = encode(group, x);
                (isa.decode(&coded.codes, 1.0), grid::stored(coded.scale))
            })
            .unzip();
        Grid { levels, scales }
    }

    /// GPTQ: each column in turn is rounded, and its error, over the diagonal, spread over those that follow.
    #[inline(always)]
    fn round(&self, isa: impl Isa, grid: &mut Grid) -> Result<()> {
        let (width, Moments { factor, order, .. }) = (self.width, self.moments);
        let per_row = width / GROUP_SIZE;
        let mut rest = Rows::zeros(self.rows(), width);
        for (row, weights) in self.weights.chunks_exact(width).enumerate() {
            for (value, column) in rest.row(row).iter_mut().zip(order) {
                *value = weights[*column as usize];
            }
        }
        let mut terms = vec![Terms::default(); self.rows()];
        for (group, columns) in order.as_chunks::<GROUP_SIZE>().0.iter().enumerate() {
            alive(self.stop)?;
            let square = square(factor, width, group);
            for (row, terms) in terms.iter_mut().enumerate() {
                let mut x = *rest.group(row, group);
                terms.clear();
                for (i, column) in columns.iter().enumerate() {
                    let (place, at) = (row * per_row + *column as usize / GROUP_SIZE, *column as usize % GROUP_SIZE);
                    let scale = grid.scales[place];
                    let level = if scale == 0.0 { 0.0 } else { nearest(x[i] / scale) };
                    grid.levels[place][at] = level;
                    let spread = (level * scale - x[i]) / square[i][i];
                    add(&mut x, spread, &square[i]);
                    terms.push(i, spread);
                }
            }
            rest.add(isa, factor, width, group, (group + 1) * GROUP_SIZE, &terms);
        }
        Ok(())
    }

    /// `e H` of each row.
    #[inline(always)]
    fn gradient(&self, isa: impl Isa, grid: &Grid) -> Result<Rows> {
        let per_row = self.width / GROUP_SIZE;
        let mut gradient = Rows::zeros(self.rows(), self.width);
        let mut terms = vec![Terms::default(); self.rows()];
        for group in 0..per_row {
            alive(self.stop)?;
            for (row, terms) in terms.iter_mut().enumerate() {
                terms.clear();
                for (i, error) in self.error(grid, row * per_row + group).into_iter().enumerate() {
                    terms.push(i, error);
                }
            }
            gradient.add(isa, self.moments.hessian, self.width, group, 0, &terms);
        }
        Ok(gradient)
    }

    /// Of one group.
    #[inline(always)]
    fn error(&self, grid: &Grid, group: usize) -> Group {
        let (x, levels, scale) =
            (&self.weights.as_chunks::<GROUP_SIZE>().0[group], &grid.levels[group], grid.scales[group]);
        std::array::from_fn(|i| levels[i] * scale - x[i])
    }

    /// `e H eᵀ`, less `ridge` times `e eᵀ`.
    #[inline(always)]
    fn cost(&self, grid: &Grid, gradient: &Rows, row: usize, ridge: f32) -> f64 {
        let per_row = self.width / GROUP_SIZE;
        let gradient = gradient.data[row * gradient.stride..].as_chunks::<GROUP_SIZE>().0;
        let mut cost = 0.0;
        for (group, gradient) in gradient[..per_row].iter().enumerate() {
            for (error, gradient) in self.error(grid, row * per_row + group).into_iter().zip(gradient) {
                let error = f64::from(error);
                cost += error * (f64::from(*gradient) - f64::from(ridge) * error);
            }
        }
        cost
    }

    /// Sweeps over the groups until no row changes; `gradient` stays that of `grid`.
    #[inline(always)]
    fn descend(&self, isa: impl Isa, grid: &mut Grid, gradient: &mut Rows) -> Result<()> {
        let per_row = self.width / GROUP_SIZE;
        let mut terms = vec![Terms::default(); self.rows()];
        let mut moving = vec![true; self.rows()];
        for _ in 0..self.sweeps {
            let mut moved = vec![false; self.rows()];
            for group in 0..per_row {
                alive(self.stop)?;
                let square = square(self.moments.hessian, self.width, group);
                for (row, terms) in terms.iter_mut().enumerate() {
                    terms.clear();
                    if moving[row] {
                        let place = row * per_row + group;
                        let (levels, scale) = (&mut grid.levels[place], &mut grid.scales[place]);
                        let (old_levels, old_scale) = (*levels, *scale);
                        descend(levels, scale, *gradient.group(row, group), &square);
                        for (i, (new, old)) in levels.iter().zip(old_levels).enumerate() {
                            terms.push(i, new * *scale - old * old_scale);
                        }
                        moved[row] |= !terms.is_empty();
                    }
                }
                gradient.add(isa, self.moments.hessian, self.width, group, 0, &terms);
            }
            moving = moved;
            if !moving.contains(&true) {
                break;
            }
        }
        Ok(())
    }
}

/// Codes, then scale, of one group, each the best with all else fixed. `gradient` and `square` are its parts of `e H`
/// and `H`.
#[inline(always)]
#[expect(clippy::float_cmp, reason = "levels are whole numbers")]
fn descend(levels: &mut Group, scale: &mut f32, mut gradient: Group, square: &[Group; GROUP_SIZE]) {
    if *scale == 0.0 {
        return;
    }
    for _ in 0..TURNS {
        let mut changed = false;
        for i in 0..GROUP_SIZE {
            let level = nearest(levels[i] - gradient[i] / (square[i][i] * *scale));
            if level != levels[i] {
                add(&mut gradient, (level - levels[i]) * *scale, &square[i]);
                levels[i] = level;
                changed = true;
            }
        }
        let mut along = [0.0; GROUP_SIZE];
        for (level, row) in levels.iter().zip(square) {
            add(&mut along, *level, row);
        }
        let (slope, curvature) = (dot(levels, &gradient), dot(levels, &along));
        let wanted = *scale - slope / curvature;
        let fitted = if wanted.abs() <= 65504.0 { grid::stored(wanted) } else { *scale };
        let step = fitted - *scale;
        if fitted != 0.0 && step * (step * curvature + 2.0 * slope) < 0.0 {
            add(&mut gradient, step, &along);
            *scale = fitted;
            changed = true;
        }
        if !changed {
            break;
        }
    }
}

/// The level nearest to `steps`, half to even.
#[inline(always)]
fn nearest(steps: f32) -> f32 {
    #[expect(clippy::manual_clamp, reason = "clamp keeps NaN")]
    steps.round_ties_even().max(-8.0).min(7.0)
}

/// `x += by * y`
#[inline(always)]
fn add(x: &mut Group, by: f32, y: &Group) {
    for (x, y) in x.iter_mut().zip(y) {
        *x = by.mul_add(*y, *x);
    }
}

/// Eight sums, then theirs.
#[inline(always)]
fn dot(x: &Group, y: &Group) -> f32 {
    let mut sums = [0.0_f32; 8];
    for (x, y) in x.as_chunks::<8>().0.iter().zip(y.as_chunks::<8>().0) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum = x.mul_add(*y, *sum);
        }
    }
    sums.iter().sum()
}

/// The square of `matrix` on its diagonal that belongs to `group`.
#[inline(always)]
fn square(matrix: &[f32], width: usize, group: usize) -> [Group; GROUP_SIZE] {
    std::array::from_fn(|i| matrix[(group * GROUP_SIZE + i) * width..].as_chunks().0[group])
}

#[inline(always)]
fn pack(levels: &Group) -> Codes {
    let code = |i: usize| (levels[i] + 8.0) as u8;
    std::array::from_fn(|i| code(i) | code(i + CODE_BYTES) << 4)
}
