//! The primitives with AVX2, FMA and F16C. A group is four vectors of eight floats.

#[allow(clippy::wildcard_imports, reason = "the vocabulary of this file")]
use std::arch::x86_64::*;

use super::{Candidates, Codes, Group, Isa, Kernel, LANES, Panel, Terms};

/// Proof that this machine has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: `self` proves the features.
        unsafe { run(self, kernel) }
    }
}

/// Methods that forward to the functions below.
macro_rules! forward {
    ($($name:ident($($arg:ident: $type:ty),*) -> $output:ty;)*) => {
        impl Isa for Avx2 {
            $(#[inline(always)]
            fn $name(self, $($arg: $type),*) -> $output {
                // SAFETY: `self` proves the features.
                unsafe { $name($($arg),*) }
            })*
        }
    };
}

forward! {
    extreme(x: &Group) -> f32;
    magnitude_bits(x: &Group) -> u32;
    scaled_codes(x: &Group, inverse: f32) -> Codes;
    rounded_codes(x: &Group, scale: f32) -> Codes;
    decode(codes: &Codes, scale: f32) -> Group;
    squared_error(x: &Group, y: &Group) -> f64;
    fit(x: &Group, inverse: &Candidates) -> (Candidates, Candidates);
    accumulate(sums: &mut [f32; LANES], terms: &Terms, panel: &Panel) -> ();
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn extreme(x: &Group) -> f32 {
    let bits = load(x).map(|v| _mm256_castps_si256(v));
    // Positive floats order as i32; among negatives, magnitudes order as u32, above all positives.
    let positive = reduce(bits, |a, b| _mm256_max_epi32(a, b), |a, b| _mm_max_epi32(a, b));
    let negative = reduce(bits, |a, b| _mm256_max_epu32(a, b), |a, b| _mm_max_epu32(a, b));
    let (positive, negative) =
        (f32::from_bits(positive.cast_signed().max(0).cast_unsigned()), f32::from_bits(negative));
    if positive + negative == 0.0 {
        // Both signs of one magnitude, or nothing but zeros.
        return x.iter().copied().find(|value| value.abs() >= positive && positive > 0.0).unwrap_or(0.0);
    }
    if negative.is_sign_negative() && -negative > positive { negative } else { positive }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitude_bits(x: &Group) -> u32 {
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let bits = load(x).map(|v| _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    reduce(bits, |a, b| _mm256_max_epi32(a, b), |a, b| _mm_max_epi32(a, b))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled_codes(x: &Group, inverse: f32) -> Codes {
    let (inverse, half) = (_mm256_set1_ps(inverse), _mm256_set1_ps(8.5));
    pack(load(x).map(|v| _mm256_add_ps(_mm256_mul_ps(v, inverse), half)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rounded_codes(x: &Group, scale: f32) -> Codes {
    const TRUNCATE: i32 = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
    let (scale, eight, sign) = (_mm256_set1_ps(scale), _mm256_set1_ps(8.0), _mm256_set1_ps(-0.0));
    // The float below 1/2: adding 1/2 itself would carry 0.49999997 to 1.
    let half = _mm256_set1_ps(0.5_f32.next_down());
    let (least, most) = (_mm256_set1_ps(-8.0), _mm256_set1_ps(7.0));
    pack(load(x).map(|v| {
        let steps = _mm256_div_ps(v, scale);
        let away = _mm256_or_ps(half, _mm256_and_ps(steps, sign));
        let whole = _mm256_round_ps::<TRUNCATE>(_mm256_add_ps(steps, away));
        _mm256_add_ps(_mm256_min_ps(_mm256_max_ps(whole, least), most), eight)
    }))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode(codes: &Codes, scale: f32) -> Group {
    let (nibble, eight, scale) = (_mm_set1_epi8(15), _mm_set1_epi8(8), _mm256_set1_ps(scale));
    let codes: __m128i = bytemuck::cast(*codes);
    let low = _mm_sub_epi8(_mm_and_si128(codes, nibble), eight);
    let high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16::<4>(codes), nibble), eight);
    let levels = [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)];
    bytemuck::cast(levels.map(|v| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), scale)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn squared_error(x: &Group, y: &Group) -> f64 {
    let (x, y): ([__m128; 8], [__m128; 8]) = (bytemuck::cast(*x), bytemuck::cast(*y));
    let mut sums = _mm256_setzero_pd();
    for (x, y) in x.into_iter().zip(y) {
        let error = _mm256_sub_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(y));
        sums = _mm256_add_pd(sums, _mm256_mul_pd(error, error));
    }
    let s: [f64; 4] = bytemuck::cast(sums);
    (s[0] + s[1]) + (s[2] + s[3])
}

/// Candidates are the lanes: no sum ever crosses them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fit(x: &Group, inverse: &Candidates) -> (Candidates, Candidates) {
    // Added and taken away, it leaves no bits for a fraction: rounds half to even.
    let shift = _mm256_set1_ps(12_582_912.0);
    let (least, most) = (_mm256_set1_ps(-8.0), _mm256_set1_ps(7.0));
    let inverse: [__m256; 3] = bytemuck::cast(*inverse);
    let (mut xq, mut qq) = ([_mm256_setzero_ps(); 3], [_mm256_setzero_ps(); 3]);
    for value in x {
        let value = _mm256_set1_ps(*value);
        for c in 0..3 {
            let steps = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(value, inverse[c]), least), most);
            let q = _mm256_sub_ps(_mm256_add_ps(steps, shift), shift);
            xq[c] = _mm256_add_ps(xq[c], _mm256_mul_ps(value, q));
            // Squares of small integers: fusing changes nothing.
            qq[c] = _mm256_fmadd_ps(q, q, qq[c]);
        }
    }
    (bytemuck::cast(xq), bytemuck::cast(qq))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate(sums: &mut [f32; LANES], terms: &Terms, panel: &Panel) {
    let mut lanes: [__m256; LANES / 8] = bytemuck::cast(*sums);
    for (row, factor) in terms.iter() {
        let factor = _mm256_set1_ps(factor);
        for (lane, values) in lanes.iter_mut().zip(panel[row].as_chunks::<8>().0) {
            *lane = _mm256_fmadd_ps(factor, bytemuck::cast(*values), *lane);
        }
    }
    *sums = bytemuck::cast(lanes);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(x: &Group) -> [__m256; 4] {
    bytemuck::cast(*x)
}

/// One value out of 32 lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn reduce(
    [a, b, c, d]: [__m256i; 4],
    wide: impl Fn(__m256i, __m256i) -> __m256i,
    narrow: impl Fn(__m128i, __m128i) -> __m128i,
) -> u32 {
    let eight = wide(wide(a, b), wide(c, d));
    let four = narrow(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
    let two = narrow(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
    _mm_cvtsi128_si32(narrow(two, _mm_shuffle_epi32::<0b00_00_00_01>(two))).cast_unsigned()
}

/// Codes `clamp(trunc(v), 0, 15)`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pack(values: [__m256; 4]) -> Codes {
    let [a, b, c, d] = values.map(|v| _mm256_cvttps_epi32(v));
    // Narrowing works within 128-bit lanes: four bytes each of a, c, b, d in the lower, the next four in the upper.
    let bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, c), _mm256_packs_epi32(b, d));
    let bytes = _mm256_min_epu8(bytes, _mm256_set1_epi8(15));
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
    bytemuck::cast(_mm_or_si128(low, _mm_slli_epi16::<4>(high)))
}
