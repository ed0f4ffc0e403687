//! The files of the core that read what others wrote, without tract, so that they build in seconds with a sanitizer.

/// As in `../src`.
#[path = "../../src"]
#[allow(dead_code, reason = "part of the crate")]
pub mod native {
    pub mod archive;
    pub mod dat;
    pub mod error;
    pub mod fsio;
    pub mod pool;
    pub mod preflight;
    pub mod q40;
}
use native::{archive, dat, error, fsio, pool, q40};

pub mod targets;
