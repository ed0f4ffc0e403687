//! tract models. Contract and docstrings: `_native.pyi`.

use std::path::PathBuf;
use std::sync::Arc;

use numpy::{PyArray1, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyDict, PyList};

use super::boundary::{native_here, native_owned, native_short, to_py};
use super::q40::input;
use super::whole::Whole;
use crate::error::Error;
use crate::preflight;
use crate::runtime::{self, Array, Dim, Fact, Input, Property};

/// `(name, dtype, shape)`.
type PyFact<'py> = (String, String, Vec<Bound<'py, PyAny>>);

#[pyfunction]
#[pyo3(name = "preflight")]
pub fn check_archive(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    native_owned(py, move |stop| preflight::check(&path, stop))
}

#[pyclass(frozen, module = "torch_to_nnef._native")]
pub struct Model(Arc<runtime::Model>);

#[pymethods]
impl Model {
    #[staticmethod]
    #[pyo3(signature = (path, outputs = None, threads = None))]
    fn load(
        py: Python<'_>,
        path: PathBuf,
        outputs: Option<Vec<String>>,
        threads: Option<Whole<usize>>,
    ) -> PyResult<Self> {
        let threads = threads.map(|n| n.0);
        native_owned(py, move |stop| runtime::Model::load(&path, outputs.as_deref(), threads, stop))
            .map(|m| Self(Arc::new(m)))
    }

    #[staticmethod]
    #[pyo3(signature = (data, outputs = None, threads = None))]
    fn load_bytes(
        py: Python<'_>,
        data: PyBackedBytes,
        outputs: Option<Vec<String>>,
        threads: Option<Whole<usize>>,
    ) -> PyResult<Self> {
        let threads = threads.map(|n| n.0);
        native_owned(py, move |stop| runtime::Model::load_bytes(&data, outputs.as_deref(), threads, stop))
            .map(|m| Self(Arc::new(m)))
    }

    #[getter]
    fn inputs<'py>(&self, py: Python<'py>) -> PyResult<Vec<PyFact<'py>>> {
        self.0.inputs().iter().map(|fact| fact_to_py(py, fact)).collect()
    }

    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> PyResult<Vec<PyFact<'py>>> {
        self.0.outputs().iter().map(|fact| fact_to_py(py, fact)).collect()
    }

    #[getter]
    fn properties<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = PyDict::new(py);
        for (name, value) in self.0.properties() {
            match value {
                Property::Text(lines) if lines.len() == 1 => found.set_item(name, &lines[0])?,
                Property::Text(lines) => found.set_item(name, lines)?,
                Property::Tensor(array) => found.set_item(name, array_to_py(py, array)?)?,
            }
        }
        Ok(found)
    }

    #[getter]
    fn weight_bytes(&self) -> usize {
        self.0.weight_bytes()
    }

    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 makes of a Python sequence")]
    fn run<'py>(&self, py: Python<'py>, inputs: Vec<Bound<'py, PyUntypedArray>>) -> PyResult<Bound<'py, PyList>> {
        let outputs = with_inputs(py, &inputs, |given| native_here(py, |stop| self.0.run_until(stop, given)))?;
        PyList::new(py, outputs.iter().map(|array| array_to_py(py, array)).collect::<PyResult<Vec<_>>>()?)
    }

    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 makes of a Python sequence")]
    fn session(&self, py: Python<'_>, carried: Vec<(String, String)>) -> PyResult<Session> {
        native_short(py, || runtime::Session::new(Arc::clone(&self.0), &carried)).map(Session)
    }
}

#[pyclass(frozen, module = "torch_to_nnef._native")]
pub struct Session(runtime::Session);

#[pymethods]
impl Session {
    #[getter]
    fn inputs<'py>(&self, py: Python<'py>) -> PyResult<Vec<PyFact<'py>>> {
        self.0.inputs().into_iter().map(|fact| fact_to_py(py, fact)).collect()
    }

    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> PyResult<Vec<PyFact<'py>>> {
        self.0.outputs().into_iter().map(|fact| fact_to_py(py, fact)).collect()
    }

    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 makes of a Python sequence")]
    fn run<'py>(&self, py: Python<'py>, inputs: Vec<Bound<'py, PyUntypedArray>>) -> PyResult<Bound<'py, PyList>> {
        let outputs = with_inputs(py, &inputs, |given| native_here(py, |stop| self.0.run_until(stop, given)))?;
        PyList::new(py, outputs.iter().map(|array| array_to_py(py, array)).collect::<PyResult<Vec<_>>>()?)
    }

    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        native_short(py, || self.0.reset())
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let state = PyDict::new(py);
        for (name, array) in native_short(py, || self.0.state())? {
            state.set_item(name, array_to_py(py, &array)?)?;
        }
        Ok(state)
    }

    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 makes of Python sequences")]
    fn load_state<'py>(
        &self,
        py: Python<'py>,
        names: Vec<String>,
        values: Vec<Bound<'py, PyUntypedArray>>,
    ) -> PyResult<()> {
        with_inputs(py, &values, |given| {
            let state: Vec<_> = names.iter().cloned().zip(given.iter().copied()).collect();
            native_short(py, || self.0.load_state(&state))
        })
    }
}

/// Calls `work` with what `arrays` hold, not copied.
fn with_inputs<'py, T>(
    py: Python<'py>,
    arrays: &[Bound<'py, PyUntypedArray>],
    work: impl FnOnce(&[Input<'_>]) -> PyResult<T>,
) -> PyResult<T> {
    let dtypes = arrays.iter().map(dtype_name).collect::<PyResult<Vec<_>>>()?;
    let bytes = arrays.iter().map(|array| array_bytes(py, array)).collect::<PyResult<Vec<_>>>()?;
    let mut given = Vec::with_capacity(arrays.len());
    for ((array, dtype), bytes) in arrays.iter().zip(&dtypes).zip(&bytes) {
        given.push(Input { dtype, shape: array.shape(), bytes: bytes.as_slice()? });
    }
    work(&given)
}

fn fact_to_py<'py>(py: Python<'py>, fact: &Fact) -> PyResult<PyFact<'py>> {
    let dim = |dim: &Dim| match dim {
        Dim::Fixed(size) => Ok(size.into_pyobject(py)?.into_any()),
        Dim::Expression(text) => Ok(text.into_pyobject(py)?.into_any()),
    };
    Ok((fact.name.clone(), fact.dtype.clone(), fact.shape.iter().map(dim).collect::<PyResult<_>>()?))
}

/// numpy's dtype by tract's name ("f32", "bool"), or as numpy says it if tract has no such type.
fn dtype_name(array: &Bound<'_, PyUntypedArray>) -> PyResult<String> {
    let dtype = array.dtype();
    let swapped = dtype.is_native_byteorder() == Some(false);
    match dtype.kind() {
        b'b' => Ok("bool".to_owned()),
        kind @ (b'f' | b'i' | b'u') if !swapped => Ok(format!("{}{}", kind as char, 8 * dtype.itemsize())),
        _ => Ok(dtype.str()?.to_string()),
    }
}

/// The memory of a C-contiguous array, not copied.
fn array_bytes<'py>(py: Python<'py>, array: &Bound<'py, PyUntypedArray>) -> PyResult<PyReadonlyArray1<'py, u8>> {
    let refuse = |why: &str| to_py(py, &Error::InvalidArgument(format!("inputs: {why}")));
    if !array.is_c_contiguous() {
        return Err(refuse("an array is not C-contiguous; pass it through numpy.ascontiguousarray"));
    }
    if array.dtype().has_object() {
        return Err(refuse("an array of Python objects"));
    }
    let bytes = array.call_method1("reshape", (-1,))?.call_method1("view", ("u1",))?;
    input(&bytes.cast_into::<PyArray1<u8>>()?, "inputs")
}

fn array_to_py<'py>(py: Python<'py>, array: &Array) -> PyResult<Bound<'py, PyAny>> {
    let numpy = py.import("numpy")?;
    // Not by PyArray1, which panics where there is no memory.
    let bytes = numpy.call_method1("empty", (array.bytes().len(), "u1"))?.cast_into::<PyArray1<u8>>()?;
    bytes.readwrite().as_slice_mut()?.copy_from_slice(array.bytes());
    bytes.call_method1("view", (numpy_name(array.dtype()),))?.call_method1("reshape", (array.shape().to_vec(),))
}

/// numpy's name of a tract type: `f4` for `f32`.
fn numpy_name(dtype: &str) -> String {
    let (kind, bits) = dtype.split_at(1);
    bits.parse::<usize>().map_or_else(|_| dtype.to_owned(), |bits| format!("{kind}{}", bits / 8))
}
