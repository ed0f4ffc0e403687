//! `.dat` files and archives against exact bytes, tract's own readers, and everything that can go wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod dat;
mod reader;
mod writer;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use tract_nnef::ProtoModel;
use tract_nnef::internal::{Framework, Tensor};

/// A stop flag nobody raises.
static GO: AtomicBool = AtomicBool::new(false);

/// Names in `folder`, hidden ones too.
fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What tract finds at `path`.
fn tract_load(path: &Path) -> ProtoModel {
    tract_nnef::nnef().proto_model_for_path(path).unwrap()
}

fn tract_tensor<'a>(model: &'a ProtoModel, label: &str) -> &'a Tensor {
    model.tensors.iter().find(|(id, _)| id.0 == label).unwrap_or_else(|| panic!("no {label}")).1
}
