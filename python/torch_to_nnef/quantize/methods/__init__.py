"""Quantization methods, one a file: each changes a model in place and returns it."""
