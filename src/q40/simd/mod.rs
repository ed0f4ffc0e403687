//! What is done to one group, once in plain Rust (`scalar`, the oracle) and once per instruction set worth writing for.
//!
//! Every implementation gives the same bits as the oracle: sums run in the order it states, and `a * b + c` is fused
//! only where the product is exact, or everywhere (`accumulate`).

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;

pub(super) use scalar::Scalar;

use super::{CODE_BYTES, GROUP_SIZE};

/// One group of floats.
pub(super) type Group = [f32; GROUP_SIZE];
/// One group of codes, packed.
pub(super) type Codes = [u8; CODE_BYTES];
/// One value for each candidate scale of the search.
pub(super) type Candidates = [f32; 24];
/// Columns of a panel that are added at a time.
pub(super) const LANES: usize = 64;
/// Some columns of 32 rows of a matrix.
pub(super) type Panel = [[f32; LANES]; GROUP_SIZE];

/// A combination of the rows of a panel, without those that count for 0.
#[derive(Clone, Default)]
pub(super) struct Terms {
    len: usize,
    rows: [u32; GROUP_SIZE],
    factors: [f32; GROUP_SIZE],
}

impl Terms {
    #[inline(always)]
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `factor` times row `row`; at most 32 times between calls of `clear`.
    #[inline(always)]
    pub(super) fn push(&mut self, row: usize, factor: f32) {
        self.rows[self.len] = row as u32;
        self.factors[self.len] = factor;
        self.len += usize::from(factor != 0.0);
    }

    #[inline(always)]
    fn iter(&self) -> impl Iterator<Item = (usize, f32)> {
        self.rows[..self.len].iter().map(|row| *row as usize % GROUP_SIZE).zip(self.factors[..self.len].iter().copied())
    }
}

/// The primitives. Floats given must be finite.
pub(super) trait Isa: Copy + Send + Sync {
    /// The first element of largest magnitude; +0 for a group of zeros of either sign.
    fn extreme(self, x: &Group) -> f32;
    /// Largest magnitude as bits, which order as integers, NaN above all numbers. The only one to accept any float.
    fn magnitude_bits(self, x: &Group) -> u32;
    /// `min(15, trunc(x * inverse + 8.5))`, for products in `[-8.5, 8.5]`.
    fn scaled_codes(self, x: &Group, inverse: f32) -> Codes;
    /// `clamp(round(x / scale) + 8, 0, 15)`, half away from zero, for a scale that is not 0.
    fn rounded_codes(self, x: &Group, scale: f32) -> Codes;
    /// `(code - 8) * scale`
    fn decode(self, codes: &Codes, scale: f32) -> Group;
    /// `Σ(x - y)²` in f64: element `i` in sum `i % 4`, then `(s0 + s1) + (s2 + s3)`.
    fn squared_error(self, x: &Group, y: &Group) -> f64;
    /// `(Σxq, Σq²)` over the elements in order, for each candidate's `q = clamp(x * inverse, -8, 7)` rounded half to even.
    fn fit(self, x: &Group, inverse: &Candidates) -> (Candidates, Candidates);
    /// `sums += Σ factor * row`, fused, in the order of the terms.
    fn accumulate(self, sums: &mut [f32; LANES], terms: &Terms, panel: &Panel);
}

/// Work to run with the primitives of some instruction set. `run` and what it calls with `isa` in a loop must be
/// `#[inline(always)]`: code that is not inlined is compiled for the baseline instructions.
pub(super) trait Kernel {
    /// What `run` returns.
    type Output;
    /// The work.
    fn run(self, isa: impl Isa) -> Self::Output;
}

/// Runs `kernel` with the best instructions this machine has.
pub(super) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = avx2::Avx2::detect() {
        return isa.run(kernel);
    }
    kernel.run(Scalar)
}

#[cfg(test)]
pub(super) mod samples;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::samples::{any_float, group};
    use super::*;

    /// Every primitive on the same arguments; floats as bits, so that -0 and 0 differ.
    struct Everything {
        x: Group,
        codes: Codes,
        scale: f32,
    }

    impl Kernel for Everything {
        type Output = (u32, u32, [Codes; 2], Vec<u32>, u64);

        fn run(self, isa: impl Isa) -> Self::Output {
            let Self { x, codes, scale } = self;
            let extreme = isa.extreme(&x);
            let inverse = if (-8.0 / extreme).is_finite() { -8.0 / extreme } else { 0.0 };
            let y = isa.decode(&codes, scale);
            let (xq, qq) = isa.fit(&x, &std::array::from_fn(|c| inverse * (0.5 + c as f32 / 16.0)));
            let floats = y.iter().chain(&xq).chain(&qq).map(|v| v.to_bits()).collect();
            let codes = [isa.scaled_codes(&x, inverse), isa.rounded_codes(&x, scale)];
            (extreme.to_bits(), isa.magnitude_bits(&x), codes, floats, isa.squared_error(&x, &y).to_bits())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn every_instruction_set_gives_the_bits_of_the_oracle(x in group(), codes: Codes, scale: u16) {
            let scale = half::f16::from_bits(scale).to_f32();
            prop_assume!(scale.is_finite() && scale != 0.0);
            let oracle = Everything { x, codes, scale }.run(Scalar);
            prop_assert_eq!(dispatch(Everything { x, codes, scale }), oracle);
        }

        #[test]
        fn combinations_of_rows_have_the_bits_of_the_oracle(x in group(), factors in group(), count in 0_usize..=GROUP_SIZE) {
            struct Accumulate<'a>(&'a Terms, &'a Panel);
            impl Kernel for Accumulate<'_> {
                type Output = Vec<u32>;
                fn run(self, isa: impl Isa) -> Vec<u32> {
                    let mut sums = self.1[0];
                    isa.accumulate(&mut sums, self.0, self.1);
                    sums.iter().map(|sum| sum.to_bits()).collect()
                }
            }
            let mut terms = Terms::default();
            factors.iter().enumerate().take(count).for_each(|(row, factor)| terms.push(row, *factor));
            let panel: Panel =
                std::array::from_fn(|row| std::array::from_fn(|column| x[(row + 5 * column) % GROUP_SIZE]));
            let oracle = Accumulate(&terms, &panel).run(Scalar);
            prop_assert_eq!(dispatch(Accumulate(&terms, &panel)), oracle);
        }

        #[test]
        fn magnitudes_of_any_floats_agree(mut x in group(), at in 0_usize..GROUP_SIZE, odd in any_float()) {
            struct Magnitude(Group);
            impl Kernel for Magnitude {
                type Output = u32;
                fn run(self, isa: impl Isa) -> u32 {
                    isa.magnitude_bits(&self.0)
                }
            }
            x[at] = odd;
            let most = Magnitude(x).run(Scalar);
            prop_assert_eq!(dispatch(Magnitude(x)), most);
            prop_assert_eq!(x.iter().all(|v| v.is_finite()), most < f32::INFINITY.to_bits());
        }
    }
}
