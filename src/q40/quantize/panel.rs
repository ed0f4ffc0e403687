//! Rows of floats, to which multiples of the rows of a matrix are added: all that is heavy in `hessian`.
//!
//! 32 rows of the matrix are copied 64 columns at a time to where L1 keeps them for a whole tile of rows. Sums run in the order of the terms and are
//! fused, on every machine: a row comes out the same whatever shares its tile.

use crate::q40::GROUP_SIZE;
use crate::q40::simd::{Isa, LANES, Terms};

/// Rows that start at multiples of [`LANES`]; what is beyond their width holds anything.
pub(super) struct Rows {
    pub(super) stride: usize,
    pub(super) data: Vec<f32>,
}

impl Rows {
    pub(super) fn zeros(rows: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(LANES);
        Self { stride, data: vec![0.0; rows * stride] }
    }

    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.stride..][..self.stride]
    }

    pub(super) fn group(&mut self, row: usize, group: usize) -> &mut [f32; GROUP_SIZE] {
        &mut self.row(row).as_chunks_mut().0[group]
    }

    /// Adds to each row its terms of rows `[32 * group, 32 * group + 32)` of `matrix` (rows of `width`), from column
    /// `start` on, and anything to some columns before it.
    #[inline(always)]
    pub(super) fn add(
        &mut self,
        isa: impl Isa,
        matrix: &[f32],
        width: usize,
        group: usize,
        start: usize,
        terms: &[Terms],
    ) {
        if terms.iter().all(Terms::is_empty) {
            return;
        }
        let mut panel = [[0.0; LANES]; GROUP_SIZE];
        for chunk in start / LANES..width.div_ceil(LANES) {
            let columns = LANES.min(width - chunk * LANES);
            for (k, panel) in panel.iter_mut().enumerate() {
                let from = (group * GROUP_SIZE + k) * width + chunk * LANES;
                panel[..columns].copy_from_slice(&matrix[from..from + columns]);
            }
            for (row, terms) in self.data.chunks_exact_mut(self.stride).zip(terms) {
                if !terms.is_empty() {
                    isa.accumulate(&mut row.as_chunks_mut().0[chunk], terms, &panel);
                }
            }
        }
    }
}
