//! The 16 values a given scale can express, and how far a group is from them.

use half::f16;

use super::{Coded, Group};
use crate::q40::GROUP_SIZE;

/// Codes of the grid values nearest to `x`, half away from zero; all 8 if `scale` is 0.
#[inline(always)]
pub(super) fn round(x: &Group, scale: f32) -> [u8; GROUP_SIZE] {
    if scale == 0.0 {
        return [8; GROUP_SIZE];
    }
    x.map(|value| to_code((value / scale).round() + 8.0))
}

/// `clamp(v, 0, 15)` truncated.
#[inline(always)]
pub(super) fn to_code(v: f32) -> u8 {
    // Written so that each line is one vector instruction, unlike `f32::clamp`, which keeps NaN.
    let v = if v > 0.0 { v } else { 0.0 };
    let v = if v < 15.0 { v } else { 15.0 };
    // SAFETY: `v` is in [0, 15].
    unsafe { v.to_int_unchecked::<i32>() as u8 }
}

/// `x` on the grid of `scale` as f16 stores it.
#[inline(always)]
pub(super) fn encode(x: &Group, scale: f32) -> Coded {
    let scale = f16::from_f32(scale).to_f32();
    Coded { scale, codes: round(x, scale) }
}

/// Squared error of `coded` as it will decode, in f64 so that comparisons can be trusted.
#[inline(always)]
pub(super) fn squared_error(x: &Group, coded: &Coded) -> f64 {
    let scale = f16::from_f32(coded.scale).to_f32();
    let mut lanes = [0.0; 4];
    for (i, (value, code)) in x.iter().zip(coded.codes).enumerate() {
        let error = f64::from(*value) - f64::from((f32::from(code) - 8.0) * scale);
        lanes[i % 4] += error * error;
    }
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
}
