use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use _native::archive::{self, ArchiveWriter, Form};
use _native::dat::{self, DatType, Header};
use _native::error::Error;
use tempfile::tempdir;

use crate::{GO, listing, tract_load, tract_tensor};

const GRAPH: &str = "version 1.0;\n\ngraph g(x) -> (y)\n{\n  x = external<scalar>(shape=[2]);\n  y = x;\n}\n";
const FORMS: [(&str, Form); 4] = [
    ("m.nnef", Form::Folder),
    ("m.nnef.tar", Form::Tar),
    ("m.nnef.tgz", Form::Tgz { level: 0 }),
    ("m9.nnef.tgz", Form::Tgz { level: 9 }),
];

fn bytes_of(shape: &[usize]) -> (Header, Vec<u8>) {
    let header = Header::new(DatType::U8, shape).unwrap();
    let payload = (0..header.payload_len()).map(|i| i as u8).collect();
    (header, payload)
}

/// Writes an archive with nested, long and ordinary names; returns what `finish` said.
fn write_sample(path: &Path, form: Form, long: &str) -> u64 {
    let mut writer = ArchiveWriter::create(path, form).unwrap();
    writer.add_text("graph.nnef", GRAPH, &GO).unwrap();
    for (label, shape) in [("w", &[2usize, 3][..]), ("a/b/c.weight", &[5]), ("a/b/d", &[]), (long, &[1000])] {
        let (header, payload) = bytes_of(shape);
        writer.add_dat(label, &header, payload.as_slice(), &GO).unwrap();
    }
    writer.finish().unwrap()
}

/// Every file at or under `path`, with its content.
fn tree(path: &Path) -> Vec<(String, Vec<u8>)> {
    if path.is_file() {
        return vec![(String::new(), fs::read(path).unwrap())];
    }
    let inside = |name: String| {
        let deeper = tree(&path.join(&name));
        deeper.into_iter().map(move |(rest, content)| (format!("{name}/{rest}"), content)).collect::<Vec<_>>()
    };
    listing(path).into_iter().flat_map(inside).collect()
}

#[test]
fn tract_and_our_reader_find_the_same_in_every_form() {
    let dir = tempdir().unwrap();
    // Beyond the 100 bytes of a tar header; the second also beyond the 155 of a ustar prefix.
    for long in ["deep/".repeat(30) + "w", "x".repeat(240)] {
        for (name, form) in FORMS {
            let path = dir.path().join(name);
            let len = write_sample(&path, form, &long);
            assert_eq!(len, tree(&path).iter().map(|(_, content)| content.len() as u64).sum::<u64>());

            let model = tract_load(&path);
            assert_eq!(model.tensors.len(), 4);
            for (label, shape) in [("w", &[2usize, 3][..]), ("a/b/c.weight", &[5]), ("a/b/d", &[]), (&long, &[1000])] {
                let (header, payload) = bytes_of(shape);
                let tensor = tract_tensor(&model, label);
                assert_eq!((tensor.shape(), tensor.as_bytes()), (shape, payload.as_slice()));
                let content = archive::read(&path, &format!("{label}.dat"), 10_000, &GO).unwrap();
                assert_eq!(content, [header.encode().as_slice(), &payload].concat());
            }
            let mut expected = vec![
                ("graph.nnef".to_owned(), GRAPH.len() as u64),
                ("w.dat".to_owned(), 134),
                ("a/b/c.weight.dat".to_owned(), 133),
                ("a/b/d.dat".to_owned(), 129),
                (format!("{long}.dat"), 1128),
            ];
            if form == Form::Folder {
                expected.sort();
            }
            assert_eq!(archive::entries(&path, &GO).unwrap(), expected);
        }
    }
}

#[test]
fn a_tar_is_these_bytes() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.tar");
    let mut writer = ArchiveWriter::create(&path, Form::Tar).unwrap();
    writer.add_text("graph.nnef", "hello", &GO).unwrap();
    writer.finish().unwrap();

    let mut header = [0u8; 512];
    for (at, field) in [
        (0, "graph.nnef"),
        (100, "0000644\0"),
        (108, "0000000\0"),
        (116, "0000000\0"),
        (124, "00000000005\0"),
        (136, "00000000000\0"),
        (148, "        "),
        (156, "0"),
        (257, "ustar  \0"),
    ] {
        header[at..at + field.len()].copy_from_slice(field.as_bytes());
    }
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:07o}\0").as_bytes());
    let mut expected = header.to_vec();
    expected.extend(b"hello");
    expected.resize(512 * 4, 0);
    let written = fs::read(&path).unwrap();
    assert_eq!(written[..512], expected[..512]);
    assert_eq!(written, expected);
}

#[test]
fn two_runs_give_the_same_bytes() {
    for (name, form) in FORMS {
        let (one, two) = (tempdir().unwrap(), tempdir().unwrap());
        write_sample(&one.path().join(name), form, "long");
        write_sample(&two.path().join(name), form, "long");
        assert_eq!(tree(&one.path().join(name)), tree(&two.path().join(name)));
        if let Form::Tgz { level } = form {
            let effort = if level == 0 { 4 } else { 2 };
            let gzip = fs::read(one.path().join(name)).unwrap();
            assert_eq!(gzip[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, effort, 255]);
        }
    }
}

#[test]
fn names_that_could_harm_are_refused_and_change_nothing() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m");
    let mut writer = ArchiveWriter::create(&path, Form::Folder).unwrap();
    let (header, payload) = bytes_of(&[1]);
    let long = ["x".repeat(252), "x/".repeat(600) + "w"];
    let mut bad = vec![
        "", "/", "/etc/w", "../w", "a/../w", "a/..", ".", "..", ".w", "a/.w", "a//w", "a/", "a\\w", "a\0w", "a\nw",
        "a\u{7f}",
    ];
    bad.extend(long.iter().map(String::as_str));
    for label in bad {
        let refused = writer.add_dat(label, &header, payload.as_slice(), &GO);
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{label:?}: {refused:?}");
        let refused = writer.add_text(&format!("{label}/../x"), "", &GO);
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{label:?}: {refused:?}");
    }
    for label in ["w", "a/W", "é", "x.dat", "a b", "-rf", &"x".repeat(251)] {
        writer.add_dat(label, &header, payload.as_slice(), &GO).unwrap();
    }
    // Same name, same but for case, a file where a folder is needed, a folder where a file is.
    for label in ["w", "W", "A/w", "É", "e\u{301}", "E\u{301}", "w.dat/x", "X.DAT.dat/y", "a b.dat/z/z"] {
        let refused = writer.add_dat(label, &header, payload.as_slice(), &GO);
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{label:?}: {refused:?}");
    }
    writer.add_dat("f.dat/x", &header, payload.as_slice(), &GO).unwrap();
    assert!(writer.add_dat("f", &header, payload.as_slice(), &GO).is_err());
    writer.finish().unwrap();
    assert_eq!(archive::entries(&path, &GO).unwrap().len(), 8);
}

/// Yields `good` bytes, then fails as a disk would, or raises `stop`.
struct Faulty<'a> {
    good: usize,
    stop: Option<&'a AtomicBool>,
}

impl Read for Faulty<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.good == 0 {
            match self.stop {
                Some(stop) => stop.store(true, Ordering::Relaxed),
                None => return Err(io::Error::from_raw_os_error(5)),
            }
        }
        let got = if self.good == 0 { out.len() } else { out.len().min(self.good) };
        self.good -= got.min(self.good);
        Ok(got)
    }
}

#[test]
fn a_fault_midway_keeps_the_old_archive_and_leaves_nothing() {
    for (name, form) in FORMS {
        let dir = tempdir().unwrap();
        let path = dir.path().join(name);
        write_sample(&path, form, "old");
        let old = tree(&path);
        let (header, payload) = bytes_of(&[3 << 20]);
        let stop = AtomicBool::new(false);
        let faults: [(&str, Box<dyn Read + '_>); 3] = [
            ("reader fails", Box::new(Faulty { good: 1 << 20, stop: None })),
            ("reader ends early", Box::new(&payload[1..])),
            ("asked to stop", Box::new(Faulty { good: 1 << 20, stop: Some(&stop) })),
        ];
        for (fault, reader) in faults {
            let mut writer = ArchiveWriter::create(&path, form).unwrap();
            writer.add_text("graph.nnef", "new", &GO).unwrap();
            assert_eq!(listing(dir.path()).len(), 2, "{fault}");
            let failed = writer.add_dat("w", &header, reader, &stop).unwrap_err();
            match fault {
                "asked to stop" => assert!(matches!(failed, Error::Interrupted), "{failed:?}"),
                _ => assert!(matches!(failed, Error::Io { .. }), "{failed:?}"),
            }
            assert_eq!(listing(dir.path()), [name], "{fault}");
            assert!(matches!(writer.add_text("t", "", &GO), Err(Error::InvalidArgument(_))), "{fault}");
            assert!(matches!(writer.finish(), Err(Error::InvalidArgument(_))), "{fault}");
            assert_eq!(tree(&path), old, "{fault}");
        }
    }
}

#[test]
fn a_panic_midway_aborts() {
    struct Bomb;
    impl Read for Bomb {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("bomb");
        }
    }
    let dir = tempdir().unwrap();
    let mut writer = ArchiveWriter::create(&dir.path().join("m"), Form::Tar).unwrap();
    let (header, _) = bytes_of(&[1]);
    let add = std::panic::AssertUnwindSafe(|| writer.add_dat("w", &header, Bomb, &GO));
    assert!(std::panic::catch_unwind(add).is_err());
    assert!(matches!(writer.finish(), Err(Error::InvalidArgument(_))));
    assert!(listing(dir.path()).is_empty());
}

#[test]
fn abort_and_drop_leave_nothing_and_finish_comes_once() {
    for (name, form) in FORMS {
        let dir = tempdir().unwrap();
        let path = dir.path().join(name);
        let mut writer = ArchiveWriter::create(&path, form).unwrap();
        writer.add_text("a/b", "text", &GO).unwrap();
        drop(writer);
        assert!(listing(dir.path()).is_empty());

        let mut writer = ArchiveWriter::create(&path, form).unwrap();
        writer.abort();
        writer.abort();
        assert!(matches!(writer.finish(), Err(Error::InvalidArgument(_))));
        assert!(listing(dir.path()).is_empty());

        let mut writer = ArchiveWriter::create(&path, form).unwrap();
        writer.finish().unwrap();
        writer.abort();
        assert!(matches!(writer.finish(), Err(Error::InvalidArgument(_))));
        assert!(matches!(writer.add_text("t", "", &GO), Err(Error::InvalidArgument(_))));
        assert_eq!(listing(dir.path()), [name]);
    }
}

#[test]
fn an_archive_replaces_its_kind_only() {
    let dir = tempdir().unwrap();
    for (name, form) in FORMS {
        let path = dir.path().join(name);
        let mut writer = ArchiveWriter::create(&path, form).unwrap();
        writer.add_text("stale", "", &GO).unwrap();
        writer.finish().unwrap();
        write_sample(&path, form, "new");
        assert!(!archive::entries(&path, &GO).unwrap().iter().any(|(name, _)| name == "stale"));
    }
    assert_eq!(listing(dir.path()), ["m.nnef", "m.nnef.tar", "m.nnef.tgz", "m9.nnef.tgz"]);
    let refused = |name: &str, form| {
        matches!(ArchiveWriter::create(&dir.path().join(name), form), Err(Error::InvalidArgument(_)))
    };
    assert!(refused("m.nnef", Form::Tar));
    assert!(refused("m.nnef.tar", Form::Folder));
    assert!(refused("..", Form::Tar));
    assert!(refused("new", Form::Tgz { level: 10 }));
    assert!(matches!(ArchiveWriter::create(Path::new("/dev/null"), Form::Tar), Err(Error::InvalidArgument(_))));
    assert!(matches!(ArchiveWriter::create(&dir.path().join("none/m"), Form::Tar), Err(Error::Io { .. })));
    assert_eq!(listing(dir.path()).len(), 4);
}

#[cfg(unix)]
#[test]
fn modes_follow_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    fs::write(dir.path().join("file"), "").unwrap();
    fs::create_dir(dir.path().join("folder")).unwrap();
    let (file, folder) = (mode(&dir.path().join("file")), mode(&dir.path().join("folder")));
    for (name, form) in FORMS {
        let path = dir.path().join(name);
        write_sample(&path, form, "w2");
        if form == Form::Folder {
            assert_eq!((mode(&path), mode(&path.join("a/b")), mode(&path.join("a/b/d.dat"))), (folder, folder, file));
        } else {
            assert_eq!(mode(&path), file);
        }
    }
}

#[test]
fn a_dat_file_is_copied_once_checked() {
    let dir = tempdir().unwrap();
    let (source, path) = (dir.path().join("s.dat"), dir.path().join("m.tar"));
    let (header, payload) = bytes_of(&[7]);
    dat::write(&source, &header, payload.as_slice(), &GO).unwrap();
    let whole = fs::read(&source).unwrap();
    let mut writer = ArchiveWriter::create(&path, Form::Tar).unwrap();
    writer.add_dat_file("good", &source, &GO).unwrap();
    fs::write(&source, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(writer.add_dat_file("cut", &source, &GO), Err(Error::InconsistentTensor(_))));
    assert!(matches!(writer.add_dat_file("none", &dir.path().join("none"), &GO), Err(Error::Io { .. })));
    writer.finish().unwrap();
    assert_eq!(archive::entries(&path, &GO).unwrap(), [("good.dat".to_owned(), whole.len() as u64)]);
    assert_eq!(archive::read(&path, "good.dat", 1000, &GO).unwrap(), whole);
}
