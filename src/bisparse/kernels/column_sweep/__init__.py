"""Prunes columns at a plain N:M pattern from left to right and spreads their errors, on a CPU. The specification is the loop over
`bisparse.pruning.methods.error_feedback.ColumnSweep` in `bisparse.pruning.methods.sparsegpt`."""
