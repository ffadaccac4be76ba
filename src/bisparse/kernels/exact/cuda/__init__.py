"""The exact solver on GPUs, in Triton. `solve` registers it for the "cuda" device."""
