//! What tract 0.23.9 computes with packed weights: elsewhere it is silently wrong, or reads beyond their end.

use std::collections::HashMap;

use tract_core::axes::Axis;
use tract_core::ops::array::Gather;
use tract_core::ops::change_axes::AxisOp;
use tract_core::ops::cnn::Conv;
use tract_core::ops::einsum::EinSum;
use tract_core::ops::konst::Const;
use tract_core::ops::scan::Scan;
use tract_linalg::block_quant::BlockQuantStorage;
use tract_nnef::internal::{InOut, OutletId, TypedModel, TypedNode};

use crate::q40::GROUP_SIZE;
use crate::q40::block::BLOCK_BYTES;

type Checked = Result<(), String>;

/// `Err(why)` if a packed weight of `model`, as loaded and not yet optimized, is used where tract has no kernel for it.
pub fn check(model: &TypedModel) -> Checked {
    let mut packed: HashMap<OutletId, Vec<usize>> = HashMap::new();
    for node in model.nodes() {
        let named = |why: &str| format!("{}: {why}", node.name);
        if let Some(scan) = node.op_as::<Scan>() {
            check(&scan.body)?;
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
    match model.outputs.iter().find(|outlet| packed.contains_key(outlet)) {
        Some(outlet) => Err(format!("{}: a packed weight cannot be an output", model.node(outlet.node).name)),
        None => Ok(()),
    }
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

/// Groups run along the last axis: it is the one that is summed, and the only one.
fn check_product(product: &EinSum, slot: usize, rank: usize) -> Checked {
    let axes = &product.axes;
    let other = 1 - slot.min(1);
    let summed = |axis: &Axis| axis.outputs[0].is_empty() && axis.inputs.get(other).is_some_and(|at| at.len() == 1);
    let alone = |axis: &Axis| axis.inputs[slot].len() == 1;
    for at in 0..rank {
        let axis = axes.axis((InOut::In(slot), at)).map_err(|e| format!("{e:#}"))?;
        if !alone(axis) || summed(axis) != (at + 1 == rank) {
            return Err(format!("the product {axes} must sum over the last axis of the packed weight, and only over it"));
        }
    }
    match (slot < 2, product.q_params) {
        (true, None) => Ok(()),
        _ => Err("a product of integers has no kernel for packed weights".to_owned()),
    }
}
