"""NNEF documents: from a graph through the op table to text and files, with a linter that knows what tract computes wrongly."""
