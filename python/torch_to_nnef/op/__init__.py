"""The op table: one handler an ATen op, from graph values to NNEF statements. One family a file; `registry` holds the rules."""
