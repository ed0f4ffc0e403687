//! The float types weights come in, and their conversion to and from f32 by tiles.

use std::str::FromStr;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::TILE;
use crate::error::{Error, Result};

/// Element type of a float array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The floats in `bytes`, at most [`TILE`]: in place when they are aligned f32, converted in `buffer` otherwise.
    pub(super) fn load<'a>(self, bytes: &'a [u8], buffer: &'a mut [f32; TILE]) -> &'a [f32] {
        let out = &mut buffer[..bytes.len() / self.size()];
        match self {
            Self::F32 => match bytemuck::try_cast_slice(bytes) {
                Ok(floats) => return floats,
                Err(_) => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
            },
            Self::F16 => {
                let mut halves = [f16::ZERO; TILE];
                let halves = &mut halves[..out.len()];
                bytemuck::cast_slice_mut(halves).copy_from_slice(bytes);
                halves.convert_to_f32_slice(out);
            }
            Self::Bf16 => {
                for (value, half) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16);
                }
            }
        }
        out
    }

    /// Rounds `values`, at most [`TILE`], to nearest even into `bytes`. NaN stays NaN, payloads may change.
    #[inline(always)]
    pub(super) fn store(self, values: &[f32], bytes: &mut [u8]) {
        match self {
            Self::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
            Self::F16 => {
                let mut halves = [f16::ZERO; TILE];
                let halves = &mut halves[..values.len()];
                halves.convert_from_f32_slice(values);
                bytes.copy_from_slice(bytemuck::cast_slice(halves));
            }
            Self::Bf16 => {
                for (value, half) in values.iter().zip(bytes.as_chunks_mut().0) {
                    let bits = value.to_bits();
                    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
                    let kept = if value.is_nan() { bits | 0x40_0000 } else { rounded };
                    *half = ((kept >> 16) as u16).to_le_bytes();
                }
            }
        }
    }
}

impl FromStr for FloatType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::InvalidArgument(format!("float type must be f32, f16 or bf16, got {name:?}"))),
        }
    }
}
