"""Alias of `torch_to_nnef.tensor.quant.qtract`."""

from torch_to_nnef.tensor.quant.qtract import *  # noqa: F403
from torch_to_nnef.tensor.quant.qtract import __all__ as __all__
