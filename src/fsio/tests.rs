//! What must hold of unfinished files and folders.

use super::*;

fn folder_with(parent: &Path, name: &str, file: &str) -> PathBuf {
    let path = parent.join(name);
    fs::create_dir(&path).unwrap();
    fs::write(path.join(file), "").unwrap();
    path
}

#[test]
fn what_the_dead_left_is_swept_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let alive = AtomicFile::create(&path("file")).unwrap();
    let folder = AtomicFolder::create(&path("folder")).unwrap();
    let staging = Staging::create(dir.path()).unwrap();
    for name in [".t2n-unfinished-", ".t2n-unfinished-notes", ".t2n-unfinished-1234567.", ".t2n-12345678", "x"] {
        fs::write(path(name), "the user's").unwrap();
    }
    let kept = fs::read_dir(dir.path()).unwrap().count();
    fs::write(path(".t2n-unfinished-12345678"), "").unwrap();
    folder_with(&folder_with(dir.path(), ".t2n-unfinished-abcdEFGH", "file"), "inner", "file");
    sweep(dir.path());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), kept);
    alive.commit().unwrap();
    folder.commit().unwrap();
    drop(staging);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 7);
}

#[test]
fn a_folder_of_another_machine_stays() {
    let dir = tempfile::tempdir().unwrap();
    let temp = Builder::new().prefix(TEMP_PREFIX).rand_bytes(RANDOM).tempdir_in(dir.path()).unwrap();
    let lock = open_lock(temp.path()).unwrap();
    lock.try_lock().unwrap();
    // NFS and FUSE have locks on folders for one machine alone.
    let folder = OwnedFolder { temp, owner: process::id(), _lock: None };
    let mut staging = Staging { _lock: lock, folder, _above: Made(Vec::new()) };
    sweep(dir.path());
    assert!(staging.path().exists());
    let path = staging.path().to_path_buf();
    staging.folder.temp.disable_cleanup(true); // as if killed
    drop(staging);
    assert!(path.exists());
    sweep(dir.path());
    assert!(!path.exists());
}

#[test]
fn sweeps_take_nothing_from_those_who_write_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    sweep(dir.path());
                }
            });
        }
        let lost = (0..300).filter(|_| {
            let file = AtomicFile::create(&dir.path().join("x")).unwrap();
            std::thread::yield_now();
            !file.temp.path().exists()
        });
        let lost = lost.count();
        done.store(true, Ordering::Relaxed);
        assert_eq!(lost, 0);
    });
}

#[test]
fn what_was_moved_aside_comes_back_if_nothing_took_its_place() {
    let dir = tempfile::tempdir().unwrap();
    for replaced in [false, true] {
        folder_with(&folder_with(dir.path(), ".t2n-aside-12345678", "x"), "target", "old");
        if replaced {
            fs::rename(dir.path().join("target/old"), dir.path().join("target/new")).unwrap();
        }
        sweep(dir.path());
        assert!(dir.path().join(if replaced { "target/new" } else { "target/old" }).exists());
    }
    assert!(!dir.path().join(".t2n-aside-12345678").exists());
}

#[test]
fn folders_made_for_an_output_go_without_it_and_stay_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let parent = dir.path().join("a/b");
    drop(Staging::create(&parent).unwrap());
    assert!(!dir.path().join("a").exists());
    let staging = Staging::create(&parent).unwrap();
    fs::write(staging.path().join("x"), "").unwrap();
    put_in_place(&staging.path().join("x"), &parent.join("x"), &AtomicBool::new(false)).unwrap();
    drop(staging);
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 1);
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
fn without_exchange_of_many_at_once_all_end_well() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let (target, parent) = (&target, dir.path());
            scope.spawn(move || {
                for _ in 0..100 {
                    let new = folder_with(parent, &format!("new{writer}"), "file");
                    swap_in(&new, target, parent, |_, _| Err(ErrorKind::Unsupported.into())).unwrap();
                }
            });
        }
    });
    assert!(target.join("file").exists());
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
