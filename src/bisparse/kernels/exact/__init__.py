"""The exact mask solver as torch operators: typed calls, the plain-torch specification, and kernels for CPU and CUDA."""
