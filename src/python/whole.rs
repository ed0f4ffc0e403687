//! Numbers from Python, whose integers have no end.

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use super::boundary::to_py;
use crate::error::Error;

/// A `T` of sizes or counts; an integer that does not fit is an error of ours, not an `OverflowError`.
#[derive(Clone, Copy)]
pub struct Whole<T>(pub T);

impl<'a, 'py, T: FromPyObject<'a, 'py>> FromPyObject<'a, 'py> for Whole<T> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        T::extract(object).map(Self).map_err(|error| {
            let (py, error) = (object.py(), error.into());
            if error.is_instance_of::<PyOverflowError>(py) {
                to_py(py, &Error::InvalidArgument(format!("{object:?} is out of range: {}", error.value(py))))
            } else {
                error
            }
        })
    }
}
