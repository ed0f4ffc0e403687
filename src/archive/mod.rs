//! NNEF archives: a folder, a tar or a gzipped tar of `graph.nnef` and one `.dat` a variable.
//! Same entries, same bytes, on any host and date; reading never unpacks to disk.

mod label;
mod reader;
mod writer;

pub use label::dat_name;
pub use reader::{Member, entries, headers, read, visit, visit_bytes};
pub use writer::{ArchiveWriter, Form, check_dats};
