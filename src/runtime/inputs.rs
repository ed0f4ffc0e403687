//! What is checked of the inputs of a run, before tract sees them.

use std::collections::HashMap;

use tract_nnef::internal::{ShapeFact, Symbol, SymbolValues, TDim, TypedModel};

use super::{Dim, Fact, Input, TYPES, invalid};
use crate::error::{Error, Result};

/// Sizes of the symbols; [`Error::InvalidArgument`] unless the inputs, each with its index, are what `model` takes, symbols having one size each, within what the archive asserts of them.
pub fn check(model: &TypedModel, facts: &[Fact], inputs: &[(usize, Input<'_>)]) -> Result<SymbolValues> {
    let shape = |index| model.input_fact(index).map(|fact| &fact.shape).map_err(|e| Error::Tract(format!("{e:#}")));
    let mut sizes = Sizes::default();
    for (index, input) in inputs {
        check_type(&facts[*index], input)?;
        sizes.bind(&facts[*index], shape(*index)?, input)?;
    }
    // Once every symbol that stands alone is known.
    for (index, input) in inputs {
        sizes.check(&facts[*index], shape(*index)?, input)?;
    }
    // tract reasons with its assertions, but does not check them.
    for asserted in model.symbols.all_assertions() {
        if asserted.check(&sizes.values) == Some(false) {
            return invalid(format!(
                "the archive holds only where {asserted}: it cannot compute inputs of these sizes"
            ));
        }
    }
    Ok(sizes.values)
}

/// Sizes of the symbols in one run, and who gave them.
#[derive(Default)]
struct Sizes<'a> {
    values: SymbolValues,
    origin: HashMap<Symbol, (&'a str, usize)>,
}

impl<'a> Sizes<'a> {
    fn bind(&mut self, fact: &'a Fact, dims: &ShapeFact, input: &Input<'_>) -> Result<()> {
        for (axis, (dim, &size)) in dims.iter().zip(input.shape).enumerate() {
            let TDim::Sym(symbol) = dim else { continue };
            let Some(known) = self.values.get(symbol) else {
                self.values.set(symbol, size as i64);
                self.origin.insert(symbol.clone(), (&fact.name, axis));
                continue;
            };
            if known != size as i64 {
                let (first, first_axis) = self.origin.get(symbol).copied().unwrap_or_default();
                let name = &fact.name;
                return invalid(format!(
                    "input {name:?}: {symbol} is {size} on axis {axis}, but {known} on axis {first_axis} of {first:?}"
                ));
            }
        }
        Ok(())
    }

    fn check(&self, fact: &Fact, dims: &ShapeFact, input: &Input<'_>) -> Result<()> {
        for (axis, (dim, &size)) in dims.iter().zip(input.shape).enumerate() {
            if let Some(expected) = dim.eval(&self.values).as_i64()
                && expected != size as i64
            {
                let (dim, mismatch) = (&fact.shape[axis], mismatch(fact, input));
                let because =
                    if matches!(dim, Dim::Fixed(_)) { String::new() } else { format!(" with {dim} = {expected}") };
                return invalid(format!("{mismatch}; axis {axis} must be {expected}{because}"));
            }
        }
        Ok(())
    }
}

fn check_type(fact: &Fact, input: &Input<'_>) -> Result<()> {
    if !TYPES.iter().any(|&(_, name)| name == fact.dtype) {
        return invalid(format!("input {:?}: its type {} cannot be given from outside tract", fact.name, fact.dtype));
    }
    if input.dtype != fact.dtype {
        let hint = if matches!(input.dtype, "bf16" | "bfloat16") { "; tract has no bf16" } else { "" };
        return invalid(format!("{}; convert it to {}{hint}", mismatch(fact, input), fact.dtype));
    }
    if input.shape.len() != fact.shape.len() {
        return invalid(format!("{}; it must have {} axes", mismatch(fact, input), fact.shape.len()));
    }
    if fact.dtype == "bool" && input.bytes.iter().any(|&b| b > 1) {
        return invalid(format!("input {:?}: a boolean is neither 0 nor 1", fact.name));
    }
    Ok(())
}

fn mismatch(fact: &Fact, input: &Input<'_>) -> String {
    let expected: Vec<_> = fact.shape.iter().map(ToString::to_string).collect();
    let (name, dtype, expected) = (&fact.name, &fact.dtype, expected.join(", "));
    format!("input {name:?}: expected {dtype} of shape [{expected}], got {} of shape {:?}", input.dtype, input.shape)
}
