"""Archives of unknown origin: tract runs in a child process with limits, and whatever happens there is a typed error here."""

from torch_to_nnef.isolated.arrays import load_arrays, save_arrays
from torch_to_nnef.isolated.calls import inspect, run, verify
from torch_to_nnef.isolated.process import Limits

__all__ = ["Limits", "inspect", "load_arrays", "run", "save_arrays", "verify"]
