//! The pyo3 layer: check, detach, call, map errors. The only folder that names pyo3.

mod boundary;

use pyo3::prelude::*;

/// `torch_to_nnef._native`; contract in `_native.pyi`.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
