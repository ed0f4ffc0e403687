//! `.dat` files and archives. Contract and docstrings: `_native.pyi`.
#![expect(clippy::needless_pass_by_value, reason = "pyo3 hands over what it extracted")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::boundary::{native, native_owned, native_short};
use super::q40::{Bytes, input};
use super::whole::Whole;
use crate::archive::{self, Form};
use crate::dat::{self, DatType, Header, Q40Planes};
use crate::error::{Error, Result};
use crate::fsio::{self, AtomicFile, sweep_beside};

#[pyfunction]
pub fn read_dat(py: Python<'_>, path: PathBuf) -> PyResult<(&'static str, Vec<usize>, Bytes<'_>)> {
    let (header, payload) = native_owned(py, move |stop| dat::read(&path, stop))?;
    Ok((header.dtype().name(), header.shape(), PyArray1::from_vec(py, payload)))
}

#[pyfunction]
pub fn write_dat(
    py: Python<'_>,
    path: PathBuf,
    dtype: &str,
    shape: Whole<Vec<usize>>,
    data: &Bytes<'_>,
) -> PyResult<()> {
    let data = input(data, "data")?;
    let data = data.as_slice()?;
    native(py, |stop| dat::write(&path, &plain_header(dtype, &shape.0, data)?, data, stop))
}

#[pyfunction]
pub fn write_dat_q40(
    py: Python<'_>,
    path: PathBuf,
    shape: Whole<Vec<usize>>,
    codes: &Bytes<'_>,
    scales: &Bytes<'_>,
) -> PyResult<()> {
    let (codes, scales) = (input(codes, "codes")?, input(scales, "scales")?);
    let (codes, scales) = (codes.as_slice()?, scales.as_slice()?);
    native(py, |stop| {
        let (header, planes) = q40_payload(&shape.0, codes, scales)?;
        dat::write(&path, &header, planes, stop)
    })
}

#[pyfunction]
pub fn check_dats(py: Python<'_>, tensors: Whole<Vec<(String, String, Vec<usize>)>>) -> PyResult<()> {
    native_short(py, || archive::check_dats(&tensors.0))
}

#[pyfunction]
pub fn archive_entries(py: Python<'_>, path: PathBuf) -> PyResult<Vec<(String, u64)>> {
    native_owned(py, move |stop| archive::entries(&path, stop))
}

/// `(name, bytes, dtype, shape)`.
type PyEntry = (String, u64, Option<&'static str>, Option<Vec<usize>>);

#[pyfunction]
pub fn archive_tensors(py: Python<'_>, path: PathBuf) -> PyResult<Vec<PyEntry>> {
    let found = native(py, move |stop| archive::headers(&path, stop))?;
    let entry = |(name, size, header): (String, u64, Option<Header>)| {
        (name, size, header.as_ref().map(|h| h.dtype().name()), header.as_ref().map(Header::shape))
    };
    Ok(found.into_iter().map(entry).collect())
}

#[pyfunction]
pub fn archive_read(
    py: Python<'_>,
    path: PathBuf,
    name: String,
    max_bytes: Whole<u64>,
) -> PyResult<Bound<'_, PyBytes>> {
    let content = native_owned(py, move |stop| archive::read(&path, &name, max_bytes.0, stop))?;
    Ok(PyBytes::new(py, &content))
}

#[pyfunction]
pub fn put_in_place(py: Python<'_>, new: PathBuf, target: PathBuf) -> PyResult<()> {
    native(py, |stop| fsio::put_in_place(&new, &target, stop))
}

#[pyfunction]
pub fn write_text(py: Python<'_>, path: PathBuf, text: &str) -> PyResult<()> {
    native(py, |_| {
        sweep_beside(&path);
        let mut file = AtomicFile::create(&path)?;
        file.write_all(text.as_bytes()).map_err(Error::io(&path))?;
        file.commit().map(drop)
    })
}

#[pyfunction]
pub fn sweep(py: Python<'_>, folder: PathBuf) -> PyResult<()> {
    native(py, |_| {
        fsio::sweep(&folder);
        Ok(())
    })
}

/// A folder to write in, behind a lock since it goes once.
#[pyclass(frozen, module = "torch_to_nnef._native")]
pub struct Staging {
    path: PathBuf,
    folder: Mutex<Option<fsio::Staging>>,
}

#[pymethods]
impl Staging {
    #[new]
    fn new(py: Python<'_>, parent: PathBuf) -> PyResult<Self> {
        let folder = native_short(py, || fsio::Staging::create(&parent))?;
        Ok(Self { path: folder.path().to_path_buf(), folder: Mutex::new(Some(folder)) })
    }

    fn __enter__(&self) -> &Path {
        &self.path
    }

    fn __exit__(&self, py: Python<'_>, _class: Py<PyAny>, _error: Py<PyAny>, _traceback: Py<PyAny>) -> PyResult<()> {
        native_short(py, || {
            drop(self.folder.lock().unwrap_or_else(PoisonError::into_inner).take());
            Ok(())
        })
    }
}

/// The core writer behind a lock, so that threads take turns.
#[pyclass(frozen, module = "torch_to_nnef._native")]
pub struct ArchiveWriter(Mutex<archive::ArchiveWriter>);

#[pymethods]
impl ArchiveWriter {
    #[new]
    #[pyo3(signature = (path, form, compression_level = Whole(0)), text_signature = "(path, form, compression_level=0)")]
    fn new(py: Python<'_>, path: PathBuf, form: &str, compression_level: Whole<u32>) -> PyResult<Self> {
        let writer = native_short(py, || {
            let form = match form {
                "folder" => Form::Folder,
                "tar" => Form::Tar,
                "tgz" => Form::Tgz { level: compression_level.0 },
                _ => return Err(Error::InvalidArgument(format!("form {form:?} is not folder, tar or tgz"))),
            };
            archive::ArchiveWriter::create(&path, form)
        })?;
        Ok(Self(Mutex::new(writer)))
    }

    fn add_text(&self, py: Python<'_>, name: &str, text: &str) -> PyResult<()> {
        native(py, |stop| self.lock().add_text(name, text, stop))
    }

    fn add_tensor(
        &self,
        py: Python<'_>,
        label: &str,
        dtype: &str,
        shape: Whole<Vec<usize>>,
        data: &Bytes<'_>,
    ) -> PyResult<()> {
        let data = input(data, "data")?;
        let data = data.as_slice()?;
        native(py, |stop| self.lock().add_dat(label, &plain_header(dtype, &shape.0, data)?, data, stop))
    }

    fn add_q40(
        &self,
        py: Python<'_>,
        label: &str,
        shape: Whole<Vec<usize>>,
        codes: &Bytes<'_>,
        scales: &Bytes<'_>,
    ) -> PyResult<()> {
        let (codes, scales) = (input(codes, "codes")?, input(scales, "scales")?);
        let (codes, scales) = (codes.as_slice()?, scales.as_slice()?);
        native(py, |stop| {
            let (header, planes) = q40_payload(&shape.0, codes, scales)?;
            self.lock().add_dat(label, &header, planes, stop)
        })
    }

    fn add_dat_file(&self, py: Python<'_>, label: &str, path: PathBuf) -> PyResult<()> {
        native(py, |stop| self.lock().add_dat_file(label, &path, stop))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<u64> {
        native(py, |_| self.lock().finish())
    }

    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        native_short(py, || {
            self.lock().abort();
            Ok(())
        })
    }
}

impl ArchiveWriter {
    /// Only called while detached from Python. A panic under the lock has aborted the archive: nothing half done is left.
    fn lock(&self) -> MutexGuard<'_, archive::ArchiveWriter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn plain_header(dtype: &str, shape: &[usize], data: &[u8]) -> Result<Header> {
    let header = Header::new(DatType::from_name(dtype)?, shape)?;
    header.check_payload(data.len())?;
    Ok(header)
}

fn q40_payload<'a>(shape: &[usize], codes: &'a [u8], scales: &'a [u8]) -> Result<(Header, Q40Planes<'a>)> {
    let (header, planes) = (Header::new(DatType::Q40, shape)?, Q40Planes::new(codes, scales)?);
    header.check_payload(planes.blocks_len())?;
    Ok((header, planes))
}
