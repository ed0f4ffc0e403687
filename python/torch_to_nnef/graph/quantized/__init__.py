"""Models converted by `torch.ao.quantization` or torchao, as float models that round where those round.

Weights become `QTensorInt8` parameters, quantized activations `quantize_per_tensor` and `dequantize_per_tensor` of `quantized_decomposed`.
"""

from __future__ import annotations

from torch import fx, nn

__all__ = ["float_reference"]


def float_reference(model: nn.Module) -> nn.Module:
    """`model` itself, or, if it is or holds a converted module, a copy that torch can export; names stay, tensors are shared.

    Raises:
        T2NErrorNotImplemented: A converted module that has no float form here: its path, its class, what to do.

    """
    if not any(isinstance(m, fx.GraphModule) or type(m).__module__.startswith("torch.ao.nn.") for m in model.modules()):
        return model
    from torch_to_nnef.graph.quantized.modules import copied  # which loads torch.ao

    return copied(model)
