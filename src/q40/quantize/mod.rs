//! Floats to Q40. Each encoder chooses, for one group of 32, a scale and 32 codes; this file drives them over arrays.
//!
//! What every encoder may count on and must give: inputs are finite and at most [`LARGEST`] in magnitude, so the scale
//! fits f16. Groups so small that f16 scales lose precision or vanish decode to finite values; every encoder but
//! `signed_extreme` (which repeats ggml bit for bit, down to f16's subnormal rounding) picks codes against the scale
//! as stored, whose grid holds 0, and so is never worse than a group of zeros.

mod abs_max;
mod grid;
mod hessian;
mod min_max;
mod panel;
mod scale_search;
mod signed_extreme;
mod weighted;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use self::abs_max::AbsMax;
pub use self::hessian::{Moments, quantize_hessian};
use self::min_max::MinMax;
use self::scale_search::ScaleSearch;
use self::signed_extreme::SignedExtreme;
pub use self::weighted::quantize_weighted;
use super::dequantize::load_scales;
use super::simd::{Codes, Group, Isa, Kernel, dispatch};
use super::{CODE_BYTES, FloatType, GROUP_SIZE, MIN_TILES, SCALE_BYTES, TILE, alive, check_planes};
use crate::error::{Error, Result};
use crate::pool;

/// Largest magnitude whose scale, an eighth of it, fits f16.
pub const LARGEST: f32 = 8.0 * 65504.0;

/// How a group's scale and codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encoder {
    /// ggml's reference rule: the element of largest magnitude becomes code 0, exactly.
    SignedExtreme,
    /// Largest magnitude / 8, codes clamped: the positive extreme loses 1/8. The rule of older exporters.
    AbsMax,
    /// Like `SignedExtreme`, from a quantile of the magnitudes where that lowers the squared error of the group.
    MinMax {
        /// Quantile in `(0, 1]`; 1 is `SignedExtreme`.
        percentile: f64,
    },
    /// Least squared error over candidate scales; never above that of `SignedExtreme`.
    ScaleSearch,
}

impl Encoder {
    /// The encoder called `name`; `percentile` is for `min_max` and ignored by the others.
    pub fn new(name: &str, percentile: f64) -> Result<Self> {
        match name {
            "signed_extreme" => Ok(Self::SignedExtreme),
            "abs_max" => Ok(Self::AbsMax),
            "min_max" if percentile > 0.0 && percentile <= 1.0 => Ok(Self::MinMax { percentile }),
            "min_max" => Err(Error::InvalidArgument(format!("percentile must be in (0, 1], got {percentile}"))),
            "scale_search" => Ok(Self::ScaleSearch),
            _ => Err(Error::InvalidArgument(format!(
                "encoder must be signed_extreme, abs_max, min_max or scale_search, got {name:?}"
            ))),
        }
    }
}

/// One encoded group; `scale` is rounded to f16 when stored.
struct Coded {
    scale: f32,
    codes: Codes,
}

/// A rule for one group. `encode` must be `#[inline(always)]`, see [`Kernel`].
trait Encode: Copy + Sync {
    fn encode(self, isa: impl Isa, x: &Group) -> Coded;
}

/// Quantizes `data` into `codes` and `scales`; `name` is for errors, after which both hold unspecified bytes.
pub fn quantize(
    data: &[u8],
    float: FloatType,
    encoder: Encoder,
    name: &str,
    codes: &mut [u8],
    scales: &mut [u8],
    stop: &AtomicBool,
) -> Result<()> {
    check_planes(float, data.len(), codes.len(), scales.len())?;
    let job = Job { data, float, codes, name, stop, largest: LARGEST };
    match encoder {
        Encoder::SignedExtreme | Encoder::MinMax { percentile: 1.0 } => job.encode(scales, SignedExtreme),
        Encoder::AbsMax => job.encode(scales, AbsMax),
        Encoder::MinMax { percentile } => job.encode(scales, MinMax::new(percentile)),
        Encoder::ScaleSearch => job.encode(scales, ScaleSearch),
    }
}

/// Rounds `data` onto the grid of given `scales`: `code = clamp(round(x / scale) + 8, 0, 15)`, half away from zero,
/// and 8 where the scale is 0.
pub fn quantize_with_scales(
    data: &[u8],
    float: FloatType,
    name: &str,
    scales: &[u8],
    codes: &mut [u8],
    stop: &AtomicBool,
) -> Result<()> {
    check_planes(float, data.len(), codes.len(), scales.len())?;
    let finite = |scale: &[u8; SCALE_BYTES]| f16::from_le_bytes(*scale).is_finite();
    if let Some(group) = scales.as_chunks().0.iter().position(|scale| !finite(scale)) {
        return Err(Error::ImpossibleQuantization(format!(
            "tensor {name:?}: the scale of group {group} is not finite"
        )));
    }
    let job = Job { data, float, codes, name, stop, largest: f32::MAX };
    job.run(scales.par_chunks(TILE / GROUP_SIZE * SCALE_BYTES), |x, codes, scales| {
        dispatch(RoundTile { x, codes, scales });
    })
}

/// A checked call: arrays that fit each other.
struct Job<'a> {
    data: &'a [u8],
    float: FloatType,
    codes: &'a mut [u8],
    name: &'a str,
    stop: &'a AtomicBool,
    /// Inputs above are refused.
    largest: f32,
}

impl Job<'_> {
    fn encode(self, scales: &mut [u8], encoder: impl Encode) -> Result<()> {
        self.run(scales.par_chunks_mut(TILE / GROUP_SIZE * SCALE_BYTES), |x, codes, scales| {
            dispatch(EncodeTile { encoder, x, codes, scales });
        })
    }

    /// Calls `tile(floats, codes, scales)` for each tile whose floats are in range, in parallel.
    fn run<S: Send>(
        self,
        scales: impl IndexedParallelIterator<Item = S>,
        tile: impl Fn(&[f32], &mut [u8], S) + Sync,
    ) -> Result<()> {
        let Self { data, float, codes, name, stop, largest } = self;
        let tiles = data.par_chunks(TILE * float.size()).zip(codes.par_chunks_mut(TILE / GROUP_SIZE * CODE_BYTES));
        let offenders = tiles.zip(scales).enumerate().with_min_len(MIN_TILES).map_init(
            || [0.0; TILE],
            |buffer, (index, ((data, codes), scales))| {
                if stop.load(Ordering::Relaxed) {
                    return ControlFlow::Break(());
                }
                let x = float.load(data, buffer);
                if dispatch(InRange { x, largest }) {
                    tile(x, codes, scales);
                    return ControlFlow::Continue(None);
                }
                ControlFlow::Continue(Offenders::find(x, index * TILE, largest))
            },
        );
        let merge = |a, b| ControlFlow::Continue(Offenders::merge(a, b));
        pool::install(|| match offenders.try_reduce(|| None, merge) {
            ControlFlow::Break(()) => Err(Error::Interrupted),
            ControlFlow::Continue(None) => Ok(()),
            ControlFlow::Continue(Some(found)) => Err(found.error(name, largest)),
        })
    }
}

/// Inputs that no Q40 group can hold.
struct Offenders {
    first: usize,
    value: f32,
    count: usize,
}

impl Offenders {
    fn find(x: &[f32], start: usize, largest: f32) -> Option<Self> {
        let mut bad = x.iter().enumerate().filter(|(_, value)| value.is_nan() || value.abs() > largest);
        let (first, &value) = bad.next()?;
        Some(Self { first: start + first, value, count: 1 + bad.count() })
    }

    fn merge(a: Option<Self>, b: Option<Self>) -> Option<Self> {
        match (a, b) {
            (Some(a), Some(b)) => {
                let first = if a.first < b.first { &a } else { &b };
                Some(Self { first: first.first, value: first.value, count: a.count + b.count })
            }
            (a, b) => a.or(b),
        }
    }

    fn error(&self, name: &str, largest: f32) -> Error {
        let Self { first, value, count } = self;
        let limit = if largest == LARGEST { format!(" and at most {LARGEST} in magnitude") } else { String::new() };
        Error::ImpossibleQuantization(format!(
            "tensor {name:?}: {count} value(s) that Q40 cannot hold, the first is {value} at flat index {first}; values must be finite{limit}: fix the weights, or leave this tensor in float"
        ))
    }
}

/// Refuses floats that no Q40 group can hold.
fn check_range(data: &[f32], name: &str, stop: &AtomicBool) -> Result<()> {
    let tiles = data.par_chunks(TILE).enumerate().with_min_len(MIN_TILES);
    let found = tiles.map(|(index, x)| alive(stop).map(|()| Offenders::find(x, index * TILE, LARGEST)));
    match found.try_reduce(|| None, |a, b| Ok(Offenders::merge(a, b)))? {
        Some(found) => Err(found.error(name, LARGEST)),
        None => Ok(()),
    }
}

struct InRange<'a> {
    x: &'a [f32],
    largest: f32,
}

impl Kernel for InRange<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self, isa: impl Isa) -> bool {
        self.x.as_chunks().0.iter().fold(0, |most, x| isa.magnitude_bits(x).max(most)) <= self.largest.to_bits()
    }
}

struct EncodeTile<'a, E> {
    encoder: E,
    x: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl<E: Encode> Kernel for EncodeTile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let mut scales = [0.0; TILE / GROUP_SIZE];
        let groups = self.x.as_chunks().0.iter().zip(self.codes.as_chunks_mut().0);
        for ((x, codes), scale) in groups.zip(&mut scales) {
            let coded = self.encoder.encode(isa, x);
            *codes = coded.codes;
            *scale = coded.scale;
        }
        let mut halves = [f16::ZERO; TILE / GROUP_SIZE];
        halves.convert_from_f32_slice(&scales);
        self.scales.copy_from_slice(&bytemuck::cast_slice(&halves)[..self.scales.len()]);
    }
}

struct RoundTile<'a> {
    x: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a [u8],
}

impl Kernel for RoundTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, isa: impl Isa) {
        let mut scales = [0.0; TILE / GROUP_SIZE];
        load_scales(self.scales, &mut scales[..self.scales.len() / SCALE_BYTES]);
        let groups = self.x.as_chunks().0.iter().zip(self.codes.as_chunks_mut().0);
        for ((x, codes), scale) in groups.zip(&scales) {
            *codes = grid::round(isa, x, *scale);
        }
    }
}

#[cfg(test)]
mod calibrated_tests;
#[cfg(test)]
mod tests;
