//! Which names may go in an archive, whatever the model called its tensors.

use std::collections::HashSet;
use std::path::{Component, Path};

use unicode_normalization::UnicodeNormalization;

use crate::error::{Error, Result};

/// Bytes of a whole name; within the limits of every host, with room for the folder it is unpacked in.
const MAX_NAME: usize = 1024;
/// Bytes between two slashes; the limit of common file systems.
const MAX_COMPONENT: usize = 255;

/// The entry that holds the variable `label`: `a/b` -> `a/b.dat`.
pub fn dat_name(label: &str) -> Result<String> {
    // Checked before the suffix is added, which would turn an empty last component into a hidden file.
    check_name(label)?;
    let name = format!("{label}.dat");
    check_name(&name)?;
    Ok(name)
}

/// Refuses a name that could leave the archive's folder, that tract skips, or that some host cannot store.
pub fn check_name(name: &str) -> Result<()> {
    let refuse =
        |why: &str| Err(Error::InvalidArgument(format!("the archive entry name {name:?} {why}; rename the tensor")));
    if name.len() > MAX_NAME {
        return refuse("is longer than 1024 bytes");
    }
    if name.contains('\\') || is_deceptive(name) {
        return refuse("has a backslash, a control or an invisible character");
    }
    for component in name.split('/') {
        if component.is_empty() {
            return refuse("is absolute or has an empty component");
        }
        if component.starts_with('.') {
            return refuse("has a component that starts with a dot, which tract skips");
        }
        if component.len() > MAX_COMPONENT {
            return refuse("has a component longer than 255 bytes");
        }
    }
    // What is left is host-dependent, such as drive letters.
    if !Path::new(name).components().all(|c| matches!(c, Component::Normal(_))) {
        return refuse("is not a plain relative path on this host");
    }
    Ok(())
}

/// Whether `name` holds what moves the cursor, or what nobody sees: it could pass for another one.
pub fn is_deceptive(name: &str) -> bool {
    let hidden = ['\u{200b}'..='\u{200f}', '\u{2028}'..='\u{202e}', '\u{2060}'..='\u{206f}', '\u{feff}'..='\u{feff}'];
    name.chars().any(|c| c.is_control() || hidden.iter().any(|range| range.contains(&c)))
}

/// The same for names that some host takes for one: by letter case, or by how an accent is composed.
pub fn same_name(name: &str) -> String {
    // Lower first: the upper form of a capital sharp s is itself.
    let lower = name.nfkd().flat_map(char::to_lowercase);
    let folded: String = lower.flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect();
    folded.nfkd().collect()
}

/// The names used so far; two that some host confuses cannot both be in.
#[derive(Debug, Default)]
pub struct Names {
    files: HashSet<String>,
    folders: HashSet<String>,
}

impl Names {
    /// Takes `name`, already checked; [`Error::InvalidArgument`] if another entry stands in its way.
    pub fn claim(&mut self, name: &str) -> Result<()> {
        let key = same_name(name);
        let folders: Vec<&str> = key.match_indices('/').map(|(at, _)| &key[..at]).collect();
        if self.files.contains(&key) || self.folders.contains(&key) || folders.iter().any(|f| self.files.contains(*f)) {
            let why = "collides with another entry (letter case and Unicode forms are not told apart on every host); rename the tensor";
            return Err(Error::InvalidArgument(format!("the archive entry name {name:?} {why}")));
        }
        self.folders.extend(folders.into_iter().map(str::to_owned));
        self.files.insert(key);
        Ok(())
    }
}
