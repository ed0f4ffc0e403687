//! Streams entries, in the order given, into a folder, tar or tgz that takes its place at the end.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};

use super::label::{Names, check_name, dat_name};
use crate::dat::{self, COPY_LEN, DatType, Exactly, Header};
use crate::error::{Error, Result};
use crate::fsio::{AtomicFile, AtomicFolder, sweep_beside, sync_folder};

/// What an archive is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A folder of files.
    Folder,
    /// One tar file.
    Tar,
    /// One gzipped tar file; the level goes from 0 (stored) to 9.
    Tgz {
        /// Effort of the compression.
        level: u32,
    },
}

/// An archive being written beside its target. A failure while an entry is streamed aborts the whole; an entry refused
/// before (name, size) leaves the archive as it was.
pub struct ArchiveWriter {
    target: PathBuf,
    names: Names,
    sink: Option<Sink>,
}

impl ArchiveWriter {
    /// Starts an archive that will replace `target`.
    pub fn create(target: &Path, form: Form) -> Result<Self> {
        let stream = |gzip: Option<u32>| -> Result<Sink> {
            let file = BufWriter::with_capacity(COPY_LEN, AtomicFile::create(target)?);
            let stream = match gzip {
                None => Stream::Plain(file),
                // Time 0 and "unknown" system: nothing of this host in the header.
                Some(level) => {
                    Stream::Gzip(GzBuilder::new().mtime(0).operating_system(255).write(file, Compression::new(level)))
                }
            };
            Ok(Sink::Tar(tar::Builder::new(stream)))
        };
        sweep_beside(target);
        let sink = match form {
            Form::Folder => Sink::Folder(FolderSink::create(target)?),
            Form::Tar => stream(None)?,
            Form::Tgz { level: level @ 0..=9 } => stream(Some(level))?,
            Form::Tgz { level } => {
                return Err(Error::InvalidArgument(format!("compression level {level} is not in 0..=9")));
            }
        };
        Ok(Self { target: target.to_path_buf(), names: Names::default(), sink: Some(sink) })
    }

    /// Adds a text: `graph.nnef`, `graph.quant`.
    pub fn add_text(&mut self, name: &str, text: &str, stop: &AtomicBool) -> Result<()> {
        check_name(name)?;
        self.append(name, text.as_bytes(), text.len() as u64, stop)
    }

    /// Adds the variable `label`; `payload` must yield what `header` announces.
    pub fn add_dat(&mut self, label: &str, header: &Header, payload: impl Read, stop: &AtomicBool) -> Result<()> {
        let bytes = header.encode();
        self.append(&dat_name(label)?, bytes.as_slice().chain(payload), header.file_len(), stop)
    }

    /// Adds a copy of the `.dat` at `path` as the variable `label`, once its header fits its size.
    pub fn add_dat_file(&mut self, label: &str, path: &Path, stop: &AtomicBool) -> Result<()> {
        let (header, file) = dat::open(path)?;
        self.add_dat(label, &header, file, stop)
    }

    /// Puts the archive in place; returns its bytes on disk.
    pub fn finish(&mut self) -> Result<u64> {
        let target = &self.target;
        match self.sink.take().ok_or_else(|| closed(target))? {
            Sink::Folder(folder) => folder.finish(),
            Sink::Tar(builder) => finish_tar(builder, target),
        }
    }

    /// Removes what was written. Nothing to do after [`Self::finish`] or a first abort.
    pub fn abort(&mut self) {
        self.sink = None;
    }

    fn append(&mut self, name: &str, bytes: impl Read, len: u64, stop: &AtomicBool) -> Result<()> {
        if self.sink.is_none() {
            return Err(closed(&self.target));
        }
        self.names.claim(name)?;
        // Out of `self` meanwhile: whatever goes wrong, a panic included, half an entry is never finished.
        if let Some(mut sink) = self.sink.take() {
            let mut bytes = Exactly::new(bytes, len, stop);
            sink.append(name, &mut bytes, len).map_err(|e| bytes.explain(e, &self.target.join(name)))?;
            self.sink = Some(sink);
        }
        Ok(())
    }
}

/// Refuses tensors, each a label, the name of its type and its shape, that cannot be `.dat` files in one folder.
pub fn check_dats(tensors: &[(String, String, Vec<usize>)]) -> Result<()> {
    let mut names = Names::default();
    for (label, dtype, shape) in tensors {
        names.claim(&dat_name(label)?)?;
        DatType::from_name(dtype)
            .and_then(|dtype| Header::new(dtype, shape))
            .map_err(|e| Error::InvalidArgument(format!("tensor {label:?}: {e}")))?;
    }
    Ok(())
}

fn closed(target: &Path) -> Error {
    let why = "was finished or aborted (an error while an entry is written aborts it); start another writer";
    Error::InvalidArgument(format!("the archive {} {why}", target.display()))
}

enum Sink {
    Folder(FolderSink),
    Tar(tar::Builder<Stream>),
}

impl Sink {
    fn append(&mut self, name: &str, bytes: &mut dyn Read, len: u64) -> io::Result<()> {
        match self {
            Self::Folder(folder) => folder.append(name, bytes, len),
            Self::Tar(builder) => {
                let mut header = tar::Header::new_gnu(); // its time is 0, its names are empty
                header.set_uid(0);
                header.set_gid(0);
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(0o644);
                header.set_size(len);
                builder.append_data(&mut header, name, bytes)
            }
        }
    }
}

/// Where a tar goes.
enum Stream {
    Plain(BufWriter<AtomicFile>),
    Gzip(GzEncoder<BufWriter<AtomicFile>>),
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Gzip(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.flush(),
            Self::Gzip(out) => out.flush(),
        }
    }
}

fn finish_tar(builder: tar::Builder<Stream>, target: &Path) -> Result<u64> {
    let out = match builder.into_inner().map_err(Error::io(target))? {
        Stream::Plain(out) => out,
        Stream::Gzip(gzip) => gzip.finish().map_err(Error::io(target))?,
    };
    out.into_inner().map_err(|e| Error::io(target)(e.into_error()))?.commit()
}

struct FolderSink {
    root: AtomicFolder,
    /// Folders made under the root, to be synced.
    folders: BTreeSet<PathBuf>,
    len: u64,
}

impl FolderSink {
    fn create(target: &Path) -> Result<Self> {
        Ok(Self { root: AtomicFolder::create(target)?, folders: BTreeSet::new(), len: 0 })
    }

    fn append(&mut self, name: &str, bytes: &mut dyn Read, len: u64) -> io::Result<()> {
        for (at, _) in name.match_indices('/') {
            let folder = self.root.path().join(&name[..at]);
            if !self.folders.contains(&folder) {
                fs::create_dir(&folder)?;
                self.folders.insert(folder);
            }
        }
        let mut out = BufWriter::with_capacity(COPY_LEN, File::create_new(self.root.path().join(name))?);
        io::copy(bytes, &mut out)?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        self.len += len;
        Ok(())
    }

    fn finish(self) -> Result<u64> {
        self.folders.iter().try_for_each(|folder| sync_folder(folder))?;
        self.root.commit()?;
        Ok(self.len)
    }
}
