//! The pyo3 layer: check, detach, call, map errors. The only folder that names pyo3.

mod archive;
mod boundary;

use pyo3::prelude::*;

/// `torch_to_nnef._native`; contract in `_native.pyi`.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_class::<archive::ArchiveWriter>()?;
    m.add_function(wrap_pyfunction!(archive::read_dat, m)?)?;
    m.add_function(wrap_pyfunction!(archive::write_dat, m)?)?;
    m.add_function(wrap_pyfunction!(archive::write_dat_q40, m)?)?;
    m.add_function(wrap_pyfunction!(archive::archive_entries, m)?)?;
    m.add_function(wrap_pyfunction!(archive::archive_read, m)?)?;
    Ok(())
}
