//! Payloads as streams: of the announced length or an error, and interleaved on the way when they come as Q40 planes.

use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::q40::block::BLOCK_BYTES;
use crate::q40::{self, CODE_BYTES, SCALE_BYTES};

/// A reader that yields exactly `len` bytes of another, or fails; it also fails once `stop` is true.
pub struct Exactly<'a, R> {
    inner: R,
    left: u64,
    stop: &'a AtomicBool,
}

impl<'a, R: Read> Exactly<'a, R> {
    /// The next `len` bytes of `inner`.
    pub fn new(inner: R, len: u64, stop: &'a AtomicBool) -> Self {
        Self { inner, left: len, stop }
    }

    /// The error of a copy to `path` that failed with `source`.
    pub fn explain(&self, source: io::Error, path: &Path) -> Error {
        if self.stop.load(Ordering::Relaxed) { Error::Interrupted } else { Error::io(path)(source) }
    }
}

impl<R: Read> Read for Exactly<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped")); // not `Interrupted`, which copies retry
        }
        let want = out.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.inner.read(&mut out[..want])?;
        if got == 0 && want > 0 {
            let why = format!("the payload ends {} bytes before its announced length", self.left);
            return Err(io::Error::new(ErrorKind::UnexpectedEof, why));
        }
        self.left -= got as u64;
        Ok(got)
    }
}

/// Groups interleaved at a time: about 1 MiB of blocks.
const CHUNK_GROUPS: usize = 1 << 16;

/// Q40 planes read as blocks.
pub struct Q40Planes<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    blocks: Vec<u8>,
    taken: usize,
}

impl<'a> Q40Planes<'a> {
    /// `codes`: 16 bytes a group; `scales`: one f16 a group.
    pub fn new(codes: &'a [u8], scales: &'a [u8]) -> Result<Self> {
        if codes.len() / CODE_BYTES != scales.len() / SCALE_BYTES
            || codes.len() % CODE_BYTES + scales.len() % SCALE_BYTES > 0
        {
            let (codes, scales) = (codes.len(), scales.len());
            let why =
                format!("Q40 planes need 16 bytes of codes and 2 of scale a group, got {codes} and {scales} bytes");
            return Err(Error::InvalidArgument(why));
        }
        Ok(Self { codes, scales, blocks: Vec::new(), taken: 0 })
    }

    /// Bytes of all blocks, before any was read.
    pub fn blocks_len(&self) -> usize {
        self.codes.len() / CODE_BYTES * BLOCK_BYTES
    }

    fn refill(&mut self) -> Result<()> {
        let groups = CHUNK_GROUPS.min(self.codes.len() / CODE_BYTES);
        let (codes, more_codes) = self.codes.split_at(groups * CODE_BYTES);
        let (scales, more_scales) = self.scales.split_at(groups * SCALE_BYTES);
        (self.codes, self.scales, self.taken) = (more_codes, more_scales, 0);
        self.blocks.resize(groups * BLOCK_BYTES, 0);
        // Whoever reads looks at whether to stop between chunks.
        q40::join(codes, scales, &mut self.blocks, &AtomicBool::new(false))
    }
}

impl Read for Q40Planes<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.blocks.len() {
            self.refill().map_err(io::Error::other)?;
        }
        let got = (&self.blocks[self.taken..]).read(out)?;
        self.taken += got;
        Ok(got)
    }
}
