//! What an archive may not ask of tract's operators, checked where tract builds them, with the values it builds them from.
//!
//! tract 0.23.9 loops without end on a transposition that names an axis twice, allocates what numbers in the file ask for,
//! takes a packed side of `matmul` as it lies, whatever it is told, and the first element of a tensor for a number, also
//! where there is none.

use std::borrow::Cow;
use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, OnceLock};

use tract_core::ops::einsum::EinSum;
use tract_nnef::ast::{Identifier, Invocation, RValue, TypeName, TypeSpec};
use tract_nnef::deser::{ModelBuilder, ResolvedInvocation, Value};
use tract_nnef::framework::Nnef;
use tract_nnef::internal::{
    AxesMapping, OutletId, TDim, Tensor, TractErrorContext, TractResult, TypedFact, TypedNode, ensure,
};
use tract_nnef::registry::ToTract;

/// Axes of a tensor.
const MAX_RANK: usize = 64;
/// What tract allocates while it loads or runs, if numbers in the file ask for it: `(operator, argument, most of the
/// product of its numbers)`, of a padding over its axes. The elements of a window become offsets, a few hundred bytes
/// each. Other operators (`avg_pool`, `max_pool`) are fragments that apply these.
const AMOUNTS: [(&str, &str, i64); 17] = [
    ("tile", "repeats", 1 << 31),
    ("pad", "padding", 1 << 24),
    ("tract_core_broadcast", "shape", 1 << 31),
    ("tract_core_range", "start", 1 << 31),
    ("tract_core_range", "end", 1 << 31),
    ("tract_core_one_hot", "dim", 1 << 31),
    ("tract_core_resize", "sizes", 1 << 31),
    ("tract_core_resize", "scales", 1 << 16),
    ("nearest_upsample", "factor", 1 << 16),
    ("multilinear_upsample", "factor", 1 << 16),
    ("conv", "padding", 1 << 24),
    ("deconv", "padding", 1 << 24),
    ("tract_core_qconv", "padding", 1 << 24),
    ("box", "size", 1 << 18),
    ("box", "padding", 1 << 24),
    ("debox", "size", 1 << 18),
    ("max_pool_with_index", "size", 1 << 18),
];

/// Operators that slide a window.
const WINDOWS: [&str; 6] = ["conv", "deconv", "box", "debox", "max_pool_with_index", "tract_core_qconv"];
/// `(argument, least number)` of theirs: tract takes what is less for very much.
const LEAST: [(&str, i64); 4] = [("size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)];

type Check = fn(&mut ModelBuilder, &ResolvedInvocation) -> TractResult<()>;
type CheckBuilt = fn(&mut ModelBuilder, &ResolvedInvocation, OutletId) -> TractResult<()>;

const BEFORE: [(&str, Check); 5] = [
    ("transpose", transpose),
    ("unsqueeze", unsqueeze),
    ("box", window),
    ("max_pool_with_index", window),
    ("tract_core_one_hot", one_hot),
];
const AFTER: [(&str, CheckBuilt); 2] = [("matmul", matmul), ("tract_moe_ffn", experts)];

/// tract's own operators, which [`guard`] stands before.
static OWN: OnceLock<HashMap<String, ToTract>> = OnceLock::new();

/// Puts the checks around the operators of `framework` that take arguments by name.
pub fn guard(mut framework: Nnef) -> Nnef {
    let mut own = HashMap::new();
    for registry in &mut framework.registries {
        let primitives = registry.primitives.iter_mut().map(|(name, operator)| (name, &mut operator.to_tract));
        let others = registry.element_wise_ops.iter_mut().map(|(name, .., to_tract)| (&*name, to_tract));
        own.extend(primitives.chain(others).map(|(name, of)| (name.0.clone(), mem::replace(of, checked as ToTract))));
    }
    OWN.get_or_init(|| own);
    framework
}

fn checked(builder: &mut ModelBuilder, asked: &ResolvedInvocation) -> TractResult<Value> {
    let name = &*asked.invocation.id.0;
    let own = OWN.get().and_then(|own| own.get(name)).context("an operator that nobody guards")?;
    let resolved = resolved(builder, asked)?;
    let invocation = &ResolvedInvocation { invocation: &resolved, ..asked.clone() };
    single(builder, invocation)?;
    for (_, check) in BEFORE.iter().filter(|(operator, _)| *operator == name) {
        check(builder, invocation)?;
    }
    for (_, argument, most) in AMOUNTS.iter().filter(|(operator, ..)| *operator == name) {
        amount(builder, invocation, argument, *most)?;
    }
    for (argument, least) in LEAST.iter().filter(|_| WINDOWS.contains(&name)) {
        let asked = numbers(builder, invocation, argument)?.unwrap_or_default();
        ensure!(asked.iter().all(|n| n >= least), "{argument} {asked:?}: at least {least}");
    }
    let built = own(builder, invocation)?;
    for (_, check) in AFTER.iter().filter(|(operator, _)| *operator == name) {
        let outlet = built.to(builder)?;
        check(builder, invocation, outlet)?;
    }
    Ok(built)
}

/// Arguments that apply operators under names for what they are: tract builds them anew each time it looks at them.
fn resolved<'a>(builder: &mut ModelBuilder, asked: &ResolvedInvocation<'a>) -> TractResult<Cow<'a, Invocation>> {
    if asked.invocation.arguments.iter().all(|argument| is_written(&argument.rvalue)) {
        return Ok(Cow::Borrowed(asked.invocation));
    }
    let mut invocation = asked.invocation.clone();
    let mut named = Vec::new();
    for (at, argument) in invocation.arguments.iter_mut().enumerate().filter(|(_, a)| !is_written(&a.rvalue)) {
        let name = argument.id.as_ref().or_else(|| asked.default_params.get(at).map(|parameter| &parameter.id));
        builder.naming_scopes.push(name.context("more arguments than the operator has")?.clone());
        let value = if invocation.id.0.ends_with("external") {
            builder.allowing_new_symbols(|builder| argument.rvalue.resolve(builder, &[]))
        } else {
            argument.rvalue.resolve(builder, &[])
        };
        builder.naming_scopes.pop();
        let name = Identifier(format!("\0argument {at}"));
        named.push((name.clone(), value?));
        argument.rvalue = RValue::Identifier(name);
    }
    // Not before all are resolved: they may apply operators with such arguments too.
    builder.scopes.last_mut().context("no scope")?.extend(named);
    Ok(Cow::Owned(invocation))
}

/// Refuses tensors that are not one number where numbers belong.
fn single(builder: &ModelBuilder, invocation: &ResolvedInvocation) -> TractResult<()> {
    for parameter in invocation.default_params.iter().filter(|parameter| is_number(&parameter.spec)) {
        let given = invocation.get_named_arg(&parameter.id.0);
        let fits = given.is_none_or(|value| is_single(builder, &value));
        ensure!(fits, "{}: a tensor that is not one element stands for a number", parameter.id.0);
    }
    Ok(())
}

/// Or numbers; all that tract declares as tensors of integers are.
fn is_number(spec: &TypeSpec) -> bool {
    match spec {
        TypeSpec::Single(_) | TypeSpec::Tensor(TypeName::Integer) => true,
        TypeSpec::Tensor(_) => false,
        TypeSpec::Array(of) => is_number(of),
        TypeSpec::Tuple(items) => items.iter().all(is_number),
    }
}

fn is_single(builder: &ModelBuilder, argument: &RValue) -> bool {
    match argument {
        RValue::Identifier(name) => {
            builder.scopes.last().and_then(|scope| scope.get(name)).is_none_or(|value| is_one(builder, value))
        }
        RValue::Array(items) | RValue::Tuple(items) => items.iter().all(|item| is_single(builder, item)),
        _ => true,
    }
}

fn is_one(builder: &ModelBuilder, value: &Value) -> bool {
    match value {
        Value::Wire(outlet) => builder.model.outlet_fact(*outlet).is_ok_and(|fact| fact.shape.volume() == TDim::Val(1)),
        Value::Tensor(tensor) => tensor.len() == 1,
        Value::Array(items) | Value::Tuple(items) => items.iter().all(|item| is_one(builder, item)),
        _ => true,
    }
}

fn transpose(builder: &mut ModelBuilder, invocation: &ResolvedInvocation) -> TractResult<()> {
    let axes = numbers(builder, invocation, "axes")?.context("transpose with axes that are not written as numbers")?;
    let twice = axes.iter().enumerate().find(|&(at, axis)| axes[..at].contains(axis));
    ensure!(twice.is_none(), "transpose with an axis twice: {axes:?}");
    Ok(())
}

fn unsqueeze(builder: &mut ModelBuilder, invocation: &ResolvedInvocation) -> TractResult<()> {
    let many = numbers(builder, invocation, "axes")?.unwrap_or_default().len();
    ensure!(many <= MAX_RANK, "unsqueeze with {many} axes");
    Ok(())
}

/// tract looks for batch and channel in sizes and paddings without a look at how many there are.
fn window(builder: &mut ModelBuilder, invocation: &ResolvedInvocation) -> TractResult<()> {
    let [size, padding] = ["size", "padding"].map(|argument| numbers(builder, invocation, argument));
    let [axes, pads] = [size?, padding?].map(|written| written.map(|numbers| numbers.len()));
    let fits = axes.zip(pads).is_some_and(|(axes, pads)| axes > 2 && (pads == 0 || pads == 2 * axes));
    ensure!(fits, "a window whose size and padding are not written for batch, channel and at least one more axis");
    Ok(())
}

/// tract writes one value into a tensor of the other's type.
fn one_hot(builder: &mut ModelBuilder, invocation: &ResolvedInvocation) -> TractResult<()> {
    let mut types = [None; 2];
    for (found, argument) in types.iter_mut().zip(["value_off", "value_on"]) {
        let value = invocation.get_named_arg(argument).map(|value| value.resolve(builder, &[])).transpose()?;
        *found = value.and_then(|value| value.to::<Arc<Tensor>>(builder).ok()).map(|value| value.datum_type());
    }
    ensure!(
        types[0] == types[1] && types[0].is_some_and(|of| of.is_copy()),
        "one_hot with values that are not written, or no numbers of one type"
    );
    Ok(())
}

fn amount(builder: &mut ModelBuilder, invocation: &ResolvedInvocation, argument: &str, most: i64) -> TractResult<()> {
    let asked = numbers(builder, invocation, argument)?.unwrap_or_default();
    let together = if argument == "padding" { 2 } else { 1 };
    let product = asked.chunks(together).try_fold(1i64, |product, side| {
        let sum = side.iter().try_fold(0i64, |sum, n| sum.checked_add(n.checked_abs()?))?;
        product.checked_mul(sum.max(1))
    });
    ensure!(product.is_some_and(|product| product <= most), "{argument} {asked:?}: more than {most} in all");
    Ok(())
}

/// Of a packed side only what tract does with it anyway may be asked. tract puts it first, the right one with the result
/// transposed.
fn matmul(builder: &mut ModelBuilder, invocation: &ResolvedInvocation, built: OutletId) -> TractResult<()> {
    let node = builder.model.node(built.node);
    let Some(product) = node.op_as::<EinSum>().filter(|_| is_packed(builder, node, 0)) else { return Ok(()) };
    let rank = builder.model.outlet_fact(node.inputs[0])?.rank();
    let is_left = [false, true].into_iter().any(|transposed| {
        AxesMapping::for_numpy_matmul(rank, false, transposed, false).is_ok_and(|axes| axes == product.axes)
    });
    let (argument, needed) = if is_left { ("transposeA", false) } else { ("transposeB", true) };
    let asked =
        invocation.get_named_arg(argument).map(|asked| asked.resolve(builder, &[])?.to::<bool>(builder)).transpose()?;
    ensure!(asked == Some(needed), "matmul of a packed side needs {argument} = {needed}");
    Ok(())
}

fn experts(builder: &mut ModelBuilder, invocation: &ResolvedInvocation, built: OutletId) -> TractResult<()> {
    let node = builder.model.node(built.node);
    if !(0..node.inputs.len()).any(|at| is_packed(builder, node, at)) {
        return Ok(());
    }
    let layout = invocation.get_named_arg("expert_layout").map(|layout| layout.resolve(builder, &[])).transpose()?;
    ensure!(
        matches!(layout, Some(Value::String(name)) if name == "linear"),
        "packed experts need expert_layout = \"linear\""
    );
    Ok(())
}

fn is_packed(builder: &ModelBuilder, node: &TypedNode, at: usize) -> bool {
    node.inputs.get(at).is_some_and(|&input| builder.model.outlet_fact(input).is_ok_and(TypedFact::is_exotic))
}

/// An argument of whole numbers, nested ones in a row; None if they depend on inputs or symbols.
fn numbers(
    builder: &mut ModelBuilder,
    invocation: &ResolvedInvocation,
    argument: &str,
) -> TractResult<Option<Vec<i64>>> {
    let Some(value) = invocation.get_named_arg(argument) else { return Ok(None) };
    let value = value.resolve(builder, &[])?;
    Ok(flat(builder, &value))
}

/// Whether it applies no operator.
fn is_written(value: &RValue) -> bool {
    match value {
        RValue::Identifier(_) | RValue::Literal(_) => true,
        RValue::Array(items) | RValue::Tuple(items) => items.iter().all(is_written),
        _ => false,
    }
}

fn flat(builder: &mut ModelBuilder, value: &Value) -> Option<Vec<i64>> {
    match value {
        Value::Dim(size) => size.to_i64().ok().map(|n| vec![n]),
        Value::Array(items) | Value::Tuple(items) => {
            items.iter().map(|item| flat(builder, item)).collect::<Option<Vec<_>>>().map(|all| all.concat())
        }
        _ => {
            let tensor = value.to::<Arc<Tensor>>(builder).ok()?;
            let whole = tensor.cast_to::<i64>().ok()?;
            Some(whole.try_as_plain_ram().ok()?.as_slice::<i64>().ok()?.to_vec())
        }
    }
}

#[cfg(test)]
mod tests {
    use tract_transformers::WithTractTransformers;

    use super::*;

    #[test]
    fn the_tables_name_operators_of_tract() {
        guard(tract_nnef::nnef().with_tract_transformers());
        let own = OWN.get().unwrap_or_else(|| unreachable!("set by guard"));
        let named = BEFORE.iter().map(|(name, _)| *name).chain(AFTER.iter().map(|(name, _)| *name));
        let named = named.chain(AMOUNTS.iter().map(|(name, ..)| *name)).chain(WINDOWS);
        let missing: Vec<_> = named.filter(|name| !own.contains_key(*name)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
