//! How many bytes of constants an optimized model holds.

use std::collections::HashSet;
use std::sync::Arc;

use tract_core::ops::konst::Const;
use tract_core::ops::matmul::optimized::{MatMulOperand, OptMatMul, ProtoFusedSpec};
use tract_core::ops::scan::OptScan;
use tract_linalg::block_quant::BlockQuantStorage;
use tract_linalg::mmm::{EagerPackedInput, MMMInputValue, PackedMatrixStorage, PanelExtractInput};
use tract_nnef::internal::{Tensor, TypedModel};

/// Sum of the buffers met so far, each counted once.
#[derive(Default)]
pub struct Weights {
    seen: HashSet<*const ()>,
    bytes: usize,
}

impl Weights {
    /// Bytes held by `model` and the bodies of its loops: constants of the graph and those packed into its products.
    pub fn of(model: &TypedModel) -> usize {
        let mut weights = Self::default();
        weights.add_model(model);
        weights.bytes
    }

    fn add_model(&mut self, model: &TypedModel) {
        for node in model.nodes() {
            if let Some(constant) = node.op_as::<Const>() {
                self.add_tensor(constant.val());
            } else if let Some(product) = node.op_as::<OptMatMul>() {
                for spec in &product.micro_ops {
                    let ProtoFusedSpec::AddMatMul { a, b, .. } = spec else { continue };
                    for operand in [a, b] {
                        if let MatMulOperand::Const(packed) = operand {
                            self.add_packed(&**packed);
                        }
                    }
                }
            } else if let Some(scan) = node.op_as::<OptScan>() {
                self.add_model(scan.plan.model());
            }
        }
    }

    fn add_tensor(&mut self, tensor: &Arc<Tensor>) {
        let at = Arc::as_ptr(tensor).cast();
        if let Some(packed) = tensor.storage_as::<PackedMatrixStorage>() {
            packed.values().iter().for_each(|value| self.add_packed(&**value));
        } else if let Some(blocks) = tensor.storage_as::<BlockQuantStorage>() {
            self.add(at, blocks.value().len());
        } else if tensor.is_plain_ram() {
            self.add(at, tensor.as_bytes().len());
        }
    }

    fn add_packed(&mut self, value: &dyn MMMInputValue) {
        let extracted = || value.downcast_ref::<PanelExtractInput>().map(|extract| &extract.data);
        if let Some(eager) = value.downcast_ref::<EagerPackedInput>().or_else(extracted) {
            self.add(Arc::as_ptr(&eager.packed).cast(), eager.packed.len());
        }
    }

    fn add(&mut self, at: *const (), bytes: usize) {
        if self.seen.insert(at) {
            self.bytes += bytes;
        }
    }
}
