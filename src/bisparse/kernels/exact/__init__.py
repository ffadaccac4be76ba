"""The exact mask solver as torch operators: typed calls (`ops`), specification (`reference`), kernels (`cpu`, `cuda`)."""

from bisparse.kernels.exact import cpu, cuda, reference

__all__ = ["cpu", "cuda", "reference"]
