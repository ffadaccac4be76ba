"""One-shot pruning methods: one file per method."""
