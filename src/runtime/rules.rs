//! What a parsed graph may not ask of tract, seen with the values that its fragments are given.
//!
//! tract 0.23.9 loops without end on a transposition that names an axis twice, and takes a packed right side of `matmul`
//! as transposed whatever it is told.

use std::collections::{HashMap, HashSet};

use tract_linalg::block_quant::BlockQuantStorage;
use tract_nnef::ast::{
    Argument, Assignment, FragmentDef, Invocation, LValue, Literal, Parameter, ProtoModel, RValue, Subscript,
};
use tract_nnef::internal::Tensor;

/// Axes of a tensor.
const MAX_RANK: usize = 64;
/// What tract allocates while it loads or runs, if numbers in the file ask for it: `(operator, argument, its place, most
/// of the product of its numbers)`. The elements of a window become offsets, a few hundred bytes each.
const AMOUNTS: [(&str, &str, usize, i64); 17] = [
    ("tile", "repeats", 1, 1 << 31),
    ("pad", "padding", 1, 1 << 31),
    ("constant", "shape", 0, 1 << 31),
    ("tract_core_broadcast", "shape", 1, 1 << 31),
    ("tract_core_range", "end", 1, 1 << 31),
    ("tract_core_one_hot", "dim", 2, 1 << 31),
    ("copy_n", "times", 1, 1 << 16),
    ("nearest_upsample", "factor", 1, 1 << 16),
    ("multilinear_upsample", "factor", 1, 1 << 16),
    ("conv", "padding", 4, 1 << 31),
    ("deconv", "padding", 4, 1 << 31),
    ("box", "size", 1, 1 << 18),
    ("box", "padding", 3, 1 << 31),
    ("debox", "size", 1, 1 << 18),
    ("max_pool", "size", 1, 1 << 18),
    ("max_pool_with_index", "size", 1, 1 << 18),
    ("avg_pool", "size", 1, 1 << 18),
];

type Checked = Result<(), String>;

/// What is known of an identifier before anything is computed.
#[derive(Clone)]
enum Known {
    /// A tensor in blocks of 32.
    Packed,
    /// Numbers and texts written in the file.
    Written(RValue),
}

type Scope = HashMap<String, Known>;

/// `Err(why)` if tract must not be given `proto`; cycles of fragments have been refused before.
pub fn check(proto: &ProtoModel) -> Checked {
    let packed = |tensor: &Tensor| tensor.storage_as::<BlockQuantStorage>().is_some();
    let labels = proto.tensors.iter().filter(|(_, tensor)| packed(tensor)).map(|(label, _)| label.0.as_str()).collect();
    Walk { proto, labels }.body(&proto.doc.graph_def.body, Scope::new())
}

struct Walk<'a> {
    proto: &'a ProtoModel,
    /// Of packed tensors.
    labels: HashSet<&'a str>,
}

impl Walk<'_> {
    fn body(&self, body: &[Assignment], mut scope: Scope) -> Checked {
        for assignment in body {
            self.value(&assignment.right, &scope)?;
            if let LValue::Identifier(left) = &assignment.left
                && let Some(known) = self.known(&assignment.right, &scope)
            {
                scope.insert(left.0.clone(), known);
            }
        }
        Ok(())
    }

    fn value(&self, value: &RValue, scope: &Scope) -> Checked {
        match value {
            RValue::Identifier(_) | RValue::Literal(_) => Ok(()),
            RValue::Unary(_, operand) => self.value(operand, scope),
            RValue::Binary(left, _, right) => {
                self.value(left, scope)?;
                self.value(right, scope)
            }
            RValue::Tuple(items) | RValue::Array(items) => items.iter().try_for_each(|item| self.value(item, scope)),
            RValue::Subscript(of, at) => {
                self.value(of, scope)?;
                match &**at {
                    Subscript::Single(at) => self.value(at, scope),
                    Subscript::Range(from, to) => {
                        [from, to].into_iter().flatten().try_for_each(|end| self.value(end, scope))
                    }
                }
            }
            RValue::Comprehension(each) => {
                each.loop_iters.iter().try_for_each(|(_, over)| self.value(over, scope))?;
                self.value(&each.yields, scope)
            }
            RValue::IfThenElse(choice) => {
                [&choice.cond, &choice.then, &choice.otherwise].into_iter().try_for_each(|v| self.value(v, scope))
            }
            RValue::Invocation(call) => self.call(call, scope),
        }
    }

    fn call(&self, call: &Invocation, scope: &Scope) -> Checked {
        call.arguments.iter().try_for_each(|argument| self.value(&argument.rvalue, scope))?;
        if let Some(fragment) = self.fragment(&call.id.0)
            && let Some(body) = &fragment.body
        {
            return self.body(body, self.bind(&fragment.decl.parameters, &call.arguments, scope));
        }
        let name = call.id.0.as_str();
        match name {
            "transpose" => check_axes(self.argument(call, "axes", 1, scope))?,
            "unsqueeze" => check_rank(self.argument(call, "axes", 1, scope))?,
            "matmul" => self.matmul(call, scope)?,
            "tract_moe_ffn" => self.experts(call, scope)?,
            "tract_core_scan" => self.loop_body(call, scope)?,
            _ => {}
        }
        for (_, argument, at, most) in AMOUNTS.iter().filter(|(operator, ..)| *operator == name) {
            if let Some(written) = self.argument(call, argument, *at, scope) {
                check_amount(name, argument, &written, *most)?;
            }
        }
        Ok(())
    }

    /// Of a packed right side only what tract does with it anyway may be asked.
    fn matmul(&self, call: &Invocation, scope: &Scope) -> Checked {
        for (at, operand, transposed, needed) in [(0, "A", "transposeA", false), (1, "B", "transposeB", true)] {
            let given = find(&call.arguments, operand, at);
            if given.is_some_and(|value| matches!(self.known(value, scope), Some(Known::Packed))) {
                let asked = self.argument(call, transposed, at + 2, scope);
                let asked = asked.unwrap_or(RValue::Literal(Literal::Logical(false)));
                if asked != RValue::Literal(Literal::Logical(needed)) {
                    return Err(format!("matmul of a packed {operand} needs {transposed} = {needed}"));
                }
            }
        }
        Ok(())
    }

    fn experts(&self, call: &Invocation, scope: &Scope) -> Checked {
        let packed = |argument: &Argument| matches!(self.known(&argument.rvalue, scope), Some(Known::Packed));
        let linear = RValue::Literal(Literal::String("linear".to_owned()));
        if call.arguments.iter().any(packed) && self.argument(call, "expert_layout", usize::MAX, scope) != Some(linear)
        {
            return Err("packed experts need expert_layout = \"linear\"".to_owned());
        }
        Ok(())
    }

    /// The fragment that a scan names; what its parameters are given is not followed.
    fn loop_body(&self, call: &Invocation, scope: &Scope) -> Checked {
        let Some(RValue::Literal(Literal::String(name))) = self.argument(call, "body", 0, scope) else {
            return Err("the body of a scan must be a name".to_owned());
        };
        match self.fragment(&name).and_then(|fragment| fragment.body.as_ref()) {
            Some(body) => self.body(body, Scope::new()),
            None => Err(format!("there is no fragment {name:?} for the body of a scan")),
        }
    }

    /// As tract chooses among several of a name.
    fn fragment(&self, name: &str) -> Option<&FragmentDef> {
        self.proto.doc.fragments.iter().find(|fragment| fragment.decl.id.0 == name && fragment.body.is_some())
    }

    fn bind(&self, parameters: &[Parameter], arguments: &[Argument], scope: &Scope) -> Scope {
        let known = |(at, parameter): (usize, &Parameter)| {
            let name = &parameter.id.0;
            let known = match find(arguments, name, at) {
                Some(value) => self.known(value, scope),
                None => parameter.lit.clone().map(|literal| Known::Written(RValue::Literal(literal))),
            };
            Some((name.clone(), known?))
        };
        parameters.iter().enumerate().filter_map(known).collect()
    }

    /// An argument that is written in the file, directly or as the parameter of a fragment.
    fn argument(&self, call: &Invocation, name: &str, at: usize, scope: &Scope) -> Option<RValue> {
        match self.known(find(&call.arguments, name, at)?, scope) {
            Some(Known::Written(value)) => Some(value),
            _ => None,
        }
    }

    fn known(&self, value: &RValue, scope: &Scope) -> Option<Known> {
        match value {
            RValue::Identifier(name) => scope.get(&name.0).cloned(),
            RValue::Literal(_) => Some(Known::Written(value.clone())),
            RValue::Unary(sign, operand) if sign == "-" => match (&**operand, self.known(operand, scope)) {
                (RValue::Literal(_), Some(_)) => Some(Known::Written(value.clone())),
                _ => None,
            },
            RValue::Array(items) | RValue::Tuple(items) => {
                let written = |item| match self.known(item, scope) {
                    Some(Known::Written(value)) => Some(value),
                    _ => None,
                };
                items.iter().map(written).collect::<Option<_>>().map(|items| Known::Written(RValue::Array(items)))
            }
            RValue::Invocation(call) => self.packed(call, scope).then_some(Known::Packed),
            _ => None,
        }
    }

    /// Whether the result is in blocks: a variable, or one of the operators that only change its shape.
    fn packed(&self, call: &Invocation, scope: &Scope) -> bool {
        match call.id.0.as_str() {
            "variable" => match self.argument(call, "label", 1, scope) {
                Some(RValue::Literal(Literal::String(label))) => {
                    [&*label, label.trim_start_matches('/')].iter().any(|label| self.labels.contains(label))
                }
                _ => false,
            },
            "squeeze" | "unsqueeze" | "reshape" => find(&call.arguments, "input", 0)
                .is_some_and(|value| matches!(self.known(value, scope), Some(Known::Packed))),
            _ => false,
        }
    }
}

/// As tract finds arguments: by name, else by place if all before are by place too.
fn find<'a>(arguments: &'a [Argument], name: &str, at: usize) -> Option<&'a RValue> {
    let named = arguments.iter().find(|argument| argument.id.as_ref().is_some_and(|id| id.0 == name));
    let placed = || {
        let before = arguments.get(..=at)?;
        before.iter().all(|argument| argument.id.is_none()).then(|| before.last())?
    };
    named.or_else(placed).map(|argument| &argument.rvalue)
}

fn check_axes(axes: Option<RValue>) -> Checked {
    let axes = axes.and_then(|axes| numbers(&axes)).ok_or("transpose with axes that are not written as numbers")?;
    let twice = axes.iter().enumerate().find(|&(at, axis)| axes[..at].contains(axis));
    twice.map_or(Ok(()), |(_, axis)| Err(format!("transpose with axis {axis} twice")))
}

fn check_rank(axes: Option<RValue>) -> Checked {
    match axes.and_then(|axes| numbers(&axes)).unwrap_or_default().len() {
        0..=MAX_RANK => Ok(()),
        many => Err(format!("unsqueeze with {many} axes")),
    }
}

fn check_amount(operator: &str, argument: &str, written: &RValue, most: i64) -> Checked {
    let asked = numbers(written).unwrap_or_default();
    let product = asked.iter().try_fold(1i64, |product, &n| product.checked_mul(n.checked_abs()?.max(1)));
    match product {
        Some(product) if product <= most => Ok(()),
        _ => Err(format!("{operator} with {argument} {asked:?}: more than {most} in all")),
    }
}

/// Whole numbers, nested ones in a row; None if there is anything else.
fn numbers(value: &RValue) -> Option<Vec<i64>> {
    let join = |items: Vec<Option<Vec<i64>>>| items.into_iter().collect::<Option<Vec<_>>>().map(|all| all.concat());
    match value {
        RValue::Literal(Literal::Numeric(text)) => text.parse().ok().map(|n| vec![n]),
        RValue::Literal(Literal::Array(items) | Literal::Tuple(items)) => {
            join(items.iter().map(|item| numbers(&RValue::Literal(item.clone()))).collect())
        }
        RValue::Array(items) | RValue::Tuple(items) => join(items.iter().map(numbers).collect()),
        RValue::Unary(sign, operand) if sign == "-" => numbers(operand).map(|all| all.iter().map(|n| -n).collect()),
        _ => None,
    }
}
