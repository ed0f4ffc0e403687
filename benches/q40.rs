//! Bytes of floats per second: Q40 beside what memory itself can do on the same buffers, in the same run.
//!
//! `1_thread` figures are to be read against `scan` (reading the floats) and `memcpy` of that size.

use std::hint::black_box;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use _native::q40::{Encoder, FloatType, Moments, dequantize, quantize, quantize_hessian, quantize_weighted};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// One buffer that L2 holds, one that no cache does.
const MEBIBYTES: [usize; 2] = [1, 96];

fn bell(n: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..6).map(|_| uniform()).sum()).collect()
}

/// Reads every byte, with enough independent chains to be bound by memory.
fn scan(data: &[f32]) -> u32 {
    let mut lanes = [0; 32];
    for chunk in data.as_chunks::<32>().0 {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane ^= value.to_bits();
        }
    }
    lanes.iter().fold(0, |all, lane| all ^ lane)
}

fn pools() -> Vec<(String, ThreadPool)> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build().ok();
    [1, all].into_iter().filter_map(|n| Some((format!("{n}_thread"), pool(n)?))).collect()
}

fn bench(criterion: &mut Criterion) {
    let stop = AtomicBool::new(false);
    for mebibytes in MEBIBYTES {
        let n = mebibytes << 18;
        let x = bell(n);
        let data: &[u8] = bytemuck::cast_slice(&x);
        let mut copy = vec![1_u8; data.len()];
        let (mut codes, mut scales) = (vec![1; n / 2], vec![1; n / 16]);
        let mut group = criterion.benchmark_group(format!("{mebibytes}_MiB_f32"));
        group.throughput(Throughput::BytesDecimal(data.len() as u64)).sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3)).sample_size(20);
        group.bench_function("scan", |b| b.iter(|| scan(black_box(&x))));
        group.bench_function("memcpy", |b| b.iter(|| copy.copy_from_slice(black_box(data))));
        for (threads, pool) in pools() {
            for (name, encoder) in [("signed_extreme", Encoder::SignedExtreme), ("scale_search", Encoder::ScaleSearch)]
            {
                group.bench_function(BenchmarkId::new(name, &threads), |b| {
                    b.iter(|| {
                        pool.install(|| quantize(data, FloatType::F32, encoder, "w", &mut codes, &mut scales, &stop))
                    });
                });
            }
            group.bench_function(BenchmarkId::new("dequantize", &threads), |b| {
                b.iter(|| pool.install(|| dequantize(&codes, &scales, FloatType::F32, &mut copy, &stop)));
            });
        }
        group.finish();
    }
}

/// Encoders that know the inputs, on the two shapes of a layer of `SmolLM2`; elements a second, of inputs with one common direction.
fn bench_calibrated(criterion: &mut Criterion) {
    let stop = AtomicBool::new(false);
    for (rows, width) in [(1536, 576), (576, 1536)] {
        let x = bell(rows * width);
        let (mut codes, mut scales) = (vec![1; x.len() / 2], vec![1; x.len() / 16]);
        let importance = vec![1.5; width];
        // H = I + 1/2, all ones beside it: its inverse and factor have closed forms.
        let hessian: Vec<f32> = (0..width * width).map(|at| if at % (width + 1) == 0 { 1.5 } else { 0.5 }).collect();
        let factor = factor_of_shared_direction(width);
        let order: Vec<u32> = (0..width as u32).collect();
        let moments =
            Moments { hessian: &hessian, ridge: 0.01, factor: &factor, order: &order, importance: &importance };
        let mut group = criterion.benchmark_group(format!("{rows}x{width}"));
        group.throughput(Throughput::Elements(x.len() as u64)).sampling_mode(SamplingMode::Flat).sample_size(10);
        for (threads, pool) in pools() {
            group.bench_function(BenchmarkId::new("weighted", &threads), |b| {
                b.iter(|| {
                    pool.install(|| quantize_weighted(&x, width, &importance, "w", &mut codes, &mut scales, &stop))
                });
            });
            for sweeps in [0, 16] {
                group.bench_function(BenchmarkId::new(format!("hessian_{sweeps}_sweeps"), &threads), |b| {
                    b.iter(|| {
                        pool.install(|| {
                            quantize_hessian(&x, width, moments, sweeps, "w", &mut codes, &mut scales, &stop)
                        })
                    });
                });
            }
        }
        group.finish();
    }
}

/// `U` of `quantize_hessian` for `I + 1/2`: once `i` columns are fixed, the inverse of what is left is `I - 1 / (2 + n)`, `n` columns being left.
fn factor_of_shared_direction(width: usize) -> Vec<f32> {
    let mut factor = vec![0.0; width * width];
    for (i, row) in factor.chunks_exact_mut(width).enumerate() {
        let coupling = 1.0 / (2.0 + (width - i) as f32);
        let root = (1.0 - coupling).sqrt();
        row[i] = root;
        row[i + 1..].fill(-coupling / root);
    }
    factor
}

criterion_group!(benches, bench, bench_calibrated);
criterion_main!(benches);
