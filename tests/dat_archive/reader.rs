use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use _native::archive::{self, ArchiveWriter, Form};
use _native::error::Error;
use flate2::Compression;
use flate2::write::GzEncoder;
use tar::EntryType;
use tempfile::{TempDir, tempdir};

use crate::GO;

/// One tar member with a valid checksum, whatever its name and type.
fn member(name: &[u8], kind: EntryType, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut bytes = [header.as_bytes().as_slice(), content].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    member(name.as_bytes(), EntryType::Regular, content)
}

fn tar_of(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), vec![0; 1024]].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// The same bytes as a tar and as a tgz on disk.
fn on_disk(tar: &[u8]) -> (TempDir, [PathBuf; 2]) {
    let dir = tempdir().unwrap();
    let paths = [dir.path().join("m.tar"), dir.path().join("m.tgz")];
    fs::write(&paths[0], tar).unwrap();
    fs::write(&paths[1], gzip(tar)).unwrap();
    (dir, paths)
}

fn refused(what: &str, path: &Path) {
    match archive::entries(path, &GO) {
        Err(Error::InconsistentTensor(text)) => assert!(text.contains(path.to_str().unwrap()), "{what}: {text}"),
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn hostile_members_are_refused() {
    let ok = file("graph.nnef", b"text");
    let cases = [
        ("absolute", file("/etc/passwd", b"")),
        ("parent", file("../x", b"")),
        ("parent inside", file("a/../x", b"")),
        ("dot inside", file("a/./x", b"")),
        ("empty component", file("a//x", b"")),
        ("folder name on a file", file("a/", b"")),
        ("empty name", file("", b"")),
        ("backslash", file("a\\b", b"")),
        ("control character", file("a\nb", b"")),
        ("not UTF-8", member(b"a\xff", EntryType::Regular, b"")),
        ("symlink", member(b"x", EntryType::Symlink, b"")),
        ("hard link", member(b"x", EntryType::Link, b"")),
        ("character device", member(b"x", EntryType::Char, b"")),
        ("block device", member(b"x", EntryType::Block, b"")),
        ("fifo", member(b"x", EntryType::Fifo, b"")),
        ("global extension", member(b"graph.quant", EntryType::XGlobalHeader, b"")),
        ("folder with content", member(b"graph.quant", EntryType::Directory, b"text")),
        ("duplicate", file("graph.nnef", b"other")),
        ("duplicate by ./", file("./graph.nnef", b"other")),
        ("long name of 2 MiB", [member(b"L", EntryType::GNULongName, &vec![b'x'; 2 << 20]), file("x", b"")].concat()),
        ("long name of 5000", [member(b"L", EntryType::GNULongName, &[b'x'; 5000]), file("x", b"")].concat()),
        ("long name of nothing", member(b"L", EntryType::GNULongName, b"x")),
    ];
    for (what, hostile) in cases {
        let (_dir, paths) = on_disk(&tar_of(&[ok.clone(), hostile]));
        for path in paths {
            refused(what, &path);
        }
    }
}

#[test]
fn ordinary_tars_of_others_are_read() {
    let record = b"27 path=some/long/name.dat\n";
    let tar = tar_of(&[
        member(b"./", EntryType::Directory, b""),
        file("./graph.nnef", b"text"),
        member(b"a/", EntryType::Directory, b""),
        file("a/w.dat", b"12345"),
        [member(b"PaxHeaders/x", EntryType::XHeader, record), file("short", b"6")].concat(),
        file("._hidden", b""),
    ]);
    let (_dir, paths) = on_disk(&tar);
    let expected = [("graph.nnef", 4), ("a/w.dat", 5), ("some/long/name.dat", 1), ("._hidden", 0)];
    for path in paths {
        let found = archive::entries(&path, &GO).unwrap();
        assert_eq!(found, expected.map(|(name, size)| (name.to_owned(), size)));
        assert_eq!(archive::read(&path, "a/w.dat", 5, &GO).unwrap(), b"12345");
    }
}

#[test]
fn reading_is_bounded() {
    let dir = tempdir().unwrap();
    fs::create_dir(dir.path().join("m")).unwrap();
    fs::write(dir.path().join("m/x"), b"12345").unwrap();
    let (_keep, [tar, tgz]) = on_disk(&tar_of(&[file("x", b"12345")]));
    for path in [dir.path().join("m"), tar, tgz] {
        assert_eq!(archive::read(&path, "x", 5, &GO).unwrap(), b"12345");
        assert!(matches!(archive::read(&path, "x", 4, &GO), Err(Error::InconsistentTensor(_))));
        let missing = archive::read(&path, "y", 5, &GO);
        assert!(matches!(missing, Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound));
    }
    // 8 GiB declared, 5 bytes there: refused without an allocation of that size.
    let mut lie = tar::Header::new_gnu();
    lie.set_path("x").unwrap();
    lie.set_size((8 << 30) - 1);
    lie.set_cksum();
    let (_keep, paths) = on_disk(&[lie.as_bytes().as_slice(), b"12345"].concat());
    for path in paths {
        refused("8 GiB declared", &path);
        assert!(matches!(archive::read(&path, "x", u64::MAX, &GO), Err(Error::InconsistentTensor(_))));
    }
}

#[test]
fn bytes_are_visited_as_files_are() {
    let tar = tar_of(&[file("a", b"1"), file("b", b"22")]);
    for bytes in [tar.clone(), gzip(&tar)] {
        let mut seen = Vec::new();
        archive::visit_bytes(Path::new("memory"), &bytes, &GO, &mut |member| {
            seen.push((member.name().to_owned(), member.read_all(10)?));
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
        assert_eq!(seen, [("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"22".to_vec())]);
    }
}

#[test]
fn a_raised_flag_stops_the_walk() {
    let (dir, [tar, tgz]) = on_disk(&tar_of(&[file("x", b"12345")]));
    for path in [dir.path(), &tar, &tgz] {
        let stop = &AtomicBool::new(true);
        assert!(matches!(archive::entries(path, stop), Err(Error::Interrupted)), "{path:?}");
        assert!(matches!(archive::headers(path, stop), Err(Error::Interrupted)), "{path:?}");
        assert!(matches!(archive::read(path, "x", 9, stop), Err(Error::Interrupted)), "{path:?}");
    }
}

#[cfg(unix)]
#[test]
fn links_and_special_files_of_a_folder_are_refused() {
    let dir = tempdir().unwrap();
    let root = dir.path().join("m");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("graph.nnef"), "text").unwrap();
    let odd = root.join("odd");
    for target in ["graph.nnef", "/etc", "missing"] {
        std::os::unix::fs::symlink(target, &odd).unwrap();
        refused(target, &root);
        fs::remove_file(&odd).unwrap();
    }
    let socket = std::os::unix::net::UnixListener::bind(&odd).unwrap();
    refused("socket", &root);
    drop(socket);
    fs::remove_file(&odd).unwrap();
    assert_eq!(archive::entries(&root, &GO).unwrap(), [("graph.nnef".to_owned(), 4)]);
    refused("device", Path::new("/dev/null"));
    assert!(matches!(archive::entries(&dir.path().join("none"), &GO), Err(Error::Io { .. })));
}

/// Every truncation and many single-byte changes: the entries, a typed error, never a panic; a gzip never lies.
#[test]
fn damaged_archives_give_typed_errors() {
    let dir = tempdir().unwrap();
    for (form, sound) in [(Form::Tar, false), (Form::Tgz { level: 6 }, true)] {
        let path = dir.path().join("m");
        let mut writer = ArchiveWriter::create(&path, form).unwrap();
        writer.add_text("graph.nnef", "version 1.0; graph g(x) -> (y) { }", &GO).unwrap();
        writer.add_text(&format!("{}/w", "long".repeat(30)), &"x".repeat(600), &GO).unwrap();
        writer.finish().unwrap();
        let whole = fs::read(&path).unwrap();
        let walk = |bytes: &[u8]| {
            let mut seen = Vec::new();
            let outcome = archive::visit_bytes(Path::new("memory"), bytes, &GO, &mut |member| {
                seen.push((member.name().to_owned(), member.read_all(10_000)?));
                Ok(ControlFlow::Continue(()))
            });
            match outcome {
                Ok(()) => Some(seen),
                Err(Error::InconsistentTensor(_)) => None,
                Err(other) => panic!("{other:?}"),
            }
        };
        let original = walk(&whole).unwrap();
        for len in 0..whole.len() {
            if let Some(seen) = walk(&whole[..len]) {
                assert!(!sound && original.starts_with(&seen), "cut to {len} bytes");
            }
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x41;
            if let Some(seen) = walk(&changed) {
                assert!(!sound || (at < 10 && seen == original), "byte {at} changed");
            }
        }
    }
}
