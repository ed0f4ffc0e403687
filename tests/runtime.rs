//! The runtime and its preflight against the tract they are written for.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use _native::error::Error;
use _native::preflight;
use _native::runtime::{Dim, Input, Model, Session, TRACT_VERSION};
use proptest::prelude::*;
use tract_nnef::ast::{Assignment, RValue, Subscript};

static GO_ON: AtomicBool = AtomicBool::new(false);

/// A tar of `graph.nnef` alone.
fn archive(text: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, "graph.nnef", text.as_bytes()).unwrap();
    tar.into_inner().unwrap()
}

fn graph(fragments: &str, body: &str) -> Vec<u8> {
    archive(&format!(
        "version 1.0;\nextension tract_registry tract_core;\nextension tract_symbol B;\n{fragments}\n\
         graph net(x) -> (y) {{ x = external<scalar>(shape = [B, 2]); {body} }}"
    ))
}

fn run(model: &Model, rows: usize) -> Vec<f32> {
    let x: Vec<u8> = (0..2 * rows).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let outputs = model.run(&[Input { dtype: "f32", shape: &[rows, 2], bytes: &x }]).unwrap();
    outputs[0].bytes().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn the_version_is_the_one_pinned() {
    let manifest = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let pinned = manifest.lines().filter(|line| line.starts_with("tract-")).collect::<Vec<_>>();
    assert_eq!(pinned.len(), 4);
    for line in pinned {
        assert!(line.contains(&format!("\"={TRACT_VERSION}\"")), "{line}");
    }
}

#[test]
fn a_graph_runs_at_several_sizes() {
    let model = Model::load_bytes(&graph("", "y = x + 1.0;"), None, None, &GO_ON).unwrap();
    assert_eq!(model.inputs()[0].shape, [Dim::Expression("B".into()), Dim::Fixed(2)]);
    assert_eq!((model.outputs()[0].name.as_str(), model.outputs()[0].dtype.as_str()), ("y", "f32"));
    assert_eq!(run(&model, 1), [1.0, 2.0]);
    assert_eq!(run(&model, 2), [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn a_wrong_number_of_bytes_never_reaches_a_tensor() {
    let model = Model::load_bytes(&graph("", "y = x + 1.0;"), None, None, &GO_ON).unwrap();
    for length in [0, 7, 9, 1 << 12] {
        let bytes = vec![0; length];
        assert!(model.run(&[Input { dtype: "f32", shape: &[1, 2], bytes: &bytes }]).is_err());
    }
    let huge = [usize::MAX, 2];
    assert!(model.run(&[Input { dtype: "f32", shape: &huge, bytes: &[] }]).is_err());
}

#[test]
fn a_request_to_stop_is_heard() {
    let stop = AtomicBool::new(true);
    assert!(matches!(Model::load_bytes(&graph("", "y = x;"), None, None, &stop), Err(Error::Interrupted)));
}

/// x [S] is put behind the cache [P]; the sum of both is what a run gives.
fn remembering() -> Arc<Model> {
    let text = "version 1.0;\nextension tract_registry tract_core;\nextension tract_symbol S;\n\
                extension tract_symbol P;\nextension tract_assert S + P <= 5;\n\
                graph net(x, past) -> (total, all) {\n\
                x = external<scalar>(shape = [S]);\npast = external<scalar>(shape = [P]);\n\
                all = concat([past, x], axis = 0);\ntotal = sum_reduce(all, axes = [0]);\n}";
    Arc::new(Model::load_bytes(&archive(text), None, None, &GO_ON).unwrap())
}

fn total(session: &Session, x: &[f32]) -> Result<i64, Error> {
    let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
    let outputs = session.run(&[Input { dtype: "f32", shape: &[x.len()], bytes: &bytes }])?;
    assert_eq!(outputs.len(), 1);
    Ok(f32::from_le_bytes(outputs[0].bytes().try_into().unwrap()) as i64)
}

#[test]
fn a_session_goes_on_from_its_last_run() {
    let model = remembering();
    let carried = [("past".to_owned(), "all".to_owned())];
    let (one, other) = (Session::new(model.clone(), &carried).unwrap(), Session::new(model, &carried).unwrap());
    assert_eq!((one.inputs()[0].name.as_str(), one.outputs()[0].name.as_str()), ("x", "total"));
    assert_eq!(total(&one, &[1.0, 2.0]).unwrap(), 3);
    assert_eq!(total(&one, &[4.0]).unwrap(), 7);
    assert_eq!(total(&other, &[8.0]).unwrap(), 8);
    assert!(matches!(total(&one, &[1.0, 1.0, 1.0]), Err(Error::InvalidArgument(why)) if why.contains("S+P")));
    assert_eq!(total(&one, &[1.0]).unwrap(), 8, "a failed run changes nothing");
    one.reset().unwrap();
    assert_eq!(total(&one, &[1.0]).unwrap(), 1);
}

#[test]
fn a_session_carries_what_exists() {
    for (input, output) in [("none", "all"), ("past", "none")] {
        let made = Session::new(remembering(), &[(input.to_owned(), output.to_owned())]);
        assert!(matches!(made, Err(Error::InvalidArgument(_))), "{input} {output}");
    }
}

/// What preflight lets through loads on a quarter of the stack that the binding gives it.
#[test]
fn the_deepest_graphs_allowed_fit_the_stack() {
    let link = |i: usize, sum: usize| {
        let sum = " + a".repeat(sum);
        format!("fragment f{i}(a: tensor<scalar>) -> (b: tensor<scalar>) {{ b = f{}(a){sum}; }}\n", i + 1)
    };
    let last = |i: usize| format!("fragment f{i}(a: tensor<scalar>) -> (b: tensor<scalar>) {{ b = copy(a); }}\n");
    let links = |n: usize, sum: usize| (0..n).map(|i| link(i, sum)).collect::<String>() + &last(n);
    let deepest = |what: &dyn Fn(usize) -> Vec<u8>| {
        let allowed = |n: &usize| preflight::check_bytes(&what(*n), &GO_ON).is_ok();
        let n = (1..2000).take_while(allowed).last().unwrap();
        assert!(n < 1999);
        (n, what(n))
    };
    for (least, (n, bytes)) in [
        (240, deepest(&|n| graph("", &format!("y = x{};", " + x".repeat(n))))),
        (60, deepest(&|n| graph(&links(n, 0), "y = f0(x);"))),
        (20, deepest(&|n| graph(&links(n, 8), "y = f0(x);"))),
    ] {
        assert!(n >= least, "{n}");
        let load = move || Model::load_bytes(&bytes, None, None, &GO_ON).map(drop);
        std::thread::Builder::new().stack_size(16 << 20).spawn(load).unwrap().join().unwrap().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Neither preflight nor, for what it lets through, tract falls over a soup of tokens.
    #[test]
    fn any_soup_of_tokens_is_survived(
        fragments in soup(12),
        body in soup(30),
    ) {
        let outcome = Model::load_bytes(&graph(&fragments, &body), None, None, &GO_ON);
        prop_assert!(matches!(outcome, Ok(_) | Err(Error::Tract(_))), "{outcome:?}");
    }
}

fn soup(length: usize) -> impl Strategy<Value = String> {
    let token = prop::sample::select(vec![
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "<scalar>",
        "(x)",
        "[0]",
        ",",
        ";",
        "=",
        "==",
        "<=",
        "-",
        "- ",
        "!",
        "+",
        "^",
        "#\n",
        "\"",
        "'",
        "\\",
        "x",
        "y",
        "f",
        " in ",
        "1in2",
        "if",
        " else ",
        "for ",
        " yield ",
        "i\"f\"",
        "relu",
        "f(x)",
        "-3",
        "1e-5",
        "é",
        "\0",
        "y = ",
        "fragment f",
        "(a: scalar) -> (b: scalar) { b = ",
        "; }",
        "graph",
        ":",
        "?",
        ".",
        "extension",
        "transpose(",
    ]);
    prop::collection::vec(token, 0..length).prop_map(|tokens| tokens.concat())
}

/// Every operator that tract's own fragments apply, or that stands for a sign, is one a document may not redefine.
#[test]
fn reserved_names_are_those_tract_applies_itself() {
    let framework = tract_nnef::nnef();
    let mut applied =
        BTreeSet::from(["add", "sub", "mul", "div", "pow", "gt", "lt", "eq", "ne", "ge", "le"].map(String::from));
    for registry in &framework.registries {
        let assignments = registry.fragments.values().flat_map(|fragment| fragment.body.iter().flatten());
        assignments.for_each(|assignment| collect(assignment, &mut applied));
    }
    assert_eq!(preflight::RESERVED.iter().map(ToString::to_string).collect::<BTreeSet<_>>(), applied);
}

fn collect(assignment: &Assignment, applied: &mut BTreeSet<String>) {
    let mut pending = vec![&assignment.right];
    while let Some(value) = pending.pop() {
        match value {
            RValue::Invocation(invocation) => {
                applied.insert(invocation.id.0.clone());
                pending.extend(invocation.arguments.iter().map(|argument| &argument.rvalue));
            }
            RValue::Binary(left, _, right) => pending.extend([&**left, &**right]),
            RValue::Unary(_, operand) => pending.push(operand),
            RValue::Tuple(values) | RValue::Array(values) => pending.extend(values),
            RValue::IfThenElse(branches) => pending.extend([&branches.cond, &branches.then, &branches.otherwise]),
            RValue::Comprehension(each) => {
                pending.push(&each.yields);
                pending.extend(each.loop_iters.iter().map(|(_, values)| values).chain(&each.filter));
            }
            RValue::Subscript(value, subscript) => {
                pending.push(value);
                match &**subscript {
                    Subscript::Single(index) => pending.push(index),
                    Subscript::Range(from, to) => pending.extend(from.iter().chain(to)),
                }
            }
            RValue::Identifier(_) | RValue::Literal(_) => {}
        }
    }
}
