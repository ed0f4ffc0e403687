//! Q40 on numpy arrays of bytes.

use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::boundary::{native, to_py};
use super::whole::Whole;
use crate::error::Error;
use crate::q40::{self, Encoder, FloatType, Moments};

pub(super) type Bytes<'py> = Array<'py, u8>;
type Array<'py, T> = Bound<'py, PyArray1<T>>;

/// See `_native.pyi`, as for the other functions here.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the contract of _native.pyi")]
pub fn q40_quantize(
    py: Python<'_>,
    data: &Bytes<'_>,
    dtype: &str,
    encoder: &str,
    percentile: f64,
    name: &str,
    codes: &Bytes<'_>,
    scales: &Bytes<'_>,
) -> PyResult<()> {
    let encoder = Encoder::new(encoder, percentile).map_err(|e| to_py(py, &e))?;
    let float = float_type(py, dtype)?;
    let (data, mut codes, mut scales) = (input(data, "data")?, output(codes, "codes")?, output(scales, "scales")?);
    let (data, codes, scales) = (data.as_slice()?, codes.as_slice_mut()?, scales.as_slice_mut()?);
    native(py, |stop| q40::quantize(data, float, encoder, name, codes, scales, stop))
}

#[pyfunction]
pub fn q40_quantize_with_scales(
    py: Python<'_>,
    data: &Bytes<'_>,
    dtype: &str,
    name: &str,
    scales: &Bytes<'_>,
    codes: &Bytes<'_>,
) -> PyResult<()> {
    let float = float_type(py, dtype)?;
    let (data, scales, mut codes) = (input(data, "data")?, input(scales, "scales")?, output(codes, "codes")?);
    let (data, scales, codes) = (data.as_slice()?, scales.as_slice()?, codes.as_slice_mut()?);
    native(py, |stop| q40::quantize_with_scales(data, float, name, scales, codes, stop))
}

#[pyfunction]
pub fn q40_quantize_weighted(
    py: Python<'_>,
    data: &Array<'_, f32>,
    width: Whole<usize>,
    importance: &Array<'_, f32>,
    name: &str,
    codes: &Bytes<'_>,
    scales: &Bytes<'_>,
) -> PyResult<()> {
    let (data, importance) = (input(data, "data")?, input(importance, "importance")?);
    let (mut codes, mut scales) = (output(codes, "codes")?, output(scales, "scales")?);
    let (data, importance) = (data.as_slice()?, importance.as_slice()?);
    let (codes, scales) = (codes.as_slice_mut()?, scales.as_slice_mut()?);
    native(py, |stop| q40::quantize_weighted(data, width.0, importance, name, codes, scales, stop))
}

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the contract of _native.pyi")]
pub fn q40_quantize_hessian(
    py: Python<'_>,
    data: &Array<'_, f32>,
    width: Whole<usize>,
    hessian: &Array<'_, f32>,
    ridge: f32,
    factor: &Array<'_, f32>,
    order: &Array<'_, u32>,
    importance: &Array<'_, f32>,
    sweeps: Whole<usize>,
    name: &str,
    codes: &Bytes<'_>,
    scales: &Bytes<'_>,
) -> PyResult<()> {
    let (data, hessian, factor) = (input(data, "data")?, input(hessian, "hessian")?, input(factor, "factor")?);
    let (order, importance) = (input(order, "order")?, input(importance, "importance")?);
    let (mut codes, mut scales) = (output(codes, "codes")?, output(scales, "scales")?);
    let moments = Moments {
        hessian: hessian.as_slice()?,
        ridge,
        factor: factor.as_slice()?,
        order: order.as_slice()?,
        importance: importance.as_slice()?,
    };
    let (data, codes, scales) = (data.as_slice()?, codes.as_slice_mut()?, scales.as_slice_mut()?);
    native(py, |stop| q40::quantize_hessian(data, width.0, moments, sweeps.0, name, codes, scales, stop))
}

#[pyfunction]
pub fn q40_dequantize(
    py: Python<'_>,
    codes: &Bytes<'_>,
    scales: &Bytes<'_>,
    dtype: &str,
    data: &Bytes<'_>,
) -> PyResult<()> {
    let float = float_type(py, dtype)?;
    let (codes, scales, mut data) = (input(codes, "codes")?, input(scales, "scales")?, output(data, "data")?);
    let (codes, scales, data) = (codes.as_slice()?, scales.as_slice()?, data.as_slice_mut()?);
    native(py, |stop| q40::dequantize(codes, scales, float, data, stop))
}

#[pyfunction]
pub fn q40_squared_error(
    py: Python<'_>,
    codes: &Bytes<'_>,
    scales: &Bytes<'_>,
    dtype: &str,
    data: &Bytes<'_>,
    shown: &str,
) -> PyResult<(f64, f64)> {
    let (float, shown) = (float_type(py, dtype)?, float_type(py, shown)?);
    let (codes, scales, data) = (input(codes, "codes")?, input(scales, "scales")?, input(data, "data")?);
    let (codes, scales, data) = (codes.as_slice()?, scales.as_slice()?, data.as_slice()?);
    native(py, |stop| q40::squared_error(codes, scales, float, data, shown, stop))
}

#[pyfunction]
pub fn q40_join(py: Python<'_>, codes: &Bytes<'_>, scales: &Bytes<'_>, blocks: &Bytes<'_>) -> PyResult<()> {
    let (codes, scales, mut blocks) = (input(codes, "codes")?, input(scales, "scales")?, output(blocks, "blocks")?);
    let (codes, scales, blocks) = (codes.as_slice()?, scales.as_slice()?, blocks.as_slice_mut()?);
    native(py, |stop| q40::join(codes, scales, blocks, stop))
}

#[pyfunction]
pub fn q40_split(py: Python<'_>, blocks: &Bytes<'_>, codes: &Bytes<'_>, scales: &Bytes<'_>) -> PyResult<()> {
    let (blocks, mut codes, mut scales) =
        (input(blocks, "blocks")?, output(codes, "codes")?, output(scales, "scales")?);
    let (blocks, codes, scales) = (blocks.as_slice()?, codes.as_slice_mut()?, scales.as_slice_mut()?);
    native(py, |stop| q40::split(blocks, codes, scales, stop))
}

fn float_type(py: Python<'_>, dtype: &str) -> PyResult<FloatType> {
    dtype.parse().map_err(|e| to_py(py, &e))
}

pub(super) fn input<'py, T: Element>(array: &Array<'py, T>, what: &str) -> PyResult<PyReadonlyArray1<'py, T>> {
    match array.try_readonly() {
        Ok(view) if array.is_c_contiguous() => Ok(view),
        Ok(_) => Err(unusable(array.py(), what, "it is not contiguous")),
        Err(error) => Err(unusable(array.py(), what, error)),
    }
}

fn output<'py>(array: &Bytes<'py>, what: &str) -> PyResult<PyReadwriteArray1<'py, u8>> {
    match array.try_readwrite() {
        Ok(view) if array.is_c_contiguous() => Ok(view),
        Ok(_) => Err(unusable(array.py(), what, "it is not contiguous")),
        Err(error) => Err(unusable(array.py(), what, error)),
    }
}

fn unusable(py: Python<'_>, what: &str, why: impl std::fmt::Display) -> PyErr {
    to_py(py, &Error::InvalidArgument(format!("array `{what}` cannot be used: {why}")))
}
