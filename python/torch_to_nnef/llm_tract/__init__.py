"""Causal language models of Hugging Face transformers: checkpoint to archive, and the archive in use."""
