//! The fuzz targets over their committed corpora, and over every truncation and many changed bytes of these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::Path;

use _native as native;

#[path = "../fuzz/src/targets.rs"]
mod targets;

/// Runs `target` on each file of its corpus and on what little changes make of it; returns how many inputs that were.
fn run(name: &str, target: fn(&[u8])) -> usize {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut count = 0;
    for path in paths {
        let bytes = fs::read(&path).unwrap();
        let step = bytes.len().div_ceil(200).max(1);
        target(&bytes);
        for at in (0..bytes.len()).step_by(step) {
            target(&bytes[..at]);
            let mut changed = bytes.clone();
            for flip in [0x01, 0x80, 0xff] {
                changed[at] = bytes[at] ^ flip;
                target(&changed);
            }
            count += 4;
        }
        count += 1;
    }
    count
}

#[test]
fn headers() {
    assert!(run("dat_header", targets::dat_header) > 5000);
}

#[test]
fn archives() {
    assert!(run("archive", targets::archive) > 5000);
}

#[test]
fn preflights() {
    assert!(run("preflight", targets::preflight) > 3000);
}

#[test]
fn q40_round_trips() {
    assert!(run("q40", targets::q40) > 20_000);
}

/// The fuzzer compiles the files of the core with dependencies of its own.
#[test]
fn the_fuzz_crate_has_the_dependencies_of_the_files_it_compiles() {
    let read = |path| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let (core, fuzz) = (read("Cargo.toml"), read("fuzz/Cargo.toml"));
    let (_, dependencies) = core.split_once("[dependencies]\n").unwrap();
    let (dependencies, _) = dependencies.split_once("[dev-dependencies]").unwrap();
    let needed = dependencies.lines().filter(|line| {
        line.contains(" = ") && !["#", "numpy", "pyo3", "tract"].iter().any(|other| line.starts_with(other))
    });
    let missing: Vec<_> = needed.clone().filter(|&line| !fuzz.lines().any(|other| other == line)).collect();
    assert!(needed.count() > 5 && missing.is_empty(), "{missing:#?}");
}
