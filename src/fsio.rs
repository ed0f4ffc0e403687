//! Files and folders that appear whole or not at all: written beside their target, synced, renamed over it.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Start of the name of everything unfinished; what a killed process leaves can be recognised by it.
pub const TEMP_PREFIX: &str = ".t2n-";

/// A file that takes its place at [`Self::commit`]; dropped before, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    temp: NamedTempFile,
    target: PathBuf,
}

impl AtomicFile {
    /// Starts a file beside `target`, which may exist as a file (a link is replaced, not followed).
    pub fn create(target: &Path) -> Result<Self> {
        let parent = parent_of(target)?;
        if fs::metadata(target).is_ok_and(|found| !found.is_file()) {
            return Err(Error::InvalidArgument(format!("{} exists and is not a file", target.display())));
        }
        let mut builder = Builder::new();
        builder.prefix(TEMP_PREFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask
        let temp = builder.tempfile_in(parent).map_err(Error::io(target))?;
        Ok(Self { temp, target: target.to_path_buf() })
    }

    /// Puts the file in place, durably.
    pub fn commit(self) -> Result<()> {
        let Self { temp, target } = self;
        temp.as_file().sync_all().map_err(Error::io(&target))?;
        temp.persist(&target).map_err(|e| Error::io(&target)(e.error))?;
        sync_folder(parent_of(&target)?)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temp.as_file_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A folder that takes its place at [`Self::commit`]; dropped before, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFolder {
    temp: TempDir,
    target: PathBuf,
}

impl AtomicFolder {
    /// Starts an empty folder beside `target`, which may exist as a folder.
    pub fn create(target: &Path) -> Result<Self> {
        let parent = parent_of(target)?;
        if fs::symlink_metadata(target).is_ok_and(|found| !found.is_dir()) {
            return Err(Error::InvalidArgument(format!("{} exists and is not a folder", target.display())));
        }
        let temp = Builder::new().prefix(TEMP_PREFIX).tempdir_in(parent).map_err(Error::io(target))?;
        Ok(Self { temp, target: target.to_path_buf() })
    }

    /// Where to write meanwhile. The files and folders in it must be synced before [`Self::commit`].
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Puts the folder in place, durably, then removes the one it replaces.
    pub fn commit(self) -> Result<()> {
        let Self { temp, target } = self;
        put_folder(temp.path(), &target)?;
        let _placed_or_removed = temp.keep();
        Ok(())
    }
}

/// Renames a finished file or folder to `target`, durably; what was there of the same kind is replaced in one step.
/// `new` lies on the same file system, synced.
pub fn put_in_place(new: &Path, target: &Path) -> Result<()> {
    let kind = |path: &Path| fs::symlink_metadata(path).map(|found| found.is_dir());
    let folder = kind(new).map_err(Error::io(new))?;
    if kind(target).is_ok_and(|existing| existing != folder) {
        let wanted = if folder { "folder" } else { "file" };
        return Err(Error::InvalidArgument(format!("{} exists and is not a {wanted}", target.display())));
    }
    if folder {
        return put_folder(new, target);
    }
    fs::rename(new, target).map_err(Error::io(target))?;
    sync_folder(parent_of(target)?)
}

/// Afterwards nothing is at `new`.
fn put_folder(new: &Path, target: &Path) -> Result<()> {
    sync_folder(new)?;
    let parent = parent_of(target)?;
    swap_in(new, target, parent).map_err(Error::io(target))?;
    sync_folder(parent)?;
    match fs::remove_dir_all(new) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(new)(e)),
        _ => Ok(()),
    }
}

/// Makes the names in `folder` durable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(not(unix)) {
        return Ok(()); // folders cannot be opened there
    }
    match File::open(folder).and_then(|f| f.sync_all()) {
        // Some network file systems offer no sync of folders; there is nothing more to ask of them.
        Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Err(Error::io(folder)(e)),
        _ => Ok(()),
    }
}

/// The folder that holds `path`.
fn parent_of(path: &Path) -> Result<&Path> {
    match (path.file_name(), path.parent()) {
        (Some(_), Some(parent)) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        (Some(_), Some(parent)) => Ok(parent),
        _ => Err(Error::InvalidArgument(format!("{:?} names no file or folder to write", path.display()))),
    }
}

/// Renames `new` to `target` in `parent`; a folder already there ends up at `new`, or is removed by [`move_aside`].
fn swap_in(new: &Path, target: &Path, parent: &Path) -> io::Result<()> {
    match fs::rename(new, target) {
        Err(e) if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {}
        outcome => return outcome,
    }
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
            // The kernel or the file system has no exchange.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            outcome => return outcome.map_err(Into::into),
        }
    }
    move_aside(new, target, parent)
}

/// [`swap_in`] by two renames: a process killed between them leaves `target` absent, and its old content in a folder
/// named [`TEMP_PREFIX`] beside it.
fn move_aside(new: &Path, target: &Path, parent: &Path) -> io::Result<()> {
    let aside = Builder::new().prefix(TEMP_PREFIX).tempdir_in(parent)?;
    let old = aside.path().join("old");
    fs::rename(target, &old)?;
    let outcome = fs::rename(new, target);
    if outcome.is_err() && fs::rename(&old, target).is_err() {
        let _leftover = aside.keep(); // rather than the old content lost
    }
    outcome
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn folder_with(parent: &Path, name: &str, file: &str) -> PathBuf {
        let path = parent.join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(file), "").unwrap();
        path
    }

    #[test]
    fn without_exchange_a_folder_is_replaced_by_two_renames() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (folder_with(dir.path(), "target", "old"), folder_with(dir.path(), "new", "new"));
        move_aside(&new, &old, dir.path()).unwrap();
        assert!(old.join("new").exists() && !old.join("old").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_second_rename_brings_the_old_folder_back() {
        let dir = tempfile::tempdir().unwrap();
        let old = folder_with(dir.path(), "target", "old");
        assert!(move_aside(&dir.path().join("missing"), &old, dir.path()).is_err());
        assert!(old.join("old").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
