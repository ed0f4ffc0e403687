"""Quantization: what may be quantized, how, and what it cost."""
