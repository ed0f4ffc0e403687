"""TorchScript as eager modules: torch.export takes no ScriptModule, so its graphs are interpreted while torch traces."""

from torch_to_nnef.graph.torchscript.interpreter import interpreted_functions
from torch_to_nnef.graph.torchscript.modules import eager

__all__ = ["eager", "interpreted_functions"]
