"""The operators and their kernels: `ops` is the specification, `cpu` and `cuda` the fast ones."""
