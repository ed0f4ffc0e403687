#![allow(clippy::unwrap_used, clippy::panic, clippy::float_cmp, reason = "tests; exactness is what is tested")]

use proptest::prelude::*;

use super::*;
use crate::q40::simd::Scalar;
use crate::q40::simd::samples::{any_float, group};
use crate::q40::{self, dequantize, join, split};

const ENCODERS: [Encoder; 5] = [
    Encoder::SignedExtreme,
    Encoder::AbsMax,
    Encoder::MinMax { percentile: 1.0 },
    Encoder::MinMax { percentile: 0.9 },
    Encoder::ScaleSearch,
];

fn run(data: &[u8], float: FloatType, encoder: Encoder) -> Result<(Vec<u8>, Vec<u8>)> {
    let n = data.len() / float.size();
    let (mut codes, mut scales) = (vec![0xee; n / 2], vec![0xee; n / 16]);
    quantize(data, float, encoder, "layer.weight", &mut codes, &mut scales, &AtomicBool::new(false))?;
    Ok((codes, scales))
}

fn encode(x: &[f32], encoder: Encoder) -> (Vec<u8>, Vec<u8>) {
    run(bytemuck::cast_slice(x), FloatType::F32, encoder).unwrap()
}

/// Element by element from the definition, unlike the kernels.
fn decode(codes: &[u8], scales: &[u8]) -> Vec<f64> {
    let scale = |i: usize| f16::from_le_bytes([scales[i / 32 * 2], scales[i / 32 * 2 + 1]]).to_f64();
    let code = |i: usize| codes[i / 32 * 16 + i % 16] >> (if i % 32 < 16 { 0 } else { 4 }) & 15;
    (0..codes.len() * 2).map(|i| (f64::from(code(i)) - 8.0) * scale(i)).collect()
}

fn squared_error(x: &[f32], encoder: Encoder) -> f64 {
    let (codes, scales) = encode(x, encoder);
    x.iter().zip(decode(&codes, &scales)).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum()
}

/// A bell-shaped sample, the same on every run.
fn bell(n: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..6).map(|_| uniform()).sum()).collect()
}

/// `quantize_row_q4_0_ref` of ggml, line by line.
fn ggml(x: &[f32]) -> (f16, [u8; 16]) {
    let (mut amax, mut max) = (0.0_f32, 0.0_f32);
    for &v in x {
        if amax < v.abs() {
            (amax, max) = (v.abs(), v);
        }
    }
    let d = max / -8.0;
    let id = if d == 0.0 { 0.0 } else { 1.0 / d };
    let quant = |v: f32| ((v * id + 8.5) as i8).min(15) as u8;
    (f16::from_f32(d), std::array::from_fn(|j| quant(x[j]) | quant(x[16 + j]) << 4))
}

#[test]
fn signed_extreme_on_awkward_groups() {
    let tie = |first: f32| {
        let mut x = [0.25; 32];
        (x[3], x[9]) = (first, -first);
        x
    };
    for (x, scale, code_3, code_9) in [
        (tie(1.0), -0.125, 0, 15),
        (tie(-1.0), 0.125, 0, 15),
        ([0.0; 32], -0.0, 8, 8),
        ([-0.0; 32], -0.0, 8, 8),
        ([LARGEST; 32], -65504.0, 0, 0),
        ([-LARGEST; 32], 65504.0, 0, 0),
        ([f32::MIN_POSITIVE / 4.0; 32], -0.0, 8, 8),
    ] {
        let (codes, scales) = encode(&x, Encoder::SignedExtreme);
        let stored = f16::from_le_bytes([scales[0], scales[1]]);
        assert_eq!(stored.to_bits(), f16::from_f32(scale).to_bits(), "{x:?}");
        assert_eq!((codes[3] & 15, codes[9] & 15), (code_3, code_9), "{x:?}");
    }
}

#[test]
fn the_default_search_gains_what_it_should() {
    let x = bell(32 * 4096);
    let gain = squared_error(&x, Encoder::ScaleSearch) / squared_error(&x, Encoder::SignedExtreme);
    // 0.885 is what 320 candidates of both signs reach on a normal sample.
    assert!((0.85..0.90).contains(&gain), "{gain}");
    assert!(squared_error(&x, Encoder::AbsMax) > squared_error(&x, Encoder::SignedExtreme));
}

/// ggml's `test-quantize-fns`: its test vector and its ceiling for 4 bits.
#[test]
fn errors_stay_under_ggmls_ceiling() {
    let x: Vec<f32> = (0..32 * 128).map(|i| 0.1 + 2.0 * (i as f32).cos()).collect();
    for encoder in ENCODERS {
        let error = squared_error(&x, encoder).sqrt() / x.len() as f64;
        assert!(error < 0.002, "{encoder:?}: {error}");
    }
}

#[test]
fn refusals_name_tensor_place_and_count() {
    let refusal = |x: &[f32]| match run(bytemuck::cast_slice(x), FloatType::F32, Encoder::ScaleSearch) {
        Err(Error::ImpossibleQuantization(text)) => text,
        other => panic!("{other:?}"),
    };
    let mut x = bell(TILE * 3);
    x[TILE * 2 + 5] = f32::NAN;
    x[TILE + 77] = f32::NEG_INFINITY;
    x[TILE + 78] = LARGEST.next_up();
    let text = refusal(&x);
    for part in ["\"layer.weight\"", "3 value(s)", "-inf at flat index 2125", "524032"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let scales = vec![0; x.len() / 16];
    let mut codes = vec![0; x.len() / 2];
    let stop = AtomicBool::new(false);
    let text = quantize_with_scales(bytemuck::cast_slice(&x), FloatType::F32, "w", &scales, &mut codes, &stop);
    assert!(text.unwrap_err().to_string().contains("2 value(s)"));
}

#[test]
fn scales_given_must_be_finite() {
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        let scales: Vec<u8> = [f16::ONE, bad].iter().flat_map(|s| s.to_le_bytes()).collect();
        let outcome =
            quantize_with_scales(&[0; 256], FloatType::F32, "w", &scales, &mut [0; 32], &AtomicBool::new(false));
        assert!(
            matches!(&outcome, Err(Error::ImpossibleQuantization(text)) if text.contains("group 1")),
            "{outcome:?}"
        );
    }
}

#[test]
fn halves_round_away_from_zero_and_what_is_below_does_not() {
    for (steps, rounded) in [(0.5, 1.0), (1.5, 2.0), (2.5, 3.0), (6.5, 7.0)] {
        for (v, level) in [(steps, rounded), (-steps, -rounded), (f32::next_down(steps), rounded - 1.0)] {
            let (x, mut codes) = ([v; 32], [0; 16]);
            let (data, stop) = (bytemuck::cast_slice(&x), AtomicBool::new(false));
            quantize_with_scales(data, FloatType::F32, "w", &f16::ONE.to_le_bytes(), &mut codes, &stop).unwrap();
            assert_eq!(f32::from(codes[0] & 15), 8.0 + level, "{v}");
        }
    }
}

#[test]
fn lengths_and_names_are_checked() {
    let stop = AtomicBool::new(false);
    for (data, codes, scales) in [(124, 16, 2), (126, 16, 2), (128, 15, 2), (128, 16, 3), (256, 16, 2)] {
        let (data, mut codes, mut scales) = (vec![0; data], vec![0; codes], vec![0; scales]);
        let outcome = quantize(&data, FloatType::F32, Encoder::AbsMax, "w", &mut codes, &mut scales, &stop);
        assert!(matches!(outcome, Err(Error::InvalidArgument(_))), "{outcome:?}");
    }
    for percentile in [0.0, -0.1, 1.1, f64::NAN] {
        assert!(matches!(Encoder::new("min_max", percentile), Err(Error::InvalidArgument(_))));
    }
    assert!(matches!(Encoder::new("nearest", 1.0), Err(Error::InvalidArgument(_))));
    assert!(matches!("f64".parse::<FloatType>(), Err(Error::InvalidArgument(_))));
}

#[test]
fn a_raised_flag_stops_the_work() {
    let stop = &AtomicBool::new(true);
    let (data, codes, scales, blocks) = (&mut [0; 128], &mut [0; 16], &mut [0; 2], &mut [0; 18]);
    let outcomes = [
        quantize(data, FloatType::F32, Encoder::AbsMax, "w", codes, scales, stop),
        quantize_with_scales(data, FloatType::F32, "w", scales, codes, stop),
        dequantize(codes, scales, FloatType::F32, data, stop),
        q40::squared_error(codes, scales, FloatType::F32, data, FloatType::F32, stop).map(drop),
        join(codes, scales, blocks, stop),
        split(blocks, codes, scales, stop),
    ];
    for (index, outcome) in outcomes.iter().enumerate() {
        assert!(matches!(outcome, Err(Error::Interrupted)), "{index}: {outcome:?}");
    }
}

#[test]
fn an_empty_tensor_is_no_error() {
    assert_eq!(run(&[], FloatType::Bf16, Encoder::ScaleSearch).unwrap(), (vec![], vec![]));
}

#[test]
fn threads_do_not_change_a_bit() {
    let x = bell(TILE * (MIN_TILES * 3 + 1) + 32 * 5);
    for encoder in ENCODERS {
        let [one, two, five] = [1, 2, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| encode(&x, encoder))
        });
        assert!(one == two && two == five, "{encoder:?}");
    }
}

#[test]
fn unaligned_and_half_inputs_give_what_their_f32_would() {
    let x = bell(TILE + 64);
    let halves: Vec<u8> = x.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    let brains: Vec<u8> = x.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let widened: Vec<f32> = x.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
    let brain_widened: Vec<f32> = x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
    let bytes = bytemuck::cast_slice::<f32, u8>(&x).to_vec();
    for encoder in ENCODERS {
        for (float, bytes, same) in [
            (FloatType::F32, &bytes, &x),
            (FloatType::F16, &halves, &widened),
            (FloatType::Bf16, &brains, &brain_widened),
        ] {
            let expected = encode(same, encoder);
            for shift in 0..4 {
                let mut shifted = vec![0; shift];
                shifted.extend_from_slice(bytes);
                assert_eq!(run(&shifted[shift..], float, encoder).unwrap(), expected, "{encoder:?} {float:?} {shift}");
            }
        }
    }
}

struct OneGroup<'a, E>(E, &'a Group);

impl<E: Encode> Kernel for OneGroup<'_, E> {
    type Output = (u32, Codes);

    fn run(self, isa: impl Isa) -> Self::Output {
        let coded = self.0.encode(isa, self.1);
        (coded.scale.to_bits(), coded.codes)
    }
}

fn same_bits<E: Encode>(encoder: E, x: &Group) -> bool {
    dispatch(OneGroup(encoder, x)) == OneGroup(encoder, x).run(Scalar)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn signed_extreme_is_ggml(x in group()) {
        let (codes, scales) = encode(&x, Encoder::SignedExtreme);
        let (scale, expected) = ggml(&x);
        prop_assert_eq!(&scales[..], scale.to_le_bytes());
        // Below 2^-125, 1 / d overflows: ggml converts infinities, we write 8; both decode to 0.
        let tiny = x.iter().all(|v| v.abs() <= 2.0_f32.powi(-125));
        prop_assert!(codes == expected || tiny, "{:?} {:?}", codes, expected);
    }

    #[test]
    fn encoders_give_the_bits_of_the_oracle(x in group(), percentile in 0.01..0.999) {
        prop_assert!(same_bits(SignedExtreme, &x) && same_bits(AbsMax, &x));
        prop_assert!(same_bits(MinMax::new(percentile), &x) && same_bits(ScaleSearch, &x));
    }

    #[test]
    fn search_and_clipping_are_never_worse_than_signed_extreme(x in group(), percentile in 0.001..=1.0) {
        let reference = squared_error(&x, Encoder::SignedExtreme) * (1.0 + 1e-12);
        prop_assert!(squared_error(&x, Encoder::ScaleSearch) <= reference);
        let clipped = squared_error(&x, Encoder::MinMax { percentile });
        prop_assert!(clipped <= reference);
    }

    #[test]
    fn no_encoder_but_ggmls_is_worse_than_zeros(x in group(), percentile in 0.001..0.999) {
        let zeros: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        for encoder in [Encoder::AbsMax, Encoder::MinMax { percentile }, Encoder::ScaleSearch] {
            prop_assert!(squared_error(&x, encoder) <= zeros * (1.0 + 1e-12), "{:?}", encoder);
        }
    }

    #[test]
    fn codes_for_given_scales_are_the_formula(x in group(), scale: u16) {
        let scale = f16::from_bits(scale);
        prop_assume!(scale.is_finite());
        let mut codes = [0; 16];
        let stop = AtomicBool::new(false);
        let data = bytemuck::cast_slice(&x);
        quantize_with_scales(data, FloatType::F32, "w", &scale.to_le_bytes(), &mut codes, &stop).unwrap();
        for (i, v) in x.iter().enumerate() {
            let code = codes[i % 16] >> (i / 16 * 4) & 15;
            let steps = if scale == f16::ZERO { 0.0 } else { (v / scale.to_f32()).round() };
            prop_assert_eq!(f32::from(code), (steps + 8.0).clamp(0.0, 15.0));
        }
    }

    #[test]
    fn quantized_values_quantize_to_themselves(codes: Codes, scale in 0_u16..0x7c00) {
        // Given their own scale, and given none when a code is at the extreme of the grid.
        let mut codes = codes;
        codes[0] &= 0xf0;
        let scales = scale.to_le_bytes();
        let (mut data, mut again, stop) = ([0; 128], [0; 16], AtomicBool::new(false));
        dequantize(&codes, &scales, FloatType::F32, &mut data, &stop).unwrap();
        quantize_with_scales(&data, FloatType::F32, "w", &scales, &mut again, &stop).unwrap();
        prop_assert!(scale == 0 || again == codes);
        let x: Vec<f32> = data.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
        prop_assert_eq!(encode(&x, Encoder::SignedExtreme).1, if scale == 0 { vec![0, 0x80] } else { scales.to_vec() });
        prop_assert_eq!(squared_error(&x, Encoder::ScaleSearch), 0.0);
    }

    #[test]
    fn quantile_is_linear_between_ranks(x in group(), percentile in 0.0_f64..1.0) {
        let mut sorted = x.map(|v| f64::from(v.abs()));
        sorted.sort_by(f64::total_cmp);
        let position = percentile * 31.0;
        let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
        let expected = below + (above - below) * position.fract();
        let found = f64::from(MinMax::new(percentile).quantile(&x));
        prop_assert!((found - expected).abs() <= expected * 1e-6 + 1e-44, "{} {}", found, expected);
    }

    #[test]
    fn a_value_out_of_range_is_found_anywhere(n in 1_usize..200, at: prop::sample::Index, bad in any_float()) {
        let mut x = vec![1.0_f32; n * 32];
        let at = at.index(x.len());
        x[at] = bad;
        let outcome = run(bytemuck::cast_slice(&x), FloatType::F32, Encoder::SignedExtreme);
        if bad.abs() <= LARGEST {
            prop_assert!(outcome.is_ok());
        } else {
            let text = outcome.unwrap_err().to_string();
            prop_assert!(text.contains("1 value(s)") && text.ends_with("float"), "{}", text);
            let place = format!("at flat index {at};");
            prop_assert!(text.contains(&place), "{}", text);
        }
    }
}
