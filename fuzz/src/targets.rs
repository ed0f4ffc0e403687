//! What must hold for any bytes. `tests/corpora.rs` runs the same over what is committed.

use std::ops::ControlFlow;
use std::path::{Component, Path};
use std::sync::atomic::AtomicBool;

use crate::native::archive::{self, dat_name};
use crate::native::dat::{DatType, HEADER_LEN, Header};
use crate::native::q40::{Encoder, FloatType, dequantize, join, quantize, quantize_with_scales, split};

/// Nobody asks these calls to stop.
static GO: AtomicBool = AtomicBool::new(false);
/// Bytes of an entry that are read.
const MOST: u64 = 1 << 20;
const ENCODERS: [&str; 4] = ["signed_extreme", "abs_max", "min_max", "scale_search"];

/// A header that is read is one that can be made, and is written as it was read.
pub fn dat_header(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else { return };
    let Ok(header) = Header::decode(bytes) else { return };
    assert_eq!(Header::new(header.dtype(), &header.shape()).as_ref().ok(), Some(&header));
    assert_eq!(Header::decode(&header.encode()).ok().as_ref(), Some(&header));
    let elements: u64 = header.shape().iter().map(|&d| d as u64).product();
    let most = if header.dtype() == DatType::Q40 { elements } else { elements * 8 };
    assert!(header.payload_len() <= most && header.file_len() == header.payload_len() + HEADER_LEN as u64);
}

/// Entries that are given out have plain names, each once, and as many bytes as they say; so do the names we write.
pub fn archive(bytes: &[u8]) {
    let mut names = Vec::new();
    let _refused = archive::visit_bytes(Path::new("fuzz"), bytes, &GO, &mut |member| {
        assert!(is_plain(member.name()) && !names.contains(&member.name().to_owned()), "{:?}", member.name());
        names.push(member.name().to_owned());
        if let Ok(content) = member.read_all(MOST) {
            assert_eq!(content.len() as u64, member.size());
        }
        Ok(ControlFlow::Continue(()))
    });
    if let Ok(label) = std::str::from_utf8(bytes)
        && let Ok(name) = dat_name(label)
    {
        assert!(is_plain(&name), "{name:?}");
    }
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Any archive, and any graph.nnef, is passed or refused.
pub fn preflight(bytes: &[u8]) {
    let _outcome = crate::native::preflight::check_bytes(bytes, &GO);
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    if tar.append_data(&mut header, "graph.nnef", bytes).is_ok()
        && let Ok(archive) = tar.into_inner()
    {
        let _outcome = crate::native::preflight::check_bytes(&archive, &GO);
    }
}

/// Floats are refused, or become groups whose values are finite, survive both layouts, and are their own nearest ones.
pub fn q40(bytes: &[u8]) {
    let Some((choice, data)) = bytes.split_first() else { return };
    let data = &data[..data.len() / 128 * 128];
    let Ok(encoder) = Encoder::new(ENCODERS[usize::from(choice % 4)], f64::from(choice / 4 + 1) / 64.0) else { return };
    let (mut codes, mut scales) = (vec![0; data.len() / 8], vec![0; data.len() / 64]);
    let outcome = quantize(data, FloatType::F32, encoder, "fuzz", &mut codes, &mut scales, &GO);
    let held = |value: &[u8; 4]| f32::from_le_bytes(*value).abs() <= 8.0 * 65504.0;
    assert_eq!(outcome.is_ok(), data.as_chunks().0.iter().all(held));
    if outcome.is_err() {
        return;
    }
    let mut blocks = vec![0; data.len() / 128 * 18];
    let (mut codes_back, mut scales_back) = (vec![1; codes.len()], vec![1; scales.len()]);
    let mut same = join(&codes, &scales, &mut blocks, &GO).is_ok();
    same &= split(&blocks, &mut codes_back, &mut scales_back, &GO).is_ok();
    assert!(same && codes == codes_back && scales == scales_back);
    let values = decoded(&codes, &scales);
    assert!(values.iter().all(|value| value.is_finite()));
    let again =
        quantize_with_scales(bytemuck::cast_slice(&values), FloatType::F32, "fuzz", &scales, &mut codes_back, &GO);
    assert!(again.is_ok() && decoded(&codes_back, &scales) == values);
}

fn decoded(codes: &[u8], scales: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; codes.len() * 2];
    let outcome = dequantize(codes, scales, FloatType::F32, bytemuck::cast_slice_mut(&mut values), &GO);
    assert!(outcome.is_ok());
    values
}
