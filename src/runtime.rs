//! tract in this process: load an archive, optimize it, run it. With its submodules, the only file that names tract.
//!
//! A panic inside tract becomes [`Error::Tract`] here, since where it happened is what the caller can act on. What
//! cannot be caught (stack overflow, abort) is refused beforehand by [`preflight`].

mod inputs;
mod packed;
mod rules;
mod session;
mod weights;

use std::any::Any;
use std::collections::HashSet;
use std::fmt::{self, Display};
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rayon::ThreadPoolBuilder;
use tract_core::model::TRACT_NAME;
use tract_core::plan::eval;
use tract_core::runtime::RunOptions;
use tract_linalg::multithread::{Executor, multithread_tract_scope};
use tract_nnef::ast::{LValue, ProtoModel};
use tract_nnef::internal::{
    DatumType, DimLike, Framework, Identifier, IntoTValue, Nnef, OutletId, SymbolValues, TDim, TValue, TVec, Tensor,
    TractError, TractErrorContext, TractResult, TypedFact, TypedModel, TypedSimplePlan, bail, ensure,
};
use tract_transformers::WithTractTransformers;

use crate::error::{Error, Result};
use crate::preflight;
pub use session::Session;
use weights::Weights;

/// Version of the linked tract crates.
pub const TRACT_VERSION: &str = "0.23.9";

/// Longest error text of tract that is passed on: some of its errors quote the whole graph.
const MAX_ERROR_LEN: usize = 4000;

/// The types whose items are plain bytes, by tract's names.
const TYPES: [(DatumType, &str); 12] = [
    (DatumType::Bool, "bool"),
    (DatumType::U8, "u8"),
    (DatumType::U16, "u16"),
    (DatumType::U32, "u32"),
    (DatumType::U64, "u64"),
    (DatumType::I8, "i8"),
    (DatumType::I16, "i16"),
    (DatumType::I32, "i32"),
    (DatumType::I64, "i64"),
    (DatumType::F16, "f16"),
    (DatumType::F32, "f32"),
    (DatumType::F64, "f64"),
];

/// One dimension of a [`Fact`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    /// Known at load.
    Fixed(usize),
    /// An expression over symbols, e.g. `B` or `S+P`.
    Expression(String),
}

impl Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => size.fmt(f),
            Self::Expression(text) => f.write_str(text),
        }
    }
}

/// What is known of an input or output before a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// Name in graph.nnef.
    pub name: String,
    /// Type of the items as they cross [`Model::run`]: quantized types by their integer storage, symbolic ones as i64.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<Dim>,
}

impl Fact {
    fn new(name: String, fact: &TypedFact) -> Self {
        let dim = |dim: &TDim| dim.to_usize().map_or_else(|_| Dim::Expression(dim.to_string()), Dim::Fixed);
        let dtype = match type_name(fact.datum_type) {
            Some(name) => name.to_owned(),
            None if fact.datum_type.is_tdim() => "i64".to_owned(),
            None => format!("{:?}", fact.datum_type),
        };
        Self { name, dtype, shape: fact.shape.iter().map(dim).collect() }
    }
}

impl Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<_> = self.shape.iter().map(ToString::to_string).collect();
        write!(f, "{:?}: {}[{}]", self.name, self.dtype, shape.join(", "))
    }
}

/// Value of a property of the archive.
#[derive(Debug)]
pub enum Property {
    /// A string, or several.
    Text(Vec<String>),
    /// Numbers.
    Tensor(Array),
}

/// A tensor given to [`Model::run`].
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Type of the items, by tract's name.
    pub dtype: &'a str,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Items in C order, little endian.
    pub bytes: &'a [u8],
}

/// A tensor of tract; a copy shares its items.
#[derive(Debug, Clone)]
pub struct Array {
    dtype: &'static str,
    value: TValue,
}

impl Array {
    /// `symbols`: their sizes in the run that made `value`.
    fn new(value: TValue, symbols: &SymbolValues) -> TractResult<Self> {
        let value = if value.datum_type().is_tdim() { evaluate(&value, symbols)?.into_tvalue() } else { value };
        let dtype = type_name(value.datum_type());
        ensure!(value.is_plain_ram(), "{value:?} is not plain numbers: a packed weight cannot be an output");
        let dtype = dtype.with_context(|| format!("{:?} has no counterpart outside tract", value.datum_type()))?;
        Ok(Self { dtype, value })
    }

    /// Type of the items, by tract's name.
    pub fn dtype(&self) -> &'static str {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    /// Items in C order, little endian.
    pub fn bytes(&self) -> &[u8] {
        self.value.as_bytes()
    }

    fn as_input(&self) -> Input<'_> {
        Input { dtype: self.dtype, shape: self.shape(), bytes: self.bytes() }
    }
}

/// An archive in tract, optimized and ready to run; shared freely between threads.
#[derive(Debug)]
pub struct Model {
    plan: Arc<TypedSimplePlan>,
    inputs: Vec<Fact>,
    outputs: Vec<Fact>,
    properties: Vec<(String, Property)>,
    equal: Vec<packed::Equal>,
    weight_bytes: usize,
    /// Whose threads the plan uses: a fork leaves them behind.
    process: u32,
}

impl Model {
    /// Loads a folder, tar or tgz. `outputs` names assignments of graph.nnef to output instead of the graph's results;
    /// `threads` share the work of a run, one if not given.
    pub fn load(path: &Path, outputs: Option<&[String]>, threads: Option<usize>, stop: &AtomicBool) -> Result<Self> {
        preflight::check(path, stop)?;
        Self::build(path, outputs, threads, stop, || framework().proto_model_for_path(path))
    }

    /// [`Self::load`] of a tar or tgz in memory.
    pub fn load_bytes(
        bytes: &[u8],
        outputs: Option<&[String]>,
        threads: Option<usize>,
        stop: &AtomicBool,
    ) -> Result<Self> {
        preflight::check_bytes(bytes, stop)?;
        let label = Path::new(preflight::IN_MEMORY);
        Self::build(label, outputs, threads, stop, || framework().proto_model_for_read(&mut Cursor::new(bytes)))
    }

    fn build(
        archive: &Path,
        outputs: Option<&[String]>,
        threads: Option<usize>,
        stop: &AtomicBool,
        parse: impl FnOnce() -> TractResult<ProtoModel>,
    ) -> Result<Self> {
        let at = archive.display();
        let options = RunOptions { executor: executor(threads)?, ..RunOptions::default() };
        let mut proto = guarded(&at, stop, parse)?;
        let refused = |why: String| Error::Tract(format!("{at}: graph.nnef: {why}"));
        if let Some(names) = outputs {
            select_outputs(&mut proto, names)?;
        }
        let results = proto.doc.graph_def.results.iter().map(|id| id.0.clone()).collect();
        let model = guarded(&at, stop, || {
            let mut model = framework().model_for_proto_model(&proto)?;
            order_inputs(&mut model, &proto)?;
            Ok(model)
        })?;
        let equal = packed::check(&model).map_err(refused)?;
        // Or the weights would stay in memory twice, as loaded and as packed.
        drop(proto);
        let properties = guarded(&at, stop, || properties(&model))?;
        let plan = guarded(&at, stop, || model.into_optimized()?.into_runnable_with_options(&options))?;
        guarded(&at, stop, || Self::describe(plan, results, properties, equal))
    }

    fn describe(
        plan: Arc<TypedSimplePlan>,
        results: Vec<String>,
        properties: Vec<(String, Property)>,
        equal: Vec<packed::Equal>,
    ) -> TractResult<Self> {
        let model = plan.model();
        let fact = |name: String, outlet: &OutletId| Ok(Fact::new(name, model.outlet_fact(*outlet)?));
        let inputs =
            model.inputs.iter().map(|i| fact(model.node(i.node).name.clone(), i)).collect::<TractResult<_>>()?;
        let outputs = results.into_iter().zip(&model.outputs).map(|(n, o)| fact(n, o)).collect::<TractResult<_>>()?;
        let weight_bytes = Weights::of(model);
        Ok(Self { plan, inputs, outputs, properties, equal, weight_bytes, process: std::process::id() })
    }

    /// Inputs, in the order [`Self::run`] takes them.
    pub fn inputs(&self) -> &[Fact] {
        &self.inputs
    }

    /// Outputs, in the order [`Self::run`] gives them.
    pub fn outputs(&self) -> &[Fact] {
        &self.outputs
    }

    /// Properties of the archive, by name.
    pub fn properties(&self) -> &[(String, Property)] {
        &self.properties
    }

    /// Bytes of the constants that tract holds, each counted once, packed ones as they are held.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// One run, without state from earlier ones.
    pub fn run(&self, inputs: &[Input<'_>]) -> Result<Vec<Array>> {
        self.run_until(&|| false, inputs)
    }

    /// [`Self::run`] that asks `stop` before each operator, and ends with [`Error::Interrupted`] if it says so.
    pub fn run_until(&self, stop: &dyn Fn() -> bool, inputs: &[Input<'_>]) -> Result<Vec<Array>> {
        self.run_with(&vec![None; self.inputs.len()], stop, inputs)
    }

    /// One run in which an input has its value of `carried`, one an input, or else the next of `inputs`.
    fn run_with(&self, carried: &[Option<Array>], stop: &dyn Fn() -> bool, inputs: &[Input<'_>]) -> Result<Vec<Array>> {
        let free = self.inputs.iter().zip(carried).filter(|(_, value)| value.is_none());
        let names: Vec<_> = free.map(|(fact, _)| fact.name.as_str()).collect();
        if inputs.len() != names.len() {
            let (expected, got) = (names.len(), inputs.len());
            return invalid(format!("{expected} inputs are expected ({}), got {got}", names.join(", ")));
        }
        let mut rest = inputs.iter().copied();
        let values = carried.iter().map(|value| value.as_ref().map(Array::as_input).or_else(|| rest.next()));
        let given: Vec<_> = values.enumerate().filter_map(|(at, input)| Some((at, input?))).collect();
        let symbols = inputs::check(self.plan.model(), &self.inputs, &given)?;
        if let Some(why) = self.equal.iter().find_map(|sizes| sizes.check(&symbols).err()) {
            return invalid(format!("the archive cannot compute inputs of these sizes: {why}"));
        }
        let stopped = AtomicBool::new(false);
        let forked = self.process != std::process::id();
        let outcome = guarded(&"running the model", &stopped, || {
            let tensor = |(at, input): &(usize, Input<'_>)| match &carried[*at] {
                Some(value) => Ok(value.value.clone()),
                None => Ok(self.array(*at, input)?.value),
            };
            let tensors = given.iter().map(tensor).collect::<TractResult<TVec<_>>>()?;
            let outputs = self.plan.spawn()?.run_plan_with_eval(tensors, |context, state, node, inputs| {
                if stop() {
                    stopped.store(true, Ordering::Relaxed);
                    bail!("stopped");
                }
                if forked {
                    return multithread_tract_scope(Executor::SingleThread, || eval(context, state, node, inputs));
                }
                eval(context, state, node, inputs)
            })?;
            outputs.into_iter().map(|value| Array::new(value, &symbols)).collect()
        });
        if stopped.into_inner() { Err(Error::Interrupted) } else { outcome }
    }

    /// The value of the input at `at`, which `inputs::check` admitted.
    fn array(&self, at: usize, input: &Input<'_>) -> TractResult<Array> {
        let datum_type = self.plan.model().input_fact(at)?.datum_type;
        // SAFETY: `inputs::check` admitted only types of TYPES, for which any bytes are a value (bool: checked there);
        // tract checks their number.
        let value = unsafe { Tensor::from_raw_dt(datum_type, input.shape, input.bytes) }?.into_tvalue();
        Array::new(value, &SymbolValues::default())
    }
}

/// What runs a plan on more threads than the caller's.
fn executor(threads: Option<usize>) -> Result<Option<Executor>> {
    match threads {
        None | Some(1) => Ok(None),
        Some(0) => invalid("threads: at least 1".to_owned()),
        Some(n) => match ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("tract-{i}")).build() {
            Ok(pool) => Ok(Some(Executor::MultiThread(Arc::new(pool)))),
            Err(why) => invalid(format!("threads: {n} cannot be started: {why}")),
        },
    }
}

fn invalid<T>(why: String) -> Result<T> {
    Err(Error::InvalidArgument(why))
}

/// Parsing its standard library takes milliseconds, so that there is one for all loads.
fn framework() -> &'static Nnef {
    static FRAMEWORK: OnceLock<Nnef> = OnceLock::new();
    FRAMEWORK.get_or_init(|| rules::guard(tract_nnef::nnef().with_tract_transformers()))
}

fn type_name(datum_type: DatumType) -> Option<&'static str> {
    TYPES.iter().find(|(dt, _)| *dt == datum_type.unquantized()).map(|(_, name)| *name)
}

/// Runs `work` of tract, unless asked to stop; its errors and panics become [`Error::Tract`] that begins with `at`.
fn guarded<T>(at: &dyn Display, stop: &AtomicBool, work: impl FnOnce() -> TractResult<T>) -> Result<T> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::Interrupted);
    }
    let why = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => cause_first(&error),
        Err(panic) => format!("tract panicked: {}", panic_text(&*panic)),
    };
    Err(Error::Tract(format!("{at}: {}", why.get(..why.floor_char_boundary(MAX_ERROR_LEN)).unwrap_or_default())))
}

/// The long way to it comes last, where a cut does no harm.
fn cause_first(error: &TractError) -> String {
    let mut chain: Vec<_> = error.chain().map(ToString::to_string).collect();
    let cause = chain.pop().unwrap_or_default();
    if chain.is_empty() { cause } else { format!("{cause} ({})", chain.join(": ")) }
}

/// Symbolic dimensions as i64; tract leaves those that it folded into constants as expressions.
fn evaluate(dims: &Tensor, symbols: &SymbolValues) -> TractResult<Tensor> {
    let sizes = dims.try_as_plain_ram()?.as_slice::<TDim>()?.iter().map(|dim| Ok(dim.eval(symbols).to_i64()?));
    Tensor::from_shape(dims.shape(), &sizes.collect::<TractResult<Vec<i64>>>()?)
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// Makes the assignments `names` the results of the graph.
fn select_outputs(proto: &mut ProtoModel, names: &[String]) -> Result<()> {
    let graph = &mut proto.doc.graph_def;
    let mut assigned = HashSet::new();
    let mut pending: Vec<&LValue> = graph.body.iter().map(|assignment| &assignment.left).collect();
    while let Some(left) = pending.pop() {
        match left {
            LValue::Identifier(id) => drop(assigned.insert(id.0.as_str())),
            LValue::Array(parts) | LValue::Tuple(parts) => pending.extend(parts),
        }
    }
    if names.is_empty() {
        return invalid("outputs: an empty list; name at least one assignment of graph.nnef".to_owned());
    }
    if let Some(unknown) = names.iter().find(|name| !assigned.contains(name.as_str())) {
        return invalid(format!("outputs: graph.nnef assigns nothing called {unknown:?}"));
    }
    if let Some((_, twice)) = names.iter().enumerate().find(|&(i, name)| names[..i].contains(name)) {
        return invalid(format!("outputs: {twice:?} is named twice"));
    }
    graph.results = names.iter().map(|name| Identifier(name.clone())).collect();
    Ok(())
}

/// Puts the inputs in the order of the graph's signature; tract has them in the order of the body.
fn order_inputs(model: &mut TypedModel, proto: &ProtoModel) -> TractResult<()> {
    let place = |outlet: &OutletId| {
        let name = &model.node(outlet.node).name;
        proto.doc.graph_def.parameters.iter().position(|id| id.0 == *name)
    };
    let mut inputs = model.inputs.clone();
    inputs.sort_by_key(|outlet| place(outlet).unwrap_or(usize::MAX));
    model.set_input_outlets(&inputs)
}

/// Without the name of the graph, which tract puts among them.
fn properties(model: &TypedModel) -> TractResult<Vec<(String, Property)>> {
    let mut found = model
        .properties
        .iter()
        .filter(|(name, _)| *name != TRACT_NAME)
        .map(|(name, value)| {
            let property = if value.datum_type() == DatumType::String {
                Property::Text(value.try_as_plain_ram()?.as_slice::<String>()?.to_vec())
            } else {
                Property::Tensor(Array::new(value.clone().into_tvalue(), &SymbolValues::default())?)
            };
            Ok((name.clone(), property))
        })
        .collect::<TractResult<Vec<_>>>()?;
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}
