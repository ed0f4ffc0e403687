//! Limits on what may reach tract: what it cannot survive (stack overflow, endless loops) is refused here, as far as
//! it shows without running anything. Memory that ops ask for at run time does not show: an archive of unknown origin
//! belongs in a child process with limits.

mod graph;

use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::archive::{self, Member};
use crate::dat::{DatType, HEADER_LEN, Header};
use crate::error::{Error, Result};

pub use graph::RESERVED;

/// Stands for the path of an archive that has none.
pub const IN_MEMORY: &str = "archive in memory";
/// Bytes of graph.nnef, and of graph.quant.
const MAX_TEXT: u64 = 256 << 20;
/// Bytes of all entries.
const MAX_TOTAL: u64 = 1 << 40;

/// Bytes of all entries of a file that is compressed beyond [`MAX_RATIO`].
const MAX_INFLATED: u64 = 1 << 30;
/// Weights shrink to half at best; deflate shrinks zeros to a thousandth.
const MAX_RATIO: u64 = 200;

/// Refuses a folder, tar or tgz that could crash or hang tract.
///
/// [`Error::Tract`] for what graph.nnef says, for its absence and for nested models; [`Error::InconsistentTensor`] for a
/// container or `.dat` that is not what its headers say.
pub fn check(path: &Path, stop: &AtomicBool) -> Result<()> {
    let packed = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|file| file.len());
    let mut found = Found { packed, ..Found::default() };
    archive::visit(path, stop, &mut |member| found.check(path, member))?;
    found.finish(path)
}

/// [`check`] of a tar or tgz in memory.
pub fn check_bytes(bytes: &[u8], stop: &AtomicBool) -> Result<()> {
    let label = Path::new(IN_MEMORY);
    let mut found = Found { packed: Some(bytes.len() as u64), ..Found::default() };
    archive::visit_bytes(label, bytes, stop, &mut |member| found.check(label, member))?;
    found.finish(label)
}

/// What was met on the way through an archive.
#[derive(Default)]
struct Found {
    graph: bool,
    total: u64,
    /// Bytes of the file that holds all.
    packed: Option<u64>,
}

impl Found {
    fn check(&mut self, archive: &Path, member: &mut Member) -> Result<ControlFlow<()>> {
        let name = member.name().to_owned();
        let refuse = |why: &str| Error::Tract(format!("{}: {name}: {why}", archive.display()));
        self.total = self.total.saturating_add(member.size());
        if self.total > MAX_TOTAL {
            return Err(refuse(&format!("the entries up to here take more than {MAX_TOTAL} bytes")));
        }
        if self.total > MAX_INFLATED && self.packed.is_some_and(|packed| self.total / MAX_RATIO > packed) {
            return Err(refuse(&format!("the entries up to here take more than {MAX_RATIO} times what the file has")));
        }
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", &name));
        if name.split('/').any(|component| component.starts_with('.')) {
            // tract does not look at it either.
        } else if name == "graph.nnef" {
            self.graph = true;
            graph::check(&text(&refuse, member)?).map_err(|why| refuse(&why))?;
        } else if name == "graph.quant" {
            text(&refuse, member)?;
        } else if !folder.is_empty() && matches!(file, "graph.nnef" | "graph.quant") || is_archive(file) {
            return Err(refuse("a model inside a model, which is not supported"));
        } else if Path::new(file).extension().is_some_and(|extension| extension == "dat") {
            check_dat(member)
                .map_err(|why| Error::InconsistentTensor(format!("{}: {name}: {why}", archive.display())))?;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn finish(self, archive: &Path) -> Result<()> {
        let missing =
            || Error::Tract(format!("{}: it has no graph.nnef, so it is not an NNEF archive", archive.display()));
        self.graph.then_some(()).ok_or_else(missing)
    }
}

fn is_archive(file: &str) -> bool {
    file.ends_with(".nnef.tar") || file.ends_with(".nnef.tgz")
}

fn text(refuse: &dyn Fn(&str) -> Error, member: &mut Member) -> Result<String> {
    String::from_utf8(member.read_all(MAX_TEXT)?).map_err(|e| refuse(&format!("not UTF-8: {}", e.utf8_error())))
}

fn check_dat(member: &mut Member) -> std::result::Result<(), String> {
    if member.size() < HEADER_LEN as u64 {
        return Err(format!("{} bytes, a .dat has at least {HEADER_LEN}", member.size()));
    }
    let mut bytes = [0; HEADER_LEN];
    member.read_exact(&mut bytes).map_err(|e| e.to_string())?;
    let header = Header::decode(&bytes).map_err(|e| e.to_string())?;
    if member.size() != header.file_len() {
        return Err(format!("{} bytes, its header announces {}", member.size(), header.file_len()));
    }
    // Any other byte is undefined behaviour once tract takes it for a boolean.
    let mut part = [0; 4096];
    while header.dtype() == DatType::Bool {
        match member.read(&mut part).map_err(|e| e.to_string())? {
            0 => break,
            length if header.admits(&part[..length]) => {}
            _ => return Err("a boolean is neither 0 nor 1".to_owned()),
        }
    }
    Ok(())
}
