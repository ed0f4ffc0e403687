"""Models converted by `torch.ao.quantization` or torchao, as float models that round where those round.

Weights become `QTensorInt8` parameters, quantized activations `quantize_per_tensor` and `dequantize_per_tensor` of `quantized_decomposed`.
"""

from __future__ import annotations

from torch import fx, nn

from torch_to_nnef.exceptions import T2NErrorNotImplemented

__all__ = ["CONVERTED", "float_reference"]

CONVERTED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse")
"""Where torch has the classes of converted modules."""


def float_reference(model: nn.Module) -> nn.Module:
    """`model` itself, or, if it is or holds a converted module, a copy that torch can export; names stay, tensors are shared.

    Raises:
        T2NErrorNotImplemented: A converted module that has no float form here: its path, its class, what to do. A model that was
            prepared but not converted.

    """
    modules = dict(model.named_modules())
    observer = next((path for path, module in modules.items() if hasattr(module, "calculate_qparams")), None)
    if observer is not None:
        raise T2NErrorNotImplemented(
            f"`{observer}` is an observer: the model is prepared for quantization, call `convert` before it is exported"
        )
    if not any(_may_be_converted(module) for module in modules.values()):
        return model
    from torch_to_nnef.graph.quantized.modules import copied  # which loads torch.ao

    return copied(model)


def _may_be_converted(module: nn.Module) -> bool:
    if isinstance(module, fx.GraphModule):
        return any(node.op == "call_function" and "quantize" in str(node.target) for node in module.graph.nodes)
    cls = type(module)
    return cls.__module__.startswith(CONVERTED) and not cls.__name__.endswith("FloatFunctional")
