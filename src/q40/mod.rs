//! Q40 (GGUF `Q4_0`): groups of 32 consecutive floats share one f16 scale; `value = (code - 8) * scale`, code in `0..16`.
//!
//! Two layouts of the same bits. *Planes*: `codes` (16 bytes a group: byte `i` holds element `i` in its low nibble and
//! element `i + 16` in its high nibble) beside `scales` (f16). *Blocks*: 18 bytes a group, scale then codes.
//! Arrays are raw little-endian bytes and need no alignment.

#![expect(clippy::inline_always, reason = "kernels must be compiled with the instructions of their caller, see `simd`")]

pub mod block;
pub mod dequantize;
pub mod error;
pub mod float;
pub mod quantize;
mod simd;

pub use block::{BlockQ4_0, join, split};
pub use dequantize::dequantize;
pub use error::squared_error;
pub use float::FloatType;
pub use quantize::{Encoder, Moments, quantize, quantize_hessian, quantize_weighted, quantize_with_scales};

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Elements that share a scale.
pub const GROUP_SIZE: usize = 32;
/// Bytes of the codes of one group.
pub const CODE_BYTES: usize = GROUP_SIZE / 2;
/// Bytes of the scale of one group.
pub const SCALE_BYTES: usize = 2;

/// Elements converted, encoded and stored at a time: 8 KiB of f32, so that the passes over them stay in L1.
const TILE: usize = 2048;
/// Tiles a thread takes at least, to make scheduling them negligible.
const MIN_TILES: usize = 32;

const _: () = assert!(cfg!(target_endian = "little"), "arrays are exchanged as little-endian bytes");

/// [`Error::Interrupted`] once `stop` is true.
fn alive(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}

/// Checks the planes against `len`, the bytes of `n` floats, and returns `n`.
fn check_planes(float: FloatType, len: usize, codes: usize, scales: usize) -> Result<usize> {
    let n = len / float.size();
    if !len.is_multiple_of(float.size()) || !n.is_multiple_of(GROUP_SIZE) {
        let size = float.size();
        return Err(Error::InvalidArgument(format!(
            "Q40 needs a multiple of {GROUP_SIZE} floats of {size} bytes, got {len} bytes; pad the last dimension or leave the tensor in float"
        )));
    }
    let groups = n / GROUP_SIZE;
    if codes != groups * CODE_BYTES || scales != groups * SCALE_BYTES {
        return Err(Error::InvalidArgument(format!(
            "{n} elements need {} bytes of codes and {} of scales, got {codes} and {scales}",
            groups * CODE_BYTES,
            groups * SCALE_BYTES
        )));
    }
    Ok(n)
}
