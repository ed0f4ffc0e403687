//! The pyo3 layer: check, detach, call, map errors. The only folder that names pyo3.

mod archive;
mod boundary;
mod q40;
mod runtime;
mod whole;

use pyo3::prelude::*;

/// `torch_to_nnef._native`; contract in `_native.pyi`.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("tract_version", crate::runtime::TRACT_VERSION)?;
    m.add_class::<runtime::Model>()?;
    m.add_class::<runtime::Session>()?;
    m.add_function(wrap_pyfunction!(runtime::check_archive, m)?)?;
    m.add_class::<archive::ArchiveWriter>()?;
    m.add_function(wrap_pyfunction!(archive::read_dat, m)?)?;
    m.add_function(wrap_pyfunction!(archive::write_dat, m)?)?;
    m.add_function(wrap_pyfunction!(archive::write_dat_q40, m)?)?;
    m.add_function(wrap_pyfunction!(archive::check_dats, m)?)?;
    m.add_class::<archive::Staging>()?;
    m.add_function(wrap_pyfunction!(archive::put_in_place, m)?)?;
    m.add_function(wrap_pyfunction!(archive::sweep, m)?)?;
    m.add_function(wrap_pyfunction!(archive::write_text, m)?)?;
    m.add_function(wrap_pyfunction!(archive::archive_entries, m)?)?;
    m.add_function(wrap_pyfunction!(archive::archive_read, m)?)?;
    m.add_function(wrap_pyfunction!(archive::archive_tensors, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_quantize, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_quantize_with_scales, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_quantize_weighted, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_quantize_hessian, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_dequantize, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_squared_error, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_join, m)?)?;
    m.add_function(wrap_pyfunction!(q40::q40_split, m)?)?;
    Ok(())
}
