//! What tract 0.23.9 computes with packed weights: elsewhere it is silently wrong, or reads beyond their end. It also
//! multiplies operands whose sizes do not fit.

use std::collections::{HashMap, HashSet};

use tract_core::ops::array::Gather;
use tract_core::ops::binary::TypedBinOp;
use tract_core::ops::change_axes::AxisOp;
use tract_core::ops::cnn::Conv;
use tract_core::ops::einsum::EinSum;
use tract_core::ops::gru_cell::GruEpilogue;
use tract_core::ops::konst::Const;
use tract_core::ops::lstm_cell::LstmEpilogue;
use tract_core::ops::scan::Scan;
use tract_linalg::block_quant::BlockQuantStorage;
use tract_nnef::internal::{InOut, OutletId, SymbolValues, TDim, ToDim, TypedFact, TypedModel, TypedNode};

use crate::q40::GROUP_SIZE;
use crate::q40::block::BLOCK_BYTES;

type Checked = Result<(), String>;

/// Two sizes that a product or a loop needs to be equal, and are not provably so; one of them may be 1 if `broadcast`.
#[derive(Debug)]
pub struct Equal {
    sizes: [TDim; 2],
    broadcast: bool,
}

impl Equal {
    /// `Err(why)` if the sizes differ for these symbols; what has no value is not looked at.
    pub fn check(&self, symbols: &SymbolValues) -> Checked {
        let [Some(a), Some(b)] = self.sizes.each_ref().map(|size| size.eval(symbols).as_i64()) else { return Ok(()) };
        if a == b || self.broadcast && (a == 1 || b == 1) {
            return Ok(());
        }
        let [first, second] = &self.sizes;
        Err(format!("a product or loop along {first} = {a} and {second} = {b}, which must be equal"))
    }
}

/// What has to be looked at in each run of `model`, as loaded and not yet optimized; `Err(why)` if a packed weight is used
/// where tract has no kernel for it, or if sizes do not fit.
pub fn check(model: &TypedModel) -> Result<Vec<Equal>, String> {
    let mut equal = Vec::new();
    let mut packed: HashMap<OutletId, Vec<usize>> = HashMap::new();
    let mut constant: HashSet<usize> = HashSet::new();
    for node in model.nodes() {
        let named = |why: &str| format!("{}: {why}", node.name);
        check_operands(model, node, &constant).map_err(|why| named(&why))?;
        if node.op_is::<Const>() || !node.inputs.is_empty() && node.inputs.iter().all(|i| constant.contains(&i.node)) {
            constant.insert(node.id);
        }
        if let Some(scan) = node.op_as::<Scan>() {
            equal.extend(steps(model, node, scan).map_err(|why| named(&why))?);
            equal.extend(check(&scan.body)?);
        }
        if let Some(constant) = node.op_as::<Const>()
            && let Some(blocks) = constant.val().storage_as::<BlockQuantStorage>()
        {
            let shape = constant.val().shape();
            if bytes(shape) != Some(blocks.value().len()) {
                return Err(named(&format!("its packed weight has another size than shape {shape:?}")));
            }
            packed.insert(node.id.into(), shape.to_vec());
        }
        if let Some(product) = node.op_as::<EinSum>() {
            let blocks = node.inputs.iter().filter(|&input| packed.contains_key(input)).count();
            if blocks > 1 {
                return Err(named("a product of two packed operands"));
            }
            equal.extend(sizes(model, node, product, blocks == 0).map_err(|why| named(&why))?);
        }
        for (slot, input) in node.inputs.iter().enumerate() {
            let Some(shape) = packed.get(input) else { continue };
            if let Some(AxisOp::Add(_) | AxisOp::Rm(_) | AxisOp::Reshape(..)) = node.op_as::<AxisOp>() {
                // Blocks stay where they are.
                let fact = model.outlet_fact(node.id.into()).map_err(|e| named(&format!("{e:#}")))?;
                let shape = fact.shape.as_concrete().ok_or_else(|| named("a packed weight of no fixed shape"))?;
                packed.insert(node.id.into(), shape.to_vec());
            } else {
                check_use(node, slot, shape).map_err(|why| named(&why))?;
            }
        }
    }
    Ok(equal)
}

/// tract reads the first element of a constant beside an operand, also where there is none; the operands of a cell as if they
/// had the type of the first; and of its state whole rows alone.
fn check_operands(model: &TypedModel, node: &TypedNode, constant: &HashSet<usize>) -> Checked {
    let facts = model.node_input_facts(node.id).map_err(|e| format!("{e:#}"))?;
    let empty = |fact: &TypedFact| fact.shape.iter().any(|size| *size == TDim::Val(0));
    if node.op_is::<TypedBinOp>() && node.inputs.iter().zip(&facts).any(|(i, f)| constant.contains(&i.node) && empty(f))
    {
        return Err("an operand is a constant without elements".to_owned());
    }
    let lstm = node.op_as::<LstmEpilogue>().map(|cell| cell.hidden);
    if let Some(hidden) = lstm.or_else(|| node.op_as::<GruEpilogue>().map(|cell| cell.hidden)) {
        let state = facts.last().and_then(|fact| fact.shape.last()) == Some(&hidden.to_dim());
        if !state || facts.iter().any(|fact| fact.datum_type != facts[0].datum_type) {
            return Err(format!("a cell whose operands differ in type, or whose state has no rows of {hidden}"));
        }
    }
    Ok(())
}

/// tract leaves what a loop skips, and the rest of a step, as memory was before; it takes the length of the first operand
/// for that of all.
fn steps(model: &TypedModel, node: &TypedNode, scan: &Scan) -> Result<Vec<Equal>, String> {
    let facts = model.node_input_facts(node.id).map_err(|e| format!("{e:#}"))?;
    let scanned = scan.input_mapping.iter().zip(facts).filter_map(|(mapping, fact)| Some((mapping.as_scan()?, fact)));
    let given = scan.output_mapping.iter().enumerate().filter_map(|(at, mapping)| Some((at, mapping.scan?.1)));
    let mut whole = scan.skip == 0;
    let mut lengths = Vec::new();
    for (info, fact) in scanned {
        whole &= info.chunk.abs() == 1;
        lengths.push(fact.shape.get(info.axis).ok_or("a loop along an axis that is not there")?);
    }
    for (at, info) in given {
        let fact = scan.body.output_fact(at).map_err(|e| format!("{e:#}"))?;
        whole &= info.chunk.abs() == 1 && fact.shape.get(info.axis) == Some(&TDim::Val(1));
    }
    if !whole {
        return Err("a loop whose steps do not each take and give one element of an axis".to_owned());
    }
    let mut equal = Vec::new();
    for pair in lengths.windows(2).filter(|pair| pair[0] != pair[1]) {
        let pair = Equal { sizes: [pair[0].clone(), pair[1].clone()], broadcast: false };
        pair.check(&SymbolValues::default())?;
        equal.push(pair);
    }
    Ok(equal)
}

/// Of a packed tensor; None if it cannot be in blocks.
fn bytes(shape: &[usize]) -> Option<usize> {
    let len = shape.iter().try_fold(1usize, |len, &dim| len.checked_mul(dim))?;
    let fits = shape.len() > 1 && len.is_multiple_of(GROUP_SIZE);
    fits.then(|| (len / GROUP_SIZE).checked_mul(BLOCK_BYTES))?
}

fn check_use(node: &TypedNode, slot: usize, shape: &[usize]) -> Checked {
    let whole = |row: usize| match row % GROUP_SIZE {
        0 => Ok(()),
        _ => Err(format!("rows of {row} packed elements are not whole groups of {GROUP_SIZE}")),
    };
    if let Some(product) = node.op_as::<EinSum>() {
        check_product(product, slot, shape.len())?;
        whole(shape.last().copied().unwrap_or(0))
    } else if let Some(conv) = node.op_as::<Conv>() {
        match (slot, conv.group > 1 && shape.get(1) == Some(&1)) {
            (1, false) => whole(shape[1..].iter().product()),
            (1, true) => Err("a depthwise convolution has no kernel for a packed filter".to_owned()),
            _ => Err("of a convolution only the filter may be packed".to_owned()),
        }
    } else if let Some(gather) = node.op_as::<Gather>() {
        match (slot, gather.axis, gather.output_type) {
            (0, 0, Some(_)) => whole(shape.last().copied().unwrap_or(0)),
            _ => Err("a lookup of packed rows needs axis = 0 and a datum_type".to_owned()),
        }
    } else if node.op.name() == "MoeFfn" && slot > 1 {
        whole(shape.last().copied().unwrap_or(0))
    } else {
        Err(format!("{} has no kernel for packed weights", node.op.name()))
    }
}

/// Groups run along the last axis: it is the one that is summed, with one of the other operand, and the only one.
fn check_product(product: &EinSum, slot: usize, rank: usize) -> Checked {
    let mapping = &product.axes;
    if product.q_params.is_some() || mapping.input_count() != 2 {
        return Err("only products of two operands in floats have kernels for packed weights".to_owned());
    }
    for at in 0..rank {
        let axis = mapping.axis((InOut::In(slot), at)).map_err(|e| format!("{e:#}"))?;
        let (shown, shared) = (axis.outputs[0].len(), axis.inputs[1 - slot].len());
        let legal = if at + 1 == rank { (shown, shared) == (0, 1) } else { shown == 1 && shared < 2 };
        if !legal || axis.inputs[slot].len() != 1 {
            return Err(format!(
                "the product {mapping} must sum over the last axis of the packed weight, and only over it"
            ));
        }
    }
    Ok(())
}

/// tract does not compare the sizes of operands, and reads behind the smaller one.
fn sizes(model: &TypedModel, node: &TypedNode, product: &EinSum, broadcast: bool) -> Result<Vec<Equal>, String> {
    let facts = model.node_input_facts(node.id).map_err(|e| format!("{e:#}"))?;
    let mut equal = Vec::new();
    for axis in product.axes.iter_all_axes() {
        let along =
            axis.inputs.iter().zip(&facts).flat_map(|(places, fact)| places.iter().map(|at| fact.shape.get(*at)));
        let along: Vec<&TDim> = along.flatten().collect();
        let summed = axis.outputs[0].is_empty();
        for size in along.iter().skip(1).filter(|size| **size != along[0]) {
            if summed && (along[0].is_one() || size.is_one()) {
                // tract's optimizer may come to no end if the other one is a symbol.
                return Err(format!("a product along {} and {size}, which must be equal", along[0]));
            }
            let pair = Equal { sizes: [along[0].clone(), (*size).clone()], broadcast: broadcast && !summed };
            pair.check(&SymbolValues::default())?;
            equal.push(pair);
        }
    }
    Ok(equal)
}
