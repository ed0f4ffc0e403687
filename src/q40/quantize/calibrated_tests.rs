#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests; exactness is what is tested")]

use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use super::*;

/// Quantized rows, decoded from the definition.
struct Found {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Found {
    fn empty(n: usize) -> Self {
        Self { codes: vec![0xee; n / 2], scales: vec![0xee; n / 16] }
    }

    fn values(&self) -> Vec<f64> {
        let scale = |i: usize| f16::from_le_bytes([self.scales[i / 32 * 2], self.scales[i / 32 * 2 + 1]]).to_f64();
        let code = |i: usize| self.codes[i / 32 * 16 + i % 16] >> (if i % 32 < 16 { 0 } else { 4 }) & 15;
        (0..self.codes.len() * 2).map(|i| (f64::from(code(i)) - 8.0) * scale(i)).collect()
    }

    /// Σ importance * error² of each row.
    fn weighted_error(&self, x: &[f32], importance: &[f32]) -> f64 {
        let error = x.iter().zip(self.values()).zip(importance.iter().cycle());
        error.map(|((x, y), w)| f64::from(*w) * (f64::from(*x) - y).powi(2)).sum()
    }

    /// `e H eᵀ` of each row.
    fn costs(&self, x: &[f32], hessian: &[f64]) -> Vec<f64> {
        let errors: Vec<f64> = x.iter().zip(self.values()).map(|(x, y)| y - f64::from(*x)).collect();
        let width = hessian.len().isqrt();
        let product = |e: &[f64], row: &[f64]| e.iter().zip(row).map(|(e, h)| e * h).sum::<f64>();
        errors
            .chunks(width)
            .map(|e| (0..width).map(|i| e[i] * product(e, &hessian[i * width..][..width])).sum())
            .collect()
    }
}

fn plain(x: &[f32], encoder: Encoder) -> Found {
    let mut found = Found::empty(x.len());
    let stop = AtomicBool::new(false);
    quantize(bytemuck::cast_slice(x), FloatType::F32, encoder, "w", &mut found.codes, &mut found.scales, &stop)
        .unwrap();
    found
}

fn weighted(x: &[f32], width: usize, importance: &[f32]) -> Result<Found> {
    let mut found = Found::empty(x.len());
    let stop = AtomicBool::new(false);
    quantize_weighted(x, width, importance, "w", &mut found.codes, &mut found.scales, &stop)?;
    Ok(found)
}

/// Floats in (-1, 1), the same for a seed.
fn uniform(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n + 8).map(|_| next()).skip(8).collect()
}

/// Owned `Moments`, and the Hessian without its ridge, in f64.
struct Inputs {
    exact: Vec<f64>,
    hessian: Vec<f32>,
    ridge: f32,
    factor: Vec<f32>,
    order: Vec<u32>,
    importance: Vec<f32>,
}

impl Inputs {
    /// Of `count` inputs that share a direction, so that their elements are coupled.
    fn sample(seed: u64, width: usize, count: usize) -> Self {
        let x = uniform(seed, count * width);
        let shared = uniform(seed + 1, count);
        let x: Vec<f64> = x
            .iter()
            .enumerate()
            .map(|(i, v)| f64::from(*v) * (1.0 + (i % width % 5) as f64) + 2.0 * f64::from(shared[i / width]))
            .collect();
        let moment = |i: usize, j: usize| x.chunks(width).map(|x| x[i] * x[j]).sum::<f64>() / count.max(1) as f64;
        Self::new((0..width * width).map(|at| moment(at / width, at % width)).collect())
    }

    fn new(exact: Vec<f64>) -> Self {
        let width = exact.len().isqrt();
        let mean = exact.iter().step_by(width + 1).sum::<f64>() / width as f64;
        let ridge = if mean > 0.0 { 0.01 * mean as f32 } else { 1.0 };
        let mut damped = exact.clone();
        damped.iter_mut().step_by(width + 1).for_each(|v| *v += f64::from(ridge));
        let hessian: Vec<f32> = damped.iter().map(|v| *v as f32).collect();
        let importance: Vec<f32> = hessian.iter().step_by(width + 1).copied().collect();
        let mut order: Vec<u32> = (0..width as u32).collect();
        order.sort_by(|a, b| importance[*b as usize].total_cmp(&importance[*a as usize]));
        let at = |i: usize, j: usize| damped[order[i] as usize * width + order[j] as usize];
        Self { factor: factor(width, at), exact, hessian, ridge, order, importance }
    }

    fn moments(&self) -> Moments<'_> {
        let Self { hessian, ridge, factor, order, importance, .. } = self;
        Moments { hessian, ridge: *ridge, factor, order, importance }
    }
}

/// Upper `U` with `UᵀU` the inverse of `a`, by elimination: column by column, what GPTQ leaves of the inverse.
fn factor(width: usize, a: impl Fn(usize, usize) -> f64) -> Vec<f32> {
    // Gauss-Jordan; no pivots, since `a` is positive definite.
    let mut left: Vec<Vec<f64>> = (0..width).map(|i| (0..width).map(|j| a(i, j)).collect()).collect();
    let mut inverse: Vec<Vec<f64>> =
        (0..width).map(|i| (0..width).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for i in 0..width {
        let pivot = left[i][i];
        for j in 0..width {
            left[i][j] /= pivot;
            inverse[i][j] /= pivot;
        }
        for row in (0..width).filter(|row| *row != i) {
            let by = left[row][i];
            for j in 0..width {
                left[row][j] -= by * left[i][j];
                inverse[row][j] -= by * inverse[i][j];
            }
        }
    }
    let mut upper = vec![0.0; width * width];
    for i in 0..width {
        let root = inverse[i][i].sqrt();
        let row: Vec<f64> = inverse[i].iter().map(|v| v / root).collect();
        for j in i..width {
            upper[i * width + j] = row[j] as f32;
            for k in i..width {
                inverse[k][j] -= row[k] * row[j];
            }
        }
    }
    upper
}

fn by_hessian(x: &[f32], width: usize, moments: Moments, sweeps: usize) -> Result<Found> {
    let mut found = Found::empty(x.len());
    let stop = AtomicBool::new(false);
    quantize_hessian(x, width, moments, sweeps, "w", &mut found.codes, &mut found.scales, &stop)?;
    Ok(found)
}

#[test]
fn the_example_of_an_important_element() {
    // Between ±1, 0.9 has no code of its own; where nothing else counts, it gets one.
    let mut x = [0.3_f32; 32];
    (x[0], x[1]) = (-1.0, 0.9);
    let mut importance = [1e-6_f32; 32];
    importance[1] = 1.0;
    let found = weighted(&x, 32, &importance).unwrap();
    assert!((found.values()[1] - 0.9).abs() < 1e-3, "{}", found.values()[1]);
}

#[test]
fn rows_share_importance_in_order() {
    let x = uniform(3, 8 * 64);
    let importance: Vec<f32> = uniform(4, 2 * 64).iter().map(|v| v.abs()).collect();
    let both = weighted(&x, 64, &importance).unwrap();
    for half in 0..2 {
        let alone = weighted(&x[half * 256..][..256], 64, &importance[half * 64..][..64]).unwrap();
        assert_eq!(both.codes[half * 128..][..128], alone.codes);
        assert_eq!(both.scales[half * 16..][..16], alone.scales);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let x = uniform(1, 128);
    for (width, importance) in [
        (0, vec![]),
        (33, vec![1.0; 33]),
        (64, vec![1.0; 32]),
        (64, vec![]),
        (32, vec![1.0; 96]),
        (64, vec![-1.0; 64]),
        (64, vec![f32::NAN; 64]),
    ] {
        assert!(matches!(weighted(&x, width, &importance), Err(Error::InvalidArgument(_))), "{width} {importance:?}");
    }
    let inputs = Inputs::sample(1, 32, 64);
    let good = inputs.moments();
    let (nan, zeros, twice) = (vec![f32::NAN; 1024], vec![0.0; 1024], vec![0; 32]);
    for moments in [
        Moments { hessian: &nan, ..good },
        Moments { hessian: &zeros, ..good },
        Moments { factor: &zeros, ..good },
        Moments { factor: &good.factor[1..], ..good },
        Moments { order: &twice, ..good },
        Moments { order: &[], ..good },
        Moments { ridge: f32::NAN, ..good },
        Moments { ridge: -1.0, ..good },
        Moments { importance: &nan[..32], ..good },
    ] {
        assert!(matches!(by_hessian(&x, 32, moments, 1), Err(Error::InvalidArgument(_))));
    }
    for bad in [f32::NAN, f32::INFINITY, 2.0 * LARGEST] {
        let mut x = x.clone();
        x[77] = bad;
        for outcome in [weighted(&x, 32, &[1.0; 32]), by_hessian(&x, 32, good, 1)] {
            let Err(Error::ImpossibleQuantization(text)) = outcome else { unreachable!("accepted {bad}") };
            assert!(text.contains("flat index 77"), "{text}");
        }
    }
}

#[test]
fn both_stop_when_asked() {
    let (x, inputs) = (uniform(1, 64), Inputs::sample(1, 32, 64));
    let mut found = Found::empty(64);
    let stop = AtomicBool::new(true);
    let outcome = quantize_weighted(&x, 32, &[1.0; 32], "w", &mut found.codes, &mut found.scales, &stop);
    assert!(matches!(outcome, Err(Error::Interrupted)));
    let outcome = quantize_hessian(&x, 32, inputs.moments(), 9, "w", &mut found.codes, &mut found.scales, &stop);
    assert!(matches!(outcome, Err(Error::Interrupted)));
}

#[test]
fn coupled_inputs_are_worth_knowing() {
    let (x, inputs) = (uniform(5, 64 * 96), Inputs::sample(6, 96, 400));
    let total = |found: Found| found.costs(&x, &inputs.exact).iter().sum::<f64>();
    let search = total(plain(&x, Encoder::ScaleSearch));
    let sweeps = [0, 1, 32].map(|sweeps| total(by_hessian(&x, 96, inputs.moments(), sweeps).unwrap()));
    assert!(sweeps[0] < 0.7 * search && sweeps[1] < sweeps[0] && sweeps[2] < sweeps[1], "{search} {sweeps:?}");
}

#[test]
fn nothing_known_of_inputs_is_scale_search() {
    let (x, inputs) = (uniform(9, 40 * 64), Inputs::new(vec![0.0; 64 * 64]));
    let found = by_hessian(&x, 64, inputs.moments(), 8).unwrap();
    let (known, search) =
        (found.weighted_error(&x, &[1.0]), plain(&x, Encoder::ScaleSearch).weighted_error(&x, &[1.0]));
    assert!(known <= search, "{known} {search}");
    assert!(known > 0.98 * search, "{known} {search}");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let (x, inputs) = (uniform(7, 101 * 96), Inputs::sample(8, 96, 300));
    let run = |threads| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| by_hessian(&x, 96, inputs.moments(), 5).unwrap())
    };
    let (one, five) = (run(1), run(5));
    assert!(one.codes == five.codes && one.scales == five.scales);
    // Nor which rows come along.
    let alone = by_hessian(&x[37 * 96..38 * 96], 96, inputs.moments(), 5).unwrap();
    assert!(alone.codes == one.codes[37 * 48..38 * 48] && alone.scales == one.scales[37 * 6..38 * 6]);
}

/// What `hessian` does for one row, in f64 and one element after the other; scales are given.
fn gptq(x: &[f32], inputs: &Inputs, scales: &[f64]) -> Vec<f64> {
    let width = x.len();
    let mut rest: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    let mut values = vec![0.0; width];
    for (i, column) in inputs.order.iter().map(|column| *column as usize).enumerate() {
        let scale = scales[column / 32];
        values[column] = (rest[column] / scale).round_ties_even().clamp(-8.0, 7.0) * scale;
        let error = (rest[column] - values[column]) / f64::from(inputs.factor[i * width + i]);
        for (j, later) in inputs.order.iter().enumerate().skip(i + 1) {
            rest[*later as usize] -= error * f64::from(inputs.factor[i * width + j]);
        }
    }
    values
}

proptest! {
    #[test]
    fn weighted_is_never_worse_than_the_extreme(
        x in crate::q40::simd::samples::group(), importance in prop::array::uniform32(0.0_f32..3.0), power in -60_i32..60
    ) {
        let importance = importance.map(|v| v.powi(4) * 2.0_f32.powi(power));
        let found = weighted(&x, 32, &importance).unwrap().weighted_error(&x, &importance);
        let extreme = plain(&x, Encoder::SignedExtreme).weighted_error(&x, &importance);
        // Importance is compared relative to the largest, rounded once.
        prop_assert!(found <= extreme * (1.0 + 1e-6), "{} {}", found, extreme);
    }

    #[test]
    fn equal_importance_is_about_scale_search(x in prop::array::uniform32(-1.0_f32..1.0), importance in 1e-30_f32..1e30) {
        let found = weighted(&x, 32, &[importance; 32]).unwrap().weighted_error(&x, &[1.0]);
        prop_assert!(found <= plain(&x, Encoder::ScaleSearch).weighted_error(&x, &[1.0]) * 1.0001);
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_row_is_worse_than_scale_search(
        seed in 0_u64..1_000_000, groups in 1_usize..4, rows in 1_usize..40, count in 1_usize..200, sweeps in 0_usize..5, power in -20_i32..12,
    ) {
        let width = 32 * groups;
        let x: Vec<f32> = uniform(seed, rows * width).iter().map(|v| v.powi(3) * 2.0_f32.powi(power)).collect();
        let inputs = Inputs::sample(seed, width, count);
        let search = plain(&x, Encoder::ScaleSearch).costs(&x, &inputs.exact);
        let found = by_hessian(&x, width, inputs.moments(), sweeps).unwrap().costs(&x, &inputs.exact);
        for (found, search) in found.iter().zip(search) {
            // Sums in f32: a thousandth, where terms of both signs cancel.
            prop_assert!(*found <= search * 1.001 + 1e-30, "{} {}", found, search);
        }
    }

    #[test]
    fn more_sweeps_are_never_worse(seed in 0_u64..1_000_000, sweeps in 0_usize..6) {
        let (x, inputs) = (uniform(seed, 4 * 64), Inputs::sample(seed, 64, 100));
        // The descent sees the ridge, so that its own measure has it too.
        let mut damped = inputs.exact.clone();
        damped.iter_mut().step_by(65).for_each(|v| *v += f64::from(inputs.ridge));
        let costs = |sweeps| by_hessian(&x, 64, Moments { ridge: 0.0, ..inputs.moments() }, sweeps).unwrap().costs(&x, &damped);
        for (more, fewer) in costs(sweeps + 1).iter().zip(costs(sweeps)) {
            prop_assert!(*more <= fewer * 1.0001, "{} {}", more, fewer);
        }
    }

    #[test]
    fn rounding_is_that_of_the_oracle(seed in 0_u64..1_000_000, groups in 1_usize..4) {
        let width = 32 * groups;
        let (x, inputs) = (uniform(seed, width), Inputs::sample(seed, width, 500));
        let found = by_hessian(&x, width, inputs.moments(), 0).unwrap();
        // Of the two it chooses from by the error of the row, scale search is the other.
        prop_assume!(found.codes != plain(&x, Encoder::ScaleSearch).codes);
        let scales: Vec<f64> = found.scales.as_chunks().0.iter().map(|s| f16::from_le_bytes(*s).to_f64()).collect();
        let wanted = gptq(&x, &inputs, &scales);
        let differing = found.values().iter().zip(&wanted).filter(|(a, b)| a != b).count();
        // f32 against f64: where a value lies between two codes one may differ, and then those after it.
        let cost = |values: &[f64]| {
            let e: Vec<f64> = values.iter().zip(&x).map(|(v, x)| v - f64::from(*x)).collect();
            (0..width * width).map(|at| e[at / width] * inputs.exact[at] * e[at % width]).sum::<f64>()
        };
        prop_assert!(differing == 0 || cost(&found.values()) < 1.5 * cost(&wanted), "{} of {}", differing, width);
    }
}
