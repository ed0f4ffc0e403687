//! Files and folders that appear whole or not at all: written beside their target, synced, renamed over it.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Start of the name of everything unfinished; its end is as long as `RANDOM`.
pub const TEMP_PREFIX: &str = ".t2n-unfinished-";
/// Start of the name of a folder that holds, under its own name, one that is being replaced.
const ASIDE_PREFIX: &str = ".t2n-aside-";
const RANDOM: usize = 8;
/// File in a [`Staging`] that is locked too: on most network file systems other machines see no lock on a folder.
const LOCK: &str = ".t2n-lock";

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
        check_kind(target, false)?;
        let mut builder = Builder::new();
        builder.prefix(TEMP_PREFIX).rand_bytes(RANDOM);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask
        let temp = owned(|| {
            let temp = builder.tempfile_in(parent).map_err(|e| plain(&e))?;
            Ok(own(temp.path(), temp.as_file()).then_some(temp))
        });
        Ok(Self { temp: temp.map_err(Error::io(target))?, target: target.to_path_buf() })
    }

    /// Puts the file in place, durably; returns its bytes.
    pub fn commit(self) -> Result<u64> {
        let Self { temp, target } = self;
        temp.as_file().sync_all().map_err(Error::io(&target))?;
        let len = temp.as_file().metadata().map_err(Error::io(&target))?.len();
        temp.persist(&target).map_err(|e| Error::io(&target)(e.error))?;
        sync_folder(parent_of(&target)?)?;
        Ok(len)
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
    temp: OwnedFolder,
    target: PathBuf,
}

impl AtomicFolder {
    /// Starts an empty folder beside `target`, which may exist as a folder.
    pub fn create(target: &Path) -> Result<Self> {
        let parent = parent_of(target)?;
        check_kind(target, true)?;
        let temp = OwnedFolder::create(parent, TEMP_PREFIX).map_err(Error::io(target))?;
        Ok(Self { temp, target: target.to_path_buf() })
    }

    /// Where to write meanwhile. The files and folders in it must be synced before [`Self::commit`].
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Puts the folder in place, durably, then removes the one it replaces.
    pub fn commit(self) -> Result<()> {
        sync_folder(self.path())?;
        put_folder(self.path(), &self.target) // and what is now at `temp` is dropped
    }
}

/// A folder beside a target, to write it in; dropped, it is gone, and so are folders made above it that are empty.
#[derive(Debug)]
pub struct Staging {
    _lock: File, // closed before the folder goes: NFS keeps the name of an open file
    folder: OwnedFolder,
    _above: Made,
}

impl Staging {
    /// In `parent`, which is made if need be, and swept.
    pub fn create(parent: &Path) -> Result<Self> {
        sweep(parent);
        let mut above = Made(Vec::new());
        let made = owned(|| {
            above.make(parent)?; // again if another process, which failed, removed it
            let folder = OwnedFolder::create(parent, TEMP_PREFIX)?;
            let lock = open_lock(folder.path())?;
            Ok(own(&folder.path().join(LOCK), &lock).then_some((lock, folder)))
        });
        let (lock, folder) = made.map_err(Error::io(parent))?;
        Ok(Self { _lock: lock, folder, _above: above })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Folders this process made, innermost first; those that are empty go when it is dropped.
#[derive(Debug)]
struct Made(Vec<PathBuf>);

impl Made {
    fn make(&mut self, folder: &Path) -> io::Result<()> {
        let missing = folder.ancestors().filter(|f| !f.as_os_str().is_empty()).take_while(|f| !f.exists());
        self.0.extend(missing.map(Path::to_path_buf));
        fs::create_dir_all(folder)?;
        self.0.iter().try_for_each(|made| made.parent().map_or(Ok(()), |above| sync(or_here(above))))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _in_use = self.0.iter().try_for_each(fs::remove_dir);
    }
}

/// An unfinished folder with its lock; dropped, it is gone, unless by a fork of the process that made it.
#[derive(Debug)]
struct OwnedFolder {
    temp: TempDir,
    owner: u32,
    _lock: Option<File>, // dropped after the folder is gone
}

impl Drop for OwnedFolder {
    fn drop(&mut self) {
        if self.owner != process::id() {
            self.temp.disable_cleanup(true);
        }
    }
}

impl OwnedFolder {
    fn create(parent: &Path, prefix: &str) -> io::Result<Self> {
        owned(|| {
            let temp = Builder::new().prefix(prefix).rand_bytes(RANDOM).tempdir_in(parent).map_err(|e| plain(&e))?;
            let owner = process::id();
            if cfg!(not(unix)) {
                return Ok(Some(Self { temp, owner, _lock: None })); // folders cannot be opened there
            }
            let lock = File::open(temp.path())?;
            Ok(own(temp.path(), &lock).then(|| Self { temp, owner, _lock: Some(lock) }))
        })
    }

    fn path(&self) -> &Path {
        self.temp.path()
    }
}

/// What `make` gives, which a [`sweep`] of another process may take away before it is locked; then it is made again.
fn owned<T>(mut make: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
    let mut failed = io::Error::from(ErrorKind::ResourceBusy);
    for _ in 0..16 {
        match make() {
            Ok(Some(new)) => return Ok(new),
            Ok(None) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => failed = e,
            Err(e) => return Err(e),
        }
    }
    Err(failed)
}

/// Locks `file`, at `path`, as this process's as long as it is open; false if a sweep has it.
/// Where there are no locks, sweeps get none either.
fn own(path: &Path, file: &File) -> bool {
    !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && path.exists()
}

fn open_lock(folder: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(false).open(folder.join(LOCK))
}

/// Removes what processes that are dead left unfinished in `folder`, and puts back what they had moved aside. An error
/// leaves it for the next time.
pub fn sweep(folder: &Path) {
    for entry in fs::read_dir(or_here(folder)).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        let starts = |prefix: &str| {
            let random = name.to_str().and_then(|name| name.strip_prefix(prefix));
            random.is_some_and(|r| r.len() == RANDOM && r.bytes().all(|b| b.is_ascii_alphanumeric()))
        };
        let Ok(kind) = entry.file_type() else { continue };
        if starts(TEMP_PREFIX) && kind.is_file() {
            // Some network file systems lock only what is open for writing.
            let Ok(lock) = File::options().write(true).open(&path) else { continue };
            if lock.try_lock().is_ok() {
                let _left = fs::remove_file(&path); // still locked: who made it meanwhile makes another
            }
        } else if kind.is_dir() && (starts(TEMP_PREFIX) || starts(ASIDE_PREFIX)) {
            let Ok(lock) = File::open(&path) else { continue };
            if lock.try_lock().is_ok() {
                let _left = if starts(ASIDE_PREFIX) { put_back(&path, folder) } else { remove_unowned(&path) };
            }
        }
    }
}

/// Removes an unfinished folder, unless another machine has a lock in it.
fn remove_unowned(path: &Path) -> io::Result<()> {
    let lock = match open_lock(path) {
        Err(e) if e.kind() == ErrorKind::StorageFull => None, // removing helps
        lock => Some(lock?),
    };
    if lock.as_ref().is_none_or(|lock| lock.try_lock().is_ok()) {
        let _open = fs::remove_dir_all(path); // NFS: not before the lock is closed
        drop(lock);
        return fs::remove_dir_all(path);
    }
    Ok(())
}

/// [`sweep`] of the folder that holds `target`.
pub fn sweep_beside(target: &Path) {
    target.parent().into_iter().for_each(sweep);
}

/// Moves what is in `aside` to `folder`; what is there already stays.
fn put_back(aside: &Path, folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(aside)? {
        let entry = entry?;
        let target = folder.join(entry.file_name());
        if !target.exists() {
            fs::rename(entry.path(), target)?;
        }
    }
    fs::remove_dir_all(aside)
}

/// Makes a finished file or folder durable and renames it to `target`; what was there of the same kind is replaced in
/// one step. `new` lies on the same file system.
pub fn put_in_place(new: &Path, target: &Path, stop: &AtomicBool) -> Result<()> {
    let folder = fs::symlink_metadata(new).map_err(Error::io(new))?.is_dir();
    check_kind(target, folder)?;
    sync_tree(new, stop)?;
    if folder {
        put_folder(new, target)?;
        let _swept_later = fs::remove_dir_all(new);
        return Ok(());
    }
    fs::rename(new, target).map_err(Error::io(target))?;
    sync_folder(parent_of(target)?)
}

/// Refuses to replace at `target` anything but a folder, or but a file or a link to one.
fn check_kind(target: &Path, folder: bool) -> Result<()> {
    let found = if folder { fs::symlink_metadata(target) } else { fs::metadata(target) };
    if found.is_ok_and(|found| !(if folder { found.is_dir() } else { found.is_file() })) {
        let wanted = if folder { "folder" } else { "file" };
        return Err(Error::InvalidArgument(format!("{} exists and is not a {wanted}", placed(target).display())));
    }
    Ok(())
}

/// `path` as it will be once what is unfinished is in place.
pub fn placed(path: &Path) -> PathBuf {
    path.components().filter(|part| !part.as_os_str().as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes())).collect()
}

/// An error of `tempfile` without the path that it adds: [`Error::io`] adds one that callers know.
fn plain(error: &io::Error) -> io::Error {
    let text = error.to_string();
    io::Error::new(error.kind(), text.split(" at path ").next().unwrap_or_default())
}

/// Afterwards what was at `target`, if anything, is at `new`.
fn put_folder(new: &Path, target: &Path) -> Result<()> {
    let parent = parent_of(target)?;
    swap_in(new, target, parent, exchange).map_err(Error::io(target))?;
    sync_folder(parent)
}

/// Makes files, and folders with all in them, durable; not what links lead to, nor files we may not read, which are
/// others' and were only linked in.
fn sync_tree(path: &Path, stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::Interrupted);
    }
    let kind = fs::symlink_metadata(path).map_err(Error::io(path))?;
    if kind.is_dir() {
        for entry in fs::read_dir(path).map_err(Error::io(path))? {
            sync_tree(&entry.map_err(Error::io(path))?.path(), stop)?;
        }
        return sync_folder(path);
    }
    match kind.is_file().then(|| File::open(path).and_then(|f| f.sync_all())) {
        Some(Err(e)) if e.kind() != ErrorKind::PermissionDenied => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Makes the names in `folder` durable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    sync(folder).map_err(Error::io(folder))
}

fn sync(folder: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(()); // folders cannot be opened there
    }
    match File::open(folder).and_then(|f| f.sync_all()) {
        // Some network file systems offer no sync of folders; there is nothing more to ask of them.
        Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Err(e),
        _ => Ok(()),
    }
}

/// The folder that holds `path`.
fn parent_of(path: &Path) -> Result<&Path> {
    match (path.file_name(), path.parent()) {
        (Some(_), Some(parent)) => Ok(or_here(parent)),
        _ => Err(Error::InvalidArgument(format!("{:?} names no file or folder to write", path.display()))),
    }
}

/// `folder`, or the working folder if it is the empty path.
fn or_here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

/// Renames `new` to `target` in `parent`; a folder already there is then at `new`, or gone. Of several that do so at once
/// the last one wins.
fn swap_in(new: &Path, target: &Path, parent: &Path, exchange: Exchange) -> io::Result<()> {
    let is_occupied = |e: &io::Error| matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists);
    loop {
        match fs::rename(new, target) {
            Err(e) if is_occupied(&e) => {}
            outcome => return outcome,
        }
        let outcome = match exchange(new, target) {
            Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                move_aside(new, target, parent)
            }
            outcome => outcome,
        };
        match outcome {
            Err(e) if is_occupied(&e) || (e.kind() == ErrorKind::NotFound && new.exists()) => {} // another was faster
            outcome => return outcome,
        }
    }
}

/// Gives each of two folders the other's name in one step; an error if the kernel or the file system cannot.
type Exchange = fn(&Path, &Path) -> io::Result<()>;

#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn exchange(new: &Path, target: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Two renames; if the process is killed between them, `target` is absent until the next [`sweep`].
fn move_aside(new: &Path, target: &Path, parent: &Path) -> io::Result<()> {
    let mut aside = OwnedFolder::create(parent, ASIDE_PREFIX)?;
    let old = aside.path().join(target.file_name().unwrap_or_default());
    fs::rename(target, &old)?;
    let outcome = fs::rename(new, target);
    if outcome.is_err() && fs::rename(&old, target).is_err() && !target.exists() {
        aside.temp.disable_cleanup(true); // it is for the sweep, rather than the old content lost
    }
    outcome
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
