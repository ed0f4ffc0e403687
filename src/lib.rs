//! Rust core of `torch_to_nnef`: Q40 mathematics, NNEF bytes on disk, tract in process.
//! Nothing outside `python` names pyo3; nothing outside `runtime` names tract.

pub mod archive;
pub mod dat;
pub mod error;
pub mod fsio;
mod pool;
pub mod preflight;
#[cfg(feature = "python")]
mod python;
pub mod q40;
pub mod runtime;
