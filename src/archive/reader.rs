//! Walks an archive member by member, in bounded memory, seeing the names and sizes that tract would.

use std::cell::Cell;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use flate2::read::GzDecoder;

use super::label::{is_deceptive, same_name};
use crate::dat::{HEADER_LEN, Header};
use crate::error::{Error, Result};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Members an archive may have.
const MAX_MEMBERS: usize = 1 << 20;
/// Bytes of a member's name.
const MAX_NAME: usize = 4096;
/// Bytes of all names.
const MAX_NAMES: usize = 64 << 20;
/// Bytes that the headers between two members may take: long names and extensions, which the tar crate holds whole.
const MAX_HEADERS: u64 = 1 << 20;
/// Bytes read at a time.
const BUFFER_LEN: usize = 1 << 16;

/// One file of an archive; reading it yields its bytes.
pub struct Member<'a> {
    name: &'a str,
    size: u64,
    archive: &'a Path,
    bytes: &'a mut dyn Read,
}

impl Member<'_> {
    /// Relative path with `/` between components.
    pub fn name(&self) -> &str {
        self.name
    }

    /// Size in bytes, as the archive declares it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The whole content; [`Error::InconsistentTensor`] if it is larger than `max_bytes` or shorter than declared.
    pub fn read_all(&mut self, max_bytes: u64) -> Result<Vec<u8>> {
        let (name, size) = (self.name, self.size);
        if size > max_bytes {
            return Err(refuse(self.archive, &format!("{name} has {size} bytes, more than the {max_bytes} allowed")));
        }
        let mut content = Vec::new(); // grows with what is there, not with what is declared
        self.take(size).read_to_end(&mut content).map_err(|e| explain(e, self.archive))?;
        if content.len() as u64 != size {
            return Err(refuse(self.archive, &format!("{name} ends after {} of {size} bytes", content.len())));
        }
        Ok(content)
    }
}

impl Read for Member<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.bytes.read(out)
    }
}

/// What is done with each member; `Break` ends the walk.
pub type OnMember<'a> = &'a mut dyn FnMut(&mut Member) -> Result<ControlFlow<()>>;

/// Calls `on_member` for every file of the folder, tar or tgz at `path` (folders in name order, tars in their own).
///
/// Refuses ([`Error::InconsistentTensor`]) links, devices, absolute names, `..`, and two members of one name.
pub fn visit(path: &Path, stop: &AtomicBool, on_member: OnMember) -> Result<()> {
    let metadata = fs::metadata(path).map_err(Error::io(path))?;
    if metadata.is_dir() {
        return visit_folder(path, stop, on_member);
    }
    if !metadata.is_file() {
        return Err(refuse(path, "it is neither a file nor a folder"));
    }
    let file = BufReader::with_capacity(BUFFER_LEN, File::open(path).map_err(Error::io(path))?);
    visit_stream(path, file, metadata.len(), stop, on_member)
}

/// [`visit`] for a tar or tgz in memory; `label` stands for its path in errors.
pub fn visit_bytes(label: &Path, bytes: &[u8], stop: &AtomicBool, on_member: OnMember) -> Result<()> {
    visit_stream(label, Cursor::new(bytes), bytes.len() as u64, stop, on_member)
}

/// `(name, size)` of every file, in the order of [`visit`].
pub fn entries(path: &Path, stop: &AtomicBool) -> Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    visit(path, stop, &mut |member| {
        found.push((member.name().to_owned(), member.size()));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// [`entries`], with the headers of those that are `.dat` files; payloads are not read.
pub fn headers(path: &Path, stop: &AtomicBool) -> Result<Vec<(String, u64, Option<Header>)>> {
    let mut found = Vec::new();
    visit(path, stop, &mut |member| {
        let (name, size) = (member.name().to_owned(), member.size());
        let hidden = name.split('/').any(|component| component.starts_with('.')); // tract skips it
        let header = if !hidden && Path::new(&name).extension().is_some_and(|extension| extension == "dat") {
            let mut bytes = [0; HEADER_LEN];
            member.read_exact(&mut bytes).map_err(|e| explain(e, path))?;
            Some(Header::decode(&bytes)?)
        } else {
            None
        };
        found.push((name, size, header));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}

/// The content of the first member called `name`; what follows it is not looked at.
pub fn read(path: &Path, name: &str, max_bytes: u64, stop: &AtomicBool) -> Result<Vec<u8>> {
    let mut content = None;
    visit(path, stop, &mut |member| {
        if member.name() != name {
            return Ok(ControlFlow::Continue(()));
        }
        content = Some(member.read_all(max_bytes)?);
        Ok(ControlFlow::Break(()))
    })?;
    let missing = || io::Error::new(ErrorKind::NotFound, "the archive has no such entry");
    content.ok_or_else(|| Error::io(&path.join(name))(missing()))
}

fn refuse(archive: &Path, why: &str) -> Error {
    Error::InconsistentTensor(format!("{}: {why}", archive.display()))
}

/// A failed read of an archive: the system's fault if it has an error number, else the archive's.
fn explain(source: io::Error, archive: &Path) -> Error {
    match source.get_ref() {
        Some(inner) if inner.is::<Stopped>() => Error::Interrupted,
        _ if source.raw_os_error().is_some() => Error::io(archive)(source),
        _ => refuse(archive, &format!("not a readable tar or tgz: {source}")),
    }
}

/// The names seen so far, each one acceptable, each one another on every host.
struct Names<'a> {
    archive: &'a Path,
    seen: HashSet<String>,
    bytes: usize,
}

impl<'a> Names<'a> {
    fn new(archive: &'a Path) -> Self {
        Self { archive, seen: HashSet::new(), bytes: 0 }
    }

    fn admit(&mut self, name: &str) -> Result<()> {
        let bad = name.len() > MAX_NAME || is_deceptive(name) || name.contains('\\');
        if bad || name.split('/').any(|component| matches!(component, "" | "." | "..")) {
            let shown: String = name.chars().take(200).collect();
            return Err(refuse(self.archive, &format!("the entry name {shown:?} is not a plain relative path")));
        }
        self.bytes += name.len();
        if self.seen.len() == MAX_MEMBERS || self.bytes > MAX_NAMES {
            let why = format!("it has more than {MAX_MEMBERS} entries or {MAX_NAMES} bytes of names");
            return Err(refuse(self.archive, &why));
        }
        if !self.seen.insert(same_name(name)) {
            let why = format!("two entries are called {name:?} (letter case and Unicode forms are not told apart)");
            return Err(refuse(self.archive, &why));
        }
        Ok(())
    }
}

fn visit_folder(root: &Path, stop: &AtomicBool, on_member: OnMember) -> Result<()> {
    let mut names = Names::new(root);
    let mut files = Vec::new();
    let mut pending = vec![String::new()];
    while let Some(folder) = pending.pop() {
        let path = root.join(&folder);
        for found in fs::read_dir(&path).map_err(Error::io(&path))? {
            let found = found.map_err(Error::io(&path))?;
            let Ok(name) = found.file_name().into_string() else {
                return Err(refuse(root, &format!("the entry name {} is not UTF-8", found.file_name().display())));
            };
            let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            names.admit(&name)?;
            let metadata = found.metadata().map_err(Error::io(&found.path()))?; // of a link: its own
            if metadata.is_dir() {
                pending.push(name);
            } else if metadata.is_file() {
                files.push((name, metadata.len()));
            } else {
                return Err(refuse(root, &format!("{name} is a link or a special file")));
            }
        }
    }
    files.sort_unstable();
    for (name, size) in files {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let path = root.join(&name);
        let mut file = File::open(&path).map_err(Error::io(&path))?;
        let mut member = Member { name: &name, size, archive: root, bytes: &mut file };
        if on_member(&mut member)?.is_break() {
            break;
        }
    }
    Ok(())
}

fn visit_stream<R: Read + Seek>(
    path: &Path,
    mut file: R,
    len: u64,
    stop: &AtomicBool,
    on_member: OnMember,
) -> Result<()> {
    let mut magic = [0; 2];
    if len < magic.len() as u64 {
        return Err(refuse(path, "it is too short for a tar or tgz"));
    }
    file.read_exact(&mut magic).and_then(|()| file.rewind()).map_err(Error::io(path))?;
    let budget = Cell::new(MAX_HEADERS);
    if magic == GZIP_MAGIC {
        let mut tar = tar::Archive::new(Metered { inner: GzDecoder::new(file), budget: &budget, stop });
        if visit_tar(path, tar.entries().map_err(|e| explain(e, path))?, None, &budget, on_member)? {
            // Up to the checksum at its end; what follows the last member is padding.
            budget.set(MAX_HEADERS);
            io::copy(&mut tar.into_inner(), &mut io::sink()).map_err(|e| explain(e, path))?;
        }
    } else {
        let mut tar = tar::Archive::new(Metered { inner: file, budget: &budget, stop });
        let members = tar.entries_with_seek().map_err(|e| explain(e, path))?;
        visit_tar(path, members, Some(len), &budget, on_member)?;
    }
    Ok(())
}

/// Returns whether the walk went to the end.
fn visit_tar<R: Read>(
    path: &Path,
    members: tar::Entries<R>,
    len: Option<u64>,
    budget: &Cell<u64>,
    on_member: OnMember,
) -> Result<bool> {
    let mut names = Names::new(path);
    for member in members {
        let mut member = member.map_err(|e| explain(e, path))?;
        let (kind, size) = (member.header().entry_type(), member.size());
        let full_name = member.path().map_err(|e| explain(e, path))?.into_owned();
        let Some(name) = full_name.to_str() else {
            return Err(refuse(path, &format!("the entry name {} is not UTF-8", full_name.display())));
        };
        // As tract does: one leading "./" does not count.
        let name = name.strip_prefix("./").unwrap_or(name);
        budget.set(size.saturating_add(MAX_HEADERS));
        if kind.is_dir() && size == 0 {
            continue; // tract would read one that has content
        }
        names.admit(name)?;
        if !kind.is_file() {
            return Err(refuse(
                path,
                &format!("{name} is not a file but a tar member of type {:?}", kind.as_byte() as char),
            ));
        }
        if len.is_some_and(|len| member.raw_file_position().saturating_add(size) > len) {
            return Err(refuse(path, &format!("it ends before the {size} bytes of {name}")));
        }
        let mut member = Member { name, size, archive: path, bytes: &mut member };
        if on_member(&mut member)?.is_break() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fails when more than the budget is read, and when asked to stop.
struct Metered<'a, R> {
    inner: R,
    budget: &'a Cell<u64>,
    stop: &'a AtomicBool,
}

#[derive(Debug, thiserror::Error)]
#[error("stopped")]
struct Stopped;

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other(Stopped));
        }
        let got = self.inner.read(out)?;
        let left = self.budget.get().checked_sub(got as u64);
        self.budget
            .set(left.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "its member headers are too large"))?);
        Ok(got)
    }
}

impl<R: Seek> Seek for Metered<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}
