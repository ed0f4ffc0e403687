//! The one error type of the core; the binding maps each variant to a Python class of `torch_to_nnef.exceptions`.

use std::path::{Path, PathBuf};

use crate::fsio::placed;

/// Result of every fallible function of the core.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value the caller gave is outside what the function accepts.
    #[error("{0}")]
    InvalidArgument(String),
    /// An object used against its contract.
    #[error("{0}")]
    Misuse(String),
    /// A tensor that Q40 cannot hold: shape, non-finite value, or scale beyond f16.
    #[error("{0}")]
    ImpossibleQuantization(String),
    /// Bytes that are not what their header or container says.
    #[error("{0}")]
    InconsistentTensor(String),
    /// An operating-system failure on a path.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder the call was about.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An archive that must not reach tract, or that tract refused.
    #[error("{0}")]
    Tract(String),
    /// A panic caught at the boundary of a native call.
    #[error("panic in native code: {0}")]
    Panic(String),
    /// The caller asked to stop (Ctrl-C); partial outputs are gone.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// Adapter for `map_err` on calls that touch `path`; what is unfinished is called by the name it is for.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: placed(path), source }
    }
}
