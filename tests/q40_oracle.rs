//! Q40 against tract's own quantizer and dequantizer: the bytes we write are the bytes tract would.

use std::sync::atomic::AtomicBool;

use _native::q40::{Encoder, FloatType, dequantize, join, quantize};
use tract_linalg::block_quant::{BlockQuant, Q4_0};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Bell-shaped groups, each at a scale of its own from 1e-8 to 1e4, the same on every run.
fn groups(count: usize) -> Vec<f32> {
    let mut state = 7_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut x = Vec::with_capacity(count * 32);
    for _ in 0..count {
        let scale = 10_f32.powf(uniform() * 12.0 - 8.0);
        // A quarter of the groups on a coarse lattice: ties of extremes and of roundings.
        let lattice = uniform() < 0.25;
        x.extend((0..32).map(|_| {
            let v = (uniform() + uniform() + uniform()) * 2.0 - 3.0;
            scale * if lattice { (v * 4.0).round() } else { v }
        }));
    }
    x
}

fn blocks(x: &[f32], encoder: Encoder) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let (mut codes, mut scales) = (vec![0; x.len() / 2], vec![0; x.len() / 16]);
    let mut blocks = vec![0; x.len() / 32 * 18];
    let stop = AtomicBool::new(false);
    quantize(bytemuck::cast_slice(x), FloatType::F32, encoder, "w", &mut codes, &mut scales, &stop)?;
    join(&codes, &scales, &mut blocks, &stop)?;
    Ok(blocks)
}

#[test]
fn a_million_groups_quantize_as_tract_does() -> Outcome {
    let x = groups(1 << 20);
    for x in x.chunks(32 << 14) {
        let (ours, theirs) = (blocks(x, Encoder::SignedExtreme)?, Q4_0.quant_f32(x)?);
        let different = ours.chunks(18).zip(theirs.chunks(18)).position(|(ours, theirs)| ours != theirs);
        assert_eq!(different.map(|g| &x[g * 32..][..32]), None);
    }
    Ok(())
}

#[test]
fn tract_decodes_what_we_decode() -> Outcome {
    let x = groups(1 << 14);
    for encoder in [Encoder::SignedExtreme, Encoder::ScaleSearch] {
        let blocks = blocks(&x, encoder)?;
        let (mut codes, mut scales) = (vec![0; x.len() / 2], vec![0; x.len() / 16]);
        _native::q40::split(&blocks, &mut codes, &mut scales, &AtomicBool::new(false))?;
        let mut ours = vec![0; x.len() * 4];
        dequantize(&codes, &scales, FloatType::F32, &mut ours, &AtomicBool::new(false))?;
        let theirs = Q4_0.dequant_f32(&blocks)?;
        assert!(theirs.as_bytes() == ours, "{encoder:?}");
    }
    Ok(())
}
