"""What quantization and export did to a model, as plain data with JSON, HTML and terminal views."""

from torch_to_nnef.report.data import Report, Section, Totals

__all__ = ["Report", "Section", "Totals"]
