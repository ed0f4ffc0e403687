//! Groups to test with.

use proptest::prelude::*;

use super::Group;
use crate::q40::GROUP_SIZE;
use crate::q40::quantize::LARGEST;

/// Any bits, often those of NaN and infinities.
pub fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![any::<u32>().prop_map(f32::from_bits), Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)]
}

/// Groups that Q40 accepts: bell-shaped at any scale, full of ties, with zeros of both signs, constant, subnormal,
/// of arbitrary bits.
pub fn group() -> impl Strategy<Value = Group> {
    let bell = (prop::array::uniform32(-1.0_f32..1.0), -150..19).prop_map(|(x, power)| {
        let scale = 2.0_f64.powi(power) as f32;
        let bell: Group = std::array::from_fn(|i| x[i] * x[(i + 7) % GROUP_SIZE].abs() * scale);
        bell
    });
    let ties = (prop::array::uniform32(-8_i8..=8), -24..15)
        .prop_map(|(x, power)| x.map(|v| f32::from(v) / 2.0 * 2.0_f32.powi(power)));
    let zeros = prop::array::uniform32(prop_oneof![8 => Just(0.0_f32), 8 => Just(-0.0), 1 => -1e-3_f32..1e-3]);
    let constant = (-LARGEST..=LARGEST).prop_map(|v| [v; GROUP_SIZE]);
    let subnormal = prop::array::uniform32(0_u32..64).prop_map(|x| x.map(|v| f32::from_bits(v.rotate_right(1))));
    let bits = prop::array::uniform32(any::<u32>()).prop_map(|x| {
        x.map(|v| {
            let v = f32::from_bits(v);
            if v.abs() <= LARGEST { v } else { f32::from_bits(v.to_bits() & 0x3fff_ffff) }
        })
    });
    prop_oneof![4 => bell, 2 => ties, 1 => zeros, 1 => constant, 1 => subnormal, 2 => bits]
}
